"""Commands that follow from functions."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from diffract.cli.commands import COMMANDS
from diffract.cli.generate import Command, function_of, read_signature
from diffract.errors import RunError

REFERENCES = sorted({reference for command in COMMANDS for reference in command.functions})


@pytest.mark.parametrize("reference", REFERENCES)
def test_the_source_says_what_the_function_does(reference: str) -> None:
    module, name = reference.split(":")
    parameters = inspect.signature(getattr(import_module(module), name)).parameters.values()
    named = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in ("progress", "say")}
    found = {p.name: p.default for p in read_signature(reference).parameters}
    assert found == named
    assert all(p.help for p in read_signature(reference).parameters)


def command_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, **row: Any) -> tuple[Any, list[Any]]:
    """Make a command of a function that is written into a module of the package."""
    import diffract

    name = f"made_for_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(f"from __future__ import annotations\nLIMIT = 7\nCALLS = []\n{source}")
    monkeypatch.setattr(diffract, "__path__", [*diffract.__path__, str(tmp_path)])
    monkeypatch.setattr(diffract, "__file__", str(tmp_path / "__init__.py"))
    shown: list[Any] = []
    row = {"show": lambda found, given: shown.append(found), **row}
    command = Command("do", "See", (f"diffract.{name}:do",), **row)
    app = typer.Typer()
    app.command()(function_of(command))
    return typer.main.get_command(app), shown


SOURCE = '''
def do(first: str, *rest: Reference, names: Sequence[str] = ("a", "b"), limit: int | None = LIMIT,
       deep: bool = False, cache: bool = True, where: str | Path | None = None, output: str | Path | None = None,
       progress: Progress | None = None):
    """Do ``it``.

    Args:
        first: A file. In Python also a mapping.
        rest: Any number, such as ``"x y"``.
        names: Which of
            them.
    """
    return first, rest, names, limit, deep, cache, where, output
'''


def test_a_command_takes_what_the_function_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command, shown = command_of(monkeypatch, tmp_path, SOURCE)
    assert command.help == "Do it."
    texts = {p.name: p.help for p in command.params}
    assert (texts["first"], texts["rest"], texts["names"]) == (
        "A file.",
        "Any number, such as 'x y'.",
        "Which of them.",
    )
    options = {p.name: p.opts + p.secondary_opts for p in command.params if p.param_type_name == "option"}
    assert next(iter(options)) == "output"
    assert options["output"] == ["--output", "-o"]
    assert options["cache"] == ["--cache", "--no-cache"]
    assert options["deep"] == ["--deep"]
    assert "json" not in options  # nothing says what it would print
    command(["a", "b", "c", "--names", "x, y", "--no-cache", "--where", "w", "--quiet"], standalone_mode=False)
    assert shown == []
    command(["a", "b", "c", "--names", "x, y", "--no-cache", "--where", "w"], standalone_mode=False)
    assert shown == [("a", ("b", "c"), ["x", "y"], 7, False, False, Path("w"), None)]


def test_a_place_is_asked_for_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = (
        'def do(*, output: str | Path | None = None, dry_run: bool = False):\n    """Do it."""\n    raise KeyError\n'
    )
    command, _ = command_of(monkeypatch, tmp_path, source)
    with pytest.raises(RunError, match=r"where to\? Pass -o RUN, or --dry-run"):
        command(["--debug"], standalone_mode=False)


@pytest.mark.parametrize(
    ("arguments", "not_loaded"),
    [
        (["--help"], ["torch", "polars", "plotly", "diffract.search", "diffract.train", "diffract.api"]),
        (["scan", "--help"], ["torch", "diffract.api", "diffract.edits"]),
        (["search", "rewind", "--help"], ["torch", "diffract.search"]),
        (["plot", "--help"], ["torch", "plotly", "diffract.plots"]),
        (["study", "run", "--help"], ["torch", "polars", "diffract.studies"]),
        (["rewind", "--help"], ["torch", "polars"]),
    ],
)
def test_help_loads_only_what_it_shows(arguments: list[str], not_loaded: list[str]) -> None:
    code = "import sys; from diffract.cli.main import app; app(sys.argv[2:], standalone_mode=False); "
    check = (
        f"{code}assert not set(sys.argv[1].split()) & sys.modules.keys(), set(sys.argv[1].split()) & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", check, " ".join(not_loaded), *arguments], check=True, capture_output=True)
