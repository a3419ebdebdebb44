"""LoRA: write what a training stage changed as an adapter over its base."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffract.checkpoints.adapter import WEIGHTS
from diffract.edits.bench import Bench, Other, Planned, Row, matrix_changes
from diffract.edits.draft import Draft, Place, everything
from diffract.edits.heads import Part, Units, change_norms
from diffract.edits.peft import (
    Exported,
    Exporter,
    Factors,
    Module,
    Split,
    Target,
    linear_modules,
    whole_matrix,
    write_adapter,
)
from diffract.edits.settings import Lora, Pissa, Settings, describe
from diffract.edits.spectral_edits import low_rank, pissa
from diffract.edits.write import Job, run_jobs, write_draft
from diffract.matrices import Matrix


def plan_lora(lora: Lora, bench: Bench, draft: Draft) -> Split:
    """Return changes to base + B A of every linear layer."""
    base = bench.other(lora.base)
    modules, left = linear_modules(bench, lora.select)
    by_tensor = {module.tensor: module for module in modules}
    rows = _left_rows(draft, base, left)
    split = Split(Planned({}, {"base": describe(lora.base), "modules": len(modules)}, rows, _summary), modules)

    def edit(values: Tensor, matrix: Matrix, place: Place) -> Tensor:
        module, origin = by_tensor[matrix.tensor], base.read(matrix.tensor, place)
        tuned, origin = (w.mT if module.transposed else w for w in (values, origin))
        factors, row = _factors(lora, module, tuned, origin)
        split.factors[matrix.tensor] = factors
        rows.append(row)
        return values

    split.planned.changes = matrix_changes(bench, [whole_matrix(bench, m.tensor) for m in modules], edit)
    return split


def write_lora(lora: Lora, bench: Bench, draft: Draft, split: Split, target: Target) -> Exported:
    """Write the adapter into the folder itself."""
    digests = write_adapter(target.folder, bench, describe(lora.base), _computed(draft, split, target))
    return Exported({WEIGHTS: digests}, target.folder, loads_alone=False)


def _computed(draft: Draft, split: Split, target: Target) -> Iterator[Factors]:
    """Yield the factors of each module in the model's order."""
    draft, waiting = draft.then(split.planned.changes), deque(split.modules)
    infos = [draft.checkpoint.info(module.tensor) for module in split.modules]
    jobs = [Job(info, (info.name,), draft.workspace_bytes(info.name)) for info in infos]
    for _ in run_jobs(jobs, lambda job: draft.block(job.info.name, None), target.progress):
        while waiting and waiting[0].tensor in split.factors:
            yield split.factors.pop(waiting.popleft().tensor)


def _factors(lora: Lora, module: Module, tuned: Tensor, base: Tensor) -> tuple[Factors, Row]:
    """Return factors as they are stored, and what these miss of the change."""
    dtype = getattr(torch, lora.dtype)
    found = low_rank(tuned, base, lora.criterion(), factor_dtype=dtype)
    row = {"name": module.tensor, "rank": found.kept, "of": found.total, "change": found.change, "error": found.error}
    return Factors(module, found.B.to(dtype), found.A.to(dtype)), row


def _left_rows(draft: Draft, base: Other, left: Mapping[str, str]) -> list[Row]:
    """Say of tensors that no adapter carries why, and what they have changed: all of it is missed."""
    places = {name: everything(draft.checkpoint.info(name).shape) for name in left}
    units = Units(tuple(left), tuple(Part(name, place, frozenset({name})) for name, place in places.items()))
    changes = change_norms(units, draft.blocks, base)
    return [{"name": name, "left": why, "change": changes[name], "error": changes[name]} for name, why in left.items()]


def _summary(rows: list[Row]) -> dict[str, Any]:
    """Say how much of the change the adapter carries, and how much stays behind in other tensors."""
    carried, left = ([row for row in rows if ("left" in row) == other] for other in (False, True))
    if not carried:  # nothing is computed yet
        return {}
    ranks = [row["rank"] for row in carried]
    whole, missed, behind = (
        sum(row[key] ** 2 for row in part) ** 0.5
        for part, key in ((carried, "change"), (carried, "error"), (left, "error"))
    )
    return {
        "adapted": sum(rank > 0 for rank in ranks),
        "ranks": f"{min(ranks)} to {max(ranks)}",
        "change": whole,
        "error": missed,
        "error, share of the change": missed / whole if whole else 0.0,
        "changed tensors left out": sum(row["error"] > 0 for row in left),
        "change left out": behind,
    }


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


EXPORTERS: dict[type[Settings], Exporter] = {
    Lora: Exporter(plan_lora, write_lora),
    Pissa: Exporter(plan_pissa, write_pissa),
}
