"""Whole evaluations: tables, run folders, one against another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffract.api import evaluate
from diffract.errors import RunError
from diffract.evaluate import Evaluator, compare_scores, load_subject, load_tasks, summarise
from diffract.evaluate.model import model_digest
from diffract.run import Run, load_run
from tiny_language_model import write_language_model


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setenv("DIFFRACT_CACHE_DIR", str(tmp_path / "cache"))
    return [write_language_model(tmp_path / f"model{seed}", seed) for seed in range(2)]


def run(model: Path, **options) -> Run:
    return evaluate(model, "math,gsm:1", limit=6, device="cpu", **options)


def test_an_evaluation_is_what_evaluator_and_statistics_say(models: list[Path]) -> None:
    found = run(models[0])
    subject, tasks = load_subject(models[0], device="cpu"), load_tasks("math,gsm:1", limit=6)
    assert found.items.equals(Evaluator(subject, tasks).scores())
    assert found.summary.equals(summarise(found.items, tasks))
    manifest = found.manifest
    assert manifest["models"][0]["digest"] == model_digest(subject.model)
    assert manifest["models"][0]["dtype"] == "float32"
    assert manifest["settings"] == {"split": "held-out", "limit": 6, "shots": 0, "data": None}
    assert [t["key"] for t in manifest["tasks"]] == [t.key for t in tasks]
    # of 64 tokens none is left after a question of bytes
    assert manifest["warnings"] == ["gsm:1: 6 prompts leave no room in the model's context; they count as wrong"]


def test_a_run_folder_is_read_as_it_was_written(models: list[Path], tmp_path: Path) -> None:
    found = run(models[0], output=tmp_path / "run")
    again = load_run(tmp_path / "run")
    assert again.items.equals(found.items)
    assert again.summary.equals(found.summary)
    assert json.loads(json.dumps(found.manifest)) == {k: v for k, v in again.manifest.items() if k != "format"}
    assert again.manifest["tasks"] == json.loads(json.dumps([t.settings() for t in load_tasks("math,gsm:1", limit=6)]))
    with pytest.raises(RunError, match="exists"):
        run(models[0], output=tmp_path / "run")
    run(models[1], output=tmp_path / "run", force=True)
    assert not load_run(tmp_path / "run").items.equals(found.items)


def test_one_against_another(models: list[Path]) -> None:
    a, b = run(models[0]), run(models[1])
    table = compare_scores(a.tables, b.tables)
    assert table["task"].to_list() == ["math", "gsm:1"]
    qualities = [dict(e.summary.select("task", "quality").iter_rows()) for e in (a, b)]
    assert table["difference"][0] == pytest.approx(qualities[1]["math"] - qualities[0]["math"], abs=1e-12)
    assert table["p_holm"].to_list() == [min(1.0, 2 * table["p"][0]), 1.0]
    assert compare_scores(a.tables, a.tables)["p"].to_list() == [1.0, 1.0]
    with pytest.raises(RunError, match="math, gsm:1: not the same items in both"):
        compare_scores(evaluate(models[1], "math,gsm:1", limit=5, device="cpu").tables, a.tables)


def test_a_model_in_memory(models: list[Path]) -> None:
    subject = load_subject(models[0], device="cpu")
    found = evaluate(subject.model, "math", tokenizer=subject.tokenizer, limit=6)
    assert found.items.equals(run(models[0]).items.filter(task="math"))
    assert torch.is_grad_enabled()
