"""How unevenly a change is spread over heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
import polars as pl

from diffract.plots.style import CHANCE, figure, label, line


def lorenz(heads: pl.DataFrame) -> go.Figure:
    """Draw, for each domain, what share of the squared change the least changed heads have together.

    Args:
        heads: The heads table: model and ``head_delta``.
    """
    known = heads.filter(pl.col("head_delta").is_not_null())
    names = known["model"].unique(maintain_order=True)
    return lorenz_lines({name: known.filter(pl.col("model") == name)["head_delta"].to_list() for name in names})


def lorenz_lines(deltas: Mapping[str, Sequence[float]]) -> go.Figure:
    """Draw Lorenz curves of the squares of values; names are untrusted. Without any change there is no curve."""
    traces = [go.Scatter(x=[0, 1], y=[0, 1], name="all heads alike", mode="lines", line=CHANCE, hoverinfo="skip")]
    for index, (name, values) in enumerate(deltas.items()):
        x, y = lorenz_curve(np.square(np.asarray(values, float)))
        gini = 1 - 2 * float(np.trapezoid(y, x)) if len(x) else float("nan")
        shown = label(name)
        hover = f"%{{x:.1%}} of heads: %{{y:.1%}} of the change<extra>{shown}</extra>"
        traces.append(
            go.Scatter(x=x, y=y, name=f"{shown} (Gini {gini:.2f})", mode="lines", line=line(index), hovertemplate=hover)
        )
    y = "share of the squared change"
    inside = {"orientation": "v", "x": 0.02, "xanchor": "left", "y": 0.98, "yanchor": "top"}
    made = figure(traces, x="share of heads, least changed first", y=y, height=460, width=480, legend=inside)
    percent = {"tickformat": ".0%", "dtick": 0.2, "ticklen": 4, "tickcolor": "rgba(0,0,0,0)"}
    made.update_layout(margin={"r": 28}).update_xaxes(**percent, range=[0, 1], constrain="domain")
    return made.update_yaxes(**percent, range=[0, 1.005], scaleanchor="x", constrain="domain")


def lorenz_curve(values: np.ndarray) -> tuple[list[float], list[float]]:
    """Return shares of count and shares of the sum, from (0, 0) to (1, 1); empty where the sum is zero.

    >>> lorenz_curve(np.array([3.0, 1.0]))
    ([0.0, 0.5, 1.0], [0.0, 0.25, 1.0])
    """
    total = values.sum()
    if not total > 0:
        return [], []
    sums = np.concatenate([[0.0], np.cumsum(np.sort(values))]) / total
    return np.linspace(0, 1, len(sums)).tolist(), sums.tolist()
