"""Who descends from whom: descendants, strangers, and models whose parts were moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import diffract
from diffract.analysis.trajectory import breaks
from diffract.checkpoints import open_checkpoint
from diffract.matrices import lay_out
from diffract.matrices.lineage import Lineage, correlation, tell_lineage

SAMPLES = Path(__file__).parents[2] / "samples" / "tiny-olmo2"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base() -> Weights:
    return {name: tensor.float() for name, tensor in load_file(SAMPLES / "base" / "model.safetensors").items()}


def related(one: Any, other: Any) -> Lineage:
    return tell_lineage(lay_out(open_checkpoint(one)), lay_out(open_checkpoint(other)))


def stranger(base: Weights, seed: int = 0) -> Weights:
    """Weights of the same sizes that have nothing to do with the base, but share its table of tokens to the bit."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(w.shape, generator=generator) * w.std() for name, w in base.items() if w.ndim == 2}
    return base | {name: w for name, w in drawn.items() if "embed" not in name}


def test_correlation_is_pearsons() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 30, 7, generator=generator, dtype=torch.float64)
    expected = np.corrcoef(one.flatten(), (one + other + 3).flatten())[0, 1]
    assert correlation(one, one + other + 3) == pytest.approx(expected, rel=1e-12)
    assert correlation(one, one) == 1.0
    assert np.isnan(correlation(torch.ones(3, 3).double(), torch.ones(3, 3).double()))


@pytest.mark.parametrize("name", ["math", "code", "natural", "instructions"])
def test_stages_of_training_descend(name: str) -> None:
    found = related(SAMPLES / "base", SAMPLES / name)
    assert (found.word, found.matrices) == ("descendant or sibling", 28)
    assert found.correlation == pytest.approx(0.955, abs=0.02)


def test_siblings_and_the_model_itself(base: Weights) -> None:
    assert related(SAMPLES / "math", SAMPLES / "code").word == "descendant or sibling"
    assert related(SAMPLES / "base", SAMPLES / "base") == Lineage("same values", 1.0, 28)
    assert related(SAMPLES / "base", base) == Lineage("same values", 1.0, 28)


def test_strangers_are_told_though_they_share_a_table(base: Weights) -> None:
    found = related(base, stranger(base))
    assert found.word == "stranger"
    assert found.correlation == pytest.approx(0, abs=0.01)


def test_far_relatives(base: Weights) -> None:
    other = stranger(base)
    mixed = {name: 0.5 * w + other[name] if w.ndim == 2 else w for name, w in base.items()}
    assert related(base, mixed).word == "far"


def test_what_was_moved_is_no_stranger(base: Weights) -> None:
    generator = torch.Generator().manual_seed(1)
    shifted = {re_layered(name): w for name, w in base.items()}
    assert related(base, shifted).word == "rearranged"
    turned = dict(base)
    for name, w in base.items():
        if "proj" in name and not name.endswith(("o_proj.weight", "down_proj.weight")):
            turned[name] = w[torch.randperm(len(w), generator=generator)]
        elif "proj" in name:
            turned[name] = w[:, torch.randperm(w.shape[1], generator=generator)]
    assert related(base, turned).word == "rearranged"
    pruned = {name: w for name, w in base.items() if "layers.3." not in name}
    assert related(base, pruned).word == "same values"


def re_layered(name: str) -> str:
    parts = name.split(".")
    if parts[1] == "layers":
        parts[2] = str((int(parts[2]) + 1) % 4)
    return ".".join(parts)


def test_too_little_in_common_tells_nothing(base: Weights) -> None:
    few = {name: w for name, w in base.items() if "layers.0.mlp" in name}
    assert related(base, few) == Lineage("cannot tell", None, 3)


def test_a_comparison_with_a_stranger_has_no_numbers_of_a_whole_change(base: Weights) -> None:
    run = diffract.compare(
        base, base | {"x": torch.eye(2)}, stranger(base), metrics="norms,change", allow_unmatched=True
    )
    assert run.models["lineage"].to_list() == [None, "same values", "stranger"]
    assert run.models["delta_relative"].to_list() == [None, 0.0, None]
    assert run.metrics.filter(model="tuned-2")["delta_relative"].null_count() == 0
    first = run.manifest["notable"]["tuned-2"][0]
    assert first.startswith("A STRANGER to base: its weights do not descend from it")


def test_a_checkpoint_of_another_run_breaks_the_series(base: Weights) -> None:
    generator = torch.Generator().manual_seed(2)
    series, weights = [], base
    for _ in range(5):
        weights = {n: w + 0.05 * w.std() * torch.randn(w.shape, generator=generator) for n, w in weights.items()}
        series.append(weights)
    run = diffract.trajectory(*series[:3], stranger(base), *series[3:], by="given", metrics="norms,change")
    assert run.models["lineage"].to_list() == [
        None,
        *["descendant or sibling"] * 2,
        "stranger",
        "stranger",
        run.models["lineage"][5],
    ]
    assert run.models["delta_relative"].is_null().to_list() == [True, False, False, True, True, False]
    told = [text for text in run.manifest["warnings"] if "BREAKS THE SERIES" in text]
    assert [text.partition(" ")[0] for text in told] == ["checkpoint-3", "checkpoint-4"]


def test_a_restart_that_is_no_stranger_breaks_the_series_too() -> None:
    steps = [0.5, 0.98, 0.985, 0.6, 0.99, 0.99]
    kinship = [None, *(Lineage("far" if r < 0.9 else "descendant or sibling", r, 9) for r in steps)]
    (told,) = breaks([f"step{i}" for i in range(7)], kinship)
    assert told.startswith("step4 BREAKS THE SERIES: far, its weights correlate 0.600")
