"""PiSSA: split a model into an adapter of its principal parts and the residual that it lies over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from diffract.edits.bench import Bench
from diffract.edits.draft import Draft, Place
from diffract.edits.exports.export import Export, Exported, FactorDtype
from diffract.edits.exports.peft import Factors, linear_modules, write_adapter
from diffract.edits.operations.pissa import pissa
from diffract.edits.output import Output
from diffract.edits.step import Planned, matrix_changes
from diffract.edits.write import Progress, write_draft
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

    def write(
        self, bench: Bench, draft: Draft, folder: Path, target: Path, output: Output, progress: Progress | None
    ) -> Exported:
        """Write ``residual``, a whole model, and ``adapter``, which lies over it."""
        modules, left = linear_modules(bench, self.select)
        found: dict[str, Factors] = {}
        by_tensor = {module.tensor: module for module in modules}

        def edit(values: Tensor, matrix: Matrix, place: Place) -> Tensor:
            module, stored = by_tensor[matrix.tensor], getattr(torch, self.dtype)
            oriented = values.mT if module.transposed else values
            split = pissa(oriented, min(self.rank, *oriented.shape), factor_dtype=stored)
            found[matrix.tensor] = Factors(module, split.B.to(stored), split.A.to(stored))
            return split.residual.mT if module.transposed else split.residual

        whole = [whole_matrix(bench, module.tensor) for module in modules]
        residual = draft.then(matrix_changes(bench, whole, edit))
        (folder / RESIDUAL).mkdir()
        digests = write_draft(residual, folder / RESIDUAL, output, progress)
        ordered = (found[module.tensor] for module in modules)
        factors = write_adapter(folder / ADAPTER, bench, str(target / RESIDUAL), ordered)
        outputs = {RESIDUAL: digests, f"{ADAPTER}/adapter_model.safetensors": factors}
        summary = {"modules": len(modules), "rank": self.rank, "left whole": len(left)}
        return Exported(outputs, Planned({}, summary), folder / RESIDUAL, True)


def whole_matrix(bench: Bench, tensor: str) -> Matrix:
    """Return a 2-D tensor as one matrix, fused parts together."""
    info = bench.checkpoint.info(tensor)
    return Matrix(tensor, tensor, (info.shape[0], info.shape[1]), info.dtype)
