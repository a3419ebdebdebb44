"""From facts to rows: one frame for the matrices that were analysed together."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import torch
from torch import Tensor

from diffract.analysis.facts import Found
from diffract.metrics import Metric

CURVE = "curve."
"""Prefix of the columns that hold what runs along the spectrum."""


def bundle(found: Found, metrics: Sequence[Metric]) -> pl.DataFrame:
    """Return one row per matrix: outcome, metrics, and lists along the spectrum. What has no value is null."""
    finite = found.finite.cpu()
    zero = (found.facts["squares"] == 0).cpu()
    status = ["zero" if z else "ok" if f else "non_finite" for f, z in zip(finite, zero, strict=True)]
    spectrum = found.spectrum
    count = len(status)
    columns: dict[str, pl.Series] = {
        "status": pl.Series(status, dtype=pl.String),
        "method": pl.Series(list(spectrum.method) if spectrum else [None] * count, dtype=pl.String),
        "resolved": _numbers(spectrum.resolved if spectrum else None, finite),
    }
    for metric in metrics:
        columns[metric.name] = _numbers(metric(*(found.facts[fact] for fact in metric.facts)), finite)
    curves = ({"sigma": spectrum.S} if spectrum else {}) | found.curves
    for name, values in curves.items():
        columns[CURVE + name] = _lists(values, finite)
    return pl.DataFrame(columns)


def _numbers(values: Tensor | None, finite: Tensor) -> pl.Series:
    if values is None:
        return pl.Series([None] * len(finite), dtype=pl.Float64)
    known = values.cpu().double()
    known = torch.where(finite & known.isfinite(), known, torch.nan)
    return pl.Series(known.numpy(), dtype=pl.Float64).fill_nan(None)


def _lists(values: Tensor, finite: Tensor) -> pl.Series:
    known = values.cpu()
    rows = [
        pl.Series(row.numpy()) if ok and not row.isnan().any() else None for row, ok in zip(known, finite, strict=True)
    ]
    return pl.Series(rows, dtype=pl.List(pl.Float64))
