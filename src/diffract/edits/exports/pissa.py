"""PiSSA: split a model into an adapter of its principal parts and the residual that it lies over."""

from __future__ import annotations

import torch
from torch import Tensor

from diffract.checkpoints.adapter import WEIGHTS
from diffract.edits.bench import Bench
from diffract.edits.draft import Draft, Place
from diffract.edits.exports.export import Exported, Split, Target
from diffract.edits.exports.peft import Factors, linear_modules, whole_matrix, write_adapter
from diffract.edits.operations.pissa import pissa
from diffract.edits.planning import Planned, matrix_changes
from diffract.edits.settings import Pissa
from diffract.edits.write import write_draft
from diffract.matrices import Matrix

RESIDUAL, ADAPTER = "residual", "adapter"


def plan_pissa(settings: Pissa, bench: Bench, draft: Draft) -> Split:
    """Return changes to the residual of every linear layer."""
    modules, left = linear_modules(bench, settings.select)
    by_tensor = {module.tensor: module for module in modules}
    summary = {"modules": len(modules), "rank": settings.rank, "left whole": len(left)}
    split = Split(Planned({}, summary), modules)

    def edit(values: Tensor, matrix: Matrix, place: Place) -> Tensor:
        module, stored = by_tensor[matrix.tensor], getattr(torch, settings.dtype)
        oriented = values.mT if module.transposed else values
        found = pissa(oriented, min(settings.rank, *oriented.shape), factor_dtype=stored)
        split.factors[matrix.tensor] = Factors(module, found.B.to(stored), found.A.to(stored))
        return found.residual.mT if module.transposed else found.residual

    split.planned.changes = matrix_changes(bench, [whole_matrix(bench, m.tensor) for m in modules], edit)
    return split


def write_pissa(settings: Pissa, bench: Bench, draft: Draft, split: Split, target: Target) -> Exported:
    """Write ``residual``, a whole model, and ``adapter``, which lies over it."""
    residual, adapter = target.folder / RESIDUAL, target.folder / ADAPTER
    residual.mkdir()
    digests = write_draft(draft.then(split.planned.changes), residual, target.output, target.progress)
    ordered = (split.factors.pop(module.tensor) for module in split.modules)
    factors = write_adapter(adapter, bench, str(target.path / RESIDUAL), ordered)
    return Exported({RESIDUAL: digests, f"{ADAPTER}/{WEIGHTS}": factors}, residual, loads_alone=True)
