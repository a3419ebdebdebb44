"""Figures of learned factors: where what was learned sits, and what each recipe gains of the target and of the rest."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import polars as pl

from diffract.plots.choice import Frames, kind, pick
from diffract.plots.style import CHANCE, LOG, figure, label, line, panels

DIRECTIONS = "diffract search directions BASE TUNED --eval TASKS --keep TASKS -o RUN"

HOVER = "%{text}<br>σ %{x:.3g}: factor %{y:.3g}"


def factors_by_sigma(factors: pl.DataFrame) -> go.Figure:
    """Draw each factor against its singular value, a panel for each projection, a colour for each layer.

    Args:
        factors: The factors table of a search; factors of whole parts, which have no singular value, are left out.
    """
    own = factors.filter(pl.col("direction").is_not_null(), pl.col("sigma") > 0)
    names, contents = [], []
    for (block, projection), rows in own.group_by("block", "projection", maintain_order=True):
        names.append(f"{label(block)}.{label(projection)}")
        contents.append([
            go.Scatter(
                x=part["sigma"].to_list(),
                y=part["factor"].to_list(),
                text=[f"{label(name)}, direction {i}" for name, i in part.select("name", "direction").iter_rows()],
                name=f"layer {layer}",
                legendgroup=f"layer {layer}",
                showlegend=len(names) == 1,
                mode="markers",
                marker={"size": 4, "opacity": 0.6, "color": line(int(layer or 0))["color"]},
                hovertemplate=HOVER,
            )
            for (layer,), part in rows.group_by("layer", maintain_order=True)
        ])  # fmt: skip
    made = panels(names, contents, x="σ of the change", y="factor: 1 tuned, 0 base", legend=True, height=220)
    return made.update_xaxes(**LOG).add_hline(y=1, line=CHANCE)


def recipe_front(choice: pl.DataFrame, points: pl.DataFrame, *, target: str, kept: str) -> go.Figure:
    """Draw what each recipe gains of a target and of what is to be kept on the held-out split, with intervals of 95%.

    Args:
        choice: The choice table of a search for factors.
        points: Its points table; of it the curve of the interpolation is drawn.
        target: A target task.
        kept: A task that is to be kept.
    """
    traces: list[go.Scatter] = []
    rows = points.filter(pl.col("split") == "held-out", pl.col("recipe") == "interpolation").sort("at")
    both = rows.filter(task=target).join(rows.filter(task=kept), on="at", suffix="_kept", maintain_order="left")
    if both.height:
        x, y = both["gain_kept"].to_list(), both["gain"].to_list()
        thin = {**CHANCE, "width": 1}
        traces.append(
            go.Scatter(x=x, y=y, mode="lines", line=thin, name="interpolation, whole curve", hoverinfo="skip")
        )
    for i, (recipe, own) in enumerate(choice.group_by("recipe", maintain_order=True)):
        ends = {task: own.row(by_predicate=pl.col("task") == task, named=True) for task in (target, kept)}
        one, other = ends[target], ends[kept]
        free = not one["dominated_by"]
        traces.append(
            go.Scatter(
                x=[other["held_out_gain"]],
                y=[one["held_out_gain"]],
                error_x=_bar(other),
                error_y=_bar(one),
                mode="markers",
                name=label(recipe[0]),
                marker={"size": 10, "color": line(i)["color"], "symbol": "circle" if free else "circle-open"},
                hovertemplate="%{x:.4g}, %{y:.4g}",
            )
        )
    x, y = f"gain in {label(kept)}, which is to be kept", f"gain in {label(target)}, the target"
    made = figure(traces, x=x, y=y, height=440)
    return made.add_hline(y=0, line=CHANCE).add_vline(x=0, line=CHANCE)


def _bar(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the bar of an interval, where there is one."""
    gain, low, high = (row[f"held_out_{name}"] for name in ("gain", "gain_low", "gain_high"))
    if low is None:
        return None
    return {"array": [high - gain], "arrayminus": [gain - low], "thickness": 1, "width": 3}


@kind(make=DIRECTIONS, tables=("factors",), columns=("factor",), further=())
def factors_of_run(frames: Frames) -> go.Figure:
    """Learned factors of singular directions against their singular values, by projection and layer."""
    return factors_by_sigma(frames["factors"])


@kind(make=DIRECTIONS, tables=("choice", "points"), columns=("recipe",), further=())
def front_of_run(frames: Frames, *, task: str | None = None) -> go.Figure:
    """What each recipe gains of the target and of what is to be kept, held out; controls beside it."""
    choice = frames["choice"]
    names = {
        role: choice.filter(role=role)["task"].unique(maintain_order=True).to_list() for role in ("target", "kept")
    }
    target = pick("task", task, names["target"])
    return recipe_front(choice, frames["points"], target=target, kept=names["kept"][0])
