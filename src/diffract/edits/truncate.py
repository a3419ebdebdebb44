"""Truncate: keep some of the singular directions of what training changed."""

from __future__ import annotations

from statistics import median
from typing import Any

from torch import Tensor

from diffract.edits.bench import Bench, Planned, Row, flat, matrix_changes
from diffract.edits.draft import Draft, Place
from diffract.edits.mixing import seeded
from diffract.edits.settings import Laser, Truncate, describe
from diffract.edits.spectral_edits import Truncated, laser, truncate
from diffract.matrices import Matrix


def plan_truncate(step: Truncate, bench: Bench, draft: Draft) -> Planned:
    """Return what the step changes; how many directions stayed is known once it is computed."""
    base, rule = bench.other(step.base), step.criterion()
    matrices = bench.matrices(step.select, heads=step.per == "head")
    rows: list[Row] = []

    def edit(values: Tensor, matrix: Matrix, place: Place) -> Tensor:
        chance = seeded(step.seed, matrix.name) if step.side == "random" else None
        found = truncate(values, flat(base.read(matrix.tensor, place)), rule, chance)
        rows.append(kept_row(matrix, found))
        return found.values

    summary = {"base": describe(step.base), "matrices": len(matrices)}
    return Planned(matrix_changes(bench, matrices, edit), summary, rows, kept_in_all)


def kept_row(matrix: Matrix, found: Truncated) -> Row:
    """Say how many directions of a matrix stayed, and what they hold."""
    return {"name": matrix.name, "kept": found.kept, "of": found.total, "energy_share": found.energy_share}


def kept_in_all(rows: list[Row]) -> dict[str, Any]:
    """Say how many directions stayed in all matrices, and what share of a matrix's energy these typically hold."""
    return {
        "directions kept": sum(row["kept"] for row in rows),
        "of": sum(row["of"] for row in rows),
        "energy kept, median": median(row["energy_share"] for row in rows),
    }


def plan_laser(step: Laser, bench: Bench, draft: Draft) -> Planned:
    """Return what the step changes."""
    rows: list[Row] = []

    def edit(values: Tensor, matrix: Matrix, place: Place) -> Tensor:
        found = laser(values, step.keep)
        rows.append(kept_row(matrix, found))
        return found.values

    matrices = bench.matrices(step.select, heads=False)
    return Planned(matrix_changes(bench, matrices, edit), {"matrices": len(matrices)}, rows, kept_in_all)
