"""Which models are connected: the barrier between each pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from diffract.plots.panels import panels
from diffract.plots.style import SCALE, label


def connectivity_matrix(pairs: pl.DataFrame, *, task: str | None = None) -> go.Figure:
    """Draw a matrix of barriers for each task, 0 the least; a tick stands where the interval is below the tolerance.

    Args:
        pairs: The pairs table of ``connect``.
        task: Draw this one alone.
    """
    own = pairs if task is None else pairs.filter(pl.col("task") == task)
    tasks = own["task"].unique(maintain_order=True).to_list()
    known = dict.fromkeys([*own["a"], *own["b"]])
    names = sorted(known, key=lambda name: name != "base")  # which is the last of the pairs
    highest = float(own["barrier"].max() or 0) or 1.0  # pyright: ignore[reportArgumentType] (Float64)
    contents = [[_matrix(own.filter(pl.col("task") == task), names)] for task in tasks]
    made = panels([label(task) for task in tasks], contents, x="", y="", title="barrier between models", height=260)
    bar = {"title": {"text": "barrier", "side": "right"}, "thickness": 10, "outlinewidth": 0, "tickformat": ".3~g"}
    made.update_layout(
        coloraxis={"colorscale": SCALE, "reversescale": True, "cmin": 0, "cmax": highest, "colorbar": bar}
    )
    axis = {"tickvals": list(range(len(names))), "ticktext": [label(n) for n in names], "showgrid": False, "ticks": ""}
    return made.update_layout(margin={"r": 90}).update_xaxes(**axis).update_yaxes(**axis, autorange="reversed")


def _matrix(rows: pl.DataFrame, names: Sequence[str]) -> go.Heatmap:
    known = {(row["a"], row["b"]): row for row in rows.iter_rows(named=True)}

    def cell(a: str, b: str) -> dict[str, Any] | None:
        return known.get((a, b), known.get((b, a)))

    grid = [[cell(a, b) for b in names] for a in names]
    places = list(range(len(names)))
    return go.Heatmap(
        z=[[None if c is None else c["barrier"] for c in row] for row in grid],
        x=places,
        y=places,
        text=[[_said(c) for c in row] for row in grid],
        texttemplate="%{text}",
        customdata=[["" if c is None else f"{c['low']:.4g} to {c['high']:.4g}" for c in row] for row in grid],
        hovertemplate="%{z:.4g}, 95%: %{customdata}<extra></extra>",
        coloraxis="coloraxis",
        xgap=2,
        ygap=2,
    )


def _said(pair: dict[str, Any] | None) -> str:
    return "" if pair is None else f"{pair['barrier']:.3g}{' ✓' if pair['connected'] else ''}"
