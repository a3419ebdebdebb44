"""Quality as more and more heads go back to the base."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import polars as pl

from diffract.plots.bands import banded, beside, curve, level
from diffract.plots.panels import panels
from diffract.plots.style import CHANCE, COLOURS, SERIES, label, line

SPLITS = ("selection", "held-out")
MEASURES = {"gain": ("gain_low", "gain_high"), "quality": ("low", "high")}
"""What is drawn, and the columns of its interval."""

ORDERS = ("greedy", "reference", "magnitude", "first-order", "activation")
RANDOM = {"color": COLOURS["bars"], "dash": "solid", "width": 1}
TUNED = {"color": COLOURS["tuned"], "dash": "dot", "width": 1}


def rewind_curves(points: pl.DataFrame, task: str, *, measure: str = "gain") -> go.Figure:
    """Draw a panel for each split and a curve for each order, with bands of 95%; controls are thin and have none.

    Args:
        points: The points table of ``search rewind``.
        task: A name in it.
        measure: ``gain`` over the tuned model with its paired interval, or ``quality``.
    """
    own = points.filter(pl.col("task") == task).sort("fraction", nulls_last=True, maintain_order=True)
    splits = [split for split in SPLITS if split in own["split"]]
    contents = [_panel(own.filter(pl.col("split") == split), measure, legend=not i) for i, split in enumerate(splits)]
    y = f"{label(task)}, gain over the tuned model" if measure == "gain" else label(task)
    made = panels(splits, contents, x="share of heads rewound", y=y, height=400)
    return beside(made).update_xaxes(tickformat=".0%")


def _panel(rows: pl.DataFrame, measure: str, *, legend: bool) -> list[go.Scatter]:
    low, high = MEASURES[measure]
    traces: list[go.Scatter] = []
    named: set[str] = set()
    curves = rows.filter(pl.col("order") != "base").partition_by("order", "seed", "reverse", maintain_order=True)
    for own in sorted(curves, key=lambda c: (not c["reverse"][0], c["order"][0] != "random")):  # controls behind
        name, look = _look(own["order"][0], reverse=own["reverse"][0])
        words: dict[str, Any] = {"name": name, "look": look, "legend": legend and name not in named}
        words["hover"] = "%{x:.1%} of heads: %{y:.4g}"
        x, y = own["fraction"].to_list(), own[measure].to_list()
        if own["reverse"][0] or own["order"][0] == "random":
            traces.append(curve(x, y, **words))
        else:
            traces += banded(x, y, own[low].to_list(), own[high].to_list(), **words)
        named.add(name)
    for kind, look, own in (("tuned", TUNED, rows.filter(pl.col("state") == 0)), ("base", CHANCE, _base(rows))):
        if len(own):
            traces.append(level(own[measure][0], name=kind, look=look, legend=legend))
    return traces


def _base(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.filter(pl.col("order") == "base")


def _look(order: str, *, reverse: bool) -> tuple[str, dict[str, Any]]:
    """Return what a curve is called, and its line; an order has the same colour in every figure."""
    if order == "random":
        return "random", RANDOM
    index = ORDERS.index(order) if order in ORDERS else len(ORDERS)
    if reverse:
        return f"{label(order)}, reversed", {"color": SERIES[index % len(SERIES)][0], "dash": "dot", "width": 1}
    return label(order), line(index)
