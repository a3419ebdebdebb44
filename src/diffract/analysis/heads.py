"""How a change is spread over attention heads."""

from __future__ import annotations

import polars as pl

from diffract.metrics.concentration import gini, top_share

__all__ = ["gini", "head_deltas", "top_share"]

PER_QUERY_HEAD = ("q", "o")
PER_KV_HEAD = ("k", "v")


def head_deltas(metrics: pl.DataFrame) -> pl.DataFrame:
    """Return the change of every query head over its q, k, v and o slices.

    Several query heads share one key-value head under grouped-query attention: its change counts for each of them.

    Args:
        metrics: Rows of one tuned model, with ``delta_frobenius``.

    Returns:
        Columns layer, block, head, ``head_delta`` (Frobenius norm); empty if no projection is cut into heads.
    """
    squares = metrics.filter(pl.col("delta_frobenius").is_not_null()).with_columns(d2=pl.col("delta_frobenius") ** 2)
    own = squares.filter(pl.col("projection").is_in(PER_QUERY_HEAD), pl.col("head").is_not_null())
    shared = squares.filter(pl.col("projection").is_in(PER_KV_HEAD), pl.col("kv_head").is_not_null())
    place = ["layer", "block"]
    heads = own.group_by(*place, "head").agg(pl.col("d2").sum(), pl.col("kv_head").first())
    kv = shared.group_by(*place, "kv_head").agg(pl.col("d2").sum().alias("kv_d2"))
    joined = heads.join(kv, on=[*place, "kv_head"], how="left", nulls_equal=True).sort(*place, "head")
    total = (pl.col("d2") + pl.col("kv_d2").fill_null(0.0)).sqrt()
    return joined.select(*place, "head", head_delta=total)
