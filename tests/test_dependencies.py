"""What the package imports is what it says that it needs, and each dependency has its reason."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

UNASKED = {"httpx", "compression", "datasets"}
"""What huggingface_hub, Python 3.14 and lm-eval have, and is not there without them."""


def plain(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-")


DECLARED = {plain(text) for text in PROJECT["dependencies"]}
EXTRAS = {
    plain(text)
    for name in ("images", "lm-eval", "pandas", "ray", "train")
    for text in PROJECT["optional-dependencies"][name]
}


def imported() -> set[str]:
    """Top names of all that is imported anywhere in the package."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"diffract"} - UNASKED


def test_what_is_imported_is_declared() -> None:
    of = packages_distributions()
    named = {name: {plain(package) for package in of.get(name, [name])} for name in imported()}
    assert {name for name, packages in named.items() if not packages & (DECLARED | EXTRAS)} == set()


def test_each_dependency_has_its_reason() -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text()
    listed = {plain(name) for row in re.findall(r"^\| ([^|]+) \|", page, re.M) for name in row.split(", ")}
    assert not DECLARED - listed
