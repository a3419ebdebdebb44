"""Quality as more and more heads go back to the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from diffract.plots.style import (
    CHANCE,
    COLOURS,
    SCALE,
    SERIES,
    banded,
    beside,
    curve,
    dress,
    figure,
    label,
    level,
    line,
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


def _rewind_panel(rows: pl.DataFrame, measure: str, *, legend: bool) -> list[go.Scatter]:
    low, high = MEASURES[measure]
    traces: list[go.Scatter] = []
    named: set[str] = set()
    curves = rows.filter(pl.col("order") != "base").partition_by("order", "seed", "reverse", maintain_order=True)
    for own in sorted(curves, key=lambda c: (not c["reverse"][0], c["order"][0] != "random")):  # controls behind
        name, look = _look(own["order"][0], reverse=own["reverse"][0])
        words: dict[str, Any] = {"name": name, "look": look, "legend": legend and name not in named}
        words["hover"] = "%{x:.1%} of heads: %{y:.4g}"
        x, y = own["fraction"].to_list(), own[measure].to_list()
        if own["reverse"][0] or own["order"][0] == "random":
            traces.append(curve(x, y, **words))
        else:
            traces += banded(x, y, own[low].to_list(), own[high].to_list(), **words)
        named.add(name)
    for kind, look, own in (("tuned", TUNED, rows.filter(pl.col("state") == 0)), ("base", CHANCE, _base(rows))):
        if len(own):
            traces.append(level(own[measure][0], name=kind, look=look, legend=legend))
    return traces


def _base(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.filter(pl.col("order") == "base")


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
        traces += _one(rows, label(name), index)
    made = beside(figure(traces, x=x, y=y, title=title, height=height)).update_yaxes(exponentformat="none")
    if log_x:
        made.update_xaxes(type="log", dtick="D2", tickformat="~s")
    if zero:
        made.add_hline(y=0, line={"color": "#9ca3af", "dash": "dot", "width": 1})
    return made


def _one(rows: pl.DataFrame, name: str, index: int) -> list[go.Scatter]:
    x, y, look, hover = rows["x"].to_list(), rows["y"].to_list(), line(index), "%{x:.4g}: %{y:.4g}"
    if {"low", "high"} <= set(rows.columns) and rows["low"].null_count() == 0:
        low, high = rows["low"].to_list(), rows["high"].to_list()
        return banded(x, y, low, high, name=name, look=look, legend=True, hover=hover)
    return [curve(x, y, name=name, look=look, legend=True, hover=hover)]


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
    split = _fuller(own)
    rows = own.filter(pl.col("split") == split)
    contents = [_truncation_panel(rows, against, measure, legend=not i) for i, against in enumerate(AGAINST)]
    y = f"{label(task)}, gain over the tuned model" if measure == "gain" else label(task)
    made = beside(panels(list(AGAINST.values()), contents, x=f"{split} split", y=y, height=400))
    return made.update_yaxes(range=_near(rows, measure))


def _near(rows: pl.DataFrame, measure: str) -> list[float] | None:
    """Return what the rules and both models span, and a quarter more on each side."""
    own = rows.filter(pl.col("rule").is_in(["base", *PLAIN]) | (pl.col("state") == 0))[measure].to_list()
    margin = 0.25 * (max(own, default=0.0) - min(own, default=0.0))
    return [min(own) - margin, max(own) + margin] if margin else None


def _fuller(points: pl.DataFrame) -> str:
    counts = [points.filter(pl.col("split") == split).height for split in ("held-out", "selection")]
    return "held-out" if counts[0] >= counts[1] else "selection"


def _truncation_panel(rows: pl.DataFrame, against: str, measure: str, *, legend: bool) -> list[go.Scatter]:
    low, high = MEASURES[measure]
    traces: list[go.Scatter] = []
    named: set[str] = set()
    for own in rows.filter(pl.col("rule") != "base").partition_by("rule", "seed", maintain_order=True):
        rule = own["rule"][0]
        shown = own.filter(pl.col("fraction") == 1) if rule in SINGLE else own.sort(against)
        words = _words(rule, legend=legend and rule not in named)
        x, y = shown[against].to_list(), shown[measure].to_list()
        if rule in PLAIN:
            traces += banded(x, y, shown[low].to_list(), shown[high].to_list(), **words)
        else:
            traces.append(curve(x, y, **words))
        named.add(rule)
    base = rows.filter(pl.col("rule") == "base")
    tuned = rows.filter(pl.col("state") == 0)
    for kind, look, own in (("tuned", {"color": COLOURS["tuned"], "dash": "dot", "width": 1}, tuned),
                            ("base", CHANCE, base)):  # fmt: skip
        if len(own):
            traces.append(level(own[measure][0], name=kind, look=look, legend=legend))
    for trace in traces:
        if trace.name in SINGLE:
            trace.update(mode="markers", marker={"size": 9, "symbol": "diamond"})
    return traces


def _words(rule: str, *, legend: bool) -> dict[str, Any]:
    index = RULES.index(rule) if rule in RULES else len(RULES)
    look = line(index, 2 if rule in PLAIN else 1)
    return {"name": label(rule), "look": look, "legend": legend, "hover": "%{x:.3g}: %{y:.4g}"}
