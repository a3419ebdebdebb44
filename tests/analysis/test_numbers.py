"""Numbers of heads and models, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest

from diffract.analysis.tables import head_deltas, model_numbers
from diffract.metrics.concentration import gini, top_share

SCHEMA = {
    "name": pl.String, "status": pl.String, "layer": pl.Int32, "block": pl.String, "projection": pl.String,
    "head": pl.Int32, "kv_head": pl.Int32, "rows": pl.Int64, "cols": pl.Int64,
    "frobenius_norm": pl.Float64, "delta_frobenius": pl.Float64, "delta_changed_share": pl.Float64,
    "value_share": pl.Float64,
}  # fmt: skip
ATTN = (0, "attn")
ROWS = [
    ("q0", "ok", *ATTN, "q", 0, 0, 2, 2, 3.0, 1.0, 1.0, 0.5),
    ("q1", "ok", *ATTN, "q", 1, 0, 2, 2, 3.0, 2.0, 0.5, 0.25),
    ("o0", "ok", *ATTN, "o", 0, 0, 2, 2, 3.0, 2.0, 0.0, 0.0),
    ("o1", "ok", *ATTN, "o", 1, 0, 2, 2, 3.0, 4.0, 0.0, None),
    ("k0", "ok", *ATTN, "k", None, 0, 2, 2, 3.0, 2.0, 0.5, 1.0),
    ("up", "ok", 0, "mlp", "up", None, None, 4, 5, 10.0, 5.0, 1.0, 0.0),
    ("lost", "unpaired", 0, "mlp", "x", None, None, 9, 9, 1e6, None, None, None),
    ("nan", "non_finite", 0, "mlp", "y", None, None, 9, 9, None, None, None, None),
]


def table() -> pl.DataFrame:
    return pl.DataFrame(ROWS, schema=SCHEMA, orient="row")


def test_shared_kv_heads_count_for_each_query_head() -> None:
    found = head_deltas(table())
    assert found["head"].to_list() == [0, 1]
    # head 0: q 1, o 4, k 4; head 1: q 4, o 16, k 4
    assert found["head_delta"].to_list() == pytest.approx([3.0, math.sqrt(24.0)], rel=1e-15)


def test_heads_without_kv_slices() -> None:
    found = head_deltas(table().filter(pl.col("projection") != "k"))
    assert found["head_delta"].to_list() == pytest.approx([math.sqrt(5), math.sqrt(20)], rel=1e-15)
    assert head_deltas(table().filter(block="mlp")).height == 0


def test_model_numbers_by_hand() -> None:
    found = model_numbers(table(), table())
    d2 = 1 + 4 + 4 + 16 + 4 + 25
    # the base's norm is that of the matrices whose change is known: five of norm 3, one of norm 10
    assert found["delta_relative"] == pytest.approx(math.sqrt(d2 / 145), rel=1e-15)
    # of rows with a value: (1 * .5 + 4 * .25 + 4 * 0 + 4 * 1 + 25 * 0) / (1 + 4 + 4 + 4 + 25)
    assert found["value_share"] == pytest.approx(5.5 / 38, rel=1e-15)
    # by entries: (4 + 2 + 0 + 0 + 2 + 20) / (5 * 4 + 20)
    assert found["changed_share"] == pytest.approx(28 / 40, rel=1e-15)
    assert found["head_top10_share"] == pytest.approx(24 / 33, rel=1e-12)
    assert found["head_top10_share_chance"] == 0.5
    assert found["head_gini"] == pytest.approx((24 - 9) / (2 * 33), rel=1e-12)
    assert found["spectral_shift_share"] is None


def test_unknown_numbers_are_none() -> None:
    bare = table().drop("delta_frobenius", "frobenius_norm", "delta_changed_share")
    assert model_numbers(bare, bare) == {"changed_share": None}
    assert model_numbers(table().drop("frobenius_norm"), table())["delta_relative"] is None


def test_gini() -> None:
    assert gini(np.array([1.0, 3.0])) == pytest.approx(0.25, rel=1e-15)
    assert gini(np.array([3.0, 1.0])) == gini(np.array([1.0, 3.0]))
    assert gini(np.full(7, 2.0)) == pytest.approx(0.0, abs=1e-15)
    assert gini(np.eye(10)[3]) == pytest.approx(0.9, rel=1e-12)
    values = np.random.default_rng(0).random(20)
    pairs = np.abs(values[:, None] - values).sum() / (2 * 20 * values.sum())
    assert gini(values) == pytest.approx(pairs, rel=1e-12)
    assert math.isnan(gini(np.zeros(3)))
    assert math.isnan(gini(np.array([])))


def test_top_share() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert top_share(values, 0.5) == (0.7, 0.5)
    assert top_share(values, 0.1) == (0.4, 0.25)  # one, as it is rounded up
    assert top_share(values, 1.0) == (1.0, 1.0)
    assert all(map(math.isnan, top_share(np.zeros(4))))
    assert top_share(np.ones(30))[1] == pytest.approx(0.1)
