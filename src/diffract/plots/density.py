"""The spectral density of one matrix, under the laws that may describe it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from diffract.plots.density_parts import POINTS, Bars, Curve, Parts, density_parts
from diffract.plots.laws import Array, Row
from diffract.plots.rows import curve, facts
from diffract.plots.style import COLOURS, LEGEND_RIGHT, LOG, caption, figure

AXES = ("log-log", "lin-log")
BELOW = 0.01
"""Decades by which the axis begins below the floor: marks that stand on its very end may not be drawn."""

AXIS_TITLES = {
    "log-log": ("eigenvalue λ = σ²/N", "density ρ(λ)"),
    "lin-log": ("eigenvalue λ = σ²/N", "λ ρ(λ), density of ln λ"),
}
LAWS: dict[str, tuple[str, dict[str, Any]]] = {
    "mp": ("Marchenko-Pastur", {"color": COLOURS["mark"], "width": 2}),
    "pl": ("power law", {"color": "#d55e00", "dash": "solid", "width": 3}),
    "tpl": ("truncated power law", {"color": "#009e73", "dash": "dash", "width": 2}),
    "exp": ("exponential", {"color": "#cc79a7", "dash": "dot", "width": 2.5}),
    "ln": ("log-normal", {"color": "#0072b2", "dash": "dashdot", "width": 2}),
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
    points: int = POINTS,
) -> go.Figure:
    """Draw a histogram of eigenvalues and the laws whose parameters are in ``row``; ``density_parts`` says how.

    Each trace's ``meta`` says what it is: ``bars``, ``null``, ``mp``, ``pl``, ``tpl``, ``exp``, ``ln`` or ``spikes``.
    """
    values, log_y = np.asarray(eigenvalues, float), axes == "log-log"
    parts = density_parts(eigenvalues, shape, row, null=null, points=points)
    floor = parts.floor(log_y=log_y)
    traces: list[Any] = [
        _bars(parts, log_y=log_y),
        *_null(parts, log_y=log_y),
        *(_law(key, curve, row, log_y=log_y) for key, curve in parts.laws.items()),
    ]
    top = max((max(trace.y) for trace in traces if len(trace.y)), default=1.0)
    x, y = AXIS_TITLES[axes]
    made = figure(traces + _spikes(values, row, floor), x=x, y=y, title=title, height=420, legend=LEGEND_RIGHT)
    made.update_xaxes(**LOG)
    _mark_xmin(made, row, values)
    if log_y:
        return made.update_yaxes(**LOG, range=[math.log10(floor) - BELOW, math.log10(max(top, floor * 10)) + 0.2])
    return made.update_yaxes(range=[0, 1.08 * top])


def _steps(bars: Bars, floor: float, *, log_y: bool) -> tuple[list[float], list[float]]:
    tops = np.maximum(bars.heights(log_y=log_y), floor).repeat(2)
    return bars.edges.repeat(2).tolist(), [floor, *tops.tolist(), floor]


def _bars(parts: Parts, *, log_y: bool) -> go.Scatter:
    x, y = ([], []) if parts.spectrum is None else _steps(parts.spectrum, parts.floor(log_y=log_y), log_y=log_y)
    name = "spectrum" if not parts.zeros else f"spectrum (without {parts.zeros} zeros)"
    look = {"line": {"color": COLOURS["bars"], "width": 1}, "fillcolor": "rgba(156,163,175,0.35)"}
    return go.Scatter(x=x, y=y, name=name, meta="bars", mode="lines", fill="toself", hoverinfo="skip", **look)


def _null(parts: Parts, *, log_y: bool) -> list[go.Scatter]:
    if parts.null is None:
        return []
    x, y = _steps(parts.null, parts.floor(log_y=log_y), log_y=log_y)
    look = {"color": "#56b4e9", "width": 1.5}
    return [go.Scatter(x=x, y=y, name="permuted entries", meta="null", mode="lines", line=look, hoverinfo="skip")]


def _law(key: str, curve: Curve, row: Row, *, log_y: bool) -> go.Scatter:
    name, alpha = LAWS[key][0], row.get(f"{key}_alpha")
    hover = f"λ %{{x:.4g}}: %{{y:.4g}}<extra>{name}</extra>"
    x, rho = curve
    return go.Scatter(
        x=x.tolist(),
        y=(rho if log_y else x * rho).tolist(),
        name=name if alpha is None else f"{name} (α {alpha:.2f})",
        meta=key,
        mode="lines",
        line=LAWS[key][1],
        hovertemplate=hover,
    )


def _spikes(values: Array, row: Row, floor: float) -> list[go.Scatter]:
    edge = row.get("mp_edge")
    found = [] if edge is None else values[values > edge].tolist()
    if not found:
        return []
    look = {"symbol": "triangle-up", "size": 8, "color": COLOURS["mark"], "opacity": 0.7}
    hover = "λ %{x:.4g}<extra>spike</extra>"
    name = f"spikes above the edge ({len(found)})"
    y = [floor] * len(found)
    common: dict[str, Any] = {"name": name, "meta": "spikes", "mode": "markers", "hovertemplate": hover}
    return [go.Scatter(x=found, y=y, marker=look, cliponaxis=False, **common)]


def _mark_xmin(made: go.Figure, row: Row, values: Array) -> None:
    xmin = row.get("pl_xmin")
    if xmin is None or not xmin > 0 or not len(values):
        return
    colour = LAWS["pl"][1]["color"]
    made.add_vline(x=xmin, line={"color": colour, "width": 1, "dash": "dot"})
    made.add_annotation(
        x=math.log10(xmin), y=1, yref="paper", text="x<sub>min</sub>", showarrow=False, xanchor="left", yanchor="top",
        xshift=2, font={"color": colour},
    )  # fmt: skip
