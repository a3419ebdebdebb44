"""How well a power law fits, for every place where its tail might begin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import polars as pl

from diffract.plots.laws import Row
from diffract.plots.rows import curve, facts
from diffract.plots.style import COLOURS, LOG, SERIES, caption, figure


def ks_scan(spectra: pl.DataFrame, metrics: pl.DataFrame, name: str, *, model: str) -> go.Figure:
    """Draw the Kolmogorov-Smirnov distance of the best power law from each eigenvalue on, and which one was chosen.

    Args:
        spectra: The spectra table, with ``sigma`` and ``pl_ks_scan``.
        metrics: The metrics table, with ``pl_xmin``, ``pl_ks``, ``pl_alpha``, ``pl_tail_count``.
        name: Of the matrix.
        model: Whose.
    """
    row = facts(metrics, model, name)
    longer = max(row.get("rows") or 1, row.get("cols") or 1)
    eigenvalues = np.square(curve(spectra, model, name, "sigma")) / longer
    return ks_lines(eigenvalues.tolist(), curve(spectra, model, name, "pl_ks_scan"), row, title=caption(model, name))


def ks_lines(eigenvalues: Sequence[float], distances: Sequence[float], row: Row, *, title: str = "") -> go.Figure:
    """Draw distances against the xmin that they belong to.

    Args:
        eigenvalues: In the order of ``distances``.
        distances: NaN where an eigenvalue is no candidate.
        row: ``pl_xmin``, ``pl_ks``, ``pl_alpha`` and ``pl_tail_count``, if there is a fit.
        title: Made safe already.
    """
    points = sorted((x, d) for x, d in zip(eigenvalues, distances, strict=True) if x > 0 and math.isfinite(d))
    scan = go.Scatter(
        x=[x for x, _ in points],
        y=[d for _, d in points],
        mode="lines+markers",
        line={"color": COLOURS["bars"], "width": 1},
        marker={"size": 4, "color": SERIES[0][0]},
        hovertemplate="tail from λ %{x:.4g}: %{y:.4g}<extra></extra>",
        showlegend=False,
    )
    made = figure([scan], x="tail begins at λ", y="KS distance of the power law", title=title)
    _mark(made, row)
    return made.update_xaxes(**LOG).update_yaxes(rangemode="tozero")


def _mark(made: go.Figure, row: Row) -> None:
    xmin, ks = row.get("pl_xmin"), row.get("pl_ks")
    if xmin is None or ks is None or not xmin > 0:
        return
    colour = SERIES[1][0]
    made.add_vline(x=xmin, line={"color": colour, "width": 1, "dash": "dot"})
    look = {"size": 11, "symbol": "diamond", "color": colour, "line": {"color": "white", "width": 1}}
    made.add_trace(go.Scatter(x=[xmin], y=[ks], mode="markers", marker=look, showlegend=False, hoverinfo="skip"))
    alpha, count = row.get("pl_alpha"), row.get("pl_tail_count")
    words = [f"x<sub>min</sub> = {xmin:.3g}", f"KS {ks:.3f}"]
    words += [] if alpha is None else [f"α {alpha:.2f}"]
    words += [] if count is None else [f"{count:.0f} eigenvalues in the tail"]
    # Placed on the paper: an axis makes room for words that belong to a point of it.
    made.add_annotation(
        x=1, xref="paper", y=1, yref="paper", text=", ".join(words), showarrow=False, xanchor="right", yanchor="bottom",
        font={"color": colour},
    )  # fmt: skip
