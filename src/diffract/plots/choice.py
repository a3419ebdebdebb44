"""What a kind of figure needs of a run, and what it shows: as asked for, or the most telling of what there is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import plotly.graph_objects as go
import polars as pl

from diffract.attention import lorenz_of
from diffract.errors import SelectionError, choose, printable
from diffract.tables import Tables, load


def curve(spectra: pl.DataFrame, model: str, name: str, quantity: str) -> list[float]:
    """Return a quantity along the spectrum of a matrix, an empty list where it is not known; nulls become NaN."""
    found = spectra.filter(pl.col("model") == model, pl.col("name") == name, pl.col("quantity") == quantity)["values"]
    return found[0].cast(pl.Float64).fill_null(float("nan")).to_list() if len(found) else []


def facts(metrics: pl.DataFrame, model: str, name: str) -> dict[str, Any]:
    """Return the row of a matrix, empty where there is none."""
    found = metrics.filter(pl.col("model") == model, pl.col("name") == name)
    return found.row(0, named=True) if len(found) else {}


def part() -> pl.Expr:
    """What a matrix is within its layer: ``attn.q``, ``mlp.gate``, or ``embed`` where the block is all there is."""
    whole = pl.col("projection").is_null() | (pl.col("block") == pl.col("projection"))
    return pl.when(whole).then(pl.col("block")).otherwise(pl.concat_str("block", "projection", separator="."))


Frames = Mapping[str, pl.DataFrame]

COMPARE_RUN = "diffract compare BASE TUNED -o RUN"
SCAN_OR_COMPARE = "diffract scan MODEL -o RUN` or `" + COMPARE_RUN


@dataclass(frozen=True)
class FigureKind:
    """A kind of figure that can be drawn of a run; ``kind`` makes one of the function that draws it.

    Attributes:
        draw: Draws it, from the tables by name; its options are what it takes by keyword.
        summary: One sentence.
        make: The command that makes a run for it.
        tables: Which must be there.
        quantities: Of the spectra table; all must be there.
        columns: Of the first table; at least one must be there.
        further: Tables that it uses where they are there.
        options: Names of the options that it takes.
    """

    draw: Callable[..., go.Figure]
    summary: str
    make: str
    tables: tuple[str, ...]
    quantities: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    further: tuple[str, ...] = ("models",)
    options: tuple[str, ...] = ()


def kind(*, make: str, tables: tuple[str, ...], **needs: tuple[str, ...]) -> Callable[..., FigureKind]:
    """Declare a kind of figure at the function that draws it, whose docstring's first line says what it shows.

    This is a decorator that registers nothing.

    Args:
        make: The command that makes a run for it.
        tables: Which must be there.
        needs: Further attributes of ``FigureKind``: quantities, columns, further.
    """

    def declare(draw: Callable[..., go.Figure]) -> FigureKind:
        parameters = inspect.signature(draw).parameters.values()
        options = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        summary = (draw.__doc__ or "").partition("\n")[0]
        return FigureKind(draw, summary, make=make, tables=tables, **needs, options=options)

    return declare


class Tabled(Protocol):
    """A run in memory."""

    @property
    def tables(self) -> Tables:
        """Its tables by name."""
        ...


def read_frames(run: str | Path | Tabled | Tables, names: Sequence[str]) -> Frames:
    """Return the tables of a run, of a folder only those of the named ones that are there.

    Raises:
        RunError: The folder is no run folder, of another layout, or damaged.
    """
    wanted = (*names, *(("heads",) if "lorenz" in names else ()))
    if isinstance(run, str | Path):
        return _with_lorenz(names, load(run, only=wanted).frames)
    return _with_lorenz(names, (run if isinstance(run, Tables) else run.tables).frames)


def _with_lorenz(names: Sequence[str], found: dict[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    """A comparison has no points of Lorenz curves; they follow from its heads."""
    found = {name: frame for name, frame in found.items() if name != "heads" or len(frame)}
    if "lorenz" in names and "lorenz" not in found and "heads" in found:
        found["lorenz"] = lorenz_of(found["heads"])
    return found


NO_METRICS = ("resolved",)
"""Columns of numbers that are no metrics."""


def pick(what: str, wanted: str | None, known: Sequence[str], default: str | None = None) -> str:
    """Return what is wanted if it is known, else the default, else the first that is known.

    Raises:
        SelectionError: It is not known, or nothing is.
    """
    if not known:
        raise SelectionError(f"the run has no {what} to draw.")
    if wanted is None:
        return default if default is not None and default in known else known[0]
    return choose(what, wanted, known)


def pick_model(frames: Frames, wanted: str | None) -> str:
    """Return the wanted model; by default the first tuned one, the last checkpoint of a trajectory, or the only one."""
    known = frames["metrics"]["model"].unique(maintain_order=True).to_list()
    last = [name for name in _of_role(frames, "checkpoint") if name in known][-1:]
    default = [*_of_role(frames, "tuned"), *last]
    return pick("model", wanted, known, default[0] if default else None)


def base_model(frames: Frames, model: str) -> str | None:
    """Return what a model was compared with, ``None`` for the base of all and where there is none."""
    models = frames.get("models")
    if models is not None and "against" in models.columns:
        return next(iter(models.filter(pl.col("model") == model)["against"]), None)
    return next((name for name in _of_role(frames, "base") if name != model), None)


def pick_matrix(frames: Frames, wanted: str | None, model: str, quantity: str) -> str:
    """Return the wanted matrix of a model.

    By default, of those with most singular values the one that changed most (``delta_relative``), or the first.
    """
    has = frames["spectra"].filter(pl.col("model") == model, pl.col("quantity") == quantity)["name"]
    rows = frames["metrics"].filter(pl.col("model") == model, pl.col("name").is_in(has.implode()))
    short = pl.min_horizontal("rows", "cols")
    change = pl.col("delta_relative") if "delta_relative" in rows.columns else pl.lit(None)
    # A stable sort keeps the order of the table among equals.
    ordered = rows.sort(short, change, descending=True, nulls_last=True, maintain_order=True)
    if not len(rows):
        raise SelectionError(
            f"{printable(model)!r} has no {quantity} in this run; of a comparison, name a tuned model."
        )
    return pick("matrix", wanted, rows["name"].to_list(), ordered["name"][0] if len(ordered) else None)


def pick_metric(metrics: pl.DataFrame, wanted: str | None, defaults: Sequence[str]) -> str:
    """Return the wanted column of numbers; by default the first of ``defaults`` that is there."""
    known = [c for c, t in metrics.schema.items() if t == pl.Float64 and c not in NO_METRICS]
    return pick("metric", wanted, known, next((d for d in defaults if d in known), None))


def of_projection(metrics: pl.DataFrame, wanted: str | None, layer: int | None = None) -> pl.DataFrame:
    """Return the rows of a projection (``q`` or ``attn.q``) and of a layer; all where none is wanted.

    Raises:
        SelectionError: There is no such projection or layer.
    """
    rows = metrics.with_columns(part().alias("_part"))
    if wanted is not None:
        known = [
            *rows["projection"].drop_nulls().unique(maintain_order=True),
            *rows["_part"].unique(maintain_order=True),
        ]
        pick("projection", wanted, known)
        rows = rows.filter((pl.col("projection") == wanted) | (pl.col("_part") == wanted))
    if layer is not None:
        layers = [str(n) for n in rows["layer"].drop_nulls().unique().sort()]
        pick("layer", str(layer), layers)
        rows = rows.filter(pl.col("layer") == layer)
    return rows.drop("_part")


def pick_task(table: pl.DataFrame, wanted: str | None) -> str:
    """Return the wanted task of a search; by default the first, which decided."""
    return pick("task", wanted, table["task"].unique(maintain_order=True).to_list())


def rows_of_model(frames: Frames, model: str | None, projection: str | None) -> pl.DataFrame:
    """Return the metric rows of a model's projection."""
    chosen = pick_model(frames, model)
    return of_projection(frames["metrics"].filter(pl.col("model") == chosen), projection)


def _of_role(frames: Frames, role: str) -> list[str]:
    models = frames.get("models")
    if models is None or "role" not in models.columns:
        return []
    return models.filter(pl.col("role") == role)["model"].to_list()
