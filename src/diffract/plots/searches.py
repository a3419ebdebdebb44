"""Figures of searches: quality along curves of edits, on the lines between models, and in mixtures of three."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import polars as pl

from diffract.errors import SelectionError
from diffract.plots.choice import Frames, kind, pick, pick_task
from diffract.plots.style import (
    CHANCE,
    COLOURS,
    ROUNDED,
    SCALE,
    SERIES,
    banded,
    beside,
    between_pairs,
    colour_bar,
    dress,
    figure,
    label,
    level,
    line,
    name_both_axes,
    panels,
)

SPLITS = ("selection", "held-out")
MEASURES = {"gain": ("gain_low", "gain_high"), "quality": ("low", "high")}
"""What is drawn, and the columns of its interval."""

ORDERS = ("greedy", "reference", "magnitude", "first-order", "activation")
RANDOM = {"color": COLOURS["bars"], "dash": "solid", "width": 1}
TUNED = {"color": COLOURS["tuned"], "dash": "dot", "width": 1}


def rewind_curves(points: pl.DataFrame, task: str, *, measure: str = "gain") -> go.Figure:
    """Draw a panel for each split and a curve for each order, with bands of 95%; controls are thin and have none.

    Args:
        points: The points table of ``search rewind``.
        task: A name in it.
        measure: ``gain`` over the tuned model with its paired interval, or ``quality``.
    """
    own = points.filter(pl.col("task") == task).sort("fraction", nulls_last=True, maintain_order=True)
    splits = [split for split in SPLITS if split in own["split"]]
    contents = [
        _rewind_panel(own.filter(pl.col("split") == split), measure, legend=not i) for i, split in enumerate(splits)
    ]
    y = f"{label(task)}, gain over the tuned model" if measure == "gain" else label(task)
    made = panels(splits, contents, x="share of heads rewound", y=y, height=400)
    return beside(made).update_xaxes(tickformat=".0%")


@dataclass(frozen=True)
class Drawn:
    """A curve over the points of a search.

    Attributes:
        name: In the legend, made safe already; curves of one name are one entry.
        look: Of the line.
        rows: Its points.
        sure: Whether its intervals are drawn as a band; controls have none.
    """

    name: str
    look: dict[str, Any]
    rows: pl.DataFrame
    sure: bool


def _points_panel(
    drawn: Sequence[Drawn], ends: dict[str, pl.DataFrame], *, x: str, measure: str, hover: str, legend: bool
) -> list[go.Scatter]:
    """Curves of one panel, and a level for each model at the ends of the search."""
    low, high = MEASURES[measure]
    traces: list[go.Scatter] = []
    named: set[str] = set()
    for one in drawn:
        shown = legend and one.name not in named
        words: dict[str, Any] = {"name": one.name, "look": one.look, "legend": shown, "hover": hover}
        named.add(one.name)
        at, values, *band = (one.rows[column].to_list() for column in (x, measure, low, high))
        traces += banded(at, values, band if one.sure else None, **words)
    for name, look in (("tuned", TUNED), ("base", CHANCE)):
        if len(ends[name]):
            traces.append(level(ends[name][measure][0], name=name, look=look, legend=legend))
    return traces


def _rewind_panel(rows: pl.DataFrame, measure: str, *, legend: bool) -> list[go.Scatter]:
    base = pl.col("order") == "base"
    curves = rows.filter(~base).partition_by("order", "seed", "reverse", maintain_order=True)
    drawn = []
    for own in sorted(curves, key=lambda c: (not c["reverse"][0], c["order"][0] != "random")):  # controls behind
        order, reverse = own["order"][0], own["reverse"][0]
        drawn.append(Drawn(*_look(order, reverse=reverse), own, sure=not reverse and order != "random"))
    ends = {"tuned": rows.filter(pl.col("state") == 0), "base": rows.filter(base)}
    hover = "%{x:.1%} of heads: %{y:.4g}"
    return _points_panel(drawn, ends, x="fraction", measure=measure, hover=hover, legend=legend)


def _look(order: str, *, reverse: bool) -> tuple[str, dict[str, Any]]:
    """Return what a curve is called, and its line; an order has the same colour in every figure."""
    if order == "random":
        return "random", RANDOM
    index = ORDERS.index(order) if order in ORDERS else len(ORDERS)
    if reverse:
        return f"{label(order)}, reversed", {"color": SERIES[index % len(SERIES)][0], "dash": "dot", "width": 1}
    return label(order), line(index)


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
    bar = colour_bar("barrier", **ROUNDED)
    made.update_layout(
        coloraxis={"colorscale": SCALE, "reversescale": True, "cmin": 0, "cmax": highest, "colorbar": bar}
    )
    return name_both_axes(made.update_layout(margin={"r": 90}), names)


def _matrix(rows: pl.DataFrame, names: Sequence[str]) -> go.Heatmap:
    known = {(row["a"], row["b"]): row for row in rows.iter_rows(named=True)}

    def cell(a: str, b: str) -> dict[str, Any] | None:
        return known.get((a, b), known.get((b, a)))

    grid = [[cell(a, b) for b in names] for a in names]
    return between_pairs(
        names,
        [[None if c is None else c["barrier"] for c in row] for row in grid],
        [["" if c is None else f"{c['barrier']:.3g}{' ✓' if c['connected'] else ''}" for c in row] for row in grid],
        customdata=[["" if c is None else _interval(c["low"], c["high"]) for c in row] for row in grid],
        hovertemplate="%{z:.4g}, 95%: %{customdata}<extra></extra>",
        coloraxis="coloraxis",
    )


def _interval(low: float | None, high: float | None) -> str:
    return "not known" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def curves(
    table: pl.DataFrame, *, x: str, y: str, title: str = "", log_x: bool = False, height: int = 340, zero: bool = False
) -> go.Figure:
    """Draw y against x with the interval of each point as a band.

    Args:
        table: Columns ``name``, ``x``, ``y``, and ``low``, ``high`` where there are intervals; names are untrusted.
        x: Title of the x axis.
        y: Title of the y axis.
        title: Of the figure.
        log_x: Draw x logarithmically; what is not positive is left out.
        height: In pixels.
        zero: Mark y = 0.
    """
    known = table.filter(pl.col("y").is_not_null() & pl.col("x").is_not_null())
    if log_x:
        known = known.filter(pl.col("x") > 0)
    traces: list[go.Scatter] = []
    for index, name in enumerate(known["name"].unique(maintain_order=True)):
        rows = known.filter(pl.col("name") == name).sort("x", maintain_order=True)
        x_values, y_values, *ends = (rows[column].to_list() for column in ("x", "y", "low", "high") if column in rows)
        sure = ends if len(ends) == 2 and rows["low"].null_count() == 0 else None
        words: dict[str, Any] = {"name": label(name), "look": line(index), "legend": True}
        traces += banded(x_values, y_values, sure, **words, hover="%{x:.4g}: %{y:.4g}")
    made = beside(figure(traces, x=x, y=y, title=title, height=height)).update_yaxes(exponentformat="none")
    if log_x:
        made.update_xaxes(type="log", dtick="D2", tickformat="~s")
    if zero:
        made.add_hline(y=0, line={"color": "#9ca3af", "dash": "dot", "width": 1})
    return made


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
    contents = [_path_panel(pair, tasks, legend=not i) for i, pair in enumerate(pairs)]
    return panels(titles, contents, x="weight of the second", y="quality", height=220, columns=WIDEST, legend=True)


def _path_panel(pair: pl.DataFrame, tasks: Sequence[str], *, legend: bool) -> list[go.Scatter]:
    traces: list[go.Scatter] = []
    for index, task in enumerate(tasks):
        rows = pair.filter(pl.col("task") == task).sort("at")
        if rows.is_empty():
            continue
        x, y, *ends = (rows[column].to_list() for column in ("at", "quality", "low", "high"))
        look = line(index)
        traces += banded(x, y, ends, name=label(task), look=look, legend=legend, hover="at %{x:.3g}: %{y:.4g}")
        straight: dict[str, Any] = {"color": look["color"], "dash": "dot", "width": 1}
        traces.append(_plain([x[0], x[-1]], [rows["linear"][0], rows["linear"][-1]], straight))
        worst = rows.row(int(rows["gap"].arg_max() or 0), named=True)
        if worst["gap"] > 0:
            traces.append(_plain([worst["at"]] * 2, [worst["linear"], worst["quality"]], {"color": COLOURS["delta"]}))
    return traces


def _plain(x: list[float], y: list[float], look: dict[str, Any]) -> go.Scatter:
    return go.Scatter(x=x, y=y, mode="lines", line=look, hoverinfo="skip", showlegend=False)


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
    colours = {"colorscale": SCALE, "showscale": True, "colorbar": colour_bar(label(task), **ROUNDED)}
    trace = go.Scatterternary(
        a=a,
        b=b,
        c=c,
        mode="markers",
        marker={"size": MARK, "color": rows["quality"].to_list(), **colours},
        customdata=[_interval(low, high) for low, high in rows.select("low", "high").iter_rows()],
        hovertemplate="%{a:.2g} %{b:.2g} %{c:.2g}: %{marker.color:.4g}, 95%: %{customdata}<extra></extra>",
        cliponaxis=False,
    )
    made = dress(go.Figure([trace]), title=label(task), height=420)
    corners = zip(("aaxis", "baxis", "caxis"), names, strict=True)
    axes = {axis: {"title": {"text": name}, "min": 0} for axis, name in corners}
    return made.update_layout(ternary={"sum": 1, "bgcolor": "rgba(0,0,0,0)", **axes}, margin={"t": 60, "r": 90})


AGAINST = {"energy": "share of ||ΔW||² kept", "bytes": "share of bytes kept"}
RULES = ("drop", "energy", "tail", "random", "random-energy", "dare-energy", "dare-bytes", "donoho-gavish", "mp-edge")
SINGLE = ("donoho-gavish", "mp-edge")
PLAIN = ("drop", "energy")


def truncation_curves(points: pl.DataFrame, task: str, *, measure: str = "gain") -> go.Figure:
    """Draw a panel against the energy that is kept, and one against the bytes; seeds of one control are one colour.

    The axis shows the rules and both models; single entries can do far worse, which zooming out shows.

    Args:
        points: The points table of ``search truncate``; the held-out split is drawn where it is as full as the other.
        task: A name in it.
        measure: ``gain`` over the tuned model with its paired interval, or ``quality``.
    """
    own = points.filter(pl.col("task") == task)
    # A search with a small budget scores few points held out; half a curve would mislead.
    by_split = {split: own.filter(pl.col("split") == split) for split in ("held-out", "selection")}
    split, rows = max(by_split.items(), key=lambda item: item[1].height)
    contents = [_truncation_panel(rows, against, measure, legend=not i) for i, against in enumerate(AGAINST)]
    y = f"{label(task)}, gain over the tuned model" if measure == "gain" else label(task)
    made = beside(panels(list(AGAINST.values()), contents, x=f"{split} split", y=y, height=400))
    # what the rules and both models span, and a quarter more on each side
    near = rows.filter(pl.col("rule").is_in(["base", *PLAIN]) | (pl.col("state") == 0))[measure].to_list()
    margin = 0.25 * (max(near, default=0.0) - min(near, default=0.0))
    return made.update_yaxes(range=[min(near) - margin, max(near) + margin] if margin else None)


def _truncation_panel(rows: pl.DataFrame, against: str, measure: str, *, legend: bool) -> list[go.Scatter]:
    base = pl.col("rule") == "base"
    drawn = []
    for own in rows.filter(~base).partition_by("rule", "seed", maintain_order=True):
        rule = own["rule"][0]
        shown = own.filter(pl.col("fraction") == 1) if rule in SINGLE else own.sort(against)
        look = line(RULES.index(rule) if rule in RULES else len(RULES), 2 if rule in PLAIN else 1)
        drawn.append(Drawn(label(rule), look, shown, sure=rule in PLAIN))
    ends = {"tuned": rows.filter(pl.col("state") == 0), "base": rows.filter(base)}
    traces = _points_panel(drawn, ends, x=against, measure=measure, hover="%{x:.3g}: %{y:.4g}", legend=legend)
    for trace in traces:
        if trace.name in SINGLE:
            trace.update(mode="markers", marker={"size": 9, "symbol": "diamond"})
    return traces


SEARCH_REWIND = "diffract search rewind BASE TUNED -o RUN"
SEARCH_TRUNCATE = "diffract search truncate BASE TUNED -o RUN"
CONNECT = "diffract connect BASE NAME=MODEL NAME=MODEL --eval TASKS -o RUN"


@kind(make=SEARCH_REWIND, tables=("points",), columns=("order",), further=())
def rewind_of_run(frames: Frames, *, task: str | None = None, metric: str | None = None) -> go.Figure:
    """Quality as more and more heads go back to the base, by several orders, on both splits."""
    points = frames["points"]
    return rewind_curves(points, pick_task(points, task), measure=pick("metric", metric, list(MEASURES)))


@kind(make=SEARCH_TRUNCATE, tables=("points",), columns=("rule",), further=())
def truncation_of_run(frames: Frames, *, task: str | None = None, metric: str | None = None) -> go.Figure:
    """Quality against how much energy, and how many bytes, of the change are kept, beside controls."""
    points = frames["points"]
    return truncation_curves(points, pick_task(points, task), measure=pick("metric", metric, list(MEASURES)))


@kind(make=CONNECT, tables=("paths",), further=())
def paths_of_run(frames: Frames, *, task: str | None = None) -> go.Figure:
    """Quality on the lines between models, and barriers."""
    paths = frames["paths"]
    return model_paths(paths, task=None if task is None else pick_task(paths, task))


@kind(make=CONNECT, tables=("pairs",), further=())
def connectivity_of_run(frames: Frames, *, task: str | None = None) -> go.Figure:
    """Barriers between each pair of models."""
    pairs = frames["pairs"]
    return connectivity_matrix(pairs, task=None if task is None else pick_task(pairs, task))


@kind(make=CONNECT, tables=("simplex",), further=())
def simplex_of_run(frames: Frames, *, task: str | None = None) -> go.Figure:
    """Quality of mixtures of three models."""
    simplex = frames["simplex"]
    if simplex.is_empty():
        raise SelectionError("the run has no simplex: that takes three models, and a budget that suffices.")
    return model_simplex(simplex, pick_task(simplex, task))
