"""What the heads of a layer show together: peaks in the density of all their singular values."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import torch

from diffract.metrics.peaks import peak_count

POOLED = "pooled_peak_count"

MEANING = {
    "summary": "peaks in the density of ln sigma of all heads of a layer and projection together, on each one's row",
    "unit": "count",
    "range": "[1, inf)",
    "source": "Scott 1992, 6.3",
    "version": 1,
    "group": "spectral_shape",
}
"""The manifest's words for the column."""

PLACE = ("model", "layer", "block", "projection")


def pooled_peaks(metrics: pl.DataFrame, spectra: pl.DataFrame) -> pl.DataFrame:
    """Return the metrics with ``pooled_peak_count``, where they have ``peak_count``; null but on rows of heads.

    Sigmas that the method does not tell from zero do not count, as in ``peak_count``.
    """
    if "peak_count" not in metrics.columns:
        return metrics
    heads = metrics.filter(pl.any_horizontal(pl.col("head", "kv_head").is_not_null()), pl.col("status") == "ok")
    sigmas = spectra.filter(quantity="sigma").select("model", "name", "values")
    joined = heads.join(sigmas, on=["model", "name"], how="inner").select(*PLACE, "resolved", "values")
    rows = [_pool(place, group) for place, group in joined.group_by(*PLACE, maintain_order=True) if len(group) > 1]
    schema = {name: metrics.schema[name] for name in PLACE} | {POOLED: pl.Float64}
    found = pl.DataFrame(rows, schema=schema, orient="row")
    cut = pl.any_horizontal(pl.col("head", "kv_head").is_not_null())
    marked = metrics.join(found, on=[*PLACE], how="left", nulls_equal=True, maintain_order="left")
    return marked.with_columns(pl.when(cut).then(POOLED).alias(POOLED))


def _pool(place: tuple[Any, ...], group: pl.DataFrame) -> dict[str, Any]:
    known = zip(group["values"], group["resolved"], strict=True)
    pool = np.concatenate([np.where(v.to_numpy() > floor, v.to_numpy(), 0.0) for v, floor in known])
    count = peak_count(torch.from_numpy(pool)[None]).item()
    return dict(zip(PLACE, place, strict=True)) | {POOLED: None if np.isnan(count) else count}
