"""A whole search over what is kept of the change of the sample family."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from diffract.api import evaluate
from diffract.edits import LiveModel, Truncate
from diffract.edits.directions import Decompositions
from diffract.errors import SelectionError
from diffract.evaluate import Evaluator, load_subject, load_tasks
from diffract.run import Run
from diffract.schemas import KINDS
from diffract.search import Estimate, search_truncate
from diffract.tables import load
from search_cases import BASE, MATH

FAST: dict[str, Any] = {"eval": "math=word-problems:1", "limit": 6, "fractions": "0,0.5,1", "seeds": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("search")
    found = search_truncate(
        BASE, MATH, output=folder / "run", write=folder / "out", tolerance=0.05, choose_by="without-loss", **FAST
    )
    assert isinstance(found, Run)
    return found, folder


def test_the_run_folder_is_whole(finished: tuple[Run, Path]) -> None:
    found, folder = finished
    again = load(folder / "run")
    for name in KINDS["search truncate"]:
        assert_frame_equal(getattr(again, name), getattr(found, name))
    curves = found.points.filter(pl.col("rule") != "base").select("rule", "seed").unique()
    assert curves.height == 5 + 4 * 2


def test_quality_is_that_of_the_edit(finished: tuple[Run, Path]) -> None:
    subject, base = load_subject(MATH), load_subject(BASE, device="cpu").model
    judge = Evaluator(subject, load_tasks("math=word-problems:1", limit=6))
    for rule, at, step in (
        ("drop", 0.5, Truncate(base=base, drop=0.5)),
        ("mp-edge", 1.0, Truncate(base=base, rule="mp-edge")),
        ("random", 0.5, Truncate(base=base, drop=0.5, side="random", seed=1)),
        ("tail", 0.5, Truncate(base=base, drop=0.5, side="tail")),  # half and half
    ):
        with LiveModel(subject.model).edited(step):
            scores = judge.scores()
        rows = (
            finished[0]
            .points.filter(rule=rule, fraction=at, split="held-out")
            .filter(pl.col("seed") == pl.col("seed").max())
        )
        assert rows["quality"].item() == pytest.approx(scores["value"].sum() / scores["weight"].sum(), rel=1e-9)


def test_fewer_directions_mean_fewer_bytes_and_less_energy(finished: tuple[Run, Path]) -> None:
    drop = finished[0].points.filter(rule="drop", split="held-out")
    for column in ("directions", "energy", "bytes"):
        assert drop[column].is_sorted(descending=True)
    assert drop.row(0, named=True)["state"] == 0
    assert drop.filter(fraction=1)["energy"].item() == 0


def test_what_is_chosen_takes_the_fewest_bytes_without_loss(finished: tuple[Run, Path]) -> None:
    found = finished[0]
    rows = found.choice.filter(pl.col("which") == "without-loss", ~pl.col("control"))
    assert found.manifest["chosen"]["bytes"] == rows["bytes"].min()
    assert (rows["selection_gain_low"] >= -0.05).all()
    assert 0 < found.manifest["chosen"]["bytes"] < 1


def test_the_written_checkpoint_is_said_to_be_rounded(finished: tuple[Run, Path]) -> None:
    found, folder = finished
    written = found.manifest["written"]
    alone = evaluate(str(folder / "out"), "math=word-problems:1", limit=6, cache=False).summary["quality"].item()
    assert written["held_out"][0]["written"] == pytest.approx(alone, rel=1e-9)
    # bf16 rounds by 2^-9 of what training moved by about as much
    assert written["held_out"][0]["live"] == pytest.approx(alone, rel=1e-3)
    assert written["same_scores"] is False
    assert any("rounded to the stored dtype" in text for text in found.manifest["warnings"])


def test_decompositions_that_are_kept_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {**FAST, "limit": 1, "seeds": 1, "rules": "drop,mp-edge,random-energy"}
    filed, made = tmp_path / "filed", tmp_path / "made"
    monkeypatch.setattr("diffract.search.run.Decompositions", partial(Decompositions, memory_bytes=1 << 20))
    search_truncate(BASE, MATH, output=filed, **asked)
    assert not list(tmp_path.rglob("*.npy"))
    monkeypatch.setattr(Decompositions, "of", lambda self, way, matrices, make: make())
    search_truncate(BASE, MATH, output=made, **asked)
    for name in KINDS["search truncate"]:
        assert_frame_equal(getattr(load(filed), name), getattr(load(made), name), check_exact=True)


def test_single_rules_alone_and_dry(tmp_path: Path) -> None:
    dry = search_truncate(BASE, MATH, rules="mp-edge,drop", dry_run=True, **FAST)
    assert isinstance(dry, Estimate)
    assert dry.evaluations == {"selection": 4 + 1, "held-out": 4 + 1 + 2}
    found = search_truncate(BASE, MATH, rules="mp-edge", eval="math", limit=2)
    assert isinstance(found, Run)
    assert found.points.filter(pl.col("rule") == "mp-edge").height == 2 * 2
    with pytest.raises(SelectionError, match="unknown rule 'mp'"):
        search_truncate(BASE, MATH, rules="mp", **FAST)
