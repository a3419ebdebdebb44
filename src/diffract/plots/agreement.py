"""How far singular vectors of base and tuned agree, along the spectrum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import polars as pl

from diffract.plots.style import CHANCE, COLOURS, figure, label

SIDES = ("left", "right")


def agreement(spectra: pl.DataFrame, metrics: pl.DataFrame, name: str, *, model: str) -> go.Figure:
    """Draw |cos| of matching vectors by rank, with the level that chance gives.

    Args:
        spectra: The spectra table.
        metrics: The metrics table, for the chance levels.
        name: Of the matrix.
        model: Name of the tuned model.
    """
    rows = spectra.filter(pl.col("model") == model, pl.col("name") == name)
    row = metrics.filter(pl.col("model") == model, pl.col("name") == name).to_dicts()
    curves = {side: _values(rows, f"{side}_agreement") for side in SIDES}
    chance = {side: row[0].get(f"{side}_agreement_chance") for side in SIDES} if row else {}
    return agreement_lines(curves, chance, title=label(name))


def agreement_lines(
    curves: Mapping[str, Sequence[float]], chance: Mapping[str, float | None], *, title: str = ""
) -> go.Figure:
    """Draw agreement of both sides and their chance levels."""
    longest = max((len(values) for values in curves.values()), default=0)
    traces = []
    for side in SIDES:
        values = list(curves.get(side, ()))
        ranks = list(range(1, len(values) + 1))
        colour = {"color": COLOURS[side], "width": 2}
        traces.append(go.Scatter(x=ranks, y=values, name=side, mode="lines", line=colour))
    for side in SIDES:
        level = chance.get(side)
        ends = [] if level is None else [level, level]
        colour = {**CHANCE, "color": COLOURS[side], "width": 1}
        traces.append(
            go.Scatter(x=[1, longest][: len(ends)], y=ends, name=f"{side} by chance", mode="lines", line=colour)
        )
    made = figure(traces, x="rank", y="|cos| of base and tuned vector", title=title)
    return made.update_yaxes(range=[0, 1.02])


def _values(spectra: pl.DataFrame, quantity: str) -> list[float]:
    rows = spectra.filter(pl.col("quantity") == quantity)["values"]
    return rows[0].to_list() if len(rows) else []
