"""How a change is spread over attention heads."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

PER_QUERY_HEAD = ("q", "o")
PER_KV_HEAD = ("k", "v")
PROJECTIONS = ("q", "k", "v", "o")
"""What a head consists of."""

PLACE = ("layer", "block")


def head_deltas(metrics: pl.DataFrame) -> pl.DataFrame:
    """Return the change of every query head over its q, k, v and o slices.

    Args:
        metrics: Rows of one tuned model, with ``delta_frobenius``.

    Returns:
        Columns layer, block, head, ``head_delta`` (Frobenius norm); empty if no projection is cut into heads.
    """
    squares = metrics.filter(pl.col("delta_frobenius").is_not_null()).with_columns(d2=pl.col("delta_frobenius") ** 2)
    sums = head_sums(query_heads(squares), squares, ["d2"])
    return sums.select(*PLACE, "head", head_delta=pl.col("d2").sqrt())


def query_heads(slices: pl.DataFrame) -> pl.DataFrame:
    """Return the query heads that slices of q or o belong to: columns layer, block, head, kv_head."""
    own = slices.filter(pl.col("projection").is_in(PER_QUERY_HEAD), pl.col("head").is_not_null())
    return own.group_by(*PLACE, "head").agg(pl.col("kv_head").first()).sort(*PLACE, "head")


def head_sums(heads: pl.DataFrame, slices: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """Sum columns over the slices of every query head.

    Several query heads share one key-value head under grouped-query attention: its slices count for each of them.

    Args:
        heads: As of ``query_heads``.
        slices: One row per slice: labels, and what is to be summed.
        columns: Which columns are summed; NaN makes the sum NaN.

    Returns:
        The heads, with the sums; 0 for a head without slices.
    """
    own = slices.filter(pl.col("projection").is_in(PER_QUERY_HEAD), pl.col("head").is_not_null())
    shared = slices.filter(pl.col("projection").is_in(PER_KV_HEAD), pl.col("kv_head").is_not_null())
    joined = heads
    for rows, key, suffix in ((own, "head", ".own"), (shared, "kv_head", ".shared")):
        sums = rows.group_by(*PLACE, key).agg(pl.col(column).sum().alias(column + suffix) for column in columns)
        joined = joined.join(sums, on=[*PLACE, key], how="left", nulls_equal=True)
    parts = ((pl.col(c + ".own").fill_null(0), pl.col(c + ".shared").fill_null(0)) for c in columns)
    total = {column: one + other for column, (one, other) in zip(columns, parts, strict=True)}
    return joined.sort(*PLACE, "head").select(*heads.columns, **total)
