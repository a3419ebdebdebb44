"""Singular values of a matrix: base, tuned, and the change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import polars as pl

from diffract.plots.rows import curve
from diffract.plots.style import COLOURS, LOG, caption, figure

DASHES = {"base": "dot", "tuned": "solid", "delta": "dash"}


def spectrum(spectra: pl.DataFrame, name: str, *, base: str, tuned: str | None = None) -> go.Figure:
    """Draw the sigmas of a matrix on a logarithmic axis.

    Args:
        spectra: The spectra table.
        name: Of the matrix.
        base: Name of the (base) model.
        tuned: Name of a tuned model, if there is one.
    """
    curves = {"base": curve(spectra, base, name, "sigma")}
    if tuned is not None:
        curves |= {"tuned": curve(spectra, tuned, name, "sigma"), "delta": curve(spectra, tuned, name, "delta_sigma")}
    return spectrum_lines(curves, title=caption(tuned or base, name))


def spectrum_lines(curves: Mapping[str, Sequence[float]], *, title: str = "") -> go.Figure:
    """Draw sigmas by rank: ``base``, ``tuned`` and ``delta``."""
    traces = [
        go.Scatter(
            x=list(range(1, len(values) + 1)),
            y=list(values),
            name=kind,
            mode="lines",
            line={"color": COLOURS[kind], "width": 2, "dash": DASHES[kind]},
            hovertemplate="rank %{x}: %{y:.4g}<extra>" + kind + "</extra>",
        )
        for kind, values in curves.items()
    ]
    return figure(traces, x="rank", y="singular value", title=title).update_yaxes(**LOG)
