"""Spectral densities for the page: the script draws them, the formulas stay in ``diffract.plots``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl

from diffract.plots import density_parts as parts_of
from diffract.plots import laws
from diffract.report.packing import pack

POINTS = 32
"""On each law."""

MOST = 5_000
"""Densities in a page, about 2 kB each."""

NEEDED = ("mp_variance", "pl_xmin", "tpl_xmin", "exp_xmin", "ln_xmin", "null_w1")
"""A page has densities if the run has one of these columns."""


def densities(metrics: pl.DataFrame, spectra: pl.DataFrame) -> list[list[Any]]:
    """Return (model, matrix, parts), long spectra first, of these the last model's; nothing if no law was fitted."""
    if not set(NEEDED) & set(metrics.columns):
        return []
    return [[model, name, _plain(parts)] for model, name, parts in _parts(metrics, spectra)]


def left_out(metrics: pl.DataFrame) -> int:
    """How many matrices have no density in the page, though they could."""
    return max(0, len(metrics) - MOST) if set(NEEDED) & set(metrics.columns) else 0


def _parts(metrics: pl.DataFrame, spectra: pl.DataFrame) -> Iterator[tuple[str, str, parts_of.Parts]]:
    sigmas, nulls = (_by_matrix(spectra, quantity) for quantity in ("sigma", "null_sigma"))
    columns = [c for c in metrics.columns if c.startswith(("mp_", *(f"{prefix}_" for prefix in laws.TAILS)))]
    places = {name: i for i, name in enumerate(metrics["model"].unique(maintain_order=True))}
    place = pl.col("model").replace_strict(places, return_dtype=pl.Int32)
    longest = metrics.sort(pl.min_horizontal("rows", "cols"), place, descending=True, maintain_order=True).head(MOST)
    for row in longest.select("model", "name", "rows", "cols", *columns).iter_rows(named=True):
        key, shape = (row["model"], row["name"]), (row["rows"], row["cols"])
        if key in sigmas:
            values, null = (np.square(found.get(key, [])) / max(shape) for found in (sigmas, nulls))
            yield *key, parts_of.density_parts(values, shape, row, null=null, points=POINTS)


def _by_matrix(spectra: pl.DataFrame, quantity: str) -> dict[tuple[str, str], Any]:
    rows = spectra.filter(pl.col("quantity") == quantity)
    return {
        (model, name): np.array(values, float) for model, name, values in rows.select("model", "name", "values").rows()
    }


def _plain(parts: parts_of.Parts) -> dict[str, Any]:
    histograms = {"bars": parts.spectrum, "null": parts.null}
    return {
        "total": parts.total,
        "zeros": parts.zeros,
        **{name: _bars(bars) for name, bars in histograms.items() if bars is not None},
        "laws": {name: pack(np.concatenate(curve)) for name, curve in parts.laws.items()},
    }


def _bars(bars: parts_of.Bars) -> list[Any]:
    """Ends of the edges, which are evenly spaced in ln lambda, and the share in each bin."""
    return [float(bars.edges[0]), float(bars.edges[-1]), pack(bars.shares)]
