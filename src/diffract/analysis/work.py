"""What there is to do, as tasks, and the one worker that does them: for scans, comparisons, series, circuits, heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, TypeAlias

import blake3
import polars as pl
import torch
from torch import Tensor

from diffract.analysis.facts import MetricPlan, StackFacts, StackPair, bundle, numbers, pair_facts, single_facts
from diffract.analysis.held import Held
from diffract.analysis.noise import noise_facts, tells
from diffract.checkpoints import Checkpoint, Factors, TensorInfo, as_bytes
from diffract.engine import run_tasks
from diffract.errors import SelectionError, printable
from diffract.linalg import LowRank, change_grams, circuit_spectrum
from diffract.matrices import Layout, Matrix, batches, cut, is_paired, scan_cost, workspace_bytes
from diffract.matrices.layout import KEEP_BYTES, PIECE_BYTES
from diffract.matrices.lineage import EntrySums
from diffract.metrics import GROUPS, Facts, Metric, sources
from diffract.settings import Progress
from diffract.store import Cache, cache_key, remembered

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


@dataclass(frozen=True)
class CircuitTask:
    """The circuits of one kind in one attention block of one model.

    Attributes:
        model: The place of the checkpoint among those that are analysed.
        circuits: What they are called, one per query head.
        left: W_q, or W_o, of each query head.
        right: W_k, or W_v, of each key-value head.
    """

    model: int
    circuits: tuple[Matrix, ...]
    left: tuple[Matrix, ...]
    right: tuple[Matrix, ...]

    @property
    def tensor(self) -> str:
        """What progress calls it."""
        return self.circuits[0].name

    @property
    def workspace_bytes(self) -> int:
        """Memory that it needs at most, about."""
        return 16 * sum(m.entries for m in (*self.left, *self.right))

    @property
    def cost(self) -> float:
        """Work, about, in multiplications."""
        return float(sum(m.entries * min(m.shape) for m in (*self.left, *self.right)))


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


CIRCUITS = {"qk": ("q", "k"), "ov": ("o", "v")}
"""Each circuit and the projections that are its factors."""

KNOWN = frozenset({"sigmas", "sigma_max", "resolved", "squares", "shape", "epsilon", "drawn"})
"""Facts that the spectrum of a product tells."""

MEANINGLESS = ("shape", "random_matrix")
"""Groups that speak of a matrix of full rank with entries of its own: a circuit has as many sigmas as a head has
dimensions, the others are zero."""


def has_meaning(metric: Metric) -> bool:
    """Whether a metric can be computed of a circuit and says something about it."""
    names = {m.name for group in MEANINGLESS for m in GROUPS[group]}
    return not metric.pair and sources(metric.facts) <= KNOWN and metric.name not in names


def circuit_tasks(layouts: Sequence[Layout]) -> list[CircuitTask]:
    """Return the circuits of all models.

    Raises:
        SelectionError: No attention block has all of its projections cut into heads.
    """
    tasks = [task for i, layout in enumerate(layouts) for task in _circuits_of(layout, i)]
    if not tasks:
        raise SelectionError(
            "circuits need attention blocks with q and k, or o and v, all cut into heads; "
            f"{printable(layouts[0].checkpoint.reference)} has none that is selected. Leave --circuits out."
        )
    return tasks


def _circuits_of(layout: Layout, model: int) -> Iterator[CircuitTask]:
    """Yield the circuits of every attention block whose projections are all cut into heads."""
    places: dict[tuple[int | None, str | None], dict[str | None, list[Matrix]]] = {}
    for m in layout.matrices:
        places.setdefault((m.layer, m.block), {}).setdefault(m.projection, []).append(m)
    for parts in places.values():
        for kind, (left, right) in CIRCUITS.items():
            lefts, rights = parts.get(left, []), parts.get(right, [])
            shared = {m.kv_head for m in lefts} == {m.kv_head for m in rights} and None not in {m.head for m in lefts}
            # rows of latent queries hold rotary ones, too, which those of keys lack: they make no product
            fit = kind != "qk" or {m.shape[0] for m in lefts} == {m.shape[0] for m in rights}
            if lefts and rights and shared and fit:
                yield CircuitTask(model, tuple(_label(kind, m, rights[0]) for m in lefts), tuple(lefts), tuple(rights))


def _label(kind: str, left: Matrix, right: Matrix) -> Matrix:
    """A circuit's row: (d, d), called after its query head; it lies in no tensor of its own."""
    out = left.shape[1] if kind == "qk" else left.shape[0]
    name = left.name.replace(f".{left.projection}.", f".{kind}.")
    return replace(left, name=name, projection=kind, shape=(out, right.shape[1]))


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


class Done(NamedTuple):
    """What all tasks yield: parts, and by model and tensor digests of what was read and correlations with the base."""

    parts: list[Part]
    digests: dict[tuple[int, str], str]
    correlations: dict[tuple[int, str], float]


def run_all(
    tasks: Sequence[AnyTask],
    worker: Worker,
    *,
    progress: Progress | None = None,
    keep: Callable[[Part], None] | None = None,
) -> Done:
    """Do all tasks.

    Args:
        tasks: What there is to do.
        worker: Who does it.
        progress: What is told of it.
        keep: Takes each part while it has its vectors; they are let go of then.

    """
    total, done = sum(task.cost for task in tasks), 0.0
    parts: list[Part] = []
    digests: dict[tuple[int, str], str] = {}
    correlations: dict[tuple[int, str], float] = {}
    for task, outcome in run_tasks(tasks, worker, device=worker.device):
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
        change = between._compare(task, batch, held)[-1].rows
        added = [column for column in change.get_columns() if column.name not in own.rows.columns]
        return [replace(own, rows=own.rows.hstack(added))]

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
        checkpoint = self.checkpoints[task.model]
        every = (*task.left, *task.right)
        held = {
            n: Held(checkpoint, [m for m in every if m.tensor == n], self.cache)
            for n in dict.fromkeys(m.tensor for m in every)
        }
        metrics = tuple(filter(has_meaning, self.plan.metrics))
        worker = replace(self, plan=replace(self.plan, metrics=metrics, vectors=False))
        factors = [[held[m.tensor].digest, m.slice_key, m.kv_head] for m in (*task.left, *task.right)]
        content = ["circuit", task.circuits[0].projection, factors]
        key = cache_key(*content, worker._drawn(task.circuits), worker.plan.key, self.device.type)
        return worker._known_or_new({task.model: key}, task.circuits, lambda: [self._circuit_facts(task, held)])

    def _circuit_facts(self, task: CircuitTask, held: Mapping[str, Held]) -> StackFacts:
        left, right = (_stack(held, part).to(self.device) for part in (task.left, task.right))
        if task.circuits[0].projection == "ov":  # W_o W_v is L^T R with L = W_o^T
            left = left.mT
        places = {m.kv_head: i for i, m in enumerate(task.right)}
        index = torch.tensor([places[m.kv_head] for m in task.left], device=self.device)
        found = circuit_spectrum(left, right, right_of_left=index, method=self.plan.method)
        S = found.S
        facts = Facts(
            sigmas=S,
            sigma_max=S[:, 0],
            resolved=found.resolved,
            squares=S.square().sum(-1),
            shape=task.circuits[0].shape,
            epsilon=torch.finfo(left.dtype).eps,
        )
        return StackFacts(facts, S.isfinite().all(-1), found)

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


def _stack(held: Mapping[str, Held], matrices: Sequence[Matrix]) -> torch.Tensor:
    """Return same-shaped matrices as one stack; heads may be tensors of their own."""
    tensors = list(dict.fromkeys(m.tensor for m in matrices))
    return torch.cat([held[name].stack([m for m in matrices if m.tensor == name]).whole() for name in tensors])


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
