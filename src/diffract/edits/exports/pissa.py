"""PiSSA: split a model into an adapter of its principal parts and the residual that it lies over."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from diffract.checkpoints.adapter import WEIGHTS
from diffract.edits.bench import Bench
from diffract.edits.draft import Draft, Place
from diffract.edits.exports.export import Export, Exported, FactorDtype, Split, Target
from diffract.edits.exports.peft import Factors, linear_modules, whole_matrix, write_adapter
from diffract.edits.operations.pissa import pissa
from diffract.edits.step import Planned, matrix_changes
from diffract.edits.write import write_draft
from diffract.matrices import Matrix

RESIDUAL, ADAPTER = "residual", "adapter"


class Pissa(Export):
    """Split a model into a PEFT adapter of its principal singular directions and the residual, to train the adapter."""

    name: ClassVar[str] = "pissa"

    rank: Annotated[int, Field(ge=1)] = 16
    """Singular directions of each matrix that go into the adapter."""
    dtype: FactorDtype = "float32"
    """Of the factors."""
    select: str | None = None
    """Matrices, such as 'layers 8-, attn'; every linear layer by default."""

    def plan(self, bench: Bench, draft: Draft) -> Split:
        """Return changes to the residual of every linear layer."""
        modules, left = linear_modules(bench, self.select)
        by_tensor = {module.tensor: module for module in modules}
        summary = {"modules": len(modules), "rank": self.rank, "left whole": len(left)}
        split = Split(Planned({}, summary), modules)

        def edit(values: Tensor, matrix: Matrix, place: Place) -> Tensor:
            module, stored = by_tensor[matrix.tensor], getattr(torch, self.dtype)
            oriented = values.mT if module.transposed else values
            found = pissa(oriented, min(self.rank, *oriented.shape), factor_dtype=stored)
            split.factors[matrix.tensor] = Factors(module, found.B.to(stored), found.A.to(stored))
            return found.residual.mT if module.transposed else found.residual

        split.planned.changes = matrix_changes(bench, [whole_matrix(bench, m.tensor) for m in modules], edit)
        return split

    def write(self, bench: Bench, draft: Draft, split: Split, target: Target) -> Exported:
        """Write ``residual``, a whole model, and ``adapter``, which lies over it."""
        residual, adapter = target.folder / RESIDUAL, target.folder / ADAPTER
        residual.mkdir()
        digests = write_draft(draft.then(split.planned.changes), residual, target.output, target.progress)
        ordered = (split.factors.pop(module.tensor) for module in split.modules)
        factors = write_adapter(adapter, bench, str(target.path / RESIDUAL), ordered)
        return Exported({RESIDUAL: digests, f"{ADAPTER}/{WEIGHTS}": factors}, residual, loads_alone=True)
