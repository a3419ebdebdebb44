"""``diffract trajectory``, as it is typed."""

from __future__ import annotations

import inspect
import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

import diffract
from diffract.cli import console
from diffract.cli.main import app

run = CliRunner()


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """Three files in one folder; the matrix grows by its first value each time."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for k, step in enumerate((2000, 4000, 10000), start=1):
        save_file({"a": k * torch.eye(4), "b": k * torch.ones(3, 5)}, folder / f"step_{step:05d}.safetensors")
    return folder


def test_the_table_is_the_run(series: Path, tmp_path: Path) -> None:
    done = run.invoke(app, ["trajectory", str(series), "-o", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[:4] == [
        ["checkpoint", "step", "change", "in", "values", "stable", "rank"],
        ["step_02000", "2,000", "-", "-", "2.50"],
        ["step_04000", "4,000", "1.00", "100.0%", "2.50"],
        ["step_10000", "10,000", "0.500", "100.0%", "2.50"],
    ]
    assert "relative to the previous checkpoint" in done.stdout
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    assert "warning: all checkpoints: Generic mode" in done.stderr
    assert diffract.load_run(tmp_path / "run").models["delta_relative"].to_list() == [None, 1.0, 0.5]
    redrawn = run.invoke(app, ["report", str(tmp_path / "run"), "-o", str(tmp_path / "x.html")])
    assert redrawn.exit_code == 0
    assert (tmp_path / "x.html").read_text() == (tmp_path / "run" / "report.html").read_text()


def test_json_equals_the_api(series: Path) -> None:
    done = run.invoke(app, ["trajectory", str(series), "--json", "--against", "first", "--metrics", "delta_frobenius"])
    assert (done.exit_code, done.stderr) == (0, "")
    summary = json.loads(done.stdout)
    expected = diffract.trajectory(series, against="first", metrics=["delta_frobenius"])
    assert summary["models"] == expected.models.to_dicts()
    assert (summary["kind"], summary["settings"]["against"]) == ("trajectory", "first")


def test_names_and_defaults_are_those_of_the_api() -> None:
    typed = typer.main.get_command(app).commands["trajectory"].params
    command = {p.name: tuple(p.default) if isinstance(p.default, list) else p.default for p in typed}
    function = {n: p.default for n, p in inspect.signature(diffract.trajectory).parameters.items()}
    only_there = {"quiet", "json", "debug", "help"}
    assert set(command) - only_there == set(function) - {"progress"}
    given = {n: d for n, d in function.items() if n in command and d is not inspect.Parameter.empty}
    assert {n: command[n] for n in given} == given


def test_several_are_put_in_order(series: Path) -> None:
    files = sorted(map(str, series.iterdir()))
    done = run.invoke(app, ["trajectory", files[2], f"start={files[0]}", files[1], "--by", r"_(?P<step>\d+)"])
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.stdout.splitlines()[1:4]] == ["start", "step_04000", "step_10000"]


def test_quiet_prints_nothing(series: Path) -> None:
    assert run.invoke(app, ["trajectory", str(series), "-q"]).output == ""


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["{one}"], 1, "needs at least two checkpoints, got 1"),
        (
            ["org/m@step1", "org/m@main"],
            1,
            "1 of 2 checkpoints tell no step, first 'org/m@main' (looked at 'main', 'm')",
        ),
        (["{one}", "{one}"], 1, "are at one place (step 2,000)"),
        (["{series}", "--by", "tokens"], 1, "Every one tells step: pass --by step"),
        (["{series}", "--by", "steps"], 1, "Did you mean 'step'"),
        (["{series}", "--against", "last"], 1, "unknown against 'last'"),
        (["{empty}"], 1, "expected subfolders with weights such as checkpoint-500, or files such as step_02000"),
        (["{one}", "step3=/nowhere/at-all"], 1, "no checkpoint at '/nowhere/at-all'"),
        (["{series}", "-o", "{series}"], 1, "exists"),
        ([], 2, ""),
    ],
)
def test_wrong_input_gets_one_clear_error(
    series: Path, tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"one": series / "step_02000.safetensors", "series": series, "empty": tmp_path / "empty"}
    done = run.invoke(app, ["trajectory", *(a.format(**places) for a in arguments)])
    assert done.exit_code == code
    assert text in " ".join(done.stderr.split())
    assert "Traceback" not in done.output


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = tmp_path / f"\x1b[31m[bold]step{step}"
        folder.mkdir()
        save_file({"w": step * torch.eye(3)}, folder / "model.safetensors")
    done = run.invoke(app, ["trajectory", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    assert "[31m[bold]step1" in done.stdout


def test_progress_tells_checkpoint_and_time_left(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count(0, 100)  # so far apart that every line is told; the clock of this module alone
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    done = run.invoke(app, ["trajectory", str(series), "--no-cache"])
    assert done.exit_code == 0, done.output
    told = [line for line in done.stderr.splitlines() if line.startswith("trajectory: ")]
    assert any("s left (step_04000: a)" in line for line in told)
