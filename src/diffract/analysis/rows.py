"""From facts to rows: one frame for the matrices that were analysed together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from threading import Lock

import polars as pl
from torch import Tensor

from diffract.analysis.facts import Found
from diffract.metrics import CURVES, Metric

CURVE = "curve."
"""Prefix of the columns that hold what runs along the spectrum."""


ONE_AT_A_TIME = Lock()
"""Metrics are many small operations, each of which gives the interpreter's lock away and takes it back: two threads in
them at once spend their time waiting for each other, one beside a thread in a long operation does not."""


def bundle(found: Found, metrics: Sequence[Metric]) -> pl.DataFrame:
    """Return one row per matrix: outcome, metrics, and lists along the spectrum. What has no value is null."""
    with ONE_AT_A_TIME:
        return _owned(pl.DataFrame(_columns(found, metrics)))


def _columns(found: Found, metrics: Sequence[Metric]) -> dict[str, pl.Series]:
    finite = found.finite.tolist()
    zero = (found.facts["squares"] == 0).tolist()
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
    doubts = found.facts["tail_warnings"] if "power_law" in found.facts else [None] * count
    columns["warning"] = pl.Series([text or None for text in doubts], dtype=pl.String)
    for name, curve in CURVES.items():
        if curve.wanted(found.facts):
            columns[CURVE + name] = _lists(curve.values(found.facts), finite, ragged=curve.ragged)
    return columns


def _owned(rows: pl.DataFrame) -> pl.DataFrame:
    """Copy rows into memory of Polars' own.

    Small arrays that live on among large temporaries keep the allocator from giving these back, a few MB for each
    tensor: memory would grow with the number of layers.
    """
    return rows.select(pl.all().gather(pl.int_range(len(rows))))


def _numbers(values: Tensor | None, finite: list[bool]) -> pl.Series:
    if values is None:
        return pl.Series([None] * len(finite), dtype=pl.Float64)
    known = zip(values.tolist(), finite, strict=True)
    return pl.Series([v if ok and math.isfinite(v) else None for v, ok in known], dtype=pl.Float64)


def _lists(values: Tensor, finite: list[bool], *, ragged: bool) -> pl.Series:
    """One list per matrix; null where a matrix is not finite or the quantity has no value."""
    rows = pl.Series(values.cpu().numpy(), dtype=pl.Array(pl.Float64, values.shape[1])).arr.to_list()
    unknown = values.isnan()
    if ragged:
        rows = rows.list.eval(pl.element().filter(pl.element().is_not_nan()))
    elif bool(unknown.any()):
        rows = rows.list.eval(pl.element().fill_nan(None))
    missing = [not ok or bad for ok, bad in zip(finite, unknown.all(1).tolist(), strict=True)]
    return rows if not any(missing) else rows.set(pl.Series(missing), None)
