"""Figures over training: a metric of all matrices or of one, and spectra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from numpy.typing import NDArray
from plotly.colors import sample_colorscale

from diffract.densities import kernel_density
from diffract.errors import SelectionError
from diffract.plots.choice import Frames, kind, of_projection, part, pick, pick_matrix, pick_metric, pick_model
from diffract.plots.style import COLOURS, LOG, figure, label, panels

AXES = ("lin-lin", "lin-log", "log-lin", "log-log")
OVER = {"tokens": "tokens", "step": "step", "order": "checkpoint"}
BAND = "rgba(15,118,110,0.18)"
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""The order of panels within a block; others follow in that of the tables."""

BREAK: dict[str, Any] = {"line": {"color": "#b91c1c", "width": 1.5, "dash": "dash"}}
"""How the place is drawn at which a series breaks."""

NAMES = ("median over layers and heads", "lower to upper quartile")


def evolution(
    metrics: pl.DataFrame,
    metric: str,
    *,
    over: str | None = None,
    matrix: str | None = None,
    axes: str = "lin-lin",
    broken: Sequence[str] = (),
) -> go.Figure:
    """Draw the median and the quartiles of a metric over training, a panel for each projection.

    Panels of one block have the same y axis. A line stands where the series breaks. Where noise with the norm of
    each change was drawn, its median is dotted.

    Args:
        metrics: The metrics table of a trajectory: ``order``, and ``tokens`` or ``step`` where they are known.
        metric: A column of it.
        over: ``tokens``, ``step`` or ``order``; the first of them that is known for every checkpoint.
        matrix: Draw this one alone.
        axes: Of y and x, each ``lin`` or ``log``. What is not positive is not on a logarithmic axis.
        broken: Checkpoints that fall out of line with the one before.
    """
    over = over or time_column(metrics)
    marks = metrics.filter(pl.col("model").is_in(list(broken)))[over].drop_nulls().unique().to_list() if broken else []
    known = metrics.filter(pl.col(metric).is_not_null() & pl.col(over).is_not_null()).sort("order", maintain_order=True)
    lost = axes.endswith("-log") and bool((known[over] <= 0).any())
    if lost:
        known = known.filter(pl.col(over) > 0)
    notes = {"without the checkpoint at 0": lost, "dashed: the series breaks": bool(marks)}
    note = ", ".join(text for text, holds in notes.items() if holds)
    words: dict[str, Any] = {"x": OVER[over], "y": label(metric), "title": note}
    if matrix is not None:
        rows = known.filter(pl.col("name") == matrix)
        words["title"] = ", ".join(filter(None, [label(matrix), words["title"]]))
        return _scaled(_marked(evolution_line(rows[over].to_list(), rows[metric].to_list(), **words), marks), axes)
    places = places_of(known)
    bands = quartiles(known, metric, over)
    contents = [_band(bands.filter(pl.col("part") == p), over, legend=not i) for i, p in enumerate(places["part"])]
    if (noise := f"{metric}_noise") in known.columns:
        medians = quartiles(known.filter(pl.col(noise).is_not_null()), noise, over)
        for i, p in enumerate(places["part"]):
            contents[i].append(_noise(medians.filter(pl.col("part") == p), over, legend=not i))
    titles = [label(p) for p in places["part"]]
    made = panels(titles, contents, **words, height=150 if len(titles) > 4 else 220, share_y=False, legend=True)
    _share_within_blocks(made, places["block"].to_list())
    return _scaled(_marked(made, marks), axes)


def _marked(made: go.Figure, marks: Sequence[float]) -> go.Figure:
    """Draw a line in every panel where the series breaks."""
    for place in marks:
        made.add_vline(x=place, **BREAK)
    return made


def places_of(metrics: pl.DataFrame) -> pl.DataFrame:
    """Return block and part of each panel: blocks as they come, their projections in the usual order."""
    parts = metrics.select("block", "projection", part().alias("part")).unique("part", maintain_order=True)
    usual = {projection: place for place, projection in enumerate(PROJECTIONS)}
    rank = pl.col("projection").replace_strict(usual, default=len(usual), return_dtype=pl.Int32)
    first = parts["block"].unique(maintain_order=True).to_list()
    block = pl.col("block").replace_strict({name: i for i, name in enumerate(first)}, return_dtype=pl.Int32)
    return parts.sort(block, rank, maintain_order=True)


def time_column(metrics: pl.DataFrame) -> str:
    """Return ``tokens``, ``step`` or ``order``: the first that every checkpoint has, and that grows with the order.

    Steps do not where a training run begins to count anew.
    """
    for column in OVER:
        if column in metrics.columns:
            times = metrics.select("order", time=pl.col(column)).unique().sort("order")["time"]
            if times.null_count() == 0 and bool((times.diff().drop_nulls() > 0).all()):
                return column
    return "order"


def quartiles(metrics: pl.DataFrame, metric: str, over: str) -> pl.DataFrame:
    """Return ``low``, ``middle`` and ``high`` of a metric for each ``part`` and checkpoint.

    Args:
        metrics: Rows in the order of the checkpoints, all with the metric.
        metric: A column.
        over: ``tokens``, ``step`` or ``order``.
    """
    value = pl.col(metric)
    numbers = {"low": value.quantile(0.25, "linear"), "middle": value.median(), "high": value.quantile(0.75, "linear")}
    return (
        metrics.with_columns(part=part())
        .group_by("part", *dict.fromkeys(["order", over]), maintain_order=True)
        .agg(**numbers)
    )


def evolution_line(times: Sequence[float], values: Sequence[float], *, x: str, y: str, title: str = "") -> go.Figure:
    """Draw one curve over time."""
    look: dict[str, Any] = {"line": {"color": COLOURS["tuned"], "width": 2}, "marker": {"size": 5}}
    trace = go.Scatter(x=list(times), y=list(values), mode="lines+markers", **look)
    return figure([trace], x=x, y=y, title=title)


def band_lines(rows: pl.DataFrame, over: str, *, y: str) -> go.Figure:
    """Draw median and quartiles of one part: rows of ``quartiles``."""
    return figure(_band(rows, over, legend=True), x=OVER[over], y=label(y), height=230)


def _band(rows: pl.DataFrame, over: str, *, legend: bool) -> list[go.Scatter]:
    """Median and quartiles; the band is the way along the lower quartile and back along the upper one."""
    times = rows[over].to_list()
    outline = {"x": times + times[::-1], "y": rows["low"].to_list() + rows["high"].to_list()[::-1]}
    common: dict[str, Any] = {"showlegend": legend}
    look = {"fill": "toself", "fillcolor": BAND, "line": {"width": 0}, "mode": "lines", "hoverinfo": "skip"}
    middle: dict[str, Any] = {"mode": "lines+markers", "marker": {"size": 4}, "line": {"color": COLOURS["tuned"]}}
    return [
        go.Scatter(x=times, y=rows["middle"].to_list(), name=NAMES[0], legendgroup="m", **middle, **common),
        go.Scatter(**outline, name=NAMES[1], legendgroup="b", **look, **common),
    ]


def _noise(rows: pl.DataFrame, over: str, *, legend: bool) -> go.Scatter:
    look: dict[str, Any] = {"mode": "lines", "line": {"color": COLOURS["base"], "dash": "dot"}, "legendgroup": "n"}
    return go.Scatter(
        x=rows[over].to_list(), y=rows["middle"].to_list(), name="noise of equal norm", showlegend=legend, **look
    )


def _share_within_blocks(made: go.Figure, blocks: Sequence[str]) -> None:
    first: dict[str, str] = {}
    for axis, block in zip(made.select_yaxes(), blocks, strict=False):
        name = axis.plotly_name.replace("axis", "")
        if first.setdefault(block, name) != name:
            axis.matches = first[block]


def _scaled(made: go.Figure, axes: str) -> go.Figure:
    y, x = axes.split("-")
    made.update_yaxes(**LOG if y == "log" else {})
    return made.update_xaxes(**LOG if x == "log" else {})


MOST = 24
"""Curves that can be told apart; of more checkpoints, so many are drawn, evenly spaced in their order."""

POINTS = 256
OVERLAP = 2.2
"""How high the highest curve rises, in distances between two curves."""

SCALE = "Viridis"


def ridge(
    spectra: pl.DataFrame, metrics: pl.DataFrame, names: Sequence[str], *, title: str = "", over: str | None = None
) -> go.Figure:
    """Draw the density of ln sigma at each checkpoint, of one matrix or of several pooled.

    Args:
        spectra: The spectra table of a trajectory, with ``sigma``.
        metrics: Its metrics table: ``model``, ``order``, and ``tokens`` or ``step`` where they are known.
        names: Of the matrices.
        title: Untrusted; the name of the only matrix by default.
        over: ``tokens``, ``step`` or ``order``, for the labels.
    """
    over = over or time_column(metrics)
    times = metrics.select("model", "order", time=pl.col(over)).unique("model", keep="first").sort("order")
    wanted = (pl.col("quantity") == "sigma") & pl.col("name").is_in(list(names))
    pooled = spectra.filter(wanted).group_by("model").agg(pl.col("values").explode())
    rows = times.join(pooled, on="model", how="inner", maintain_order="left")
    title = label(title or (names[0] if len(names) == 1 else f"{len(names)} matrices"))
    return ridge_lines(rows["values"].to_list(), [_count(t) for t in rows["time"]], what=OVER[over], title=title)


def ridge_lines(samples: Sequence[Sequence[float]], times: Sequence[str], *, what: str, title: str = "") -> go.Figure:
    """Draw the kernel density of the logarithms of each sample, the first one at the bottom.

    Args:
        samples: Singular values; what is not positive does not count.
        times: Their labels, made safe already.
        what: Of what the labels speak, such as ``tokens``.
        title: Made safe already.
    """
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(MOST, len(samples))).round().astype(int))
    logs = [np.log(v[v > 0]) for v in (np.asarray(samples[i], float) for i in chosen)]
    kept = [(times[i], v) for i, v in zip(chosen, logs, strict=True) if len(v)]
    grid = _grid([v for _, v in kept])
    densities = [kernel_density(v, grid) for _, v in kept]
    highest = max((float(d.max()) for d in densities), default=1.0)
    colours: Any = sample_colorscale(SCALE, np.linspace(0, 0.92, len(kept)).tolist()) if kept else []
    traces = []
    # From the top down, so that earlier curves stand before later ones.
    for place in reversed(range(len(kept))):
        heights = densities[place] * OVERLAP / highest
        name = f"{what} {kept[place][0]}"
        traces += _curve(np.exp(grid), place + heights, ground=place, colour=colours[place], name=name)
    if len(chosen) < len(samples):
        title += f" ({len(chosen)} of {len(samples)} checkpoints)"
    made = figure(traces, x="singular value", y=what, title=title, height=140 + 22 * max(8, len(kept)))
    ticks = {"tickvals": list(range(len(kept))), "ticktext": [time for time, _ in kept], "showgrid": False}
    return made.update_xaxes(**LOG).update_yaxes(**ticks, range=[-0.4, len(kept) - 1 + OVERLAP + 0.2])


def _grid(samples: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Points that all densities share."""
    if not samples:
        return np.linspace(0, 1, POINTS)
    low, high = min(float(v.min()) for v in samples), max(float(v.max()) for v in samples)
    margin = max(0.15 * (high - low), 0.1)
    return np.linspace(low - margin, high + margin, POINTS)


def _curve(x: NDArray[np.float64], y: NDArray[np.float64], *, ground: int, colour: str, name: str) -> list[go.Scatter]:
    """The ground that a curve stands on, and the curve."""
    fill = colour.replace("rgb(", "rgba(").replace(")", ",0.8)")
    common: dict[str, Any] = {"showlegend": False, "mode": "lines"}
    flat = {"x": [float(x[0]), float(x[-1])], "y": [ground, ground], "line": {"color": colour, "width": 0.5}}
    look = {"line": {"color": colour, "width": 1.5, "simplify": False}, "fill": "tonexty", "fillcolor": fill}
    hover = {"name": name, "hovertemplate": f"σ %{{x:.4g}}<extra>{name}</extra>"}
    return [
        go.Scatter(**flat, hoverinfo="skip", **common),
        go.Scatter(x=x.tolist(), y=y.tolist(), **look, **hover, **common),
    ]


def _count(value: float) -> str:
    """A number of tokens or steps for people.

    >>> _count(2_097_152_000), _count(2000), _count(512)
    ('2.1B', '2k', '512')
    """
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:g}"


TRAJECTORY = "diffract trajectory MODEL... -o RUN"


@kind(make=TRAJECTORY, tables=("metrics",), columns=("order",))
def evolution_of_run(
    frames: Frames,
    *,
    metric: str | None = None,
    matrix: str | None = None,
    projection: str | None = None,
    over: str | None = None,
    axes: str | None = None,
) -> go.Figure:
    """A metric over training: median and quartiles of each projection, or one matrix."""
    metrics = of_projection(frames["metrics"], projection)
    chosen = pick_metric(metrics, metric, ("effective_rank", "stable_rank"))
    names = metrics["name"].unique(maintain_order=True).to_list()
    one = None if matrix is None else pick("matrix", matrix, names)
    scales = pick("axes", axes, AXES)
    models = frames.get("models", pl.DataFrame())
    broken = models.filter("breaks")["model"].to_list() if "breaks" in models.columns else []
    time = _time_axis(metrics, over)
    return evolution(metrics, chosen, over=time, matrix=one, axes=scales, broken=broken)


@kind(make=TRAJECTORY, tables=("metrics", "spectra"), quantities=("sigma",), columns=("order",))
def ridge_of_run(
    frames: Frames,
    *,
    matrix: str | None = None,
    layer: int | None = None,
    projection: str | None = None,
    over: str | None = None,
) -> go.Figure:
    """Spectra over training, of one matrix or pooled over a layer or projection."""
    metrics, time = frames["metrics"], _time_axis(frames["metrics"], over)
    if layer is None and projection is None:
        names = [pick_matrix(frames, matrix, pick_model(frames, None), "sigma")]
        return ridge(frames["spectra"], metrics, names, over=time)
    if matrix is not None:
        raise SelectionError(
            "ridge draws one matrix, or pools those of a layer or projection. Leave out one of the two."
        )
    rows = of_projection(metrics, projection, layer)
    where = "all layers" if layer is None else f"layer {layer}"
    title = f"{where}, {projection or 'all matrices'}"
    return ridge(frames["spectra"], metrics, rows["name"].unique(maintain_order=True).to_list(), title=title, over=time)


def _time_axis(metrics: pl.DataFrame, wanted: str | None) -> str | None:
    known = [c for c in OVER if c in metrics.columns and metrics[c].count() > 0]
    return None if wanted is None else pick("time axis", wanted, known)
