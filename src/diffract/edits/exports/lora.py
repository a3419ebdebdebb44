"""LoRA: write what a training stage changed as an adapter over its base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffract.edits.bench import Bench, Other
from diffract.edits.draft import WORKING_COPIES, Draft, everything
from diffract.edits.exports.export import Export, Exported, FactorDtype
from diffract.edits.exports.peft import Factors, Module, linear_modules, write_adapter
from diffract.edits.operations.low_rank import LowRankDelta, low_rank
from diffract.edits.operations.rules import NoiseRule, Rule
from diffract.edits.output import Output
from diffract.edits.step import Model, Planned, describe, together
from diffract.edits.write import Progress
from diffract.engine import run_tasks


@dataclass(frozen=True)
class Task:
    """A module whose change is decomposed."""

    place: int
    module: Module
    workspace_bytes: int


class Lora(Export):
    """Write the change against the base as a PEFT LoRA adapter."""

    name: ClassVar[str] = "lora"

    base: Model
    """What the model was tuned from, and what the adapter lies over."""
    rank: Annotated[int, Field(ge=1)] | Literal["auto", "full"] | None = None
    """Rank of every matrix, auto for what rises above noise in each (donoho-gavish, the default), or full."""
    energy: float | None = None
    """Instead: the fewest directions that hold this share of each change's squared Frobenius norm."""
    rule: NoiseRule | None = None
    """Instead: what rises above noise, by donoho-gavish or mp-edge."""
    dtype: FactorDtype = "float32"
    """Of the factors."""
    select: str | None = None
    """Matrices, such as 'layers 8-, attn'; every linear layer by default."""

    @model_validator(mode="after")
    def _check(self) -> Lora:
        if sum(x is not None for x in (self.rank, self.energy, self.rule)) > 1:
            raise ValueError("expected one of rank, energy and rule")
        self.criterion()
        return self

    def criterion(self) -> Rule:
        """Return the rule that the settings make."""
        if self.rank == "full":
            return Rule(drop=0.0)
        if isinstance(self.rank, int):
            return Rule(rank=self.rank)
        if self.energy is not None:
            return Rule(energy=self.energy)
        return Rule(rule=self.rule or "donoho-gavish")

    def write(
        self, bench: Bench, draft: Draft, folder: Path, target: Path, output: Output, progress: Progress | None
    ) -> Exported:
        """Write the adapter into the folder."""
        base = bench.other(self.base)
        modules, left = linear_modules(bench, self.select)
        rows: list[dict[str, Any]] = []
        factors = self._factors(bench, draft, base, modules, rows, progress)
        digests = write_adapter(folder, bench, base.checkpoint.reference, factors)
        rows += [{"name": name, "left": reason, **_change(draft, base, name)} for name, reason in left.items()]
        return Exported(
            {"adapter_model.safetensors": digests}, Planned({}, _summary(self.base, rows), rows), folder, False
        )

    def _factors(
        self, bench: Bench, draft: Draft, base: Other, modules: list[Module], rows: list[Any], progress: Progress | None
    ) -> Iterator[Factors]:
        """Yield the factors of each module in the model's order, and note what they miss."""
        sizes = [WORKING_COPIES * 8 * bench.checkpoint.info(m.tensor).entries for m in modules]
        tasks = [Task(i, module, size) for i, (module, size) in enumerate(zip(modules, sizes, strict=True))]
        ready: dict[int, Factors] = {}
        done, following = 0, 0
        for task, (found, row) in run_tasks(tasks, partial(self._one, draft, base), device=torch.device("cpu")):
            ready[task.place] = found
            rows.append(row)
            done += task.workspace_bytes
            if progress:
                progress(done, sum(sizes), task.module.tensor)
            while following in ready:
                yield ready.pop(following)
                following += 1

    def _one(self, draft: Draft, base: Other, task: Task) -> tuple[Factors, dict[str, Any]]:
        module, dtype = task.module, getattr(torch, self.dtype)
        tuned = torch.cat([block for _, block in draft.blocks(module.tensor)])
        origin = base.read(module.tensor, everything(tuned.shape))
        if module.transposed:
            tuned, origin = tuned.mT, origin.mT
        found = low_rank(tuned, origin, self.criterion())
        B, A = found.B.to(dtype), found.A.to(dtype)
        error = _error(tuned, origin, B, A)
        return Factors(module, B, A), {"name": module.tensor, **_record(found, error)}


def _record(found: LowRankDelta, error: Tensor) -> dict[str, Any]:
    missed = float(error)
    relative = found.error_relative * missed / found.error if found.error else 0.0
    return {"rank": found.kept, "of": found.total, "error": missed, "error_relative": relative}


def _error(tuned: Tensor, base: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """Return ||W1 - W0 - B A||_F of factors as they are stored."""
    return (tuned.double() - base.double() - B.double() @ A.double()).norm()


def _change(draft: Draft, base: Other, name: str) -> dict[str, float]:
    """Return what a tensor that no adapter carries has changed."""
    square = 0.0
    for rows, block in draft.blocks(name):
        tuned, origin = together(block, base.block(name, rows))
        square += float((tuned - origin).double().square().sum())
    return {"error": square**0.5}


def _summary(base: object, rows: list[dict[str, Any]]) -> dict[str, Any]:
    carried = [row for row in rows if "rank" in row]
    left = [row for row in rows if "left" in row and row["error"]]
    return {
        "base": describe(base),
        "modules": sum(row["rank"] > 0 for row in carried),
        "of": len(carried),
        "ranks": f"{min(r['rank'] for r in carried)} to {max(r['rank'] for r in carried)}",
        "error": sum(row["error"] ** 2 for row in carried) ** 0.5,
        "changed tensors left out": len(left),
        "their change": sum(row["error"] ** 2 for row in left) ** 0.5,
    }
