"""Orders of heads are those that ``diffract rewind`` takes, and agree with effects where they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from diffract.edits import LiveModel, Rewind
from diffract.edits.heads import change_norms, find_units, reference_scores
from diffract.errors import SelectionError
from diffract.search.plan import SearchCurve
from diffract.search.rewind import (
    ORDERS,
    HeadScores,
    Rewinder,
    agreement,
    in_order,
    parse_orders,
    rewind_curves,
)
from edit_cases import everything_of, family_pair


def test_names_as_they_are_typed() -> None:
    assert parse_orders(None, reference=True) == ORDERS
    assert parse_orders(None, reference=False) == ("greedy", "magnitude", "random", "first-order", "activation")
    assert parse_orders("random, greedy,random", reference=False) == ("greedy", "random")
    with pytest.raises(SelectionError, match=r"unknown order 'gredy', expected one of: .*\. Did you mean 'greedy'"):
        parse_orders("gredy", reference=False)
    with pytest.raises(SelectionError, match=r"unknown order 'xyz', expected one of: greedy, reference"):
        parse_orders(["xyz"], reference=False)
    with pytest.raises(SelectionError, match="order reference needs a reference"):
        parse_orders("reference", reference=False)
    with pytest.raises(SelectionError, match="expected orders, got none"):
        parse_orders(" ,", reference=False)


def test_every_order_is_reversed() -> None:
    curves = rewind_curves(("greedy", "random"), 2, (0.0, 1.0))
    assert [tuple(curve.labels.values()) for curve in curves] == [
        ("greedy", 0, False),
        ("random", 0, False),
        ("random", 1, False),
        ("greedy", 0, True),
        ("random", 0, True),
        ("random", 1, True),
    ]
    assert [curve.control for curve in curves] == [False, True, True, True, True, True]


def test_a_random_order_and_its_reverse_share_out_the_heads() -> None:
    there, back = rewind_curves(("random",), 1, (0.0, 1.0))
    names = [f"L0.h{i}" for i in range(8)]
    assert in_order(back, names, {}) == in_order(there, names, {})[::-1] != names


def test_heads_are_those_that_rewind_takes(tmp_path: Path) -> None:
    base, tuned = family_pair("llama", torch.float32)
    _, reference = family_pair("llama", torch.float32, scale=0.08)
    live = LiveModel(tuned)
    units, other = find_units(live.bench, "head", None), everything_of(live, base)
    effects = dict(zip(units.names, np.random.default_rng(0).normal(size=8).round(1).tolist(), strict=True))
    effects["L1.h3"] = effects["L0.h1"]  # equal ones
    rows = [{**units.heads[name]._asdict(), "effect": value} for name, value in effects.items()]
    pl.DataFrame(rows).write_parquet(tmp_path / "effects.parquet")
    magnitude = change_norms(units, live.bench.draft().blocks, other)
    scores: dict[str, HeadScores] = {"greedy": effects, "magnitude": magnitude}
    scores["reference"] = reference_scores(magnitude, change_norms(units, everything_of(live, reference).blocks, other))
    extra: dict[str, dict[str, Any]] = {
        "greedy": {"scores": str(tmp_path / "effects.parquet")},
        "reference": {"reference": reference},
    }
    rewinder = Rewinder(base, units, "all")
    for curve in rewind_curves(("greedy", "reference", "magnitude", "random"), 2, (0.0, 0.3, 0.5, 1.0)):
        order = curve.labels["order"]
        for at in curve.at:
            step = Rewind(
                to=base,
                fraction=at,
                **{k: curve.labels[k] for k in ("order", "reverse", "seed")},
                **extra.get(order, {}),
            )
            want = step.plan(live.bench, live.bench.draft()).summary["names"]
            point = rewinder.point(curve, at, in_order(curve, units.names, scores))
            assert sorted(point.labels["heads"]) == sorted(want)
            assert point.labels["count"] == len(want)


def test_a_head_without_a_score_is_an_error() -> None:
    curve = SearchCurve("activation", {"order": "activation", "seed": 0, "reverse": False}, (0.0, 1.0))
    with pytest.raises(SelectionError, match=r"1 of 2 units have no score, first L0\.h1"):
        in_order(curve, ["L0.h0", "L0.h1"], {"activation": {"L0.h0": 1.0, "L0.h1": float("nan")}})


def test_agreement_has_the_sign_of_the_order() -> None:
    effects = {"a": 0.3, "b": 0.1, "c": -0.2, "d": -0.5}
    assert agreement(effects, {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}, "first-order") == pytest.approx(1)
    assert agreement(effects, {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}, "magnitude") == pytest.approx(-1)
    assert agreement(effects, {"a": 1.0, "c": 2.0, "b": 3.0, "d": 4.0}, "activation") == pytest.approx(0.8)
