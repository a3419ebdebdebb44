"""``diffract eval`` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffract import load_run
from diffract.api import evaluate
from diffract.cli.main import app
from diffract.evaluate import compare_scores
from tiny_language_model import write_language_model

run = CliRunner()
COMMON = ["--tasks", "math,gsm:1", "--limit", "6", "--device", "cpu"]


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    return [str(write_language_model(tmp_path / f"model{seed}", seed)) for seed in range(2)]


def test_eval_says_what_it_found_and_writes_it(models: list[str], tmp_path: Path) -> None:
    done = run.invoke(app, ["eval", models[0], *COMMON, "-o", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    row = load_run(tmp_path / "run").summary.row(0, named=True)
    assert f"math {row['quality']:.4g} {row['low']:.4g} to {row['high']:.4g} 6 bits per byte lower" in [
        " ".join(line.split()) for line in done.stdout.splitlines()
    ]
    assert f"run: {tmp_path / 'run'}" in done.stdout
    assert "warning: gsm:1: 6 prompts leave no room" in done.stderr


def test_eval_against_a_model_and_against_its_run(models: list[str], tmp_path: Path) -> None:
    run.invoke(app, ["eval", models[0], *COMMON, "-o", str(tmp_path / "run"), "--quiet"])
    found = [
        json.loads(run.invoke(app, ["eval", models[1], *COMMON, "--against", other, "--json"]).stdout)
        for other in (models[0], str(tmp_path / "run"))
    ]
    a, b = (evaluate(m, "math,gsm:1", limit=6, device="cpu") for m in models)
    for summary in found:
        assert summary["differences"] == compare_scores(a.tables, b.tables).to_dicts()
        assert summary["summary"] == b.summary.to_dicts()
        assert summary["against"]["models"] == a.manifest["models"]
        assert summary["run"] is None
    shown = run.invoke(app, ["eval", models[1], *COMMON, "--against", models[0]])
    assert f"Against {models[0]}, item by item:" in shown.stdout
    row = compare_scores(a.tables, b.tables).row(0, named=True)
    assert f"{row['difference']:+.3g}" in shown.stdout
    assert ("better" if row["gain"] > 0 else "worse") in shown.stdout


def test_quiet_and_json_say_nothing_else(models: list[str]) -> None:
    assert run.invoke(app, ["eval", models[0], *COMMON, "--quiet"]).output == ""
    done = run.invoke(app, ["eval", models[0], *COMMON, "--json"])
    assert done.stderr == ""
    assert json.loads(done.stdout)["kind"] == "eval"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["/nowhere/at/all", "--tasks", "gsm:1"], "no checkpoint at"),
        (["{0}", "--tasks", "gsn"], "Did you mean 'gsm'"),
        (["{0}", "--tasks", "gsm:1", "--split", "test"], "unknown split 'test'"),
        (["{0}"], "task text needs text: pass --data FOLDER"),
        (["{0}", *COMMON, "-o", "{0}"], "exists"),
        (["{0}", *COMMON, "--dtype", "int8"], "unknown dtype 'int8'"),
    ],
)
def test_wrong_input_gets_one_clear_error(models: list[str], arguments: list[str], text: str) -> None:
    done = run.invoke(app, ["eval", *(a.format(*models) for a in arguments)])
    assert done.exit_code == 1
    assert text in done.stderr
    assert "Traceback" not in done.output
