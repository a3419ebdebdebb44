"""What lies between the models of the sample family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from diffract.api import evaluate
from diffract.errors import CheckpointError, SelectionError
from diffract.run import Run
from diffract.schemas import KINDS
from diffract.search import Estimate, connect
from diffract.tables import load
from search_cases import BASE, CODE, MATH, NATURAL

TASKS = "math,easy=word-problems:1"
FAST: dict[str, Any] = {"eval": TASKS, "limit": 3, "steps": 3, "grid": 2}
MODELS = (f"math={MATH}", f"text={NATURAL}", f"code={CODE}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("connect")
    found = connect(BASE, *MODELS, output=folder / "run", **FAST)
    assert isinstance(found, Run)
    return found, folder


def test_the_run_folder_is_whole(finished: tuple[Run, Path]) -> None:
    found, folder = finished
    again = load(folder / "run")
    for name in KINDS["connect"]:
        assert_frame_equal(getattr(again, name), getattr(found, name))
    assert [m["model"] for m in again.manifest["models"]] == ["base", "math", "text", "code"]
    assert found.paths.height == 6 * 3 * 2
    assert found.pairs.height == 6 * 2
    assert found.simplex.height == 6 * 2
    # four models, six middles of paths; the simplex is all corners and middles
    assert found.manifest["evaluations"] == 4 + 6


def test_ends_are_the_models_alone(finished: tuple[Run, Path]) -> None:
    for name, reference in (("math", MATH), ("code", CODE)):
        alone = evaluate(reference, TASKS, limit=3, cache=False).summary
        for task, quality in alone.select("task", "quality").rows():
            ends = finished[0].paths.filter(
                ((pl.col("a") == name) & (pl.col("at") == 0)) | ((pl.col("b") == name) & (pl.col("at") == 1)),
                pl.col("task") == task,
            )
            assert ends.height == 3
            assert (ends["quality"] - quality).abs().max() < 1e-9  # batches of another size


def test_gaps_and_barriers_follow_from_qualities(finished: tuple[Run, Path]) -> None:
    found = finished[0]
    gap = found.paths["quality"] - found.paths["linear"]  # of bits, more is worse
    assert (gap - found.paths["gap"]).abs().max() < 1e-12
    highest = found.paths.group_by("a", "b", "task").agg(most=pl.col("gap").max())
    both = found.pairs.join(highest, on=["a", "b", "task"])
    assert both["barrier"].to_list() == both["most"].to_list()
    assert (both["barrier"] >= 0).all()
    assert (found.pairs["connected"] == (found.pairs["high"] < 0.01)).all()
    for row in found.pairs.iter_rows(named=True):
        own = found.pairs.filter(pl.col("counts"), a=row["a"], b=row["b"])["connected"]
        assert row["pair_connected"] == own.all()


def test_items_give_the_qualities(finished: tuple[Run, Path]) -> None:
    found = finished[0]
    sums = found.items.group_by("state", "task").agg(q=pl.col("value").sum() / pl.col("weight").sum())
    for table in (found.paths, found.simplex):
        both = table.join(sums, on=["state", "task"])
        assert both.height == table.height
        assert (both["quality"] - both["q"]).abs().max() < 1e-12


def test_two_models_have_no_simplex_and_a_budget_leaves_out(tmp_path: Path) -> None:
    found = connect(BASE, *MODELS[:2], eval="math", limit=2, steps=5, budget=5, output=tmp_path / "run")
    assert isinstance(found, Run)
    assert found.simplex.is_empty()
    assert found.manifest["evaluations"] <= 5
    assert found.manifest["left_out"] == ["7 points of paths on the held-out split"]
    assert set(found.paths["at"]) == {0.0, 0.5, 1.0}
    dry = connect(BASE, *MODELS, dry_run=True, **FAST)
    assert isinstance(dry, Estimate)
    assert dry.evaluations == {"held-out": 4 + 6 + 6}


def test_models_that_cannot_be_mixed(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="expected steps from 3"):
        connect(BASE, *MODELS, eval="math", steps=2)
    shutil.copytree(MATH, tmp_path / "other")
    tokenizer = tmp_path / "other" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="have different tokenizers: their tokens do not mean the same"):
        connect(BASE, f"math={tmp_path / 'other'}", f"text={NATURAL}", eval="math", limit=2)
    asked: dict[str, Any] = {"eval": "math", "limit": 2, "budget": 4, "steps": 3}
    with pytest.raises(SelectionError, match=r"unknown permission 'tokenizer'.*Did you mean 'tokenizers'"):
        connect(BASE, f"math={MATH}", f"text={NATURAL}", allow=["tokenizer"], dry_run=True, **asked)
    found = connect(BASE, f"math={MATH}", f"text={NATURAL}", allow=["tokenizers"], **asked)
    assert isinstance(found, Run)
    assert "Nothing to allow: tokenizers." in found.manifest["warnings"]
    mixed = connect(BASE, f"math={tmp_path / 'other'}", f"text={NATURAL}", allow=["tokenizers"], **asked)
    assert isinstance(mixed, Run)
    assert not any("Nothing to allow" in warning for warning in mixed.manifest["warnings"])
