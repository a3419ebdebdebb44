"""Every kind of figure that can be drawn of a run; each declares itself at the function that draws it."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from diffract.errors import RunError, SelectionError, choose
from diffract.plots.agreement import agreement_of_run, profile_of_run
from diffract.plots.choice import FigureKind, Frames, Tabled, read_frames
from diffract.plots.factors import factors_of_run, front_of_run
from diffract.plots.heads import (
    effects_of_run,
    head_heatmap_of_run,
    heads_of_run,
    lorenz_of_run,
    scores_of_run,
    violins_of_run,
)
from diffract.plots.lineage import lineage_of_run
from diffract.plots.searches import connectivity_of_run, paths_of_run, rewind_of_run, simplex_of_run, truncation_of_run
from diffract.plots.spectra import density_of_run, ks_of_run, spectrum_of_run
from diffract.plots.training import evolution_of_run, ridge_of_run
from diffract.tables import Tables

KINDS: dict[str, FigureKind] = {
    "density": density_of_run,
    "ks": ks_of_run,
    "spectrum": spectrum_of_run,
    "agreement": agreement_of_run,
    "profile": profile_of_run,
    "heads": heads_of_run,
    "lorenz": lorenz_of_run,
    "scores": scores_of_run,
    "evolution": evolution_of_run,
    "ridge": ridge_of_run,
    "violins": violins_of_run,
    "head_heatmap": head_heatmap_of_run,
    "lineage": lineage_of_run,
    "rewind": rewind_of_run,
    "effects": effects_of_run,
    "truncation": truncation_of_run,
    "factors": factors_of_run,
    "front": front_of_run,
    "paths": paths_of_run,
    "connectivity": connectivity_of_run,
    "simplex": simplex_of_run,
}
"""Kinds by the name that ``plot`` takes."""


def plot(
    kind: str,
    run: str | Path | Tabled | Tables,
    *,
    matrix: str | None = None,
    model: str | None = None,
    metric: str | None = None,
    reference: str | None = None,
    projection: str | None = None,
    layer: int | None = None,
    over: str | None = None,
    axes: str | None = None,
    task: str | None = None,
) -> go.Figure:
    """Draw a figure of a run; needs no weights and no torch.

    Args:
        kind: A name of ``diffract.plots.KINDS``.
        run: A run folder, or a run.
        matrix: A name in the tables. By default, of the matrices with most singular values the one that changed most.
        model: A name in the tables; the first tuned one by default, where a figure shows one.
        metric: A column; ``delta_relative`` or ``effective_rank`` by default.
        reference: The model that ``scores`` holds the others against; the first by default.
        projection: The projection that is shown, such as ``q`` or ``attn.q``.
        layer: The layer whose matrices ``ridge`` pools.
        over: The time axis: ``tokens``, ``step`` or ``order``; by default the first that every checkpoint knows.
        axes: The scales of y and x: ``log-log`` or ``lin-log`` for ``density``; for ``evolution`` also ``lin-lin`` and
            ``log-lin``.
        task: The task of a search; by default the first, which decided.

    Raises:
        SelectionError: A name is not known, or the kind does not take an option.
        RunError: It is no run folder, or lacks what the figure needs; the message says which command makes it.
    """
    options = {
        "matrix": matrix,
        "model": model,
        "metric": metric,
        "reference": reference,
        "projection": projection,
        "layer": layer,
        "over": over,
        "axes": axes,
        "task": task,
    }
    found = KINDS[choose("kind of plot", kind, KINDS)]
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in found.options:
            raise SelectionError(f"{kind} takes no {option}; it takes {', '.join(found.options)}.")
    frames = read_frames(run, (*found.tables, *found.further))
    _check(kind, found, frames)
    return found.draw(frames, **given)


def _check(name: str, kind: FigureKind, frames: Frames) -> None:
    """Say what a run lacks for a figure, and which command makes it."""
    lacks = [f"{table}.parquet" for table in kind.tables if table not in frames]
    if not lacks and kind.quantities:
        has = set(frames["spectra"]["quantity"].unique())
        lacks = [f"{quantity} in spectra.parquet" for quantity in kind.quantities if quantity not in has]
    if not lacks and kind.columns and not set(kind.columns) & set(frames[kind.tables[0]].columns):
        lacks = [f"{' or '.join(kind.columns)} in {kind.tables[0]}.parquet"]
    if lacks:
        raise RunError(f"{name} needs {', '.join(lacks)}, which the run does not have. Make one with `{kind.make}`.")
