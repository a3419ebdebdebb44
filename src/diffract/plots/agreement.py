"""What a change does along the spectrum of its base: how far singular vectors agree, and where its energy sits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import plotly.graph_objects as go
import polars as pl

from diffract.plots.choice import (
    COMPARE_RUN,
    Frames,
    base_model,
    curve,
    facts,
    kind,
    of_projection,
    part,
    pick_matrix,
    pick_model,
)
from diffract.plots.style import CHANCE, COLOURS, banded, caption, figure, label, level, line, panels

SIDES = ("left", "right")
WIDTHS = {"left": 2.5, "right": 1.5}
"""The first one drawn is the wider, so that it shows where both coincide."""

LABELLED = 0.08
"""Share of the ranks from which on a peak's band carries its name."""

SAME_RANK, SAME_SIGMA = "vectors of the same rank", "projected on base vectors of about the same σ"


def agreement(
    spectra: pl.DataFrame, metrics: pl.DataFrame, name: str, *, model: str, base: str | None = None
) -> go.Figure:
    """Draw |cos| of matching vectors by rank, with the level that chance gives.

    Where the tables have the agreement within a window of sigmas, it stands in a second panel; where they have the
    spectrum's peaks, the ranks that belong to one are shaded.

    Args:
        spectra: The spectra table.
        metrics: The metrics table, for the chance levels.
        name: Of the matrix.
        model: Name of the tuned model.
        base: Whose peaks are shaded; the tuned model's by default.
    """
    row = facts(metrics, model, name)
    ways = ("agreement", "agreement_window")
    curves = [{side: curve(spectra, model, name, f"{side}_{way}") for side in SIDES} for way in ways]
    chance = [{side: row.get(f"{side}_{way}_chance") for side in SIDES} for way in ways]
    peaks = curve(spectra, base or model, name, "peak")
    if not any(curves[1].values()):
        return agreement_lines(curves[0], chance[0], peaks=peaks, title=caption(model, name))
    contents = [_traces(curves[0], chance[0]), _traces(curves[1], chance[1], legend=False)]
    titles, y = (SAME_RANK, SAME_SIGMA), "|cos|, norm of the projection"
    made = panels(titles, contents, x="rank", y=y, title=caption(model, name), height=260, legend=True)
    made.update_layout(shapes=[*_shades(peaks), *_shades(peaks, "x2", "y2")])
    return made.update_yaxes(range=[0, 1.02])


def agreement_lines(
    curves: Mapping[str, Sequence[float]],
    chance: Mapping[str, float | None],
    *,
    peaks: Sequence[float] = (),
    title: str = "",
) -> go.Figure:
    """Draw agreement of both sides and their chance levels.

    Args:
        curves: By side.
        chance: By side.
        peaks: For each rank the peak of the spectrum that it belongs to, -1 for none.
        title: Made safe already.
    """
    made = figure(_traces(curves, chance), x="rank", y="|cos| of base and tuned vector", title=title)
    return made.update_yaxes(range=[0, 1.02]).update_layout(shapes=list(_shades(peaks)))


def _traces(
    curves: Mapping[str, Sequence[float]], chance: Mapping[str, float | None], *, legend: bool = True
) -> list[go.Scatter]:
    longest = max((len(values) for values in curves.values()), default=0)
    common: dict[str, Any] = {"mode": "lines", "showlegend": legend}
    traces = []
    for side in SIDES:
        values, look = list(curves.get(side, ())), {"color": COLOURS[side], "width": WIDTHS[side]}
        traces.append(go.Scatter(x=list(range(1, len(values) + 1)), y=values, name=side, line=look, **common))
    for side in SIDES:
        level = chance.get(side)
        ends = [] if level is None else [level, level]
        look = {**CHANCE, "color": COLOURS[side], "width": 1}
        traces.append(go.Scatter(x=[1, longest][: len(ends)], y=ends, name=f"{side} by chance", line=look, **common))
    return traces


def peak_runs(peaks: Sequence[float]) -> Iterator[tuple[int, int, int]]:
    """Yield peak, first and last rank of each run of ranks that belong to one peak.

    >>> list(peak_runs([0, 0, -1, 1]))
    [(0, 1, 2), (1, 4, 4)]
    """
    for peak, run in groupby(enumerate(peaks, start=1), key=lambda pair: pair[1]):
        ranks = [rank for rank, _ in run]
        if peak >= 0:
            yield int(peak), ranks[0], ranks[-1]


def peak_shape(peak: int, first: int, last: int, *, named: bool, x: str = "x", y: str = "y") -> dict[str, Any]:
    """Return the band behind the ranks of one peak."""
    look = {"size": 10, "color": COLOURS["base"]}
    return {
        "type": "rect",
        "xref": x,
        "yref": f"{y} domain",
        "x0": first - 0.5,
        "x1": last + 0.5,
        "y0": 0,
        "y1": 1,
        "layer": "below",
        "line": {"width": 0},
        "fillcolor": "rgba(107,114,128,0.14)",
        "label": {"text": f"peak {peak + 1}", "textposition": "bottom left", "font": look} if named else {},
    }


def _shades(peaks: Sequence[float], x: str = "x", y: str = "y") -> Iterator[dict[str, Any]]:
    """Yield a band for each run of ranks that belong to one peak; a narrow one has no room for its name."""
    for peak, first, last in peak_runs(peaks):
        yield peak_shape(peak, first, last, named=last - first + 1 > LABELLED * len(peaks), x=x, y=y)


@kind(make=COMPARE_RUN, tables=("metrics", "spectra"), quantities=("left_agreement",))
def agreement_of_run(frames: Frames, *, matrix: str | None = None, model: str | None = None) -> go.Figure:
    """How far singular vectors of base and tuned agree along the spectrum, beside chance."""
    model = pick_model(frames, model)
    name = pick_matrix(frames, matrix, model, "left_agreement")
    return agreement(frames["spectra"], frames["metrics"], name, model=model, base=base_model(frames, model))


TENTHS = tuple(f"energy_tenth_{k}" for k in range(1, 11))
PROFILE_RUN = "diffract compare BASE TUNED --metrics profile -o RUN"


def profile(metrics: pl.DataFrame, spectra: pl.DataFrame, *, model: str, title: str = "") -> go.Figure:
    """Draw where along the spectrum of the base the change sits, as energy over what noise and turns would give.

    On the left by tenth of the resolved directions, from the largest sigmas on: the median over the matrices of each
    projection and a band of their quartiles, beside noise of equal norm where the run has it. On the right by peak of
    the base's spectrum, for the matrices that have two and more: one peak is the bulk.

    Args:
        metrics: Rows of the metrics table, with ``energy_tenth_1`` and so on.
        spectra: The spectra table; of it ``energy_by_peak``.
        model: Name of the tuned model.
        title: Made safe already.
    """
    rows = metrics.filter(pl.col("model") == model, pl.any_horizontal(pl.col(TENTHS).is_not_null()))
    rows = rows.select(pl.all(), part().alias("_part"))
    parts = rows["_part"].unique(maintain_order=True).to_list()
    tenths = [trace for i, one in enumerate(parts) for trace in _tenths(rows.filter(_part=one), TENTHS, one, line(i))]
    noise = [f"{name}_noise" for name in TENTHS]
    if set(noise) <= set(rows.columns):
        tenths += _tenths(rows, noise, "noise of equal norm", {**CHANCE, "dash": "dot"})
    peaks = (
        spectra.filter(pl.col("model") == model, quantity="energy_by_peak")
        .join(rows.select("name", "_part"), on="name", maintain_order="left")
        .filter(pl.col("values").list.len() > 1)
        .with_columns(peak=pl.int_ranges(1, pl.col("values").list.len() + 1))
        .explode("values", "peak")
    )
    boxes = [
        go.Box(
            x=one["peak"].to_list(),
            y=one["values"].to_list(),
            name=label(name),
            legendgroup=label(name),
            showlegend=False,
            marker={"color": line(i)["color"], "size": 4},
            line={"width": 1},
            boxpoints="all",
        )
        for i, name in enumerate(parts)
        if len(one := peaks.filter(_part=name))
    ]
    titles = ("by tenth of the spectrum, largest σ first", "by peak, smallest σ first")
    last = float(peaks["peak"].max() or 1)  # pyright: ignore[reportArgumentType] (a number of a peak, or null)
    ends = ((0.5, 10.5), (0.5, last + 0.5))
    chance = [level(1, name="expected", look=CHANCE, legend=one is ends[0], ends=one) for one in ends]
    contents = [[*tenths, chance[0]], [*boxes, chance[1]]]
    made = panels(titles, contents, x="", y="energy of the change / expected", title=title, height=280, legend=True)
    return made.update_layout(boxmode="group").update_xaxes(dtick=1).update_yaxes(rangemode="tozero")


def _tenths(rows: pl.DataFrame, columns: Sequence[str], name: str, look: dict[str, Any]) -> list[go.Scatter]:
    """Return medians over matrices by tenth, and their quartiles."""
    q1, middle, q3 = (rows.select(pl.col(columns).quantile(q, "linear")).row(0) for q in (0.25, 0.5, 0.75))
    hover = "tenth %{x}: %{y:.3g}"
    return banded(range(1, 11), middle, (q1, q3), name=label(name), look=look, legend=True, hover=hover)


@kind(make=PROFILE_RUN, tables=("metrics", "spectra"), columns=TENTHS[:1])
def profile_of_run(frames: Frames, *, model: str | None = None, projection: str | None = None) -> go.Figure:
    """Where along the spectrum of the base the change sits, over what noise and turns would give."""
    model = pick_model(frames, model)
    rows = of_projection(frames["metrics"], projection)
    return profile(rows, frames["spectra"], model=model, title=label(model))
