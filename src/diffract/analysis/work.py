"""One task: the matrices of one tensor, alone or in a base and its tuned checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import blake3
import polars as pl
import torch

from diffract.analysis.facts import Found, Plan, bundle, pair_facts, single_facts
from diffract.analysis.held import Held
from diffract.checkpoints import Checkpoint, Factors, as_bytes
from diffract.errors import SelectionError, printable
from diffract.linalg import LowRank, circuit_spectrum
from diffract.matrices import Layout, Matrix, batches, scan_cost, workspace_bytes
from diffract.metrics import GROUPS, Facts, Metric, sources
from diffract.store import Cache, cache_key

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


FACTORS = {"qk": ("q", "k"), "ov": ("o", "v")}

KNOWN = frozenset({"sigmas", "sigma_max", "resolved", "squares", "shape"})
"""Facts that the spectrum of a product tells."""

MEANINGLESS = ("shape", "random_matrix")
"""Groups that speak of a matrix of full rank with entries of its own: a circuit has as many sigmas as a head has
dimensions, the others are zero."""


def has_meaning(metric: Metric) -> bool:
    """Whether a metric can be computed of a circuit and says something about it."""
    names = {m.name for group in MEANINGLESS for m in GROUPS[group]}
    return not metric.pair and sources(metric.facts) <= KNOWN and metric.name not in names


@dataclass(frozen=True)
class CircuitTask:
    """The circuits of one kind in one attention block of one model.

    Attributes:
        model: Which checkpoint.
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


def all_circuits(layouts: Sequence[Layout]) -> list[CircuitTask]:
    """Return the circuits of all models.

    Raises:
        SelectionError: No attention block has all of its projections cut into heads.
    """
    tasks = [task for i, layout in enumerate(layouts) for task in circuit_tasks(layout, i)]
    if not tasks:
        raise SelectionError(
            "circuits need attention blocks with q and k, or o and v, all cut into heads; "
            f"{printable(layouts[0].checkpoint.reference)} has none that is selected. Leave --circuits out."
        )
    return tasks


def circuit_tasks(layout: Layout, model: int) -> Iterator[CircuitTask]:
    """Yield the circuits of every attention block whose projections are all cut into heads."""
    places: dict[tuple[int | None, str | None], dict[str | None, list[Matrix]]] = {}
    for m in layout.matrices:
        places.setdefault((m.layer, m.block), {}).setdefault(m.projection, []).append(m)
    for parts in places.values():
        for kind, (left, right) in FACTORS.items():
            lefts, rights = parts.get(left, []), parts.get(right, [])
            shared = {m.kv_head for m in lefts} == {m.kv_head for m in rights} and None not in {m.head for m in lefts}
            if lefts and rights and shared:
                yield CircuitTask(model, tuple(_label(kind, m, rights[0]) for m in lefts), tuple(lefts), tuple(rights))


def _label(kind: str, left: Matrix, right: Matrix) -> Matrix:
    """A circuit's row: (d, d), called after its query head; it lies in no tensor of its own."""
    out = left.shape[1] if kind == "qk" else left.shape[0]
    name = left.name.replace(f".{left.projection}.", f".{kind}.")
    return replace(left, name=name, projection=kind, shape=(out, right.shape[1]))


@dataclass(frozen=True)
class CircuitWorker:
    """Does circuit tasks.

    Attributes:
        checkpoints: All that are analysed.
        plan: What is computed; of it, what a spectrum alone tells.
        device: Where.
        cache: Results that are known already.
    """

    checkpoints: Sequence[Checkpoint]
    plan: Plan
    device: torch.device
    cache: Cache | None

    def __call__(self, task: CircuitTask) -> Outcome:
        """Do one task."""
        checkpoint = self.checkpoints[task.model]
        held = {m.tensor: Held(checkpoint, m.tensor) for m in (*task.left, *task.right)}
        digests = {name: one.digest() for name, one in held.items()}
        plan = replace(self.plan, metrics=tuple(filter(has_meaning, self.plan.metrics)))
        content = [[digests[m.tensor], m.slice_key, m.kv_head] for m in (*task.left, *task.right)]
        key = cache_key("circuit", task.circuits[0].projection, content, plan.key, self.device.type)
        rows = self.cache.get(key) if self.cache else None
        if rows is None:
            rows = bundle(self._find(task, held, plan), plan.metrics)
            if self.cache:
                self.cache.put(key, rows)
        return Outcome([Part(task.model, task.circuits, rows)], {})

    def _find(self, task: CircuitTask, held: Mapping[str, Held], plan: Plan) -> Found:
        left, right = (_stack(held, part).to(self.device) for part in (task.left, task.right))
        if task.circuits[0].projection == "ov":
            left = left.mT
        places = {m.kv_head: i for i, m in enumerate(task.right)}
        index = torch.tensor([places[m.kv_head] for m in task.left], device=self.device)
        found = circuit_spectrum(left, right, right_of_left=index, method=plan.method)
        S = found.S
        facts = Facts(
            sigmas=S,
            sigma_max=S[:, 0],
            resolved=found.resolved,
            squares=S.square().sum(-1),
            shape=task.circuits[0].shape,
        )
        return Found(facts, S.isfinite().all(-1), found)


def _stack(held: Mapping[str, Held], matrices: Sequence[Matrix]) -> torch.Tensor:
    """Same-shaped matrices as one stack; heads may be tensors of their own."""
    tensors = list(dict.fromkeys(m.tensor for m in matrices))
    return torch.cat([held[name].stack([m for m in matrices if m.tensor == name]).whole() for name in tensors])
