"""LASER: keep the largest singular directions of weights themselves."""

from __future__ import annotations

from torch import Tensor

from diffract.edits.bench import Bench
from diffract.edits.draft import Draft, Place
from diffract.edits.operations.laser import laser
from diffract.edits.planning import Planned, Row, matrix_changes
from diffract.edits.settings import Laser
from diffract.edits.steps.truncate import kept_in_all, kept_row
from diffract.matrices import Matrix


def plan_laser(step: Laser, bench: Bench, draft: Draft) -> Planned:
    """Return what the step changes."""
    rows: list[Row] = []

    def edit(values: Tensor, matrix: Matrix, place: Place) -> Tensor:
        found = laser(values, step.keep)
        rows.append(kept_row(matrix, found))
        return found.values

    matrices = bench.matrices(step.select, heads=False)
    return Planned(matrix_changes(bench, matrices, edit), {"matrices": len(matrices)}, rows, kept_in_all)
