"""A figure of a run, by name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import plotly.graph_objects as go

from diffract.errors import RunError, SelectionError, printable, suggest
from diffract.plots.catalog import KINDS, Kind
from diffract.plots.choice import Choice
from diffract.plots.frames import Frames, Tabled, read_frames


def plot(
    kind: str,
    run: str | Path | Tabled,
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
        projection: Such as ``q`` or ``attn.q``.
        layer: Whose matrices ``ridge`` pools.
        over: ``tokens``, ``step`` or ``order``; the first that is known for every checkpoint.
        axes: Of y and x: ``log-log`` or ``lin-log`` for ``density``, those and ``lin-lin``, ``log-lin`` for
            ``evolution``.
        task: Of a search; the first, that decided, by default.

    Raises:
        SelectionError: A name is not known, or the kind does not take an option.
        RunError: It is no run folder, or lacks what the figure needs; the message says which command makes it.
    """
    choice = Choice(matrix, model, metric, reference, projection, layer, over, axes, task)
    found = _kind(kind)
    _refuse_ignored(kind, found, choice)
    frames = read_frames(run, (*found.tables, *found.further))
    _check(kind, found, frames)
    return found.draw(frames, choice)


def _kind(name: str) -> Kind:
    if name not in KINDS:
        near = suggest(name, KINDS) or f" Known: {', '.join(KINDS)}."
        raise SelectionError(f"unknown kind of plot {printable(name)!r}.{near}")
    return KINDS[name]


def _refuse_ignored(name: str, kind: Kind, choice: Choice) -> None:
    for option, value in asdict(choice).items():
        if value is not None and option not in kind.options:
            raise SelectionError(f"{name} takes no {option}; it takes {', '.join(kind.options)}.")


def _check(name: str, kind: Kind, frames: Frames) -> None:
    """Say what a run lacks for a figure, and which command makes it."""
    lacks = [f"{table}.parquet" for table in kind.tables if table not in frames]
    if not lacks and kind.quantities:
        has = set(frames["spectra"]["quantity"].unique())
        lacks = [f"{quantity} in spectra.parquet" for quantity in kind.quantities if quantity not in has]
    if not lacks and kind.columns and not set(kind.columns) & set(frames[kind.tables[0]].columns):
        lacks = [f"{' or '.join(kind.columns)} in {kind.tables[0]}.parquet"]
    if lacks:
        raise RunError(f"{name} needs {', '.join(lacks)}, which the run does not have. Make one with `{kind.make}`.")
