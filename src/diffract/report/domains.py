"""What the page shows of heads and domains: whole figures, and what scores are made of."""

from __future__ import annotations

import json
from typing import Any

import plotly.graph_objects as go
import polars as pl

from diffract import plots
from diffract.plots.head_maps import Grid, HeadGrids
from diffract.plots.scores import scale01
from diffract.plots.style import DIVERGING
from diffract.report.packing import short, thin
from diffract.tables import HeadTables, Tables

CURVE_POINTS = 257
"""On each Lorenz curve."""


def domain_part(tables: Tables | HeadTables) -> dict[str, Any] | None:
    """Return figures of heads and domains; ``None`` where the run compares nothing, or has no heads."""
    if isinstance(tables, HeadTables):
        return _part(tables.heads, tables.domains)
    if tables.manifest["kind"] != "compare":
        return None
    heads = plots.heads_of(tables.metrics)
    return _part(heads, plots.domains_of(heads)) if len(heads) else None


def _part(heads: pl.DataFrame, domains: pl.DataFrame) -> dict[str, Any]:
    found = plots.head_grids(heads, "head_delta")
    figures = {"maps": plots.head_maps(heads), "lorenz": _lorenz(heads)}
    if len(domains):
        figures |= {c: plots.domain_matrix(domains, c) for c in ("spearman", "cosine") if c in domains.columns}
    return {
        "figures": {name: json.loads(str(made.to_json())) for name, made in figures.items()},
        "names": list(found.grids),
        "score": json.loads(str(_empty_score(found).to_json())),
        "scaled": [[[short(v) for v in row] for row in scale01(grid)] for grid in found.grids.values()],
        "chance": _chance(domains),
    }


def _lorenz(heads: pl.DataFrame) -> go.Figure:
    """As wide as its place, and with no more points than can be seen."""
    made = plots.lorenz(heads)
    made.for_each_trace(lambda t: t.update(x=thin(t["x"], CURVE_POINTS), y=thin(t["y"], CURVE_POINTS)))
    made.update_xaxes(constrain=None).update_yaxes(scaleanchor=None, constrain=None)
    return made.update_layout(width=None, height=340, title_text="How concentrated the change is")


def _empty_score(found: HeadGrids) -> go.Figure:
    """The figure of one score, with its axes and no values; a score is in [-1, 1]."""
    blank: Grid = [[None] * len(found.heads) for _ in found.layers]
    made = plots.heat_panels({"": blank}, found.layers, found.heads, scale="score", colours=DIVERGING)
    made.update_layout(title_text="Reference-domain score")
    return made.update_layout(height=340, coloraxis={"cmin": -1, "cmax": 1, "cmid": 0})


def _chance(domains: pl.DataFrame) -> float | None:
    """The widest of the pairs' standard deviations."""
    return max(domains["cosine_chance"].to_list(), default=None) if "cosine_chance" in domains.columns else None
