"""Numbers of a whole model, from the rows of its matrices."""

from __future__ import annotations

import math

import polars as pl

from diffract.analysis.heads import head_deltas
from diffract.metrics.concentration import gini, top_share


def model_numbers(base: pl.DataFrame, tuned: pl.DataFrame) -> dict[str, float | None]:
    """Return the numbers of one tuned model; ``None`` for what the computed metrics do not give.

    Shares are means over matrices weighted by ||D||_F^2, that is, shares of the whole model's change; heads are
    weighted by the squared norm of their change, so that shares add up.

    Args:
        base: The base's metric rows.
        tuned: The tuned model's metric rows.
    """
    pairs = tuned.filter(pl.col("status") != "unpaired").join(
        base.select("name", base_squares=pl.col("frobenius_norm") ** 2)
        if "frobenius_norm" in base.columns
        else base.select("name", base_squares=pl.lit(None, pl.Float64)),
        on="name",
        how="left",
    )
    numbers = {"changed_share": _mean(pairs, "delta_changed_share", pl.col("rows") * pl.col("cols"))}
    if "delta_frobenius" not in pairs.columns:
        return _plain(numbers)
    pairs = pairs.filter(pl.col("delta_frobenius").is_not_null()).with_columns(d2=pl.col("delta_frobenius") ** 2)
    before = float(pairs["base_squares"].sum()) if pairs["base_squares"].null_count() == 0 else 0.0
    numbers["delta_relative"] = math.sqrt(float(pairs["d2"].sum()) / before) if before else math.nan
    for name in ("value_share", "value_share_chance", "spectral_shift_share"):
        numbers[name] = _mean(pairs, name, pl.col("d2"))
    return _plain(numbers | _head_numbers(pairs))


def _head_numbers(pairs: pl.DataFrame) -> dict[str, float]:
    squares = head_deltas(pairs)["head_delta"].to_numpy() ** 2
    share, chance = top_share(squares)
    return {
        "head_top10_share": share,
        "head_top10_share_chance": chance,
        "head_gini": gini(squares),
    }


def _mean(rows: pl.DataFrame, column: str, weight: pl.Expr) -> float:
    if column not in rows.columns:
        return math.nan
    known = rows.filter(pl.col(column).is_not_null()).select(value=column, weight=weight.cast(pl.Float64))
    total = float(known["weight"].sum())
    return float((known["value"] * known["weight"]).sum()) / total if total else math.nan


def _plain(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}
