"""Figures of one matrix: its singular values, the density of its eigenvalues with laws, where its tail begins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from diffract import densities as laws
from diffract.densities import Array, Row
from diffract.plots.choice import SCAN_OR_COMPARE, Frames, base_model, curve, facts, kind, pick, pick_matrix, pick_model
from diffract.plots.style import COLOURS, LEGEND_RIGHT, LOG, SERIES, caption, figure

DASHES = {"base": "dot", "tuned": "solid", "delta": "dash"}


def spectrum(spectra: pl.DataFrame, name: str, *, base: str, tuned: str | None = None) -> go.Figure:
    """Draw the sigmas of a matrix on a logarithmic axis.

    Args:
        spectra: The spectra table.
        name: Of the matrix.
        base: Name of the (base) model.
        tuned: Name of a tuned model, if there is one.
    """
    curves = {"base": curve(spectra, base, name, "sigma")}
    if tuned is not None:
        curves |= {"tuned": curve(spectra, tuned, name, "sigma"), "delta": curve(spectra, tuned, name, "delta_sigma")}
    return spectrum_lines(curves, title=caption(tuned or base, name))


def spectrum_lines(curves: Mapping[str, Sequence[float]], *, title: str = "") -> go.Figure:
    """Draw sigmas by rank: ``base``, ``tuned`` and ``delta``."""
    traces = [
        go.Scatter(
            x=list(range(1, len(values) + 1)),
            y=list(values),
            name=which,
            mode="lines",
            line={"color": COLOURS[which], "width": 2, "dash": DASHES[which]},
            hovertemplate="rank %{x}: %{y:.4g}<extra>" + which + "</extra>",
        )
        for which, values in curves.items()
    ]
    return figure(traces, x="rank", y="singular value", title=title).update_yaxes(**LOG)


FEWEST_BINS, MOST_BINS = 8, 60
POINTS = 400
Curve = tuple[Array, Array]


@dataclass(frozen=True)
class Bars:
    """A histogram whose bins are equally wide in ln lambda.

    Attributes:
        edges: Ascending, one more than shares.
        shares: Of all eigenvalues, zeros too, that lie in each bin.
    """

    edges: Array
    shares: Array

    def heights(self, *, log_y: bool) -> Array:
        """Density in each bin, per unit of lambda or of ln lambda."""
        return self.shares / np.diff(self.edges if log_y else np.log(self.edges))


@dataclass(frozen=True)
class DensityParts:
    """One spectrum beside what may describe it.

    Attributes:
        total: Number of eigenvalues.
        zeros: How many of them are zero, and in no bin.
        spectrum: ``None`` if all are zero.
        null: Of the permuted matrix, if it is known.
        laws: Points (lambda, rho) of ``mp``, ``sep``, ``pl``, ``tpl``, ``exp`` and ``ln``, where they are known. The
            Marchenko-Pastur law is scaled by the share of eigenvalues that are no spikes, each tail by the share of
            eigenvalues from its xmin on; ``sep`` is what row and column norms alone give.
    """

    total: int
    zeros: int
    spectrum: Bars | None
    null: Bars | None
    laws: dict[str, Curve]

    def floor(self, *, log_y: bool) -> float:
        """Where bars stand: below the lowest bar that a single eigenvalue can make."""
        if not log_y:
            return 0.0
        return 1e-3 if self.spectrum is None else 0.5 / (self.total * float(np.diff(self.spectrum.edges).max()))


def density_parts(
    eigenvalues: Sequence[float],
    shape: tuple[int, int],
    row: Row,
    *,
    null: Sequence[float] = (),
    norms: Sequence[float] = (),
    points: int = POINTS,
) -> DensityParts:
    """Return histograms of eigenvalues and the laws whose parameters are in ``row``.

    Args:
        eigenvalues: Not negative.
        shape: Of the matrix.
        row: What there is of ``mp_*``, ``pl_*``, ``tpl_*``, ``exp_*``, ``ln_*``.
        null: Eigenvalues of the permuted matrix.
        norms: Eigenvalues that follow the law of row and column norms, descending.
        points: On each curve.
    """
    values = np.asarray(eigenvalues, float)
    curves = {"mp": _bulk(values, shape, row, points), "sep": _quantiles(np.asarray(norms, float))} | {
        p: _tail(values, row, p, points) for p in laws.TAILS
    }
    return DensityParts(
        total=len(values),
        zeros=int(np.count_nonzero(~(values > 0))),
        spectrum=_histogram(values),
        null=_histogram(np.asarray(null, float)),
        laws={name: curve for name, curve in curves.items() if curve is not None},
    )


def _histogram(values: Array) -> Bars | None:
    """2 sqrt(n) bins, within limits."""
    shown = values[values > 0]
    if not len(shown):
        return None
    logs = np.log(shown)
    # Wide enough that a bin holds some values, in ln lambda, where tails and bulk are both seen.
    count = int(np.clip(2 * math.sqrt(len(logs)), FEWEST_BINS, MOST_BINS))
    edges = np.exp(np.linspace(logs.min(), max(logs.max(), logs.min() + 1e-3), count + 1))
    # The first and the last value may lie beyond the edges by a rounding.
    counts, _ = np.histogram(np.clip(shown, edges[0], edges[-1]), edges)
    return Bars(edges, counts / len(values))


def _bulk(values: Array, shape: tuple[int, int], row: Row, points: int) -> Curve | None:
    variance, edge = row.get("mp_variance"), row.get("mp_edge")
    if variance is None or edge is None or not variance > 0 or not len(values):
        return None
    # The law is that of the (N - k) x (M - k) noise which k removed directions leave; its edge, v (a + b)^2 / N with
    # a^2 - b^2 = N - M, tells a and b.
    total = math.sqrt(edge / variance * max(shape))
    a, b = ((total + sign * (max(shape) - min(shape)) / total) / 2 for sign in (1, -1))
    variance, gamma = variance * a**2 / max(shape), (b / a) ** 2
    low, high = laws.marchenko_pastur_edges(variance, gamma)
    # Of square matrices the law begins at zero, which no logarithmic axis shows.
    low = max(low, float(min(values[values > 0], default=high)) / 2)
    # An angle makes points dense at both edges, where the curve is steep.
    x = low + (high - low) * (1 - np.cos(np.linspace(0, math.pi, points)[1:-1])) / 2
    # The law is of the bulk, drawn over a histogram of all values.
    share = 1 - (row.get("mp_spikes") or 0) / len(values)
    return x, share * laws.marchenko_pastur(x, variance, gamma)


def _quantiles(values: Array) -> Curve | None:
    """Return the density between quantiles of a law: each step between two of n is a share of 1 / n."""
    steps = -np.diff(values)
    # Equal neighbours would be an infinite density.
    known = (steps > 0) & (values[1:] > 0)
    if not known.any():
        return None
    middles = np.sqrt(values[1:] * values[:-1])[known]
    return middles[::-1], (1 / (len(values) * steps[known]))[::-1]


def _tail(values: Array, row: Row, prefix: str, points: int) -> Curve | None:
    found = laws.tail_parameters(row, prefix)
    if found is None or not len(values) or not 0 < found[-1] < values.max():
        return None
    x = np.geomspace(found[-1], values.max(), points)
    share = np.count_nonzero(values >= found[-1]) / len(values)
    return x, share * laws.TAILS[prefix][1](x, *found)


def ks_scan(spectra: pl.DataFrame, metrics: pl.DataFrame, name: str, *, model: str) -> go.Figure:
    """Draw the Kolmogorov-Smirnov distance of the best power law from each eigenvalue on, and which one was chosen.

    Args:
        spectra: The spectra table, with ``sigma`` and ``pl_ks_scan``.
        metrics: The metrics table, with ``pl_xmin``, ``pl_ks``, ``pl_alpha``, ``pl_tail_count``.
        name: Of the matrix.
        model: Whose.
    """
    row = facts(metrics, model, name)
    longer = max(row.get("rows") or 1, row.get("cols") or 1)
    eigenvalues = np.square(curve(spectra, model, name, "sigma")) / longer
    return ks_lines(eigenvalues.tolist(), curve(spectra, model, name, "pl_ks_scan"), row, title=caption(model, name))


def ks_lines(eigenvalues: Sequence[float], distances: Sequence[float], row: Row, *, title: str = "") -> go.Figure:
    """Draw distances against the xmin that they belong to.

    Args:
        eigenvalues: In the order of ``distances``.
        distances: NaN where an eigenvalue is no candidate.
        row: ``pl_xmin``, ``pl_ks``, ``pl_alpha`` and ``pl_tail_count``, if there is a fit.
        title: Made safe already.
    """
    # Zeros have no place on a logarithmic axis.
    points = sorted((x, d) for x, d in zip(eigenvalues, distances, strict=True) if x > 0 and math.isfinite(d))
    scan = go.Scatter(
        x=[x for x, _ in points],
        y=[d for _, d in points],
        mode="lines+markers",
        line={"color": COLOURS["bars"], "width": 1},
        marker={"size": 4, "color": SERIES[0][0]},
        hovertemplate="tail from λ %{x:.4g}: %{y:.4g}<extra></extra>",
        showlegend=False,
    )
    made = figure([scan], x="tail begins at λ", y="KS distance of the power law", title=title)
    _mark(made, row)
    return made.update_xaxes(**LOG).update_yaxes(rangemode="tozero")


def _mark(made: go.Figure, row: Row) -> None:
    xmin, ks = row.get("pl_xmin"), row.get("pl_ks")
    if xmin is None or ks is None or not xmin > 0:
        return
    colour = SERIES[1][0]
    made.add_vline(x=xmin, line={"color": colour, "width": 1, "dash": "dot"})
    look = {"size": 11, "symbol": "diamond", "color": colour, "line": {"color": "white", "width": 1}}
    made.add_trace(go.Scatter(x=[xmin], y=[ks], mode="markers", marker=look, showlegend=False, hoverinfo="skip"))
    alpha, count = row.get("pl_alpha"), row.get("pl_tail_count")
    words = [f"x<sub>min</sub> = {xmin:.3g}", f"KS {ks:.3f}"]
    words += [] if alpha is None else [f"α {alpha:.2f}"]
    words += [] if count is None else [f"{count:.0f} eigenvalues in the tail"]
    # Placed on the paper: an axis makes room for words that belong to a point of it.
    made.add_annotation(
        x=1, xref="paper", y=1, yref="paper", text=", ".join(words), showarrow=False, xanchor="right", yanchor="bottom",
        font={"color": colour},
    )  # fmt: skip


AXES = ("log-log", "lin-log")
BELOW = 0.01
"""Decades by which the axis begins below the floor: marks that stand on its very end may not be drawn."""

AXIS_TITLES = {
    "log-log": ("eigenvalue λ = σ²/N", "density ρ(λ)"),
    "lin-log": ("eigenvalue λ = σ²/N", "λ ρ(λ), density of ln λ"),
}
LAWS: dict[str, tuple[str, dict[str, Any]]] = {
    "mp": ("Marchenko-Pastur", {"color": COLOURS["mark"], "width": 2}),
    "sep": ("row and column norms", {"color": "#e69f00", "dash": "longdash", "width": 2.5}),
    "pl": ("power law", {"color": "#d55e00", "dash": "solid", "width": 3}),
    "tpl": ("truncated power law", {"color": "#009e73", "dash": "dash", "width": 2}),
    "exp": ("exponential", {"color": "#cc79a7", "dash": "dot", "width": 2.5}),
    "ln": ("log-normal", {"color": "#0072b2", "dash": "dashdot", "width": 2}),
}


def density(spectra: pl.DataFrame, metrics: pl.DataFrame, name: str, *, model: str, axes: str = "log-log") -> go.Figure:
    """Draw the density of lambda = sigma^2 / N with the laws that were fitted to it.

    Args:
        spectra: The spectra table: ``sigma``, and where they are there ``null_sigma`` of the permuted matrix and
            ``sep_sigma`` of the law of row and column norms.
        metrics: The metrics table: rows, cols, and what there is of ``mp_*``, ``pl_*``, ``tpl_*``, ``exp_*``, ``ln_*``.
        name: Of the matrix.
        model: Whose.
        axes: ``log-log`` draws rho(lambda); ``lin-log`` draws lambda rho(lambda), the density per unit of
            ln lambda, in which equal areas are equal shares.
    """
    row = facts(metrics, model, name)
    shape = (int(row.get("rows") or 1), int(row.get("cols") or 1))
    eigenvalues = np.square(curve(spectra, model, name, "sigma")) / max(shape)
    null, norms = (np.square(curve(spectra, model, name, f"{one}_sigma")) / max(shape) for one in ("null", "sep"))
    further: dict[str, Any] = {"null": null.tolist(), "norms": norms.tolist()}
    return density_lines(eigenvalues.tolist(), shape, row, **further, axes=axes, title=caption(model, name))


def density_lines(
    eigenvalues: Sequence[float],
    shape: tuple[int, int],
    row: Row,
    *,
    null: Sequence[float] = (),
    norms: Sequence[float] = (),
    axes: str = "log-log",
    title: str = "",
    points: int = POINTS,
) -> go.Figure:
    """Draw a histogram of eigenvalues and the laws whose parameters are in ``row``; ``density_parts`` says how.

    Each trace's ``meta`` says what it is: ``bars``, ``null``, ``mp``, ``sep``, ``pl``, ``tpl``, ``exp``, ``ln`` or
    ``spikes``.
    """
    values, log_y = np.asarray(eigenvalues, float), axes == "log-log"
    parts = density_parts(eigenvalues, shape, row, null=null, norms=norms, points=points)
    floor = parts.floor(log_y=log_y)
    traces: list[Any] = [
        _bars(parts, log_y=log_y),
        *_null(parts, log_y=log_y),
        *(_law(key, curve, row, log_y=log_y) for key, curve in parts.laws.items()),
    ]
    top = max((max(trace.y) for trace in traces if len(trace.y)), default=1.0)
    x, y = AXIS_TITLES[axes]
    made = figure(traces + _spikes(values, row, floor), x=x, y=y, title=title, height=420, legend=LEGEND_RIGHT)
    made.update_xaxes(**LOG)
    _mark_xmin(made, row, values)
    if log_y:
        return made.update_yaxes(**LOG, range=[math.log10(floor) - BELOW, math.log10(max(top, floor * 10)) + 0.2])
    return made.update_yaxes(range=[0, 1.08 * top])


def _steps(bars: Bars, floor: float, *, log_y: bool) -> tuple[list[float], list[float]]:
    tops = np.maximum(bars.heights(log_y=log_y), floor).repeat(2)
    return bars.edges.repeat(2).tolist(), [floor, *tops.tolist(), floor]


def _bars(parts: DensityParts, *, log_y: bool) -> go.Scatter:
    x, y = ([], []) if parts.spectrum is None else _steps(parts.spectrum, parts.floor(log_y=log_y), log_y=log_y)
    name = "spectrum" if not parts.zeros else f"spectrum (without {parts.zeros} zeros)"
    look = {"line": {"color": COLOURS["bars"], "width": 1}, "fillcolor": "rgba(156,163,175,0.35)"}
    return go.Scatter(x=x, y=y, name=name, meta="bars", mode="lines", fill="toself", hoverinfo="skip", **look)


def _null(parts: DensityParts, *, log_y: bool) -> list[go.Scatter]:
    if parts.null is None:
        return []
    x, y = _steps(parts.null, parts.floor(log_y=log_y), log_y=log_y)
    look = {"color": "#56b4e9", "width": 1.5}
    return [go.Scatter(x=x, y=y, name="permuted entries", meta="null", mode="lines", line=look, hoverinfo="skip")]


def _law(key: str, curve: Curve, row: Row, *, log_y: bool) -> go.Scatter:
    name, alpha = LAWS[key][0], row.get(f"{key}_alpha")
    hover = f"λ %{{x:.4g}}: %{{y:.4g}}<extra>{name}</extra>"
    x, rho = curve
    return go.Scatter(
        x=x.tolist(),
        y=(rho if log_y else x * rho).tolist(),
        name=name if alpha is None else f"{name} (α {alpha:.2f})",
        meta=key,
        mode="lines",
        line=LAWS[key][1],
        hovertemplate=hover,
    )


def _spikes(values: Array, row: Row, floor: float) -> list[go.Scatter]:
    edge = row.get("mp_edge")
    found = [] if edge is None else values[values > edge].tolist()
    if not found:
        return []
    look = {"symbol": "triangle-up", "size": 8, "color": COLOURS["mark"], "opacity": 0.7}
    hover = "λ %{x:.4g}<extra>spike</extra>"
    name = f"spikes above the edge ({len(found)})"
    y = [floor] * len(found)
    common: dict[str, Any] = {"name": name, "meta": "spikes", "mode": "markers", "hovertemplate": hover}
    return [go.Scatter(x=found, y=y, marker=look, cliponaxis=False, **common)]


def _mark_xmin(made: go.Figure, row: Row, values: Array) -> None:
    xmin = row.get("pl_xmin")
    if xmin is None or not xmin > 0 or not len(values):
        return
    colour = LAWS["pl"][1]["color"]
    made.add_vline(x=xmin, line={"color": colour, "width": 1, "dash": "dot"})
    made.add_annotation(
        x=math.log10(xmin), y=1, yref="paper", text="x<sub>min</sub>", showarrow=False, xanchor="left", yanchor="top",
        xshift=2, font={"color": colour},
    )  # fmt: skip


SPECTRA = ("metrics", "spectra")
SCAN_ALL = "diffract scan MODEL --metrics all -o RUN` or `diffract compare BASE TUNED --metrics all -o RUN"


@kind(make=SCAN_ALL, tables=SPECTRA, quantities=("sigma",), columns=("pl_alpha", "mp_variance"))
def density_of_run(
    frames: Frames, *, matrix: str | None = None, model: str | None = None, axes: str | None = None
) -> go.Figure:
    """Density of one matrix's eigenvalues, with the Marchenko-Pastur law, the permuted matrix and four tail fits."""
    model = pick_model(frames, model)
    name = pick_matrix(frames, matrix, model, "sigma")
    return density(frames["spectra"], frames["metrics"], name, model=model, axes=pick("axes", axes, AXES))


@kind(make=SCAN_ALL, tables=SPECTRA, quantities=("sigma", "pl_ks_scan"), columns=("pl_xmin",))
def ks_of_run(frames: Frames, *, matrix: str | None = None, model: str | None = None) -> go.Figure:
    """Distance of the best power law for every place where its tail might begin."""
    model = pick_model(frames, model)
    name = pick_matrix(frames, matrix, model, "pl_ks_scan")
    return ks_scan(frames["spectra"], frames["metrics"], name, model=model)


@kind(make=SCAN_OR_COMPARE, tables=SPECTRA, quantities=("sigma",))
def spectrum_of_run(frames: Frames, *, matrix: str | None = None, model: str | None = None) -> go.Figure:
    """Singular values of one matrix: base, tuned, and the change."""
    model = pick_model(frames, model)
    base = base_model(frames, model)
    name = pick_matrix(frames, matrix, model, "sigma")
    if base is None:
        return spectrum(frames["spectra"], name, base=model)
    return spectrum(frames["spectra"], name, base=base, tuned=model)
