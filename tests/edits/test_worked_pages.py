"""Every command and every Python block on the pages about edits runs, page by page, in the order in which it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from diffract.cli.main import app
from diffract.edits import Recipe

ROOT = Path(__file__).parents[2]
SEARCHES = ROOT / "docs" / "better-checkpoint.md"
PAGES = sorted([*(ROOT / "docs" / "edits").glob("*.md"), ROOT / "docs" / "recipes.md"])

NOT_RUN = ("diffract lora pissa/adapter",)
"""Needs an adapter that was trained: of an untrained one nothing differs from the base."""

BLOCK = re.compile(r"^```(python|yaml)\n(.*?)^```|^    (diffract [^\n]*)$", re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_works(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {}
    for language, body, command in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(body, str(page), "exec"), known)
        elif language == "yaml":
            recipe = yaml.safe_load(body)
            Recipe.model_validate(recipe)
            Path("edit.yaml").write_text(body)
        elif not command.startswith(NOT_RUN):
            found = CliRunner().invoke(app, shlex.split(command)[1:])
            assert found.exit_code == 0, f"{command}\n{found.output}"
            _assert_said(page, command, found.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it takes two to seven minutes on one core
def test_the_way_to_a_better_checkpoint_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    monkeypatch.chdir(tmp_path)
    page = SEARCHES.read_text(encoding="utf-8")
    commands = re.findall(r"^    (diffract [^\n]*)\n((?:(?:    (?!diffract )[^\n]*)?\n)*)", page, re.MULTILINE)
    assert len(commands) == len(re.findall("^    diffract ", page, re.MULTILINE)) > 8
    for command, shown in commands:
        found = CliRunner().invoke(app, shlex.split(command)[1:])
        assert found.exit_code == 0, f"{command}\n{found.output}"
        assert set(map(_words, shown.splitlines())) <= {"", *map(_words, found.stdout.splitlines())}, found.stdout


def _words(line: str) -> str:
    """A line without what differs between machines: times, the last digits of qualities, and what is chosen by them."""
    return " ".join(re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?|\b(better|worse)\b", " ", line).split())


def _assert_said(page: Path, command: str, said: str) -> None:
    """What a page shows below a command is what the command says; decimals may differ."""
    shown = re.search(rf"^    {re.escape(command)}\n\n((?:    (?!diffract).*\n)+)", page.read_text(), re.MULTILINE)
    plain = lambda text: re.sub(r"\s+", " ", re.sub(r"\d+\.\d+", "#", text)).strip()  # noqa: E731
    if shown and "$" not in shown[1]:
        assert plain(shown[1]) in plain(said), said


def test_the_pages_are_found() -> None:
    commands = {line.split()[1] for page in PAGES for _, _, line in BLOCK.findall(page.read_text()) if line}
    edits = {"rewind", "truncate", "interpolate", "merge", "laser", "scale", "svf", "lora", "pissa", "delta"}
    edits |= {"apply", "verify"}
    assert edits <= commands
    assert edits <= {page.stem for page in PAGES}
