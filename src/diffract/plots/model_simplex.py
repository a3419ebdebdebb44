"""Quality of mixtures of three models."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from diffract.plots.style import SCALE, dress, label

MARK = 16


def model_simplex(simplex: pl.DataFrame, task: str) -> go.Figure:
    """Draw a mark for each mixture, coloured by quality; the models are the corners.

    Args:
        simplex: The simplex table of ``connect``.
        task: A name in it.
    """
    rows = simplex.filter(pl.col("task") == task)
    names = [label(name) for name in rows["models"][0]] if len(rows) else ["", "", ""]
    a, b, c = ([weights[i] for weights in rows["weights"]] for i in range(3))
    bar = {"title": {"text": label(task), "side": "right"}, "thickness": 10, "outlinewidth": 0, "tickformat": ".3~g"}
    colours = {"colorscale": SCALE, "showscale": True, "colorbar": bar}
    trace = go.Scatterternary(
        a=a,
        b=b,
        c=c,
        mode="markers",
        marker={"size": MARK, "color": rows["quality"].to_list(), **colours},
        customdata=[f"{low:.4g} to {high:.4g}" for low, high in rows.select("low", "high").iter_rows()],
        hovertemplate="%{a:.2g} %{b:.2g} %{c:.2g}: %{marker.color:.4g}, 95%: %{customdata}<extra></extra>",
        cliponaxis=False,
    )
    made = dress(go.Figure([trace]), title=label(task), height=420)
    corners = zip(("aaxis", "baxis", "caxis"), names, strict=True)
    axes = {axis: {"title": {"text": name}, "min": 0} for axis, name in corners}
    return made.update_layout(ternary={"sum": 1, "bgcolor": "rgba(0,0,0,0)", **axes}, margin={"t": 60, "r": 90})
