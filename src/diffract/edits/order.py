"""In which order units are rewound: by their change, by what changed elsewhere too, by measurements, by chance."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from diffract.checkpoints.checkpoint import Range
from diffract.edits.bench import Other
from diffract.edits.draft import overlap
from diffract.edits.parts import Part, Units, head_name
from diffract.edits.planning import both
from diffract.engine import one_torch_thread
from diffract.errors import SelectionError, printable, suggest
from diffract.stats import reference_score

Blocks = Callable[[str], Iterable[tuple[Range | None, Tensor]]]
"""A tensor's blocks of rows by its name."""

HEADS = ("layer", "head")
"""Columns that a table of heads must have; ``block`` is ``attn`` where there is none."""


def change_norms(units: Units, blocks: Blocks, base: Other) -> dict[str, float]:
    """Return ||W1 - W0||_F of each unit; a part with several owners counts for each of them.

    Args:
        units: What is measured.
        blocks: Yields W1 by tensor name.
        base: W0.
    """
    by_tensor: dict[str, list[Part]] = defaultdict(list)
    for part in units.parts:
        if part.counts:
            by_tensor[part.tensor].append(part)
    squares = dict.fromkeys(units.names, 0.0)
    with one_torch_thread():
        for name, parts in by_tensor.items():
            for rows, block in blocks(name):
                tuned, origin = both(block, base.block(name, rows))
                delta = tuned - origin
                for part in parts:
                    if inside := overlap(part.place, rows):
                        norm = float(torch.linalg.vector_norm(delta[inside[0]], dtype=torch.float64))
                        squares.update((owner, squares[owner] + norm**2) for owner in part.owners)
    return {name: value**0.5 for name, value in squares.items()}


def least_first(scores: Mapping[str, float]) -> list[str]:
    """Return units by rising score, equals in the model's order.

    Raises:
        SelectionError: A unit has none.
    """
    if unknown := [name for name, score in scores.items() if not math.isfinite(score)]:
        raise SelectionError(
            f"{len(unknown)} of {len(scores)} units have no score, first {printable(unknown[0])}: either nothing or "
            "everything changed alike, or a table lacks them. Choose another order, or mend the table."
        )
    return sorted(scores, key=lambda name: scores[name])


def reference_scores(domain: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    """Return the reference-domain score of each unit from its changes: low where a reference changes it too."""
    columns = (np.array([norms[name] for name in domain]) for norms in (domain, reference))
    return dict(zip(domain, reference_score(*columns).tolist(), strict=True))


def shuffled(names: tuple[str, ...], seed: int) -> list[str]:
    """Return units in a seeded random order."""
    order = np.random.default_rng(seed).permutation(len(names))
    return [names[i] for i in order]


def read_scores(path: str, units: Units, column: str, *, model: str | None = None) -> dict[str, float]:
    """Read one number for each head from a table.

    Args:
        path: Parquet (``heads.parquet`` of a run), CSV or JSON, with columns ``layer``, ``head`` and ``column``.
        units: The heads that must be in it; others are an error too.
        column: What to read.
        model: Which rows, where the table speaks of several models.

    Raises:
        SelectionError: The table cannot be read, lacks a column, or speaks of another model's heads.
    """
    table = _read_table(path, (*HEADS, column))
    models = table["model"].unique().sort().to_list() if "model" in table.columns else []
    if model is not None and model not in models:
        raise SelectionError(f"{printable(path)} has no rows of {printable(model)!r}.{suggest(model, models)}")
    if model is None and len(models) > 1:
        raise SelectionError(
            f"{printable(path)} speaks of {len(models)} models ({printable(', '.join(models))}). Say which one."
        )
    rows = table.filter(pl.col("model") == model) if model is not None else table
    if not rows[column].dtype.is_numeric() and rows[column].count():
        raise SelectionError(f"{printable(path)}, column {column!r}: expected numbers, got {rows[column].dtype}.")
    named = (
        (head_name(r["layer"], r.get("block") or "attn", r["head"]), r[column]) for r in rows.iter_rows(named=True)
    )
    found = dict(named)
    if len(found) < len(rows):
        raise SelectionError(f"{printable(path)} has several rows for one head. Keep one of each.")
    if strange := [name for name in found if name not in units.names]:
        raise SelectionError(
            f"{printable(path)} has {printable(strange[0])}, which this model has not (its heads go from "
            f"{units.names[0]} to {units.names[-1]}). It belongs to another model."
        )
    return {name: math.nan if found.get(name) is None else float(found[name]) for name in units.names}


def _read_table(path: str, columns: Sequence[str]) -> pl.DataFrame:
    readers = {".parquet": pl.read_parquet, ".csv": pl.read_csv, ".json": pl.read_json}
    reader = readers.get(Path(path).suffix)
    if reader is None:
        raise SelectionError(f"{printable(path)}: expected a .parquet, .csv or .json table.")
    try:
        table = reader(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise SelectionError(f"cannot read {printable(path)}: {printable(error)}. Check the file.") from error
    if missing := [name for name in columns if name not in table.columns]:
        raise SelectionError(
            f"{printable(path)} has no column {missing[0]!r}, expected {', '.join(columns)}."
            f"{suggest(missing[0], table.columns)}"
        )
    return table
