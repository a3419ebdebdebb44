"""SVF: scale singular values of weights by an expert vector."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from diffract.checkpoints import open_checkpoint
from diffract.edits.bench import Bench, Planned, matrix_changes
from diffract.edits.draft import Draft, Place
from diffract.edits.settings import Svf
from diffract.edits.spectral_edits import svf
from diffract.errors import SelectionError, printable
from diffract.matrices import Matrix


def plan_svf(step: Svf, bench: Bench, draft: Draft) -> Planned:
    """Return what the step changes."""
    matrices = bench.matrices(step.select, heads=False)
    factors = {} if step.factors is None else read_factors(step.factors, bench)
    if step.factors is not None:
        matrices = [m for m in matrices if m.name in factors]

    def edit(values: Tensor, matrix: Matrix, place: Place) -> Tensor:
        return svf(values, factors[matrix.name] if step.z is None else step.z)

    return Planned(matrix_changes(bench, matrices, edit), {"matrices": len(matrices)})


def read_factors(path: str, bench: Bench) -> dict[str, Tensor]:
    """Return the vectors of a file by matrix name.

    Raises:
        SelectionError: One fits no matrix, or has another length than it has singular values.
    """
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
