"""A metric over layers and heads."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import polars as pl

from diffract.plots.style import SCALE, caption, figure, label


def head_heatmap(
    metrics: pl.DataFrame, metric: str, projection: str, *, block: str = "attn", model: str | None = None
) -> go.Figure:
    """Draw one projection's heads: layers downward, heads (key-value heads for k and v) to the right.

    Args:
        metrics: Rows of one model of the metrics table.
        metric: A column of it.
        projection: Such as ``q``.
        block: Such as ``attn``.
        model: Whose heads they are, for the title.
    """
    head = pl.coalesce("head", "kv_head")
    rows = metrics.filter(pl.col("projection") == projection, pl.col("block") == block, head.is_not_null())
    grid = rows.select("layer", pl.col(metric).alias("value"), column=head).pivot(
        "column", index="layer", values="value", sort_columns=True
    ).sort("layer")  # fmt: skip
    return heatmap(
        z=[list(row) for row in grid.drop("layer").iter_rows()],
        x=grid.columns[1:],
        y=[str(layer) for layer in grid["layer"]],
        title=label(f"{block}.{projection}") if model is None else caption(model, f"{block}.{projection}"),
        metric=metric,
    )


def heatmap(*, z: list[Any], x: list[str], y: list[str], title: str, metric: str, across: str = "head") -> go.Figure:
    """Draw a grid of values with a colour bar."""
    bar = {"title": {"text": label(metric), "side": "right"}, "thickness": 10, "outlinewidth": 0, "tickformat": ".3~g"}
    hover = f"layer %{{y}}, {across} %{{x}}<br>{label(metric)} %{{z:.4g}}<extra></extra>"
    trace = go.Heatmap(z=z, x=x, y=y, colorscale=SCALE, colorbar=bar, hovertemplate=hover, xgap=1, ygap=1)
    made = figure([trace], x=across, y="layer", title=title, height=260)
    return made.update_layout(
        xaxis={"type": "category", "showgrid": False},
        yaxis={"type": "category", "autorange": "reversed", "showgrid": False},
    )
