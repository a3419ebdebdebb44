"""A metric along training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from diffract.plots.panels import panels
from diffract.plots.rows import part
from diffract.plots.style import COLOURS, LOG, figure, label

AXES = ("lin-lin", "lin-log", "log-lin", "log-log")
OVER = {"tokens": "tokens", "step": "step", "order": "checkpoint"}
BAND = "rgba(15,118,110,0.18)"
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""The order of panels within a block; others follow in that of the tables."""

NAMES = ("median over layers and heads", "lower to upper quartile")


def evolution(
    metrics: pl.DataFrame, metric: str, *, over: str | None = None, matrix: str | None = None, axes: str = "lin-lin"
) -> go.Figure:
    """Draw the median and the quartiles of a metric over training, a panel for each projection.

    Panels of one block have the same y axis.

    Args:
        metrics: The metrics table of a trajectory: ``order``, and ``tokens`` or ``step`` where they are known.
        metric: A column of it.
        over: ``tokens``, ``step`` or ``order``; the first of them that is known for every checkpoint.
        matrix: Draw this one alone.
        axes: Of y and x, each ``lin`` or ``log``. What is not positive is not on a logarithmic axis.
    """
    over = over or time_column(metrics)
    known = metrics.filter(pl.col(metric).is_not_null() & pl.col(over).is_not_null()).sort("order", maintain_order=True)
    lost = axes.endswith("-log") and bool((known[over] <= 0).any())
    if lost:
        known = known.filter(pl.col(over) > 0)
    words: dict[str, Any] = {
        "x": OVER[over],
        "y": label(metric),
        "title": "without the checkpoint at 0" if lost else "",
    }
    if matrix is not None:
        rows = known.filter(pl.col("name") == matrix)
        words["title"] = ", ".join(filter(None, [label(matrix), words["title"]]))
        return _scaled(evolution_line(rows[over].to_list(), rows[metric].to_list(), **words), axes)
    places = places_of(known)
    bands = quartiles(known, metric, over)
    contents = [_band(bands.filter(pl.col("part") == p), over, legend=not i) for i, p in enumerate(places["part"])]
    titles = [label(p) for p in places["part"]]
    made = panels(titles, contents, **words, height=150 if len(titles) > 4 else 220, share_y=False, legend=True)
    _share_within_blocks(made, places["block"].to_list())
    return _scaled(made, axes)


def places_of(metrics: pl.DataFrame) -> pl.DataFrame:
    """Return block and part of each panel: blocks as they come, their projections in the usual order."""
    parts = metrics.select("block", "projection", part().alias("part")).unique("part", maintain_order=True)
    usual = {projection: place for place, projection in enumerate(PROJECTIONS)}
    rank = pl.col("projection").replace_strict(usual, default=len(usual), return_dtype=pl.Int32)
    first = parts["block"].unique(maintain_order=True).to_list()
    block = pl.col("block").replace_strict({name: i for i, name in enumerate(first)}, return_dtype=pl.Int32)
    return parts.sort(block, rank, maintain_order=True)


def time_column(metrics: pl.DataFrame) -> str:
    """Return ``tokens``, ``step`` or ``order``: the first that every checkpoint has, and that grows with the order.

    Steps do not where a training run begins to count anew.
    """
    return next((c for c in OVER if c in metrics.columns and _grows(metrics, c)), "order")


def _grows(metrics: pl.DataFrame, column: str) -> bool:
    times = metrics.select("order", time=pl.col(column)).unique().sort("order")["time"]
    return times.null_count() == 0 and bool((times.diff().drop_nulls() > 0).all())


def quartiles(metrics: pl.DataFrame, metric: str, over: str) -> pl.DataFrame:
    """Return ``low``, ``middle`` and ``high`` of a metric for each ``part`` and checkpoint.

    Args:
        metrics: Rows in the order of the checkpoints, all with the metric.
        metric: A column.
        over: ``tokens``, ``step`` or ``order``.
    """
    value = pl.col(metric)
    numbers = {"low": value.quantile(0.25, "linear"), "middle": value.median(), "high": value.quantile(0.75, "linear")}
    return (
        metrics.with_columns(part=part())
        .group_by("part", *dict.fromkeys(["order", over]), maintain_order=True)
        .agg(**numbers)
    )


def evolution_line(times: Sequence[float], values: Sequence[float], *, x: str, y: str, title: str = "") -> go.Figure:
    """Draw one curve over time."""
    look: dict[str, Any] = {"line": {"color": COLOURS["tuned"], "width": 2}, "marker": {"size": 5}}
    trace = go.Scatter(x=list(times), y=list(values), mode="lines+markers", **look)
    return figure([trace], x=x, y=y, title=title)


def band_lines(rows: pl.DataFrame, over: str, *, y: str) -> go.Figure:
    """Draw median and quartiles of one part: rows of ``quartiles``."""
    return figure(_band(rows, over, legend=True), x=OVER[over], y=label(y), height=230)


def _band(rows: pl.DataFrame, over: str, *, legend: bool) -> list[go.Scatter]:
    """Median and quartiles; the band is the way along the lower quartile and back along the upper one."""
    times = rows[over].to_list()
    outline = {"x": times + times[::-1], "y": rows["low"].to_list() + rows["high"].to_list()[::-1]}
    common: dict[str, Any] = {"showlegend": legend}
    look = {"fill": "toself", "fillcolor": BAND, "line": {"width": 0}, "mode": "lines", "hoverinfo": "skip"}
    middle: dict[str, Any] = {"mode": "lines+markers", "marker": {"size": 4}, "line": {"color": COLOURS["tuned"]}}
    return [
        go.Scatter(x=times, y=rows["middle"].to_list(), name=NAMES[0], legendgroup="m", **middle, **common),
        go.Scatter(**outline, name=NAMES[1], legendgroup="b", **look, **common),
    ]


def _share_within_blocks(made: go.Figure, blocks: Sequence[str]) -> None:
    first: dict[str, str] = {}
    for axis, block in zip(made.select_yaxes(), blocks, strict=False):
        name = axis.plotly_name.replace("axis", "")
        if first.setdefault(block, name) != name:
            axis.matches = first[block]


def _scaled(made: go.Figure, axes: str) -> go.Figure:
    y, x = axes.split("-")
    made.update_yaxes(**LOG if y == "log" else {})
    return made.update_xaxes(**LOG if x == "log" else {})
