"""Maps over layers and heads, one a model, with the same colours in all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import polars as pl

from diffract.plots.panels import panels
from diffract.plots.style import SCALE, label

Grid = list[list[float | None]]
SCALES = {
    "head_delta": "||ΔW||<sub>F</sub> of the head",
    "head_delta_relative": "||ΔW||<sub>F</sub> / ||W||<sub>F</sub>",
}


@dataclass(frozen=True)
class HeadGrids:
    """Values by layer and head, for several models over the same layers and heads.

    Attributes:
        layers: Names of the rows.
        heads: Names of the columns.
        grids: By model; ``None`` where a value is not known.
    """

    layers: list[str]
    heads: list[str]
    grids: dict[str, Grid]


def head_grids(heads: pl.DataFrame, column: str) -> HeadGrids:
    """Arrange a column of the heads table; models stand in its order, layers and heads ascend."""
    several = heads["block"].n_unique() > 1
    place = pl.concat_str(pl.col("layer").cast(pl.String), "block", separator=" ") if several else pl.col("layer")
    named = heads.with_columns(place=place.cast(pl.String))
    layers = named.select("layer", "block", "place").unique().sort("layer", "block")["place"].to_list()
    columns = named["head"].unique().sort().to_list()
    grids = {}
    for model in named["model"].unique(maintain_order=True):
        rows = named.filter(pl.col("model") == model).select("place", "head", column).iter_rows()
        known = {(place, head): value for place, head, value in rows}
        grids[model] = [[known.get((layer, head)) for head in columns] for layer in layers]
    return HeadGrids(layers, [str(head) for head in columns], grids)


def head_maps(heads: pl.DataFrame, *, metric: str = "head_delta") -> go.Figure:
    """Draw how much each head changed, in each domain.

    Args:
        heads: The heads table: model, layer, block, head, and the metric.
        metric: ``head_delta`` or ``head_delta_relative``.
    """
    found = head_grids(heads, metric)
    return heat_panels(found.grids, found.layers, found.heads, scale=SCALES.get(metric, label(metric)), colours=SCALE)


def heat_panels(
    grids: Mapping[str, Grid],
    layers: Sequence[str],
    heads: Sequence[str],
    *,
    scale: str,
    colours: str,
    title: str = "",
    centred: bool = False,
) -> go.Figure:
    """Draw a heat map for each name, all with one colour bar.

    Args:
        grids: By name; names are untrusted.
        layers: Names of the rows.
        heads: Names of the columns.
        scale: What the colours say, made safe already.
        colours: A colour scale.
        title: Made safe already.
        centred: Put zero in its middle.
    """
    contents = [[_map(grid, layers, heads, name)] for name, grid in grids.items()]
    height = min(420, max(150, 14 * len(layers)))
    made = panels([label(name) for name in grids], contents, x="head", y="layer", title=title, height=height)
    known = [abs(v) for grid in grids.values() for row in grid for v in row if v is not None]
    limits = {"cmin": -max(known), "cmax": max(known)} if centred and known else {}
    bar = {"title": {"text": scale, "side": "right"}, "thickness": 10, "outlinewidth": 0, "tickformat": ".3~g"}
    made.update_layout(coloraxis={"colorscale": colours, "colorbar": bar, **limits}, margin={"r": 90})
    made.update_xaxes(type="category", showgrid=False, ticks="")
    return made.update_yaxes(type="category", autorange="reversed", showgrid=False, ticks="")


def _map(grid: Grid, layers: Sequence[str], heads: Sequence[str], name: str) -> go.Heatmap:
    hover: dict[str, Any] = {"hovertemplate": f"layer %{{y}}, head %{{x}}: %{{z:.4g}}<extra>{label(name)}</extra>"}
    return go.Heatmap(z=grid, x=list(heads), y=list(layers), coloraxis="coloraxis", xgap=1, ygap=1, **hover)
