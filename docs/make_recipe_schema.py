"""Write docs/recipe.schema.json, and the tables of settings in docs/commands.md, from the settings themselves."""

from __future__ import annotations

import re
from pathlib import Path

from diffract.edits import recipe_schema
from diffract.edits.edit import Edit
from diffract.edits.recipe import EDITS

DOCS = Path(__file__).parent
BEGIN, END = "<!-- settings: made by make docs -->", "<!-- end of settings -->"


def section(kind: type[Edit]) -> str:
    """Return the section of one command."""
    name = kind.name
    fields = {n: f for n, f in kind.model_fields.items() if n not in kind.not_options}
    rows = [f"| `--{n.replace('_', '-')}` | {f.description}{_default(f)} |" for n, f in fields.items()]
    table = "\n".join(["| option | meaning |", "|---|---|", *rows])
    return f"### diffract {name}\n\n    {kind.usage}\n\n{kind.__doc__} [More](edits/{name}.md)\n\n{table}\n"


def _default(field: object) -> str:
    value = getattr(field, "default", None)
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return f" Default: `{value}`." if plain else ""


def sections() -> str:
    """Return all sections."""
    return "\n".join(map(section, EDITS))


def commands(text: str) -> str:
    """Return docs/commands.md with the sections of today."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n\n{sections()}\n{END}", text)


def main() -> None:
    """Write both files."""
    (DOCS / "recipe.schema.json").write_text(recipe_schema(), encoding="utf-8")
    page = DOCS / "commands.md"
    page.write_text(commands(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
