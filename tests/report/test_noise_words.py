"""What a report says of a change that is plain noise, and of one that is not."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import diffract
from diffract.checkpoints import open_checkpoint
from diffract.report import headlines

BASE = Path(__file__).parents[2] / "samples" / "tiny-olmo2" / "base"


@cache
def changed(seed: int, head: float = 1.0, metrics: str = "norms,change,agreement") -> diffract.Run:
    """The sample with Gaussian noise of a tenth of each tensor's norm, on one query head ``head`` times as much."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: tensor.float() for name, tensor in load_file(BASE / "model.safetensors").items()}
    noise = {
        n: torch.randn(w.shape, generator=generator) * 0.1 * w.norm() / w.numel() ** 0.5 for n, w in weights.items()
    }
    for name in ("q_proj", "o_proj"):
        rows = noise[f"model.layers.1.self_attn.{name}.weight"]
        (rows if name == "q_proj" else rows.T)[:16] *= head
    config = open_checkpoint(BASE).config
    tuned = replace(open_checkpoint({n: w + noise[n] for n, w in weights.items()}), config=config)
    return diffract.compare(replace(open_checkpoint(weights), config=config), tuned, metrics=metrics)


@pytest.mark.parametrize("seed", [0, 1])
def test_of_noise_no_sentence_and_no_large_figure_claims_structure(seed: int) -> None:
    run = changed(seed)
    assert run.manifest["notable"] == {"tuned": []}
    found = headlines(run.tables)
    assert [(h.figure, "size of the change" in h.text) for h in found if not h.minor] == [("10%", True)]
    for headline in found:
        assert headline.text.startswith("is the size of the change") or "noise of the same norm" in headline.text
        assert "in singular vectors" not in headline.text


def test_a_head_that_stands_out_is_shown_large() -> None:
    run = changed(0, head=8.0)
    row = run.models.row(1, named=True)
    assert row["head_top10_share_pvalue"] == 1 / 40
    (large,) = (h for h in headlines(run.tables) if "top tenth of heads" in h.text)
    assert not large.minor
    assert "times what noise of the same norms gives" in large.text


def test_the_noise_of_a_concentration_is_that_of_drawn_matrices() -> None:
    from diffract.attention import head_squares
    from diffract.stats import gini, top_share

    run = changed(0)
    row = run.models.row(1, named=True)
    others = [changed(seed, metrics="delta_frobenius") for seed in (2, 3, 4)]
    drawn = [head_squares(other["heads"]) for other in others]
    # the same norms, drawn entry by entry: over twelve seeds means agree (0.131, 0.025); these scatter
    tops = [float(top_share(squares)) for squares in drawn]
    assert row["head_top10_share_noise"] == pytest.approx(sum(tops) / 3, abs=4 * 0.0007)
    assert row["head_gini_noise"] == pytest.approx(sum(map(gini, drawn)) / 3, abs=4 * 0.0025)
    assert row["head_top10_share"] == pytest.approx(row["head_top10_share_noise"], rel=0.03)
