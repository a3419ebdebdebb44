"""Curves with intervals: one for each name."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from diffract.plots.bands import banded, beside, curve
from diffract.plots.style import figure, label, line


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
    traces: list[go.Scatter] = []
    for index, name in enumerate(known["name"].unique(maintain_order=True)):
        rows = known.filter(pl.col("name") == name).sort("x", maintain_order=True)
        traces += _one(rows, label(name), index)
    made = beside(figure(traces, x=x, y=y, title=title, height=height)).update_yaxes(exponentformat="none")
    if log_x:
        made.update_xaxes(type="log", dtick="D2", tickformat="~s")
    if zero:
        made.add_hline(y=0, line={"color": "#9ca3af", "dash": "dot", "width": 1})
    return made


def _one(rows: pl.DataFrame, name: str, index: int) -> list[go.Scatter]:
    x, y, look, hover = rows["x"].to_list(), rows["y"].to_list(), line(index), "%{x:.4g}: %{y:.4g}"
    if {"low", "high"} <= set(rows.columns) and rows["low"].null_count() == 0:
        low, high = rows["low"].to_list(), rows["high"].to_list()
        return banded(x, y, low, high, name=name, look=look, legend=True, hover=hover)
    return [curve(x, y, name=name, look=look, legend=True, hover=hover)]
