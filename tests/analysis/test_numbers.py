"""Numbers of heads and models, worked out by hand."""

from __future__ import annotations

import math

import polars as pl
import pytest

from diffract.analysis.tables import model_numbers
from diffract.attention import changed_heads, compared_heads

SCHEMA = {
    "model": pl.String, "name": pl.String, "status": pl.String, "layer": pl.Int32, "block": pl.String,
    "projection": pl.String,
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
    return pl.DataFrame([("m", *row) for row in ROWS], schema=SCHEMA, orient="row").with_columns(
        tensor=pl.col("projection")
    )


def heads(tuned: pl.DataFrame) -> pl.DataFrame:
    return changed_heads(table(), tuned)


def test_query_heads_share_the_squares_of_their_kv_head() -> None:
    found = heads(table())
    assert found["head"].to_list() == [0, 1]
    # head 0: q 1, o 4, half of k's 4; head 1: q 4, o 16, the other half
    assert found["head_delta"].to_list() == pytest.approx([math.sqrt(7.0), math.sqrt(22.0)], rel=1e-15)


def test_heads_without_kv_slices() -> None:
    without = table().filter(pl.col("projection") != "k")
    found = changed_heads(without, without)
    assert found["head_delta"].to_list() == pytest.approx([math.sqrt(5), math.sqrt(20)], rel=1e-15)
    mlp = table().filter(block="mlp")
    assert changed_heads(mlp, mlp).height == 0


def test_the_row_of_a_head_by_hand() -> None:
    first, second = heads(table()).rows(named=True)
    assert (first["model"], first["status"]) == ("m", "ok")
    assert first["entries"] == 11  # (4 + 4 + 2)^2 / (4 + 4 + 1)
    assert (first["rank"], second["rank"]) == (2, 1)
    assert first["change_share"] == pytest.approx(7 / 29, rel=1e-15)
    assert first["head_delta_relative"] == pytest.approx(math.sqrt(7 / 22.5), rel=1e-15)
    assert first["shared_cosine"] is None


@pytest.mark.parametrize(
    ("name", "change", "status"),
    [
        ("q0", None, "non_finite"),
        ("o0", "gone", "unpaired"),
        ("k0", None, "non_finite"),
        ("k0", "unpaired", "unpaired"),
    ],
)
def test_a_head_with_a_missing_slice_is_null(name: str, change: str | None, status: str) -> None:
    here = pl.col("name") == name
    bad = table().with_columns(pl.when(here).then(None).otherwise("delta_frobenius").alias("delta_frobenius"))
    if change == "gone":
        bad = bad.filter(~here)
    if change == "unpaired":
        bad = bad.with_columns(pl.when(here).then(pl.lit("unpaired")).otherwise("status").alias("status"))
    found = heads(bad)
    lost = [True, name == "k0"]  # the key-value head is that of both
    assert found["status"].to_list() == [status if gone else "ok" for gone in lost]
    assert found["head_delta"].is_null().to_list() == found["change_share"].is_null().to_list() == lost
    numbers = model_numbers(table(), bad, found)
    assert (numbers["head_gini"] is None) == (name == "k0")
    assert numbers["head_top10_share"] == (None if name == "k0" else 1.0)


def test_heads_of_a_comparison_are_those_of_each_tuned_model() -> None:
    metrics = pl.concat([table().with_columns(model=pl.lit(name)) for name in ("base", "a", "b")])
    found = compared_heads(metrics)
    assert found["model"].to_list() == ["a", "a", "b", "b"]
    assert compared_heads(metrics.filter(model="base")).is_empty()
    assert compared_heads(metrics.drop("delta_frobenius")).is_empty()


def test_model_numbers_by_hand() -> None:
    found = model_numbers(table(), table(), heads(table()))
    d2 = 1 + 4 + 4 + 16 + 4 + 25
    # the base's norm is that of the matrices whose change is known: five of norm 3, one of norm 10
    assert found["delta_relative"] == pytest.approx(math.sqrt(d2 / 145), rel=1e-15)
    # of rows with a value: (1 * .5 + 4 * .25 + 4 * 0 + 4 * 1 + 25 * 0) / (1 + 4 + 4 + 4 + 25)
    assert found["value_share"] == pytest.approx(5.5 / 38, rel=1e-15)
    # by entries: (4 + 2 + 0 + 0 + 2 + 20) / (5 * 4 + 20)
    assert found["changed_share"] == pytest.approx(28 / 40, rel=1e-15)
    assert found["head_top10_share"] == pytest.approx(22 / 29, rel=1e-12)
    assert found["head_top10_share_chance"] == 0.5
    assert found["head_gini"] == pytest.approx((22 - 7) / (2 * 29), rel=1e-12)
    assert found["spectral_shift_share"] is None


def test_unknown_numbers_are_none() -> None:
    bare = table().drop("delta_frobenius", "frobenius_norm", "delta_changed_share")
    assert model_numbers(bare, bare, changed_heads(bare, bare)) == {"changed_share": None}
    without = table().drop("frobenius_norm")
    assert model_numbers(without, table(), heads(table()))["delta_relative"] is None
    assert changed_heads(without, table())["head_delta_relative"].null_count() == 2
