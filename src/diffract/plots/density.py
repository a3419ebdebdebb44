"""The spectral density of one matrix, under the laws that may describe it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from diffract.plots import laws
from diffract.plots.laws import Array, Row
from diffract.plots.rows import curve, facts
from diffract.plots.style import COLOURS, LEGEND_RIGHT, LOG, caption, figure

AXES = ("log-log", "lin-log")
FEWEST_BINS, MOST_BINS = 8, 60
POINTS = 400
TAIL_LINES = {
    "pl": {"color": "#d55e00", "dash": "solid", "width": 3},
    "tpl": {"color": "#009e73", "dash": "dash", "width": 2},
    "exp": {"color": "#cc79a7", "dash": "dot", "width": 2.5},
    "ln": {"color": "#0072b2", "dash": "dashdot", "width": 2},
}


def density(spectra: pl.DataFrame, metrics: pl.DataFrame, name: str, *, model: str, axes: str = "log-log") -> go.Figure:
    """Draw the density of lambda = sigma^2 / N with the laws that were fitted to it.

    Args:
        spectra: The spectra table: ``sigma``, and ``null_sigma`` of the permuted matrix if it is there.
        metrics: The metrics table: rows, cols, and what there is of ``mp_*``, ``pl_*``, ``tpl_*``, ``exp_*``, ``ln_*``.
        name: Of the matrix.
        model: Whose.
        axes: ``log-log`` draws rho(lambda); ``lin-log`` draws lambda rho(lambda), the density per unit of
            ln lambda, in which equal areas are equal shares.
    """
    row = facts(metrics, model, name)
    shape = (int(row.get("rows") or 1), int(row.get("cols") or 1))
    eigenvalues = np.square(curve(spectra, model, name, "sigma")) / max(shape)
    null = np.square(curve(spectra, model, name, "null_sigma")) / max(shape)
    return density_lines(eigenvalues.tolist(), shape, row, null=null.tolist(), axes=axes, title=caption(model, name))


def density_lines(
    eigenvalues: Sequence[float],
    shape: tuple[int, int],
    row: Row,
    *,
    null: Sequence[float] = (),
    axes: str = "log-log",
    title: str = "",
) -> go.Figure:
    """Draw a histogram of eigenvalues and the laws whose parameters are in ``row``.

    The Marchenko-Pastur law is scaled by the share of eigenvalues that are no spikes, each tail by the share of
    eigenvalues from its xmin on.
    """
    values, log_y = np.asarray(eigenvalues, float), axes == "log-log"
    shown = values[values > 0]
    edges = _edges(shown)
    floor = _floor(edges, len(values), log_y=log_y)
    traces = [
        _bars(shown, edges, len(values), floor, log_y=log_y),
        *_null(np.asarray(null, float), edges, floor, log_y=log_y),
        *_bulk(values, shape, row, log_y=log_y),
        *(_tail(values, row, prefix, log_y=log_y) for prefix in laws.TAILS),
    ]
    traces = [trace for trace in traces if trace is not None]
    top = max((max(trace.y) for trace in traces if len(trace.y)), default=1.0)
    x, y = "eigenvalue λ = σ²/N", "density ρ(λ)" if log_y else "λ ρ(λ), density of ln λ"
    made = figure(traces + _spikes(values, row, floor), x=x, y=y, title=title, height=420, legend=LEGEND_RIGHT)
    made.update_xaxes(**LOG)
    _mark_xmin(made, row, values)
    if log_y:
        return made.update_yaxes(**LOG, range=[math.log10(floor), math.log10(max(top, floor * 10)) + 0.2])
    return made.update_yaxes(range=[0, 1.08 * top])


def _edges(shown: Array) -> Array:
    """Edges of 2 sqrt(n) bins, within limits, equally wide in ln lambda."""
    if not len(shown):
        return np.array([])
    logs = np.log(shown)
    count = int(np.clip(2 * math.sqrt(len(logs)), FEWEST_BINS, MOST_BINS))
    return np.exp(np.linspace(logs.min(), max(logs.max(), logs.min() + 1e-3), count + 1))


def _heights(values: Array, edges: Array, total: int, *, log_y: bool) -> Array:
    """Density in each bin, per unit of lambda or of ln lambda."""
    # The first and the last value may lie beyond the edges by a rounding.
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return counts / (total * np.diff(edges if log_y else np.log(edges)))


def _floor(edges: Array, total: int, *, log_y: bool) -> float:
    """Where bars stand: below the lowest bar that a single eigenvalue can make."""
    return 0.5 / (total * float(np.diff(edges).max())) if log_y and len(edges) else 0.0 if not log_y else 1e-3


def _steps(edges: Array, heights: Array, floor: float) -> tuple[list[float], list[float]]:
    tops = np.maximum(heights, floor).repeat(2)
    return edges.repeat(2).tolist(), [floor, *tops.tolist(), floor]


def _bars(shown: Array, edges: Array, total: int, floor: float, *, log_y: bool) -> go.Scatter:
    x, y = _steps(edges, _heights(shown, edges, total, log_y=log_y), floor) if len(edges) else ([], [])
    missing = total - len(shown)
    name = "spectrum" if not missing else f"spectrum (without {missing} zeros)"
    look = {"line": {"color": COLOURS["bars"], "width": 1}, "fillcolor": "rgba(156,163,175,0.35)"}
    return go.Scatter(x=x, y=y, name=name, mode="lines", fill="toself", hoverinfo="skip", **look)


def _null(null: Array, edges: Array, floor: float, *, log_y: bool) -> list[go.Scatter]:
    shown = null[null > 0]
    if not len(shown):
        return []
    own = _edges(shown)
    x, y = _steps(own, _heights(shown, own, len(null), log_y=log_y), floor)
    look = {"color": "#56b4e9", "width": 1.5}
    return [go.Scatter(x=x, y=y, name="permuted entries", mode="lines", line=look, hoverinfo="skip")]


def _bulk(values: Array, shape: tuple[int, int], row: Row, *, log_y: bool) -> list[go.Scatter]:
    variance = row.get("mp_variance")
    if variance is None or not variance > 0 or not len(values):
        return []
    low, high = laws.marchenko_pastur_edges(variance, *shape)
    low = max(low, float(min(values[values > 0], default=high)) / 2)
    # An angle makes points dense at both edges, where the curve is steep.
    x = low + (high - low) * (1 - np.cos(np.linspace(0, math.pi, POINTS)[1:-1])) / 2
    share = 1 - (row.get("mp_spikes") or 0) / len(values)
    y = share * laws.marchenko_pastur(x, variance, *shape)
    return [_law("Marchenko-Pastur", x, y, {"color": COLOURS["mark"], "width": 2}, log_y=log_y)]


def _tail(values: Array, row: Row, prefix: str, *, log_y: bool) -> go.Scatter | None:
    found = laws.tail_parameters(row, prefix)
    if found is None or not len(values) or not 0 < found[-1] < values.max():
        return None
    name, law, names = laws.TAILS[prefix]
    x = np.geomspace(found[-1], values.max(), POINTS)
    share = np.count_nonzero(values >= found[-1]) / len(values)
    alpha = f" (α {found[0]:.2f})" if names[0] == "alpha" else ""
    return _law(name + alpha, x, share * law(x, *found), TAIL_LINES[prefix], log_y=log_y)


def _law(name: str, x: Array, y: Array, line: dict[str, Any], *, log_y: bool) -> go.Scatter:
    hover = f"λ %{{x:.4g}}: %{{y:.4g}}<extra>{name}</extra>"
    drawn = y if log_y else x * y
    return go.Scatter(x=x.tolist(), y=drawn.tolist(), name=name, mode="lines", line=line, hovertemplate=hover)


def _spikes(values: Array, row: Row, floor: float) -> list[go.Scatter]:
    edge = row.get("mp_edge")
    found = [] if edge is None else values[values > edge].tolist()
    if not found:
        return []
    look = {"symbol": "triangle-up", "size": 8, "color": COLOURS["mark"], "opacity": 0.7}
    hover = "λ %{x:.4g}<extra>spike</extra>"
    name = f"spikes above the edge ({len(found)})"
    y = [floor] * len(found)
    return [go.Scatter(x=found, y=y, name=name, mode="markers", marker=look, hovertemplate=hover, cliponaxis=False)]


def _mark_xmin(made: go.Figure, row: Row, values: Array) -> None:
    xmin = row.get("pl_xmin")
    if xmin is None or not xmin > 0 or not len(values):
        return
    colour = TAIL_LINES["pl"]["color"]
    made.add_vline(x=xmin, line={"color": colour, "width": 1, "dash": "dot"})
    made.add_annotation(
        x=math.log10(xmin), y=1, yref="paper", text="x<sub>min</sub>", showarrow=False, xanchor="left", yanchor="top",
        xshift=2, font={"color": colour},
    )  # fmt: skip
