"""How a change is spread over attention heads."""

from __future__ import annotations

import math

import numpy as np
import polars as pl

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


def gini(values: np.ndarray) -> float:
    """Gini coefficient of non-negative values: 0 when all are equal, towards 1 when one has all. NaN if all are zero.

    >>> gini(np.array([1.0, 1.0])), gini(np.array([0.0, 1.0]))
    (0.0, 0.5)
    """
    ordered = np.sort(values)
    n, total = len(ordered), ordered.sum()
    if n == 0 or total == 0:
        return math.nan
    return float(2 * (np.arange(1, n + 1) * ordered).sum() / (n * total) - (n + 1) / n)


def top_share(values: np.ndarray, share: float = 0.1) -> tuple[float, float]:
    """Return what the largest ``share`` of values (rounded up) have of the sum, and what they would if all were equal.

    >>> top_share(np.array([3.0, 1.0]), 0.5)
    (0.75, 0.5)
    """
    n, total = len(values), values.sum()
    if n == 0 or total == 0:
        return math.nan, math.nan
    k = math.ceil(share * n)
    return float(np.sort(values)[-k:].sum() / total), k / n
