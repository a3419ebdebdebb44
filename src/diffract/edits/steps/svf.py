"""SVF: scale singular values of weights by an expert vector."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator
from torch import Tensor

from diffract.checkpoints import open_checkpoint
from diffract.edits.bench import Bench
from diffract.edits.draft import Draft, Place
from diffract.edits.operations.svf import svf
from diffract.edits.step import Planned, Step, matrix_changes
from diffract.errors import SelectionError, printable
from diffract.matrices import Matrix


class Svf(Step):
    """SVF: multiply the singular values of weight matrices with given factors z."""

    name: ClassVar[str] = "svf"

    z: float | None = None
    """One factor for all."""
    factors: str | None = None
    """A .safetensors or .npz file with a vector for each matrix, by the matrix's or its tensor's name."""
    select: str | None = None
    """Which matrices, such as 'attn, mlp'; with a file all that it names."""

    @model_validator(mode="after")
    def _check(self) -> Svf:
        if (self.z is None) == (self.factors is None):
            raise ValueError("expected either z or a file of factors")
        if self.z is not None and self.select is None:
            raise ValueError("z for all needs a selection of matrices")
        return self

    def plan(self, bench: Bench, draft: Draft) -> Planned:
        """Return what the step changes."""
        matrices = bench.matrices(self.select, heads=False)
        factors = {} if self.factors is None else read_factors(self.factors, bench)
        if self.factors is not None:
            matrices = [m for m in matrices if m.name in factors]

        def edit(values: Tensor, matrix: Matrix, place: Place) -> Tensor:
            return svf(values, factors[matrix.name] if self.z is None else self.z)

        return Planned(matrix_changes(bench, matrices, edit), {"matrices": len(matrices)})


def read_factors(path: str, bench: Bench) -> dict[str, Tensor]:
    """Return the vectors of a file by matrix name.

    Raises:
        SelectionError: One fits no matrix, or has another length than it has singular values.
    """
    known = {key: m for m in bench.whole_layout.matrices for key in (m.tensor, m.name)}
    found = {}
    with open_checkpoint(path) as file:
        for name in file:
            matrix, length = known.get(name), file.info(name).shape
            if matrix is None or length != (min(matrix.shape),):
                expected = "the name of a matrix or tensor" if matrix is None else f"{min(matrix.shape)} factors"
                raise SelectionError(f"{printable(path)}, {printable(name)!r} {list(length)}: expected {expected}.")
            found[matrix.name] = file.read(name).clone()
    return found
