"""Curves with the interval of each point as a band behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from diffract.plots.style import LEGEND_RIGHT

OPACITY = 0.15

LEGEND_PX, TITLE_PX = 170, 58


def banded(
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    *,
    name: str,
    look: dict[str, Any],
    legend: bool,
    hover: str,
) -> list[go.Scatter]:
    """Return a curve and its band: the way along the lower ends and back along the upper ones.

    Args:
        x: Ascending.
        y: Of the curve.
        low: Lower ends.
        high: Upper ends.
        name: Made safe already.
        look: Colour, dash and width of the line.
        legend: Whether it is in the legend.
        hover: What is said of a point, as Plotly has it.
    """
    outline: dict[str, Any] = {"x": [*x, *x[::-1]], "y": [*low, *high[::-1]]}
    fill = {"fill": "toself", "fillcolor": look["color"], "line": {"width": 0}, "mode": "lines", "hoverinfo": "skip"}
    common: dict[str, Any] = {"legendgroup": name, "name": name}
    return [
        go.Scatter(**outline, **fill, opacity=OPACITY, showlegend=False, **common),
        curve(x, y, name=name, look=look, legend=legend, hover=hover),
    ]


def beside(made: go.Figure) -> go.Figure:
    """Put the legend of many curves on the right, and leave room for long numbers on the left."""
    made.update_annotations(xshift=-TITLE_PX, selector={"textangle": -90})
    return made.update_layout(legend=LEGEND_RIGHT, margin={"l": TITLE_PX + 16, "r": LEGEND_PX})


def curve(
    x: Sequence[float], y: Sequence[float], *, name: str, look: dict[str, Any], legend: bool, hover: str
) -> go.Scatter:
    """Return a curve with a mark at each point."""
    return go.Scatter(
        x=list(x),
        y=list(y),
        name=name,
        legendgroup=name,
        showlegend=legend,
        mode="lines+markers",
        line=look,
        marker={"size": 4},
        hovertemplate=f"{hover}<extra>{name}</extra>",
    )


def level(y: float, *, name: str, look: dict[str, Any], legend: bool, ends: tuple[float, float] = (0, 1)) -> go.Scatter:
    """Return a horizontal line."""
    words: dict[str, Any] = {"name": name, "legendgroup": name, "showlegend": legend}
    return go.Scatter(x=list(ends), y=[y, y], mode="lines", line=look, hoverinfo="skip", **words)
