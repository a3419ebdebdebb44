"""How a metric is spread within each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from diffract.plots.style import COLOURS, SCALE, figure, label

PLACES = 7
"""Beside each other in a layer, so that points of nearly the same height can be told apart."""


def layer_violins(metrics: pl.DataFrame, metric: str, *, colour: str | None = None, title: str = "") -> go.Figure:
    """Draw a box and all points per layer.

    Args:
        metrics: Rows of one model of the metrics table.
        metric: A column of it.
        colour: A column that colours the points, such as ``left_agreement_mean``. Points without it are left grey.
        title: Untrusted.
    """
    rows = metrics.filter(pl.col(metric).is_not_null(), pl.col("layer").is_not_null()).sort("layer")
    layers, values, names = [str(n) for n in rows["layer"]], rows[metric].to_list(), rows["name"].to_list()
    if colour is None:
        made = layer_boxes(layers, values, names, metric=metric)
    else:
        made = coloured_boxes(layers, values, names, rows[colour].to_list(), metric=metric, colour=colour)
    return made.update_layout(title_text=label(title))


def layer_boxes(layers: Sequence[str], values: Sequence[float], names: Sequence[str], *, metric: str) -> go.Figure:
    """Draw values by layer, names on hover."""
    trace = _violin(
        x=list(layers),
        y=list(values),
        text=[label(n) for n in names],
        points="all",
        jitter=0.35,
        pointpos=0,
        marker={"size": 4, "opacity": 0.6},
        hoveron="points",
        hovertemplate="%{text}: %{y:.4g}<extra></extra>",
    )
    return figure([trace], x="layer", y=label(metric), height=340).update_xaxes(type="category")


def coloured_boxes(
    layers: Sequence[str],
    values: Sequence[float],
    names: Sequence[str],
    shades: Sequence[float | None],
    *,
    metric: str,
    colour: str,
) -> go.Figure:
    """Draw values by layer, each point coloured by another value."""
    ticks = list(dict.fromkeys(layers))
    place = {layer: float(i) for i, layer in enumerate(ticks)}
    x = [place[layer] for layer in layers]
    points = list(zip(_apart(x), values, names, shades, strict=True))
    bar = {"title": {"text": label(colour), "side": "right"}, "thickness": 10, "outlinewidth": 0}
    look = {"size": 5.5, "colorscale": SCALE, "colorbar": bar, "line": {"width": 0.5, "color": "white"}}
    known = [point for point in points if point[3] is not None]
    unknown = [point for point in points if point[3] is None]
    traces = [
        _violin(x=x, y=list(values), points=False, hoverinfo="skip", width=0.9),
        _points(known, {**look, "color": [shade for *_, shade in known]}, f"<br>{label(colour)} %{{marker.color:.4g}}"),
        _points(unknown, {"size": 5, "color": COLOURS["bars"]}, ""),
    ]
    made = figure(traces, x="layer", y=label(metric), height=380, showlegend=False)
    return made.update_xaxes(tickvals=list(range(len(ticks))), ticktext=ticks, showgrid=False)


def _points(points: Sequence[tuple[float, float, str, Any]], marker: dict[str, Any], more: str) -> go.Scatter:
    """Points at (x, y) with a name each."""
    x, y, names, _ = zip(*points, strict=True) if points else ((), (), (), ())
    hover = f"%{{text}}: %{{y:.4g}}{more}<extra></extra>"
    text = [label(name) for name in names]
    return go.Scatter(x=list(x), y=list(y), text=text, mode="markers", marker=marker, hovertemplate=hover)


def _violin(**details: Any) -> go.Violin:
    look = {"line": {"color": COLOURS["tuned"], "width": 1}, "fillcolor": "rgba(15,118,110,0.12)", "spanmode": "hard"}
    return go.Violin(box={"visible": True}, **look, **details)


def _apart(x: Sequence[float]) -> list[float]:
    """Spread points of one layer over places in turn; no chance is involved, so a figure is the same every time."""
    seen: dict[float, int] = {}
    shifted = []
    for value in x:
        seen[value] = seen.get(value, -1) + 1
        shifted.append(value + 0.4 * ((seen[value] * 3 % PLACES) / (PLACES - 1) - 0.5))
    return shifted
