"""LoRA: write what a training stage changed as an adapter over its base."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffract.checkpoints.adapter import WEIGHTS
from diffract.edits.bench import Bench, Other
from diffract.edits.draft import Draft, Place
from diffract.edits.exports.export import Exported, Split, Target
from diffract.edits.exports.peft import Factors, Module, linear_modules, whole_matrix, write_adapter
from diffract.edits.operations.low_rank import low_rank
from diffract.edits.planning import Planned, both, matrix_changes
from diffract.edits.settings import Lora, describe
from diffract.engine import run_tasks
from diffract.matrices import Matrix


@dataclass(frozen=True)
class Task:
    """A tensor whose change is decomposed."""

    tensor: str
    workspace_bytes: int


def plan_lora(lora: Lora, bench: Bench, draft: Draft) -> Split:
    """Return changes to base + B A of every linear layer."""
    base = bench.other(lora.base)
    modules, left = linear_modules(bench, lora.select)
    by_tensor = {module.tensor: module for module in modules}
    rows: list[dict[str, Any]] = [
        {"name": name, "left": why, **_change(draft, base, name)} for name, why in left.items()
    ]
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
    draft = draft.then(split.planned.changes)
    tasks = [Task(m.tensor, draft.workspace_bytes(m.tensor)) for m in split.modules]
    total, done, waiting = sum(task.workspace_bytes for task in tasks), 0, deque(split.modules)
    for task, _ in run_tasks(tasks, lambda task: _run(draft, task.tensor), device=torch.device("cpu")):
        done += task.workspace_bytes
        if target.progress:
            target.progress(done, total, task.tensor)
        while waiting and waiting[0].tensor in split.factors:
            yield split.factors.pop(waiting.popleft().tensor)


def _factors(lora: Lora, module: Module, tuned: Tensor, base: Tensor) -> tuple[Factors, dict[str, Any]]:
    """Return factors as they are stored, and what these miss of the change."""
    dtype = getattr(torch, lora.dtype)
    found = low_rank(tuned, base, lora.criterion())
    B, A = found.B.to(dtype), found.A.to(dtype)
    delta = tuned.double() - base.double()
    change, error = float(delta.norm()), float(delta.sub_(B.double() @ A.double()).norm())
    row = {"name": module.tensor, "rank": found.kept, "of": found.total, "change": change, "error": error}
    return Factors(module, B, A), row


def _run(draft: Draft, tensor: str) -> None:
    for _ in draft.blocks(tensor):
        pass


def _change(draft: Draft, base: Other, name: str) -> dict[str, float]:
    """Return what a tensor that no adapter carries has changed: all of it is missed."""
    square = 0.0
    for rows, block in draft.blocks(name):
        tuned, origin = both(block, base.block(name, rows))
        square += float(torch.linalg.vector_norm(tuned - origin, dtype=torch.float64)) ** 2
    return {"change": square**0.5, "error": square**0.5}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
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
        "changed tensors left out": sum(row["error"] > 0 for row in left),
        "change left out": behind,
    }
