"""Spectra along training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from numpy.typing import NDArray
from plotly.colors import sample_colorscale

from diffract.plots.evolution import OVER, time_column
from diffract.plots.style import LOG, figure, label

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
        traces += _curve(np.exp(grid), place, heights, colours[place], f"{what} {kept[place][0]}")
    if len(chosen) < len(samples):
        title += f" ({len(chosen)} of {len(samples)} checkpoints)"
    made = figure(traces, x="singular value", y=what, title=title, height=140 + 22 * max(8, len(kept)))
    ticks = {"tickvals": list(range(len(kept))), "ticktext": [time for time, _ in kept], "showgrid": False}
    return made.update_xaxes(**LOG).update_yaxes(**ticks, range=[-0.4, len(kept) - 1 + OVERLAP + 0.2])


def kernel_density(values: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Density of values by Gaussian kernels of Scott's bandwidth, n^(-1/5) times their standard deviation (n - 1).

    Values that are all equal get a bandwidth of one step of the grid.
    """
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    width = max(spread * len(values) ** -0.2, float(grid[1] - grid[0]))
    z = (grid[:, None] - values[None, :]) / width
    return np.exp(-0.5 * z * z).sum(axis=1) / (len(values) * width * math.sqrt(2 * math.pi))


def _grid(samples: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Points that all densities share."""
    if not samples:
        return np.linspace(0, 1, POINTS)
    low, high = min(float(v.min()) for v in samples), max(float(v.max()) for v in samples)
    margin = max(0.15 * (high - low), 0.1)
    return np.linspace(low - margin, high + margin, POINTS)


def _curve(
    x: NDArray[np.float64], place: int, heights: NDArray[np.float64], colour: str, name: str
) -> list[go.Scatter]:
    """The ground that a curve stands on, and the curve."""
    fill = colour.replace("rgb(", "rgba(").replace(")", ",0.8)")
    common: dict[str, Any] = {"showlegend": False, "mode": "lines"}
    ground = {"x": [float(x[0]), float(x[-1])], "y": [place, place], "line": {"color": colour, "width": 0.5}}
    look = {"line": {"color": colour, "width": 1.5, "simplify": False}, "fill": "tonexty", "fillcolor": fill}
    hover = {"name": name, "hovertemplate": f"σ %{{x:.4g}}<extra>{name}</extra>"}
    return [
        go.Scatter(**ground, hoverinfo="skip", **common),
        go.Scatter(x=x.tolist(), y=(place + heights).tolist(), **look, **hover, **common),
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
