"""Factors that are learned on text: what the objective is, what is chosen, and that files hold what was scored."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

import diffract
from diffract.edits import LiveModel, Scale
from diffract.errors import CheckpointError, SelectionError
from diffract.evaluate import Evaluator, load_subject, load_tasks
from diffract.run import Run
from diffract.schemas import KINDS
from diffract.search import search_directions, search_svf, verify
from diffract.search.certificate import words
from diffract.tables import load
from search_cases import BASE, MATH

TARGET, KEPT = "target.jsonl", "kept.jsonl"

FAST: dict[str, Any] = {
    "eval": f"target={TARGET}",
    "keep": f"kept={KEPT}",
    "passes": 1,
    "batch_tokens": 512,
    "tokens": 600,
    "rates": "0.001",
    "limit": 24,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two made-up languages, of 640 documents each: 32 to learn on and choose by, 32 to report."""
    folder = tmp_path_factory.mktemp("texts")
    for name, sentence in (
        (TARGET, "Tom has apples and buys more pens"),
        (KEPT, "the old river ran below its grey hills"),
    ):
        every = sentence.split()
        texts = (" ".join(every[(i * k) % len(every)] for k in range(1, 9)) + f" {i}." for i in range(640))
        pl.DataFrame({"text": list(texts)}).write_ndjson(folder / name)
    return folder


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("search")
    found = search_directions(
        BASE, MATH, **FAST, data=data, polish=1, output=folder / "run", write=folder / "out", beside="math"
    )
    assert isinstance(found, Run)
    return found, folder


def test_the_run_folder_is_whole(finished: tuple[Run, Path]) -> None:
    found, folder = finished
    again = load(folder / "run")
    for name in KINDS["search directions"]:
        assert_frame_equal(again[name], found[name])
    recipes = ["directions", "directions then polish", "interpolation", "random", "fine-tuning"]
    assert found.choice["recipe"].unique(maintain_order=True).to_list() == recipes
    assert found.choice.filter(recipe="directions")["role"].to_list() == ["beside", "target", "kept"]


def test_there_is_a_factor_for_each_direction_and_one_for_each_vector_and_table(finished: tuple[Run, Path]) -> None:
    factors = finished[0].factors
    with diffract.open(MATH) as checkpoint:
        vectors = sum(len(checkpoint.info(name).shape) == 1 for name in checkpoint)
    # Four layers of q, o (128), k, v (32) and gate, up, down (128).
    assert factors["direction"].count() == 4 * (2 * 128 + 2 * 32 + 3 * 128)
    assert factors.filter(pl.col("direction").is_null()).height == vectors + 1
    assert finished[0].manifest["settings"]["factors"] == factors.height


def test_the_table_of_the_run_makes_the_model_that_was_scored(finished: tuple[Run, Path], data: Path) -> None:
    found, folder = finished
    subject, base = load_subject(MATH), load_subject(BASE, device="cpu").model
    judge = Evaluator(subject, load_tasks([f"target={TARGET}", f"kept={KEPT}"], data=data, limit=24))
    with LiveModel(subject.model).edited(Scale(base=base, factors=str(folder / "run" / "factors.parquet"))):
        items = judge.scores()
    for task in ("target", "kept"):
        own = items.filter(task=task)
        quality = float(own["value"].to_numpy().sum() / own["weight"].to_numpy().sum())
        rows = found.choice.filter(recipe="directions", task=task)
        # Sums of float32 logits in another order of batches.
        assert rows["held_out_quality"].item() == pytest.approx(quality, rel=1e-6)


def test_the_search_leaves_the_model_as_it_was(data: Path) -> None:
    subject = load_subject(MATH)
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    search_directions(BASE, subject.model, tokenizer=subject.tokenizer, controls="none", **FAST, data=data)
    for name, tensor in subject.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(parameter.grad is not None for parameter in subject.model.parameters())


def test_a_bare_claim_is_called_one(data: Path) -> None:
    found = search_directions(
        BASE, MATH, controls="none", per="matrix", vectors=False, embeddings=False, **FAST, data=data
    )
    assert isinstance(found, Run)
    assert found.factors["name"].to_list() == [n for n in found.factors["name"].to_list() if n.startswith("L")]
    assert found.factors.height == 4 * 7
    assert any("bare claim" in text for text in found.manifest["warnings"])


def test_svf_has_factors_of_the_weights_themselves(data: Path, tmp_path: Path) -> None:
    found = search_svf(BASE, MATH, controls="none", **FAST, data=data, output=tmp_path / "run", write=tmp_path / "out")
    assert isinstance(found, Run)
    assert found.factors.height == 4 * (2 * 128 + 2 * 32 + 3 * 128)
    assert found.manifest["written"]["held_out"]
    assert (tmp_path / "out" / "factors.parquet").is_file()
    assert found.manifest["written"]["certificate"] is None
    assert "no certificate: target has 24 held-out documents, 30 are needed" in found.manifest["warnings"]


@pytest.fixture(scope="module")
def certified(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("certified") / "out"
    asked = {**FAST, "limit": 32, "controls": "random", "data": data, "write": out}
    found = search_directions(BASE, MATH, beside="sentinel=word-problems:1", **asked)
    assert isinstance(found, Run)
    assert found.manifest["written"]["certificate"] == str(out / "certificate.json")
    return out


def test_a_certificate_says_what_is_shown_and_beside_what(certified: Path) -> None:
    stated = json.loads((certified / "certificate.json").read_text())
    claims = {row["task"]: row["claim"] for row in stated["held_out"]}
    assert claims == {"sentinel": "sentinel", "target": "target", "kept": "kept"}
    assert [control["control"] for control in stated["controls"]] == ["random"]
    assert all(row["documents"] == 32 for row in stated["held_out"])
    parts = [{name for own in stated["documents"][part].values() for name in own} for part in stated["documents"]]
    assert [len(part & other) for part, other in combinations(parts, 2)] == [0, 0, 0]
    assert stated["outputs"] == json.loads((certified / "manifest.json").read_text())["outputs"]
    card = (certified / "README.md").read_text()
    for line in stated["lines"]:
        assert line in card
        assert line in (certified / "CERTIFICATE.md").read_text()


def test_a_certificate_is_checked_and_replayed(certified: Path, tmp_path: Path) -> None:
    found = verify(certified, replay=True)
    assert (found.faults, found.unchecked) == ([], [])
    assert "--replay" in verify(certified).unchecked[-1]
    shutil.copytree(certified, copied := tmp_path / "copied")
    stated = json.loads((copied / "certificate.json").read_text())
    for row in stated["held_out"]:
        row["checkpoint"] *= 0.9
    (copied / "certificate.json").write_text(json.dumps(stated | {"outputs": {}}))
    faults = verify(copied, replay=True).faults
    assert sum("the certificate says" in fault for fault in faults) == 3
    assert any("other weights" in fault for fault in faults)
    (copied / "certificate.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="no certificate of format"):
        verify(copied)


@pytest.mark.parametrize(
    ("claim", "ends", "said"),
    [
        ("target", (0.1, 0.2), "better in x (95%, 40 documents)"),
        ("target", (-0.1, 0.2), "better in x: not shown (95%, 40 documents)"),
        ("target", (-0.2, -0.001), "worse in x (95%, 40 documents)"),
        ("kept", (0.1, 0.2), "better in x (95%, 40 documents)"),
        ("kept", (-0.04, -0.01), "no worse in x (95%, 40 documents)"),
        ("kept", (-0.06, 0.2), "no worse in x: not shown (95%, 40 documents)"),
        ("kept", (-0.2, -0.001), "worse in x (95%, 40 documents)"),
        ("target", (None, None), "x: not testable, too few documents (40)"),
    ],
)
def test_words_are_those_of_the_interval(claim: str, ends: tuple[float | None, float | None], said: str) -> None:
    row = {"task": "x", "claim": claim, "documents": 40, "margin": 0.05, "low": ends[0], "high": ends[1]}
    assert words(row) == said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": f"kept={TARGET}"}, "in common"),
        ({"keep": "gsm:1"}, "measured by answers"),
        ({"limit": 10}, "10 documents in the selection split"),
        ({"controls": "none,random"}, "none"),
        ({"rates": "0"}, "rates"),
        ({"passes": 0}, "passes"),
        ({"tokens": 0}, "tokens"),
        ({"per": "neuron"}, "per"),
    ],
)
def test_bad_input_is_refused(settings: dict[str, Any], message: str, data: Path) -> None:
    with pytest.raises(SelectionError, match=message):
        search_directions(BASE, MATH, **{**FAST, **settings}, data=data)
