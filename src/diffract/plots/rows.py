"""Single rows, curves and parts of the tables."""

from __future__ import annotations

from typing import Any

import polars as pl


def curve(spectra: pl.DataFrame, model: str, name: str, quantity: str) -> list[float]:
    """Return a quantity along the spectrum of a matrix, an empty list where it is not known; nulls become NaN."""
    found = spectra.filter(pl.col("model") == model, pl.col("name") == name, pl.col("quantity") == quantity)["values"]
    return found[0].cast(pl.Float64).fill_null(float("nan")).to_list() if len(found) else []


def facts(metrics: pl.DataFrame, model: str, name: str) -> dict[str, Any]:
    """Return the row of a matrix, empty where there is none."""
    found = metrics.filter(pl.col("model") == model, pl.col("name") == name)
    return found.row(0, named=True) if len(found) else {}


def part() -> pl.Expr:
    """What a matrix is within its layer: ``attn.q``, ``mlp.gate``, or ``embed`` where the block is all there is."""
    whole = pl.col("projection").is_null() | (pl.col("block") == pl.col("projection"))
    return pl.when(whole).then(pl.col("block")).otherwise(pl.concat_str("block", "projection", separator="."))
