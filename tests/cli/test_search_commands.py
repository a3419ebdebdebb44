"""``diffract search`` and ``diffract connect``, as they are typed."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from diffract import search
from diffract.cli.main import app
from search_cases import BASE, MATH, NATURAL

run = CliRunner()
DOCS = Path(__file__).parents[2] / "docs"
QUICK = ["--eval", "math", "--limit", "2"]
GROUP: Any = typer.main.get_command(app)
COMMANDS = {
    "search rewind": (GROUP.commands["search"].commands["rewind"], search.search_rewind),
    "search truncate": (GROUP.commands["search"].commands["truncate"], search.search_truncate),
    "search directions": (GROUP.commands["search"].commands["directions"], search.search_directions),
    "search svf": (GROUP.commands["search"].commands["svf"], search.search_svf),
    "connect": (GROUP.commands["connect"], search.connect),
}
ONLY_TYPED = {"quiet", "json", "debug"}


@pytest.mark.parametrize("name", COMMANDS)
def test_python_has_the_same_names_and_defaults(name: str) -> None:
    command, function = COMMANDS[name]
    python = inspect.signature(function).parameters
    typed = {p.name.rstrip("_"): p for p in command.params if p.name not in ONLY_TYPED}
    assert set(typed) == set(python) - {"progress"}
    for key, parameter in typed.items():
        if python[key].default is not inspect.Parameter.empty:
            told = parameter.default
            assert (tuple(told) if isinstance(told, list) else told) == python[key].default, key
        assert parameter.required == (key == "models" or python[key].default is inspect.Parameter.empty)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(name: str) -> None:
    page = (DOCS / "commands.md").read_text()
    own = page[page.index(f"## diffract {name}\n") :]
    own = own[: own.find("\n##", 5)]
    for parameter in COMMANDS[name][0].params:
        for option in parameter.opts:
            if option.startswith("--"):
                assert f"`{option}" in own, option


def test_rewind_says_what_it_chose(tmp_path: Path) -> None:
    arguments = ["search", "rewind", BASE, MATH, "--order", "greedy,random", "--seeds", "1", "--fractions", "0,0.5,1"]
    done = run.invoke(app, [*arguments, *QUICK, "-o", str(tmp_path / "run"), "--write", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "math: gain in bits per byte, positive is better; chosen on selection, reported on held-out" in done.stdout
    assert "greedy reversed" in done.stdout
    assert "as the live model" in done.stdout
    assert f"run: {tmp_path / 'run'}" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()
    again = run.invoke(app, [*arguments, *QUICK, "-o", str(tmp_path / "run")])
    assert again.exit_code == 1
    assert "--force" in again.stderr
    quiet = run.invoke(app, [*arguments, *QUICK, "-o", str(tmp_path / "run"), "--force", "--json"])
    found = json.loads(quiet.stdout)
    assert found["kind"] == "search rewind"
    assert len(found["effects"]) == 32
    heads = (tmp_path / "run" / "effects.parquet").as_posix()
    edit = [
        "rewind",
        MATH,
        "--to",
        BASE,
        "--order",
        "greedy",
        "--scores",
        heads,
        "--fraction",
        "0.25",
        "--dry-run",
        "-q",
    ]
    assert run.invoke(app, edit).exit_code == 0
    figure = run.invoke(app, ["plot", "rewind", str(tmp_path / "run"), "-o", str(tmp_path / "a.html")])
    assert figure.exit_code == 0, figure.output


def test_truncate_and_connect_say_what_they_found(tmp_path: Path) -> None:
    arguments = ["search", "truncate", BASE, MATH, "--rules", "drop,tail", "--fractions", "0,0.5,1", *QUICK]
    done = run.invoke(app, [*arguments, "-o", str(tmp_path / "truncated")])
    assert done.exit_code == 0, done.output
    assert "points are the share of the change's bytes that is kept" in done.stdout
    arguments = ["connect", BASE, f"math={MATH}", f"text={NATURAL}", "--steps", "3", *QUICK]
    done = run.invoke(app, [*arguments, "-o", str(tmp_path / "connected")])
    assert done.exit_code == 0, done.output
    assert "math - text" in done.stdout
    assert "connected below 0.01" in done.stdout
    report = run.invoke(app, ["report", str(tmp_path / "connected")])
    assert report.exit_code == 1
    assert "a run of `diffract connect` has no report" in report.stderr


def test_costs_are_said_beforehand(tmp_path: Path) -> None:
    arguments = ["search", "rewind", BASE, MATH, "--order", "magnitude", "--dry-run", *QUICK]
    done = run.invoke(app, [*arguments, "--budget", "15"])
    assert done.exit_code == 0, done.output
    assert "selection" in done.stdout
    assert "left out" in done.stdout
    found = json.loads(run.invoke(app, [*arguments, "--json"]).stdout)
    assert found["evaluations"] == {"selection": 3 + 14, "held-out": 3 + 14 + 4}
    nowhere = run.invoke(app, ["search", "rewind", BASE, MATH, *QUICK])
    assert nowhere.exit_code == 1
    assert "Pass -o RUN, or --dry-run" in nowhere.stderr


def test_errors_are_messages() -> None:
    for arguments, message in (
        (["search", "rewind", BASE, MATH, "--order", "magnitud"], "Did you mean 'magnitude'"),
        (["search", "rewind", BASE, MATH, "--budget", "much"], "budget: expected evaluations such as 200"),
        (["search", "rewind", BASE, MATH, "--choose-by", "worst"], "unknown choice 'worst', expected one of: best,"),
        (["search", "truncate", BASE, MATH, "--rules", "dar"], "unknown rule 'dar'"),
        (["connect", BASE, f"math={MATH}", "--eval", "math"], "expected two or more tuned models, got 1"),
        (["connect", BASE, MATH, NATURAL, "--eval", "math"], "expected NAME=MODEL"),
    ):
        done = run.invoke(app, [*arguments, "--dry-run"])
        assert done.exit_code == 1, done.output
        assert message in done.stderr
        assert "Traceback" not in done.output


def test_looking_at_a_search_needs_no_torch() -> None:
    code = (
        "import sys, diffract.search, diffract.search.plan, diffract.cli.main; "
        "print({'torch', 'transformers', 'plotly'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"
