"""LoRA and PiSSA: write an adapter, of what a training stage changed or of a model's principal parts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from diffract.edits.edit import TUNED, Edit, Model, Planned, Row, describe
from diffract.edits.rule import NoiseRule, Rule
from diffract.errors import printable
from diffract.settings import STRICT

if TYPE_CHECKING:
    from torch import Tensor

    from diffract.edits.bench import Bench, Other
    from diffract.edits.draft import Draft, Place
    from diffract.edits.peft import LoraFactors
    from diffract.edits.write import Target, Written
    from diffract.matrices import Matrix

FactorDtype = Literal["float32", "bfloat16", "float16"]

RESIDUAL, ADAPTER = "residual", "adapter"
"""Folders that PiSSA writes."""


def _rank(value: object) -> object:
    """Read a rank; one message instead of one for each kind that it could have been."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if number in ("auto", "full") or (isinstance(number, int) and not isinstance(number, bool) and number >= 1):
        return number
    raise ValueError(f"expected a whole number from 1, auto or full, got {printable(value)!r}")


Rank = Annotated[Annotated[int, Field(ge=1)] | Literal["auto", "full"], BeforeValidator(_rank)]


class Lora(Edit):
    """Write the change against the base as a PEFT LoRA adapter."""

    # the command without a base looks at an adapter; recipes name one
    model_config = STRICT | ConfigDict(json_schema_extra={"required": ["base"]})

    name: ClassVar = "lora"
    usage: ClassVar = "diffract lora TUNED --base BASE --rank auto -o ADAPTER"
    arguments: ClassVar = (TUNED,)
    writes_adapter: ClassVar = True
    takes_output: ClassVar = False

    base: Model = None
    """What the model was tuned from, and what the adapter lies over."""
    rank: Rank | None = None
    """Rank of every matrix, auto for what rises above noise in each (donoho-gavish, the default), or full."""
    energy: float | None = None
    """Instead: the fewest directions that hold this share of each change's squared Frobenius norm."""
    rule: NoiseRule | None = None
    """Instead: what rises above noise, by donoho-gavish or mp-edge."""
    dtype: FactorDtype = "float32"
    """Of the adapter's factors: float32, bfloat16 or float16."""
    select: str | None = None
    """Matrices, such as 'layers 8-, attn'; every linear layer by default."""

    @model_validator(mode="after")
    def _check(self) -> Lora:
        if self.base is None:
            raise ValueError("expected base, what the model was tuned from")
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

    def plan(self, bench: Bench, draft: Draft) -> Planned:
        """Return changes that change nothing, on whose way the factors of every linear layer are found."""
        import torch

        from diffract.checkpoints.adapter_parts import WEIGHTS
        from diffract.edits.draft import matrix_changes
        from diffract.edits.peft import LoraFactors, linear_modules, whole_matrix, write_adapter
        from diffract.edits.spectral_edits import low_rank
        from diffract.edits.write import TensorJob, Written, run_jobs

        rule, dtype = self.criterion(), getattr(torch, self.dtype)
        modules, left = linear_modules(bench, self.select)
        asked = {module.tensor for module in modules}
        (base,) = bench.meet([self.base], asked | left.keys(), chosen=self.select is not None)
        # an adapter lies over the whole of the base's tensor: one with fewer rows or none cannot carry it
        modules = [module for module in modules if module.tensor in base.names and module.tensor not in base.rows]
        left = {name: why for name, why in left.items() if name in base.names}
        left |= {name: "the base has another number of tokens" for name in asked & base.rows.keys()}
        by_tensor = {module.tensor: module for module in modules}
        rows, factors = _left_rows(draft, base, left), {}

        # An adapter is a change whose new values nobody wants: it passes through the same machinery, threads and
        # progress as any other, and leaves its factors behind on the way.
        def edit(values: Tensor, matrix: Matrix, place: Place) -> Tensor:
            name, module = matrix.tensor, by_tensor[matrix.tensor]
            origin = base.read(name, place)
            found = low_rank(module.oriented(values), module.oriented(origin), rule, factor_dtype=dtype)
            factors[name] = LoraFactors(module, found.B.to(dtype), found.A.to(dtype))
            rank = {"rank": found.kept, "of": found.total}
            rows.append({"name": name, **rank, "change": found.change, "error": found.error})
            return values

        def computed(draft: Draft, target: Target) -> Iterator[LoraFactors]:
            """Yield factors in the model's order, as soon as all before them are there: few wait in memory."""
            waiting = deque(by_tensor)
            infos = [draft.checkpoint.info(name) for name in by_tensor]
            jobs = [TensorJob(info, (info.name,), draft.workspace_bytes(info.name)) for info in infos]
            for _ in run_jobs(jobs, lambda job: draft.block(job.info.name, None), target.progress):
                while waiting and waiting[0] in factors:
                    yield factors.pop(waiting.popleft())

        def write(draft: Draft, target: Target) -> Written:
            found = write_adapter(target.folder, computed(draft, target), bench=bench, base=describe(self.base))
            size = (target.folder / WEIGHTS).stat().st_size
            return Written({WEIGHTS: found}, target.folder, loads_alone=False, written_bytes=size)

        changes = matrix_changes(draft, [whole_matrix(bench, name) for name in by_tensor], edit)
        summary = {"base": describe(self.base), "modules": len(modules)}
        return Planned(changes, summary, rows, conclude=_carried, write=write)


class Pissa(Edit):
    """Split a model into a PEFT adapter of its principal singular directions and the residual, to train the adapter."""

    name: ClassVar = "pissa"
    usage: ClassVar = "diffract pissa MODEL --rank 16 -o OUT"
    takes_others: ClassVar = False
    writes_adapter: ClassVar = True

    rank: Annotated[int, Field(ge=1)] = 16
    """Singular directions of each matrix that go into the adapter."""
    dtype: FactorDtype = "float32"
    """Of the adapter's factors: float32, bfloat16 or float16."""
    select: str | None = None
    """Matrices, such as 'layers 8-, attn'; every linear layer by default."""

    def plan(self, bench: Bench, draft: Draft) -> Planned:
        """Return changes of every linear layer to its residual; what it loses is the adapter."""
        import torch

        from diffract.edits.draft import matrix_changes
        from diffract.edits.peft import LoraFactors, linear_modules, whole_matrix
        from diffract.edits.spectral_edits import pissa

        modules, left = linear_modules(bench, self.select)
        by_tensor = {module.tensor: module for module in modules}
        dtype, factors = getattr(torch, self.dtype), {}

        def edit(values: Tensor, matrix: Matrix, place: Place) -> Tensor:
            module = by_tensor[matrix.tensor]
            w = module.oriented(values)
            found = pissa(w, min(self.rank, *w.shape), factor_dtype=dtype)
            factors[matrix.tensor] = LoraFactors(module, found.B.to(dtype), found.A.to(dtype))
            return module.oriented(found.residual)

        def write(draft: Draft, target: Target) -> Written:
            return _write_split(draft, target, bench=bench, factors=(factors.pop(name) for name in by_tensor))

        changes = matrix_changes(draft, [whole_matrix(bench, name) for name in by_tensor], edit)
        summary = {"modules": len(modules), "rank": self.rank, "left whole": len(left)}
        return Planned(changes, summary, write=write)


def _write_split(draft: Draft, target: Target, *, bench: Bench, factors: Iterator[LoraFactors]) -> Written:
    """Write ``residual``, a whole model, and ``adapter``, which lies over it."""
    from dataclasses import replace

    from diffract.checkpoints.adapter_parts import WEIGHTS
    from diffract.edits.peft import write_adapter
    from diffract.edits.write import Written, write_draft

    residual = target.folder / RESIDUAL
    residual.mkdir()
    # Factors come into being while the residual is written, and only then: the order of the two is no choice.
    stored = write_draft(draft, replace(target, folder=residual))
    found = write_adapter(target.folder / ADAPTER, factors, bench=bench, base=str(target.path / RESIDUAL))
    size = stored.written_bytes + (target.folder / ADAPTER / WEIGHTS).stat().st_size
    outputs = {RESIDUAL: stored.digests, f"{ADAPTER}/{WEIGHTS}": found}
    return Written(outputs, residual, loads_alone=True, written_bytes=size)


def _left_rows(draft: Draft, base: Other, left: Mapping[str, str]) -> list[Row]:
    """Say of tensors that no adapter carries why, and what they have changed: all of it is missed."""
    from diffract.edits.draft import everything
    from diffract.edits.heads import TensorPart, Units, change_norms

    wholes = {name: base.shared(name, everything(draft.checkpoint.info(name).shape)) for name in left}
    parts = (TensorPart(name, place, frozenset({name})) for name, place in wholes.items() if place is not None)
    changes = change_norms(Units(tuple(left), tuple(parts)), draft.blocks, base)
    return [{"name": name, "left": why, "change": changes[name], "error": changes[name]} for name, why in left.items()]


def _carried(rows: list[Row]) -> dict[str, Any]:
    """Say how much of the change the adapter carries, and how much stays behind in other tensors."""
    carried, left = ([row for row in rows if ("left" in row) == other] for other in (False, True))
    # A preview asks before anything is computed.
    if not carried:
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
