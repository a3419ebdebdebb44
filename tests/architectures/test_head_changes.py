"""Heads of every family: one pass over entries finds the changes that a comparison of all slices finds."""

from __future__ import annotations

import copy

import polars as pl
import pytest
import torch

import diffract
from families import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_are_those_of_a_comparison(family: str) -> None:
    model = build(family)
    torch.manual_seed(1)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    run = diffract.heads(model, moved, cache=False)
    compared = diffract.compare(model, moved, metrics=["delta_frobenius", "frobenius_norm"], cache=False)
    want = compared.heads
    assert run.heads.height == want.height > 0
    assert run.heads["status"].unique().to_list() == ["ok"]
    joined = run.heads.join(want, on=["layer", "block", "head"], nulls_equal=True, suffix="_want")
    assert joined.height == want.height
    # float64 sums of at most 10^4 squares in another order
    assert (joined["head_delta"] / joined["head_delta_want"] - 1).abs().max() < 1e-12
    place = ["layer", "block", "head"]
    assert run.heads.select(place).equals(run.heads.select(place).sort(place))
    in_heads = pl.col("projection").is_in(list("qkvo")) & pl.coalesce("head", "kv_head").is_not_null()
    assert run.models["matrices"].to_list() == [compared.metrics.filter(in_heads, model="tuned").height] * 2


def test_what_is_not_cut_into_heads_is_said() -> None:
    model = build("deepseek_v3")
    plain = {name: tensor for name, tensor in model.state_dict().items() if "q_b_proj" not in name}
    own = [name for name in plain if "self_attn" in name]
    run = diffract.heads(model, model, cache=False)
    assert run.heads.height == 8
    with pytest.raises(diffract.DiffractError):
        diffract.heads({name: plain[name] for name in own}, {name: plain[name] for name in own}, cache=False)
