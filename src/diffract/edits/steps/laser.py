"""LASER: keep the largest singular directions of weights themselves."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from diffract.edits.bench import Bench
from diffract.edits.draft import Draft, Place
from diffract.edits.operations.laser import laser
from diffract.edits.step import Planned, Step, matrix_changes
from diffract.matrices import Matrix


class Laser(Step):
    """LASER: replace chosen weight matrices by their largest singular directions."""

    name: ClassVar[str] = "laser"

    keep: Annotated[float, Field(gt=0, le=1)]
    """Share rho of the singular directions that is kept, rounded up."""
    select: str
    """Which matrices, such as 'layers 20-, mlp.up'."""

    def plan(self, bench: Bench, draft: Draft) -> Planned:
        """Return what the step changes."""
        rows: list[dict[str, Any]] = []

        def edit(values: Tensor, matrix: Matrix, place: Place) -> Tensor:
            found = laser(values, self.keep)
            share = {"kept": found.kept, "of": found.total, "energy_share": found.energy_share}
            rows.append({"name": matrix.name, **share})
            return found.values

        matrices = bench.matrices(self.select, heads=False)
        return Planned(matrix_changes(bench, matrices, edit), {"matrices": len(matrices)}, rows)
