"""How a metric is spread within each layer."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
import polars as pl

from diffract.plots.style import COLOURS, figure, label


def layer_violins(metrics: pl.DataFrame, metric: str) -> go.Figure:
    """Draw a box and all points per layer.

    Args:
        metrics: Rows of one model of the metrics table.
        metric: A column of it.
    """
    rows = metrics.filter(pl.col(metric).is_not_null(), pl.col("layer").is_not_null()).sort("layer")
    return layer_boxes([str(n) for n in rows["layer"]], rows[metric].to_list(), rows["name"].to_list(), metric=metric)


def layer_boxes(layers: Sequence[str], values: Sequence[float], names: Sequence[str], *, metric: str) -> go.Figure:
    """Draw values by layer, names on hover."""
    trace = go.Violin(
        x=list(layers),
        y=list(values),
        text=[label(n) for n in names],
        points="all",
        jitter=0.35,
        pointpos=0,
        box={"visible": True},
        marker={"size": 4, "opacity": 0.6},
        line={"color": COLOURS["tuned"], "width": 1},
        fillcolor="rgba(15,118,110,0.12)",
        spanmode="hard",
        hoveron="points",
        hovertemplate="%{text}: %{y:.4g}<extra></extra>",
    )
    return figure([trace], x="layer", y=label(metric), height=340).update_xaxes(type="category")
