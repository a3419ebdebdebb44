"""Circuits of attention heads, from slices of two tensors: ``qk`` = W_q^T W_k and ``ov`` = W_o W_v per query head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from diffract.analysis.facts import Found
from diffract.analysis.plan import Plan
from diffract.analysis.rows import bundle
from diffract.analysis.stack import Held
from diffract.analysis.work import Outcome, Part
from diffract.cache import Cache, cache_key
from diffract.checkpoints import Checkpoint
from diffract.errors import SelectionError, printable
from diffract.linalg import circuit_spectrum
from diffract.matrices import Layout, Matrix
from diffract.metrics import GROUPS, Facts, Metric, sources

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
