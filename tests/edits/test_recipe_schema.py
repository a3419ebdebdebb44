"""The published schema and the tables of settings are those of today."""

from __future__ import annotations

import runpy
from pathlib import Path

from diffract.edits import recipe_schema

DOCS = Path(__file__).parents[2] / "docs"


def test_the_schema_is_up_to_date() -> None:
    assert (DOCS / "recipe.schema.json").read_text(encoding="utf-8") == recipe_schema(), "run make docs"


def test_the_tables_of_settings_are_up_to_date() -> None:
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(DOCS / "make_recipe_schema.py"))["commands"](page) == page, "run make docs"
