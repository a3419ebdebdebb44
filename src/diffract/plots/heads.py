"""Figures of heads: maps over layers and heads, how the change is spread over them, domains against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from diffract.attention import by_model
from diffract.errors import SelectionError
from diffract.plots.choice import SCAN_OR_COMPARE, Frames, kind, pick, pick_metric, rows_of_model
from diffract.plots.style import (
    CHANCE,
    COLOURS,
    DIVERGING,
    ROUNDED,
    SCALE,
    between_pairs,
    caption,
    colour_bar,
    figure,
    label,
    line,
    name_both_axes,
    panels,
)
from diffract.stats import reference_score


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
    bar = colour_bar(label(metric), **ROUNDED)
    hover = f"layer %{{y}}, {across} %{{x}}<br>{label(metric)} %{{z:.4g}}<extra></extra>"
    trace = go.Heatmap(z=z, x=x, y=y, colorscale=SCALE, colorbar=bar, hovertemplate=hover, xgap=1, ygap=1)
    made = figure([trace], x=across, y="layer", title=title, height=260)
    return made.update_layout(
        xaxis={"type": "category", "showgrid": False},
        yaxis={"type": "category", "autorange": "reversed", "showgrid": False},
    )


MEANINGS = {"spearman": "Spearman's ρ of the heads' changes", "cosine": "Cosine of the changes"}


def domain_matrix(domains: pl.DataFrame, column: str = "spearman") -> go.Figure:
    """Draw how alike each pair of domains is, in numbers on colours from -1 to 1; the diagonal is left empty.

    Args:
        domains: a, b, and the column; one row per pair.
        column: ``spearman`` or ``cosine``.
    """
    names = list(dict.fromkeys([*domains["a"], *domains["b"]]))
    known = {(a, b): value for a, b, value in domains.select("a", "b", column).iter_rows()}
    grid = [[None if a == b else known.get((a, b), known.get((b, a))) for b in names] for a in names]
    shown = [label(name) for name in names]
    texts = [["" if v is None else f"{v:.2f}" for v in row] for row in grid]
    look: dict[str, Any] = {"zmin": -1, "zmax": 1, "colorscale": DIVERGING, "showscale": False}
    look["customdata"] = [[f"{a}, {b}" for b in shown] for a in shown]
    trace = between_pairs(names, grid, texts, **look, hovertemplate="%{customdata}: %{z:.4g}<extra></extra>")
    made = figure([trace], x="", y="", title=MEANINGS.get(column, label(column)), height=340)
    return name_both_axes(made, names, constrain="domain").update_yaxes(scaleanchor="x")


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
    look: dict[str, Any] = {"x": list(heads), "y": list(layers), "coloraxis": "coloraxis", "xgap": 1, "ygap": 1}
    hover = "layer %{y}, head %{x}: %{z:.4g}<extra>"
    contents = [
        [go.Heatmap(z=grid, **look, hovertemplate=f"{hover}{label(name)}</extra>")] for name, grid in grids.items()
    ]
    height = min(420, max(150, 14 * len(layers)))
    made = panels([label(name) for name in grids], contents, x="head", y="layer", title=title, height=height)
    known = [abs(v) for grid in grids.values() for row in grid for v in row if v is not None]
    limits = {"cmin": -max(known), "cmax": max(known)} if centred and known else {}
    if known and not max(known):  # left to itself plotly puts a lone zero between -0.5 and 0.5
        limits = {"cmin": -1 if centred else 0, "cmax": 1}
    bar = colour_bar(scale, **ROUNDED)
    made.update_layout(coloraxis={"colorscale": colours, "colorbar": bar, **limits}, margin={"r": 90})
    made.update_xaxes(type="category", showgrid=False, ticks="")
    return made.update_yaxes(type="category", autorange="reversed", showgrid=False, ticks="")


PLACES = 7
"""Beside each other in a layer, so that points of nearly the same height can be told apart."""


def layer_violins(metrics: pl.DataFrame, metric: str, *, colour: str | None = None, title: str = "") -> go.Figure:
    """Draw a box and all points per layer.

    Args:
        metrics: Rows of one model of the metrics table.
        metric: A column of it.
        colour: A column that colours the points, such as ``left_agreement_mean``. Points without it are left grey.
        title: Untrusted.
    """
    rows = metrics.filter(pl.col(metric).is_not_null(), pl.col("layer").is_not_null()).sort("layer")
    layers, values, names = [str(n) for n in rows["layer"]], rows[metric].to_list(), rows["name"].to_list()
    if colour is None:
        made = layer_boxes(layers, values, names, metric=metric)
    else:
        made = coloured_boxes(layers, values, names, rows[colour].to_list(), metric=metric, colour=colour)
    return made.update_layout(title_text=label(title))


def layer_boxes(layers: Sequence[str], values: Sequence[float], names: Sequence[str], *, metric: str) -> go.Figure:
    """Draw values by layer, names on hover."""
    trace = _violin(
        x=list(layers),
        y=list(values),
        text=[label(n) for n in names],
        points="all",
        jitter=0.35,
        pointpos=0,
        marker={"size": 4, "opacity": 0.6},
        hoveron="points",
        hovertemplate="%{text}: %{y:.4g}<extra></extra>",
    )
    return figure([trace], x="layer", y=label(metric), height=340).update_xaxes(type="category")


def coloured_boxes(
    layers: Sequence[str],
    values: Sequence[float],
    names: Sequence[str],
    shades: Sequence[float | None],
    *,
    metric: str,
    colour: str,
) -> go.Figure:
    """Draw values by layer, each point coloured by another value."""
    ticks = list(dict.fromkeys(layers))
    place = {layer: float(i) for i, layer in enumerate(ticks)}
    x = [place[layer] for layer in layers]
    points = list(zip(_apart(x), values, names, shades, strict=True))
    bar = colour_bar(label(colour))
    look = {"size": 5.5, "colorscale": SCALE, "colorbar": bar, "line": {"width": 0.5, "color": "white"}}
    known = [point for point in points if point[3] is not None]
    unknown = [point for point in points if point[3] is None]
    traces = [
        _violin(x=x, y=list(values), points=False, hoverinfo="skip", width=0.9),
        _points(known, {**look, "color": [shade for *_, shade in known]}, f"<br>{label(colour)} %{{marker.color:.4g}}"),
        _points(unknown, {"size": 5, "color": COLOURS["bars"]}, ""),
    ]
    made = figure(traces, x="layer", y=label(metric), height=380, showlegend=False)
    return made.update_xaxes(tickvals=list(range(len(ticks))), ticktext=ticks, showgrid=False)


def _points(points: Sequence[tuple[float, float, str, Any]], marker: dict[str, Any], more: str) -> go.Scatter:
    """Points at (x, y) with a name each."""
    x, y, names, _ = zip(*points, strict=True) if points else ((), (), (), ())
    hover = f"%{{text}}: %{{y:.4g}}{more}<extra></extra>"
    text = [label(name) for name in names]
    return go.Scatter(x=list(x), y=list(y), text=text, mode="markers", marker=marker, hovertemplate=hover)


def _violin(**details: Any) -> go.Violin:
    look = {"line": {"color": COLOURS["tuned"], "width": 1}, "fillcolor": "rgba(15,118,110,0.12)", "spanmode": "hard"}
    return go.Violin(box={"visible": True}, **look, **details)


def _apart(x: Sequence[float]) -> list[float]:
    """Spread points of one layer over places in turn; no chance is involved, so a figure is the same every time."""
    seen: dict[float, int] = {}
    shifted = []
    for value in x:
        seen[value] = seen.get(value, -1) + 1
        shifted.append(value + 0.4 * ((seen[value] * 3 % PLACES) / (PLACES - 1) - 0.5))
    return shifted


def lorenz(points: pl.DataFrame, models: pl.DataFrame) -> go.Figure:
    """Draw, for each domain, what share of the squared change the least changed heads have together.

    Args:
        points: The lorenz table. Of a domain without any change there is no curve.
        models: The models table, for ``head_gini``.
    """
    ginis = dict(models.select("model", "head_gini").iter_rows()) if "head_gini" in models.columns else {}
    traces = [go.Scatter(x=[0, 1], y=[0, 1], name="all heads alike", mode="lines", line=CHANCE, hoverinfo="skip")]
    for index, (name, rows) in enumerate(by_model(points).items()):
        known = rows.drop_nulls("change_share")
        shown, gini = label(name), ginis.get(name)
        traces.append(
            go.Scatter(
                x=known["heads_share"].to_list(),
                y=known["change_share"].to_list(),
                name=shown if gini is None else f"{shown} (Gini {gini:.2f})",
                mode="lines",
                line=line(index),
                hovertemplate=f"%{{x:.1%}} of heads: %{{y:.1%}} of the change<extra>{shown}</extra>",
            )
        )
    y = "share of the squared change"
    inside = {"orientation": "v", "x": 0.02, "xanchor": "left", "y": 0.98, "yanchor": "top"}
    made = figure(traces, x="share of heads, least changed first", y=y, height=460, width=480, legend=inside)
    percent = {"tickformat": ".0%", "dtick": 0.2, "ticklen": 4, "tickcolor": "rgba(0,0,0,0)"}
    made.update_layout(margin={"r": 28}).update_xaxes(**percent, range=[0, 1], constrain="domain")
    return made.update_yaxes(**percent, range=[0, 1.005], scaleanchor="x", constrain="domain")


SIGNED = {
    "effect": "gain of rewinding the head alone",
    "first_order": "gain that the slope of the loss promises",
    "reference": "reference-domain score",
}
SIZES = {"magnitude": "Frobenius norm of the head's change D", "activation": "root mean square of D x"}


def head_effects(effects: pl.DataFrame, *, metric: str = "effect") -> go.Figure:
    """Draw a map over layers and heads; orange heads are better rewound, purple ones are needed.

    Args:
        effects: The effects table of ``search rewind``.
        metric: ``effect``, or what a cheaper order goes by: ``first_order``, ``reference``, ``magnitude``,
            ``activation``.
    """
    meaning, signed = (SIGNED | SIZES)[metric], metric in SIGNED
    task = effects["task"][0] if len(effects) else ""
    name = f"{meaning} ({task}, selection split)" if metric in ("effect", "first_order", "activation") else meaning
    found = head_grids(effects.with_columns(model=pl.lit(name)), metric)
    colours, scale = DIVERGING if signed else SCALE, metric.replace("_", " ")
    return heat_panels(found.grids, found.layers, found.heads, scale=scale, colours=colours, centred=signed)


def reference_scores(heads: pl.DataFrame, reference: str) -> go.Figure:
    """Draw s = scale01(d of the domain) - scale01(d of the reference) for every other domain.

    Args:
        heads: The heads table: model, layer, block, head, ``head_delta``.
        reference: A model of it.
    """
    found = head_grids(heads, "head_delta")
    against = as_array(found.grids[reference])
    scores = {name: reference_score(as_array(grid), against) for name, grid in found.grids.items() if name != reference}
    grids = {name: as_grid(score) for name, score in scores.items()}
    title = f"scaled change minus that of {label(reference)}"
    return heat_panels(grids, found.layers, found.heads, scale="score", colours=DIVERGING, title=title, centred=True)


def as_array(grid: Grid) -> np.ndarray:
    """Return a grid as an array, with NaN for what is not known."""
    return np.array(grid, dtype=float)


def as_grid(values: np.ndarray) -> Grid:
    """Return an array as a grid, with ``None`` for NaN."""
    return [[None if math.isnan(v) else v for v in row] for row in values.tolist()]


HEADS_RUN = "diffract heads BASE TUNED -o RUN"
CHANGE_FIRST = ("delta_relative", "effective_rank", "stable_rank")
SHADE = "left_agreement_mean"


@kind(make=HEADS_RUN, tables=("heads",), columns=tuple(SCALES), further=())
def heads_of_run(frames: Frames, *, model: str | None = None, metric: str | None = None) -> go.Figure:
    """Change of every head, a map for each domain, the same colours in all."""
    chosen = pick("metric", metric, [m for m in SCALES if m in frames["heads"].columns])
    return head_maps(_of_domain(frames["heads"], model), metric=chosen)


@kind(make=HEADS_RUN, tables=("lorenz",), columns=("change_share",))
def lorenz_of_run(frames: Frames, *, model: str | None = None) -> go.Figure:
    """How unevenly each domain's change is spread over heads."""
    return lorenz(_of_domain(frames["lorenz"], model), frames["models"])


@kind(make="diffract heads BASE TUNED1 TUNED2 -o RUN", tables=("heads",), columns=("head_delta",), further=())
def scores_of_run(frames: Frames, *, model: str | None = None, reference: str | None = None) -> go.Figure:
    """Which heads a domain changed more than a reference domain did."""
    names = frames["heads"]["model"].unique(maintain_order=True).to_list()
    if len(names) < 2:
        raise SelectionError(
            "scores hold domains against each other: the run needs two tuned models. Make one with "
            "`diffract heads BASE TUNED1 TUNED2 -o RUN`."
        )
    against = pick("reference", reference, names)
    others = [name for name in names if name != against]
    shown = others if model is None else [pick("model", model, others)]
    return reference_scores(frames["heads"].filter(pl.col("model").is_in([*shown, against])), against)


@kind(make=SCAN_OR_COMPARE, tables=("metrics",))
def violins_of_run(
    frames: Frames, *, metric: str | None = None, model: str | None = None, projection: str | None = None
) -> go.Figure:
    """Spread of a metric within each layer, coloured by how far singular vectors agree."""
    rows = rows_of_model(frames, model, projection)
    chosen = pick_metric(rows, metric, CHANGE_FIRST)
    shaded = SHADE in rows.columns and chosen != SHADE and rows[SHADE].count() > 0
    title = ", ".join(filter(None, [projection, rows["model"][0]]))
    return layer_violins(rows, chosen, colour=SHADE if shaded else None, title=title)


@kind(make=SCAN_OR_COMPARE, tables=("metrics",))
def head_heatmap_of_run(
    frames: Frames, *, metric: str | None = None, model: str | None = None, projection: str | None = None
) -> go.Figure:
    """A metric over the layers and heads of one projection."""
    rows = rows_of_model(frames, model, None)
    chosen = pick_metric(rows, metric, CHANGE_FIRST)
    cut = rows.filter(pl.coalesce("head", "kv_head").is_not_null())["projection"].unique(maintain_order=True).to_list()
    return head_heatmap(rows, chosen, pick("projection", projection, cut, "q"), model=rows["model"][0])


@kind(make="diffract search rewind BASE TUNED -o RUN", tables=("effects",), columns=("effect",), further=())
def effects_of_run(frames: Frames, *, metric: str | None = None) -> go.Figure:
    """What rewinding each head alone gains, or what cheaper orders go by."""
    effects = frames["effects"]
    known = [name for name in (SIGNED | SIZES) if effects[name].count() > 0]
    return head_effects(effects, metric=pick("metric", metric, known))


def _of_domain(table: pl.DataFrame, wanted: str | None) -> pl.DataFrame:
    if wanted is None:
        return table
    names = table["model"].unique(maintain_order=True).to_list()
    return table.filter(pl.col("model") == pick("model", wanted, names))
