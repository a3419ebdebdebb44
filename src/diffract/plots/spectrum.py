"""Singular values of a matrix: base, tuned, and the change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import polars as pl

from diffract.plots.style import COLOURS, figure, label


def spectrum(spectra: pl.DataFrame, name: str, *, base: str, tuned: str | None = None) -> go.Figure:
    """Draw the sigmas of a matrix on a logarithmic axis.

    Args:
        spectra: The spectra table.
        name: Of the matrix.
        base: Name of the (base) model.
        tuned: Name of a tuned model, if there is one.
    """
    chosen = spectra.filter(pl.col("name") == name)
    curves = {"base": _values(chosen, base, "sigma")}
    if tuned is not None:
        curves |= {"tuned": _values(chosen, tuned, "sigma"), "delta": _values(chosen, tuned, "delta_sigma")}
    return spectrum_lines(curves, title=label(name))


def spectrum_lines(curves: Mapping[str, Sequence[float]], *, title: str = "") -> go.Figure:
    """Draw sigmas by rank: ``base``, ``tuned`` and ``delta``."""
    traces = [
        go.Scatter(
            x=list(range(1, len(values) + 1)),
            y=list(values),
            name=kind,
            mode="lines",
            line={"color": COLOURS[kind], "width": 2, "dash": "dot" if kind == "base" else "solid"},
            hovertemplate="rank %{x}: %{y:.4g}<extra>" + kind + "</extra>",
        )
        for kind, values in curves.items()
    ]
    fine = {"showgrid": True, "gridcolor": "#f3f4f6"}
    made = figure(traces, x="rank", y="singular value", title=title)
    return made.update_yaxes(type="log", dtick=1, exponentformat="power", minor=fine)


def _values(spectra: pl.DataFrame, model: str, quantity: str) -> list[float]:
    rows = spectra.filter(pl.col("model") == model, pl.col("quantity") == quantity)["values"]
    return rows[0].to_list() if len(rows) else []
