"""Curves with intervals: one for each name."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import polars as pl

from diffract.plots.style import LEGEND_RIGHT, LOG, figure, label, line

BAND_OPACITY = 0.15


def curves(
    table: pl.DataFrame, *, x: str, y: str, title: str = "", log_x: bool = False, height: int = 340, zero: bool = False
) -> go.Figure:
    """Draw y against x with the interval of each point as a band.

    Args:
        table: Columns ``name``, ``x``, ``y``, and ``low``, ``high`` where there are intervals; names are untrusted.
        x: Title of the x axis.
        y: Title of the y axis.
        title: Of the figure.
        log_x: Draw x logarithmically; what is not positive is left out.
        height: In pixels.
        zero: Mark y = 0.
    """
    known = table.filter(pl.col("y").is_not_null() & pl.col("x").is_not_null())
    if log_x:
        known = known.filter(pl.col("x") > 0)
    traces: list[Any] = []
    for index, name in enumerate(known["name"].unique(maintain_order=True)):
        rows = known.filter(pl.col("name") == name).sort("x", maintain_order=True)
        if {"low", "high"} <= set(rows.columns) and rows["low"].null_count() == 0:
            traces.append(_band(rows, line(index)["color"], label(name)))
        traces.append(_curve(rows, index, label(name)))
    made = figure(traces, x=x, y=y, title=title, height=height, legend=LEGEND_RIGHT)
    if log_x:
        made.update_xaxes(**{name: value for name, value in LOG.items() if name != "minor"})
    if zero:
        made.add_hline(y=0, line={"color": "#9ca3af", "dash": "dot", "width": 1})
    return made


def _band(rows: pl.DataFrame, colour: str, group: str) -> go.Scatter:
    x, low, high = (rows[column].to_list() for column in ("x", "low", "high"))
    return go.Scatter(
        x=[*x, *x[::-1]],
        y=[*high, *low[::-1]],
        fill="toself",
        fillcolor=colour,
        opacity=BAND_OPACITY,
        line={"width": 0},
        legendgroup=group,
        showlegend=False,
        hoverinfo="skip",
    )


def _curve(rows: pl.DataFrame, index: int, name: str) -> go.Scatter:
    return go.Scatter(
        x=rows["x"].to_list(),
        y=rows["y"].to_list(),
        name=name,
        legendgroup=name,
        mode="lines+markers",
        marker={"size": 6},
        line=line(index),
        hovertemplate="%{x:.4g}: %{y:.4g}<extra>" + name + "</extra>",
    )
