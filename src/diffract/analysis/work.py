"""One task: the matrices of one tensor, alone or in a base and its tuned checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import blake3
import polars as pl
import torch

from diffract.analysis.facts import Found, pair_facts, single_facts
from diffract.analysis.plan import Plan
from diffract.analysis.rows import bundle
from diffract.analysis.stack import Held
from diffract.cache import Cache, cache_key
from diffract.checkpoints import Checkpoint, Factors, as_bytes
from diffract.linalg import LowRank
from diffract.matrices import Matrix, batches, scan_cost, workspace_bytes

PAIR_COST = 4
"""Work of comparing two matrices, in scans of one."""


@dataclass(frozen=True)
class TensorTask:
    """The selected matrices of one tensor.

    Attributes:
        tensor: Its name.
        matrices: What is taken of it.
        size_bytes: Of the stored tensor.
        model: Which checkpoint is analysed alone, or as base.
        tuned: Which checkpoints are compared with it.
    """

    tensor: str
    matrices: tuple[Matrix, ...]
    size_bytes: int
    model: int
    tuned: tuple[int, ...] = ()

    @property
    def workspace_bytes(self) -> int:
        """Memory that it needs at most, about."""
        return workspace_bytes(self.matrices, self.size_bytes, pair=bool(self.tuned))

    @property
    def cost(self) -> float:
        """Work, about; what progress is measured in."""
        return scan_cost(self.matrices) * (1 + PAIR_COST * len(self.tuned))


@dataclass(frozen=True)
class Part:
    """Rows of one model for a run of matrices, and their vectors if these are saved."""

    model: int
    matrices: tuple[Matrix, ...]
    rows: pl.DataFrame
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a task yields: parts, and the digests of the tensors that it read, by model."""

    parts: list[Part]
    digests: dict[int, str]


@dataclass(frozen=True)
class Worker:
    """Does tasks.

    Attributes:
        checkpoints: Base first, or the only one.
        plan: What is computed.
        device: Where.
        cache: Results that are known already.
    """

    checkpoints: Sequence[Checkpoint]
    plan: Plan
    device: torch.device
    cache: Cache | None

    def __call__(self, task: TensorTask) -> Outcome:
        """Do one task; batch by batch, each kept in the cache when it is done."""
        held = {i: Held(self.checkpoints[i], task.tensor) for i in (task.model, *task.tuned)}
        digests = {i: one.digest() for i, one in held.items()}
        return Outcome(self.parts(task, held, digests), digests)

    def parts(self, task: TensorTask, held: dict[int, Held], digests: dict[int, str]) -> list[Part]:
        """Do one task on tensors that are held already; the parts of a batch follow each other, base first."""
        parts: list[Part] = []
        for batch in batches(task.matrices):
            if task.tuned:
                parts += self._compare(task, batch, held, digests)
            else:
                parts += self._scan(task, batch, held[task.model], digests[task.model])
        return parts

    def _scan(self, task: TensorTask, batch: tuple[Matrix, ...], held: Held, digest: str) -> list[Part]:
        def compute() -> list[Found]:
            return [single_facts(held.stack(batch), self.plan, self.device)]

        return self._known_or_new((task.model,), batch, ["scan", digest], compute)

    def _compare(
        self, task: TensorTask, batch: tuple[Matrix, ...], held: dict[int, Held], digests: dict[int, str]
    ) -> list[Part]:
        parts: list[Part] = []
        for i in task.tuned:
            change = self._change(i, task.tensor, batch)

            def compute(i: int = i, change: LowRank | None = change) -> list[Found]:
                base, tuned = held[task.model].stack(batch), held[i].stack(batch)
                return list(pair_facts(base, tuned, self.plan, self.device, change))

            content = ["compare", digests[task.model], digests[i], factor_digest(change)]
            found = self._known_or_new((task.model, i), batch, content, compute)
            parts += found if not parts else found[1:]
        return parts

    def _change(self, model: int, tensor: str, batch: tuple[Matrix, ...]) -> LowRank | None:
        """The factors of an adapter's change, for each matrix of a batch."""
        if tensor not in self.checkpoints[model].factors:
            return None
        return cut_factors(self.checkpoints[model].factors[tensor](), batch)

    def _known_or_new(
        self,
        models: tuple[int, ...],
        batch: tuple[Matrix, ...],
        content: Sequence[str],
        compute: Callable[[], list[Found]],
    ) -> list[Part]:
        """Return the parts of a batch, from the cache if it holds them all."""
        slices = [m.slice_key for m in batch]
        keys = [cache_key(*content, slices, self.plan.key, self.device.type, role) for role in range(len(models))]
        cache = None if self.plan.vectors else self.cache
        known = [cache.get(key) for key in keys] if cache else []
        if known and all(frame is not None for frame in known):
            return [Part(i, batch, frame) for i, frame in zip(models, known, strict=True) if frame is not None]
        parts = []
        for role, (i, found) in enumerate(zip(models, compute(), strict=True)):
            rows = bundle(found, self.plan.metrics if role else self.plan.single)
            vectors = {side: found.facts[side] for side in ("U", "Vh")} if self.plan.vectors else {}
            parts.append(Part(i, batch, rows, vectors))
        if cache:
            for key, part in zip(keys, parts, strict=True):
                cache.put(key, part.rows)
        return parts


def cut_factors(factors: Factors, batch: Sequence[Matrix]) -> LowRank:
    """Return what a low-rank change of a tensor is of each matrix of a batch."""
    left, right = [], []
    for m in batch:
        B = factors.B[slice(*m.rows)] if m.rows else factors.B
        A = factors.A[:, slice(*m.cols)] if m.cols else factors.A
        left.append(A.mT if m.transposed else B)
        right.append(B.mT if m.transposed else A)
    return LowRank(torch.stack(left), torch.stack(right))


def factor_digest(change: LowRank | Factors | None) -> str:
    """Different factors may round to the same merged weights."""
    if change is None:
        return ""
    hasher = blake3.blake3()
    for factor in (change.B, change.A):
        hasher.update(str(tuple(factor.shape)).encode())
        hasher.update(as_bytes(factor))
    return hasher.hexdigest()
