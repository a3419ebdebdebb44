"""Quality on the lines between models, and how far it falls below the line between the ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from diffract.plots.bands import banded
from diffract.plots.panels import panels
from diffract.plots.style import COLOURS, label, line

WIDEST = 3


def model_paths(paths: pl.DataFrame, *, task: str | None = None) -> go.Figure:
    """Draw a panel for each pair and a curve for each task, with bands of 95%; a red bar is the barrier.

    Args:
        paths: The paths table of ``connect``.
        task: Draw this one alone.
    """
    own = paths if task is None else paths.filter(pl.col("task") == task)
    tasks = own["task"].unique(maintain_order=True).to_list()
    pairs = own.partition_by("a", "b", maintain_order=True)
    titles = [f"{label(pair['a'][0])} → {label(pair['b'][0])}" for pair in pairs]
    contents = [_panel(pair, tasks, legend=not i) for i, pair in enumerate(pairs)]
    return panels(titles, contents, x="weight of the second", y="quality", height=220, columns=WIDEST, legend=True)


def _panel(pair: pl.DataFrame, tasks: Sequence[str], *, legend: bool) -> list[go.Scatter]:
    traces: list[go.Scatter] = []
    for index, task in enumerate(tasks):
        rows = pair.filter(pl.col("task") == task).sort("at")
        if rows.is_empty():
            continue
        x, *found = (rows[column].to_list() for column in ("at", "quality", "low", "high"))
        look = line(index)
        traces += banded(x, *found, name=label(task), look=look, legend=legend, hover="at %{x:.3g}: %{y:.4g}")
        straight: dict[str, Any] = {"color": look["color"], "dash": "dot", "width": 1}
        traces.append(_plain([x[0], x[-1]], [rows["linear"][0], rows["linear"][-1]], straight))
        worst = rows.row(int(rows["gap"].arg_max() or 0), named=True)
        if worst["gap"] > 0:
            traces.append(_plain([worst["at"]] * 2, [worst["linear"], worst["quality"]], {"color": COLOURS["delta"]}))
    return traces


def _plain(x: list[float], y: list[float], look: dict[str, Any]) -> go.Scatter:
    return go.Scatter(x=x, y=y, mode="lines", line=look, hoverinfo="skip", showlegend=False)
