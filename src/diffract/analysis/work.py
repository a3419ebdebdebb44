"""What there is to do, as tasks, and the one worker that does them: for scans, comparisons, series, circuits, heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, TypeAlias

import blake3
import polars as pl
import torch
from torch import Tensor

from diffract.analysis.circuits import CircuitTask, HeldCircuits, circuit_facts, circuit_pair_facts, has_meaning
from diffract.analysis.facts import MetricPlan, StackFacts, StackPair, bundle, numbers, pair_facts, single_facts
from diffract.analysis.held import Held
from diffract.analysis.noise import noise_facts, tells
from diffract.checkpoints import Checkpoint, Factors, TensorInfo, as_bytes
from diffract.checkpoints.files import is_remote
from diffract.engine import run_on_ray, run_tasks
from diffract.linalg import LowRank, change_grams
from diffract.matrices import Layout, Matrix, batches, cut, is_paired, scan_cost, workspace_bytes
from diffract.matrices.layout import KEEP_BYTES, PIECE_BYTES
from diffract.matrices.lineage import EntrySums
from diffract.settings import Progress
from diffract.store import Cache, cache_key, remembered
from diffract.timing import timed

PAIR_COST = 4
"""Work of comparing two matrices, in scans of one."""

BLOCK_ENTRIES = 1 << 22
"""Entries read at once of each checkpoint's tensor where only sums over a tensor that is too large to be kept are
wanted."""

NOISE_VERSION = 1
"""Raised when other noise is drawn."""

CORRELATION_VERSION = 1
"""Raised when the correlation of two tensors changes."""

GRAMS = "grams"
"""The one column of a part that a ``HeadTask`` yields."""

GRAMS_VERSION = 1
"""Raised when the inner products of changes change."""


@dataclass(frozen=True)
class TensorTask:
    """The selected matrices of one tensor, of which metrics are wanted.

    Attributes:
        info: The tensor as the first of the checkpoints stores it.
        matrices: What is taken of it.
        model: Which checkpoint is analysed alone, or as base.
        tuned: Which checkpoints are compared with it.
    """

    info: TensorInfo
    matrices: tuple[Matrix, ...]
    model: int
    tuned: tuple[int, ...] = ()

    @property
    def tensor(self) -> str:
        """What progress calls it."""
        return self.info.name

    @property
    def workspace_bytes(self) -> int:
        """Memory that it needs at most, about."""
        return workspace_bytes(self.matrices, self.info.size_bytes, pair=bool(self.tuned))

    @property
    def cost(self) -> float:
        """Work, about; what progress is measured in."""
        return scan_cost(self.matrices) * (1 + PAIR_COST * len(self.tuned))


@dataclass(frozen=True)
class HeadTask(TensorTask):
    """The attention slices of one tensor, of which only the inner products of the changes are wanted."""

    @property
    def workspace_bytes(self) -> int:
        """Memory that it needs at most, about."""
        piece = min(PIECE_BYTES, 8 * max(m.entries for m in self.matrices))
        return (1 + len(self.tuned)) * (min(self.info.size_bytes, KEEP_BYTES) + piece)

    @property
    def cost(self) -> float:
        """Entries that are read."""
        return float(self.info.entries * (1 + len(self.tuned)))


AnyTask: TypeAlias = TensorTask | HeadTask | CircuitTask


def tensor_tasks(layouts: Sequence[Layout]) -> list[TensorTask]:
    """Return the tasks of one checkpoint, or of a base and its paired tuned ones, in file order.

    A tensor of the base is compared with every partner at once, so that it is read and decomposed once.
    """
    tasks: list[TensorTask] = []
    for i, layout in enumerate(layouts):
        for name, entry in layout.entries.items():
            if not entry.matrices or (i and is_paired(entry)):
                continue
            others = enumerate(layouts[1:], start=1) if i == 0 else ()
            tuned = tuple(k for k, other in others if is_paired(other.entries.get(name)))
            tasks.append(TensorTask(entry.info, entry.matrices, i, tuned))
    return tasks


@dataclass(frozen=True)
class Part:
    """Rows of one model for a run of matrices, and their vectors if these are saved."""

    model: int
    matrices: tuple[Matrix, ...]
    rows: pl.DataFrame
    vectors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a task yields: parts, and by model digests of the tensors that it read, and correlations with the base."""

    parts: list[Part]
    digests: dict[int, str] = field(default_factory=dict)
    correlations: dict[int, float] = field(default_factory=dict)


Outcomes: TypeAlias = "Callable[[Sequence[AnyTask], Worker], Iterator[tuple[AnyTask, Outcome]]]"
"""Yields each task with its outcome: small tasks first, otherwise in their order."""


class Done(NamedTuple):
    """What all tasks yield: parts, and by model and tensor digests of what was read and correlations with the base."""

    parts: list[Part]
    digests: dict[tuple[int, str], str]
    correlations: dict[tuple[int, str], float]


def on_this_machine(tasks: Sequence[AnyTask], worker: Worker) -> Iterator[tuple[AnyTask, Outcome]]:
    """Yield each task with its outcome, done by threads of this process."""
    return run_tasks(tasks, worker, device=worker.device, remote=worker.remote)


def on_ray(
    tasks: Sequence[AnyTask], worker: Worker, *, again: Callable[[], Worker]
) -> Iterator[tuple[AnyTask, Outcome]]:
    """Yield each task with its outcome, done by processes of Ray; a task that they die of has rows that say so.

    Args:
        tasks: What there is to do.
        worker: Who would do them here.
        again: Makes the same worker in another process, from references to the models.
    """
    return run_on_ray(tasks, again, lost=partial(lost, worker=worker), device=worker.device)


def lost(task: AnyTask, worker: Worker) -> Outcome:
    """Return rows without numbers, status ``failed``, for a task of which every process died that tried it."""
    if isinstance(task, HeadTask):
        size = (1 + len(task.tuned)) ** 2
        grams = pl.Series([[math.nan] * size] * len(task.matrices), dtype=pl.Array(pl.Float64, size))
        return Outcome([Part(task.model, task.matrices, pl.DataFrame({GRAMS: grams}))])
    matrices = task.circuits if isinstance(task, CircuitTask) else task.matrices
    models = (task.model, *task.tuned)[-1:] if worker.plan.apart else (task.model, *task.tuned)
    told = {"status": pl.String, "method": pl.String, "resolved": pl.Float64, "warning": pl.String}
    told |= {m.name: pl.Float64 for m in worker.plan.single}
    rows = pl.DataFrame([{"status": "failed"}] * len(matrices), schema=told)
    return Outcome([Part(i, matrices, rows) for i in models])


def run_all(
    tasks: Sequence[AnyTask],
    worker: Worker,
    *,
    outcomes: Outcomes = on_this_machine,
    progress: Progress | None = None,
    keep: Callable[[Part], None] | None = None,
) -> Done:
    """Do all tasks.

    Args:
        tasks: What there is to do.
        worker: Who does it.
        outcomes: Has the worker do them, or knows what it has done.
        progress: What is told of it.
        keep: Takes each part while it has its vectors; they are let go of then.

    """
    total, done = sum(task.cost for task in tasks), 0.0
    parts: list[Part] = []
    digests: dict[tuple[int, str], str] = {}
    correlations: dict[tuple[int, str], float] = {}
    for task, outcome in outcomes(tasks, worker):
        digests |= {(i, task.tensor): digest for i, digest in outcome.digests.items()}
        correlations |= {(i, task.tensor): r for i, r in outcome.correlations.items()}
        for part in outcome.parts:
            if keep:
                keep(part)
            # vectors take more memory than the weights themselves, so they must not pile up
            parts.append(replace(part, vectors={}))
        done += task.cost
        if progress:
            progress(done, total, task.tensor)
    return Done(parts, digests, correlations)


@dataclass(frozen=True)
class Worker:
    """Does tasks of every kind; what was computed of the same bytes in the same way comes from the cache.

    Attributes:
        checkpoints: Base first, or the only one. The factors of an adapter among them are its change from that base.
        plan: What is computed.
        device: Where it computes.
        cache: Results that are known already; it holds no vectors, so it must be ``None`` where these are wanted.
    """

    checkpoints: Sequence[Checkpoint]
    plan: MetricPlan
    device: torch.device
    cache: Cache | None

    @property
    def remote(self) -> bool:
        """Whether weights come over a network."""
        return any(is_remote(checkpoint) for checkpoint in self.checkpoints)

    @timed("other")
    def __call__(self, task: AnyTask) -> Outcome:
        """Do one task; matrices batch by batch, each kept in the cache when it is done."""
        match task:
            case CircuitTask():
                return Outcome(self._circuits(task))
            case HeadTask():
                return Outcome([self._grams(task)])
        held = {i: Held(self.checkpoints[i], task.matrices, self.cache) for i in (task.model, *task.tuned)}
        # digests of the very bytes that are analysed: a file that changes meanwhile spoils no result that is kept
        do = self._apart if self.plan.apart else self._compare if task.tuned else self._scan
        digests = {i: one.digest for i, one in held.items() if one.whole}
        related = {i: self._correlation(held[task.model], held[i]) for i in task.tuned}
        return Outcome([part for batch in batches(task.matrices) for part in do(task, batch, held)], digests, related)

    def _correlation(self, base: Held, tuned: Held) -> float:
        """Return how the entries of two tensors correlate, the heads and experts that are wanted of them together."""

        def correlate() -> pl.DataFrame:
            sums, rows = EntrySums(), max(1, BLOCK_ENTRIES * base.info.shape[0] // base.info.entries)
            for start in range(*base.span, rows):
                stop = min(start + rows, base.span[1])
                sums.add(base.rows(start, stop), tuned.rows(start, stop))
            return pl.DataFrame({"r": [sums.correlation()]})

        version = str(CORRELATION_VERSION)
        known = remembered(self.cache, lambda: cache_key("correlation", version, base.digest, tuned.digest), correlate)
        return known["r"][0]

    def _scan(self, task: TensorTask, batch: tuple[Matrix, ...], held: Mapping[int, Held]) -> list[Part]:
        one = held[task.model]
        keys = self._keys([task.model], batch, ["scan", one.digest])
        return self._known_or_new(keys, batch, lambda: [single_facts(one.stack(batch), self.plan, self.device)])

    def _compare(self, task: TensorTask, batch: tuple[Matrix, ...], held: Mapping[int, Held]) -> list[Part]:
        """Return the parts of the base, once, and of each tuned checkpoint, beside its numbers those of noise."""
        base, parts = held[task.model], []
        for i in task.tuned:
            tuned, factors = held[i], self.checkpoints[i].factors.get(task.tensor)
            change = factors and factors()

            def stacks(of: Sequence[Matrix], tuned: Held = tuned, change: Factors | None = change) -> StackPair:
                return StackPair(base.stack(of), tuned.stack(of), change and cut_factors(change, of))

            def compute(stacks: Callable[[Sequence[Matrix]], StackPair] = stacks) -> Sequence[StackFacts]:
                return pair_facts(stacks(batch), self.plan, self.device)

            content = [base.digest, tuned.digest, factor_digest(change and cut_factors(change, batch))]
            keys = self._keys([task.model, i], batch, ["compare", *content])
            *before, last = self._known_or_new(keys, batch, compute)
            noise = self._noise(batch, content, stacks)
            parts += [*(before if not parts else ()), replace(last, rows=last.rows.hstack(noise))]
        return parts

    def _noise(
        self, batch: Sequence[Matrix], content: Sequence[str], stacks: Callable[[Sequence[Matrix]], StackPair]
    ) -> list[pl.Series]:
        """Return what metrics of a pair are of noise of equal norm, null for matrices for which none is drawn."""
        drawn = [m for m in batch if self.plan.noise is None or m.name in self.plan.noise]
        metrics = tuple(filter(tells, self.plan.metrics))
        if not drawn or not metrics:
            return []
        plan, columns = replace(self.plan, metrics=metrics, vectors=False), []
        names = [m.name for m in drawn]
        spread = pl.Series([names.index(m.name) if m in drawn else None for m in batch], dtype=pl.UInt32)
        seeds = [[m.name, m.slice_key] for m in drawn]

        def draw(kind: str) -> pl.DataFrame:
            found = noise_facts(stacks(drawn), names, kind, find=lambda p: pair_facts(p, plan, self.device))
            return numbers(found, metrics)

        for kind in self.plan.noises:
            key = cache_key(kind, NOISE_VERSION, *content, seeds, plan.key, self.device.type)
            rows = remembered(self.cache, lambda key=key: key, partial(draw, kind))
            columns += [column.gather(spread).rename(f"{column.name}_{kind}") for column in rows]
        return columns

    def _apart(self, task: TensorTask, batch: tuple[Matrix, ...], held: Mapping[int, Held]) -> list[Part]:
        """Return the part of the last checkpoint: its rows as a scan has them, beside them what the pair adds."""
        last = task.tuned[-1] if task.tuned else task.model
        alone, between = replace(self, plan=self.plan.alone), replace(self, plan=self.plan.between)
        (own,) = alone._scan(replace(task, model=last, tuned=()), batch, held)
        if not task.tuned or not between.plan.metrics:
            return [own]
        return [replace(own, rows=beside(own.rows, between._compare(task, batch, held)[-1].rows))]

    def _keys(self, models: Sequence[int], batch: tuple[Matrix, ...], content: Sequence[str]) -> dict[int, str]:
        """Return the keys of a batch's results, one for each model in its role."""
        rest = [[m.slice_key for m in batch], self._drawn(batch), self.plan.key, self.device.type]
        return {i: cache_key(*content, *rest, role) for role, i in enumerate(models)}

    def _drawn(self, batch: tuple[Matrix, ...]) -> list[bool]:
        """Return for which matrices of a batch nulls are drawn."""
        return [self.plan.needs("drawn") and (self.plan.nulls is None or m.name in self.plan.nulls) for m in batch]

    def _known_or_new(
        self, keys: Mapping[int, str], batch: tuple[Matrix, ...], compute: Callable[[], Sequence[StackFacts]]
    ) -> list[Part]:
        """Return the parts of a batch, one for each model, from the cache if it holds them all."""
        known = [self.cache.get(key) for key in keys.values()] if self.cache else []
        found = [Part(i, batch, rows) for i, rows in zip(keys, known, strict=False) if rows is not None]
        if len(found) == len(keys):  # half of a pair, as a killed run may leave it, saves no work
            return found
        parts = []
        for i, facts in zip(keys, compute(), strict=True):
            facts.facts["drawn"] = torch.tensor(self._drawn(batch), dtype=torch.bool, device=self.device)
            rows = bundle(facts, self.plan.metrics if parts else self.plan.single)
            vectors = {side: facts.facts[side] for side in ("U", "Vh")} if self.plan.vectors else {}
            parts.append(Part(i, batch, rows, vectors))
        if self.cache:
            for key, part in zip(keys.values(), parts, strict=True):
                self.cache.put(key, part.rows)
        return parts

    def _circuits(self, task: CircuitTask) -> list[Part]:
        """Return the parts of a model's circuits, and of those compared with it, each beside its numbers alone."""
        base, *others = (HeldCircuits(self.checkpoints[i], task, self.cache) for i in (task.model, *task.tuned))
        own = [self._own_circuits(one, i) for one, i in zip((base, *others), (task.model, *task.tuned), strict=True)]
        return [own[0], *(self._with_pair(part, base, other) for part, other in zip(own[1:], others, strict=True))]

    def _own_circuits(self, held: HeldCircuits, model: int) -> Part:
        metrics = tuple(m for m in self.plan.single if has_meaning(m, normed=held.normed))
        worker = replace(self, plan=replace(self.plan, metrics=metrics, vectors=False))
        key = cache_key("circuit", held.content, worker._drawn(held.task.circuits), worker.plan.key, self.device.type)
        facts = lambda: [circuit_facts(held, self.plan.method, self.device)]  # noqa: E731
        (part,) = worker._known_or_new({model: key}, held.task.circuits, facts)
        return part

    def _with_pair(self, part: Part, base: HeldCircuits, tuned: HeldCircuits) -> Part:
        normed = base.normed or tuned.normed
        plan = replace(self.plan, metrics=tuple(m for m in self.plan.between.metrics if has_meaning(m, normed=normed)))
        if not plan.metrics:
            return part
        drawn = self._drawn(part.matrices)

        def compare() -> pl.DataFrame:
            found = circuit_pair_facts(base, tuned, self.device)
            found.facts["drawn"] = torch.tensor(drawn, dtype=torch.bool, device=self.device)
            return bundle(found, plan.metrics)

        key = partial(cache_key, "circuits", base.content, tuned.content, drawn, plan.key, self.device.type)
        return replace(part, rows=beside(part.rows, remembered(self.cache, key, compare)))

    def _grams(self, task: HeadTask) -> Part:
        """Return the inner products (k, k) of W0 and of the k - 1 changes, of each slice, as one row of k * k."""
        base = Held(self.checkpoints[task.model], task.matrices, self.cache)
        tuned = [self.checkpoints[i] for i in task.tuned]
        # of an adapter the change as factors, which are never multiplied out
        factors = [one.factors.get(task.tensor) for one in tuned]
        changed = [
            made() if made else Held(one, task.matrices, self.cache) for one, made in zip(tuned, factors, strict=True)
        ]

        def key() -> str:
            changes = [factor_digest(one) if isinstance(one, Factors) else one.digest for one in changed]
            content = ["heads", GRAMS_VERSION, base.digest, changes, [m.slice_key for m in task.matrices]]
            return cache_key(*content, self.device.type)

        def add() -> pl.DataFrame:
            flat = change_sums(task, base, changed, self.device).flatten(1).cpu().numpy()
            return pl.DataFrame({GRAMS: pl.Series(flat, dtype=pl.Array(pl.Float64, flat.shape[1]))})

        rows = remembered(self.cache, key, add)
        return Part(task.model, task.matrices, rows)


def beside(own: pl.DataFrame, pair: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of matrices with what rows of the same matrices in a pair have besides."""
    return own.hstack([column for column in pair.get_columns() if column.name not in own.columns])


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
    """Return a digest of a change that is known as factors, nothing where there is none."""
    if change is None:  # else the merged weights' digest would not do: different factors may round to the same
        return ""
    hasher = blake3.blake3()
    for factor in (change.B, change.A):
        hasher.update(str(tuple(factor.shape)).encode())
        hasher.update(as_bytes(factor))
    return hasher.hexdigest()


def change_sums(task: HeadTask, base: Held, changed: Sequence[Held | Factors], device: torch.device) -> Tensor:
    """Return the inner products (slices, k, k), summed over blocks of rows; each stored row is read once."""
    size, (count, width) = 1 + len(changed), task.info.shape
    total = torch.zeros(len(task.matrices), size, size, dtype=torch.float64, device=device)
    step = count if task.info.size_bytes <= KEEP_BYTES else max(1, BLOCK_ENTRIES // width)
    for start in range(*base.span, step):
        stop = min(start + step, base.span[1])
        rows = base.rows(start, stop).to(device)
        others = [
            Factors(one.B[start:stop].to(device), one.A.to(device))
            if isinstance(one, Factors)
            else one.rows(start, stop).to(device)
            for one in changed
        ]
        places, parts = _inside(task, start, stop)  # a slice may begin in one block and end in another
        for batch in batches(parts):
            here, places = places[: len(batch)], places[len(batch) :]
            changes = [cut_factors(one, batch) if isinstance(one, Factors) else cut(one, batch) for one in others]
            total[here] += change_grams(cut(rows, batch), changes)
    return total


def _inside(task: HeadTask, start: int, stop: int) -> tuple[list[int], list[Matrix]]:
    """Return which slices reach into a block of stored rows, and what of each is in it, counted from its first row."""
    places, parts = [], []
    for place, m in enumerate(task.matrices):
        first, last = m.rows or (0, task.info.shape[0])
        first, last = max(first, start) - start, min(last, stop) - start
        if first < last:
            width = m.shape[0] if m.transposed else m.shape[1]
            shape = (width, last - first) if m.transposed else (last - first, width)
            places.append(place)
            parts.append(replace(m, rows=(first, last), shape=shape))
    return places, parts
