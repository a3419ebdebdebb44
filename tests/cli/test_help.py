"""Every help page as it stands in ``help.txt``; ``python tests/cli/test_help.py`` writes that file anew.

The pages are laid out here and not by Typer, whose boxes and colours change from version to version: what is kept is
what diffract says, that is names, metavars, defaults, limits and texts.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from diffract.cli.main import app, listed

PAGES = Path(__file__).with_name("help.txt")
WIDTH, INDENT = 100, 30


def commands(group: Any, path: str = "diffract") -> Iterator[tuple[str, Any]]:
    """Yield every command with its full name, groups before what they hold."""
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{path} {name}")


def page(path: str, command: Any) -> str:
    arguments = [p.metavar for p in command.params if p.param_type_name == "argument"]
    blocks = [" ".join([path, *arguments]), (command.help or "").strip()]
    blocks += ["\n".join(entry(parameter) for parameter in command.params)]
    if hasattr(command, "commands"):
        blocks.append("\n".join(f"  {name:<{INDENT - 2}}{line(path, name)}".rstrip() for name in command.commands))
    blocks.append(command.epilog or "")
    return "\n\n".join(block for block in blocks if block)


def line(path: str, name: str) -> str:
    """What the list of all commands shows of one."""
    if path != "diffract":
        return ""
    command = listed(name)
    return f"{command.rich_help_panel}: {command.help}".replace("\n\n", "\n").partition("\n")[0]


def entry(parameter: Any) -> str:
    flag = getattr(parameter, "is_flag", False)
    names = (
        [parameter.metavar] if parameter.param_type_name == "argument" else parameter.opts + parameter.secondary_opts
    )
    shown = ", ".join(names) + ("" if flag or parameter.metavar in names else f" {parameter.metavar}")
    least = getattr(parameter, "min", None)
    facts = [f"at least {least}" if least is not None else "", "required" if parameter.required else ""]
    plain = isinstance(parameter.default, str | int | float | Path) and parameter.default is not False
    facts += [f"default {parameter.default}" if plain and not parameter.required else ""]
    facts += ["several" if getattr(parameter, "multiple", False) else ""]
    known = "; ".join(filter(None, facts))
    text = f"{parameter.help}{f' [{known}]' if known else ''}"
    wrapped = textwrap.fill(text, WIDTH, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT)
    return f"  {shown}".ljust(INDENT) + wrapped[INDENT:] if len(shown) < INDENT - 3 else f"  {shown}\n{wrapped}"


def pages() -> str:
    return "\n\n\n".join(page(*found) for found in commands(typer.main.get_command(app))) + "\n"


def test_every_page_is_as_it_was() -> None:
    assert pages() == PAGES.read_text(encoding="utf-8")


def test_texts_are_not_read_as_markup() -> None:
    for _, command in commands(typer.main.get_command(app)):
        for text in (command.help or "", *(parameter.help or "" for parameter in command.params)):
            assert "[" not in text
            assert "``" not in text


if __name__ == "__main__":
    PAGES.write_text(pages(), encoding="utf-8")
