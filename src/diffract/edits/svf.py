"""SVF: scale the singular values of weights by an expert vector."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import model_validator

from diffract.edits.edit import Edit, FactorTable, Finite, Planned, saved_table
from diffract.errors import SelectionError, printable

if TYPE_CHECKING:
    from torch import Tensor

    from diffract.edits.bench import Bench
    from diffract.edits.draft import Draft, Place
    from diffract.matrices import Matrix


class Svf(Edit):
    """SVF: multiply the singular values of weight matrices with given factors z."""

    name: ClassVar = "svf"
    usage: ClassVar = "diffract svf MODEL --select mlp --z 0.9 -o OUT"
    takes_others: ClassVar = False

    z: Finite | None = None
    """One factor for all."""
    factors: FactorTable | None = None
    """A .safetensors or .npz file with a vector for each matrix, by the matrix's or its tensor's name, or a table."""
    select: str | None = None
    """Which matrices, such as 'attn, mlp'; with a file all that it names."""

    @model_validator(mode="after")
    def _check(self) -> Svf:
        if (self.z is None) == (self.factors is None):
            raise ValueError("expected either z or a file of factors")
        if self.z is not None and self.select is None:
            raise ValueError("z for all needs a selection of matrices")
        return self

    def saved(self, folder: Path, output: Path) -> Svf:
        """Return the edit with a table that lies beside the checkpoint, where it has one in memory."""
        return self if self.factors is None else self.model_copy(update=saved_table(self.factors, folder, output))

    def plan(self, bench: Bench, draft: Draft) -> Planned:
        """Return changes of the selected matrices, or of those that the file names."""
        from diffract.edits.draft import matrix_changes
        from diffract.edits.spectral_edits import svf

        matrices = bench.matrices(self.select, heads=False)
        factors = {} if self.factors is None else _read_factors(self.factors, bench)
        if self.factors is not None:
            matrices = [m for m in matrices if m.name in factors]

        def edit(values: Tensor, matrix: Matrix, place: Place) -> Tensor:
            z = factors[matrix.name] if self.z is None else self.z
            return svf(values, z, known=bench.decompositions)

        return Planned(matrix_changes(draft, matrices, edit), {"matrices": len(matrices)})


def _read_factors(path: FactorTable, bench: Bench) -> dict[str, Tensor]:
    """Return the vectors of a file by matrix name.

    Raises:
        SelectionError: One fits no matrix, or has another length than it has singular values.
    """
    from diffract.checkpoints import open_checkpoint
    from diffract.edits.factors import READERS, find_scaled, read_factors

    if not isinstance(path, str) or Path(path).suffix in READERS:
        return {one.name: one.factors for one in find_scaled(read_factors(path), bench)}

    matrices = bench.whole_layout.matrices
    parts = Counter(m.tensor for m in matrices)
    known = {m.tensor: m for m in matrices if parts[m.tensor] == 1} | {m.name: m for m in matrices}
    found = {}
    with open_checkpoint(path) as file:
        for name in file:
            matrix, length = known.get(name), file.info(name).shape
            if matrix is None or length != (min(matrix.shape),):
                names = "the name of a matrix, or of a tensor that is one"
                expected = names if matrix is None else f"{min(matrix.shape)} factors"
                raise SelectionError(f"{printable(path)}, {printable(name)!r} {list(length)}: expected {expected}.")
            found[matrix.name] = file.read(name).clone()
    return found
