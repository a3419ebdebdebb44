"""The circuits of attention heads as tasks: which projections make them, their factors, and what is found out of them.

A circuit is a map of rank h at most between spaces of d dimensions, W_q^T W_k or W_o W_v, that is known as two factors.
It has singular values and vectors like any matrix, and a change between two models, but no entries, rows or columns
that anybody would look at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffract.analysis.facts import StackFacts, overlap_facts
from diffract.analysis.held import Held
from diffract.architectures.names import norm_names
from diffract.attention import CIRCUITS
from diffract.checkpoints import Checkpoint
from diffract.checkpoints.dtypes import TORCH_DTYPES
from diffract.errors import ArchitectureError, SelectionError, printable
from diffract.linalg import CircuitFactors, Method, circuit_pair, circuit_spectrum, lapack
from diffract.matrices import Layout, Matrix, is_paired
from diffract.metrics import GROUPS, Facts, Metric, sources
from diffract.store import Cache

VERSION = 2
"""Raised when other factors are composed, or the numbers of a pair change."""


@dataclass(frozen=True)
class CircuitTask:
    """The circuits of one kind in one attention block of one model, and of those that are compared with it.

    Attributes:
        model: The place of the checkpoint among those that are analysed.
        circuits: What they are called, one per query head.
        left: W_q, or W_o, of each query head.
        right: W_k, or W_v, of each key-value head.
        qk_norm: How the gains of norms of queries and keys count, as an architecture file says; none where it is empty.
        tuned: Which checkpoints are compared with it.
    """

    model: int
    circuits: tuple[Matrix, ...]
    left: tuple[Matrix, ...]
    right: tuple[Matrix, ...]
    qk_norm: str = ""
    tuned: tuple[int, ...] = ()

    @property
    def tensor(self) -> str:
        """What progress calls it."""
        return self.circuits[0].name

    @property
    def workspace_bytes(self) -> int:
        """Memory that it needs at most, about."""
        return 16 * (1 + bool(self.tuned)) * sum(m.entries for m in (*self.left, *self.right))

    @property
    def cost(self) -> float:
        """Work, about, in multiplications."""
        alone = float(sum(m.entries * min(m.shape) for m in (*self.left, *self.right)))
        return alone * (1 + PAIR_COST * len(self.tuned))


PAIR_COST = 8
"""Work of comparing two circuits, in spectra of one."""

KNOWN = frozenset({"sigmas", "sigma_max", "resolved", "squares", "shape", "epsilon", "drawn"})
"""Facts that the spectrum of a product tells."""

KNOWN_OF_PAIRS = frozenset(
    {
        *("base_sigmas", "base_resolved", "base_squares", "base_epsilon", "delta_sigmas", "delta_squares"),
        *("delta_along", "left_cosines", "right_cosines", "diagonal", "delta_energy"),
    }
)
"""Facts that the factors of two products tell without entries, rows or columns of either."""

MEANINGLESS = ("shape", "random_matrix")
"""Groups that speak of a matrix of full rank with entries of its own: a circuit has as many sigmas as a head has
dimensions, the others are zero."""


def has_meaning(metric: Metric, *, normed: bool) -> bool:
    """Whether a metric can be computed of a circuit and says something about it.

    Args:
        metric: Of one matrix or of a pair.
        normed: Whether queries and keys are normed after their projections: no size of theirs is seen by the model, so
            that only what a scaling leaves as it is says something.
    """
    names = {m.name for group in MEANINGLESS for m in GROUPS[group]}
    can = sources(metric.facts) <= KNOWN | KNOWN_OF_PAIRS and metric.name not in names
    return can and (metric.degree == 0 or not normed)


def circuit_tasks(layouts: Sequence[Layout]) -> list[CircuitTask]:
    """Return the circuits of all models; those of a base with those that are compared with them.

    Raises:
        SelectionError: No attention block has all of its projections cut into heads.
    """
    tasks = []
    for i, layout in enumerate(layouts):
        for task in _circuits_of(layout, i):
            used = {m.tensor for m in (*task.left, *task.right)}
            paired = [k for k, other in enumerate(layouts) if k and all(is_paired(other.entries.get(n)) for n in used)]
            if i not in paired:
                tasks.append(replace(task, tuned=() if i else tuple(paired)))
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
    spec = layout.architecture.spec
    for parts in places.values():
        for kind, (left, right) in CIRCUITS.items():
            lefts, rights = parts.get(left, []), parts.get(right, [])
            shared = {m.kv_head for m in lefts} == {m.kv_head for m in rights} and None not in {m.head for m in lefts}
            # rows of latent queries hold rotary ones, too, which those of keys lack: they make no product
            fit = kind != "qk" or {m.shape[0] for m in lefts} == {m.shape[0] for m in rights}
            if lefts and rights and shared and fit:
                labels = tuple(_label(kind, m, rights[0]) for m in lefts)
                norm = spec.qk_norm if spec else ""
                yield CircuitTask(model, labels, left=tuple(lefts), right=tuple(rights), qk_norm=norm)


def _label(kind: str, left: Matrix, right: Matrix) -> Matrix:
    """A circuit's row: (d, d), called after its query head; it lies in no tensor of its own."""
    out = left.shape[1] if kind == "qk" else left.shape[0]
    name = left.name.replace(f".{left.projection}.", f".{kind}.")
    return replace(left, name=name, projection=kind, shape=(out, right.shape[1]))


def gains_left_out(layout: Layout) -> list[str]:
    """Say that norms of queries and keys are no part of circuits where no architecture file tells how they are made."""
    normed = [n for m in layout.matrices if (n := _norm_of(layout.checkpoint, m))]
    if not normed or (layout.architecture.spec and layout.architecture.spec.qk_norm):
        return []
    return [
        f"{printable(normed[0])} and others norm queries and keys in a way that no architecture file describes: "
        "circuits are without their gains."
    ]


def _norm_of(checkpoint: Checkpoint, matrix: Matrix) -> str | None:
    """Return the name of the gains with which a head's queries or keys are normed, if they are."""
    names = (f"{name}.weight" for name in norm_names(matrix.tensor, matrix.projection))
    return next((name for name in names if name in checkpoint), None)


class HeldCircuits:
    """The factors of a task's circuits in one model, read when they are asked for.

    Attributes:
        task: Which circuits.
        checkpoint: The model.
    """

    def __init__(self, checkpoint: Checkpoint, task: CircuitTask, cache: Cache | None) -> None:
        self.task, self.checkpoint = task, checkpoint
        every = (*task.left, *task.right)
        parts = {n: [m for m in every if m.tensor == n] for n in dict.fromkeys(m.tensor for m in every)}
        self._held = {name: Held(checkpoint, some, cache) for name, some in parts.items()}
        self._norms = {m: name for m in every if (name := _norm_of(checkpoint, m))}

    @property
    def normed(self) -> bool:
        """Whether norms stand between the factors."""
        return bool(self._norms)

    @property
    def content(self) -> list[object]:
        """What the circuits depend on; digests are read once, by what is held."""
        every = (*self.task.left, *self.task.right)
        factors = [[self._held[m.tensor].digest, m.slice_key, m.kv_head] for m in every]
        gains = [self.checkpoint.digest(name) for name in dict.fromkeys(self._norms.values())]
        return [VERSION, self.task.circuits[0].projection, factors, self.task.qk_norm, gains]

    def factors(self, device: torch.device) -> CircuitFactors:
        """Return the factors, with gains of norms in them.

        Where there are norms the model sees no size of theirs, so that each circuit is made one of norm 1.
        """
        left, right = (self._stack(part).to(device) for part in (self.task.left, self.task.right))
        epsilon = max(torch.finfo(TORCH_DTYPES[held.info.dtype]).eps for held in self._held.values())
        if self.task.circuits[0].projection == "ov":  # W_o W_v is L^T R with L = W_o^T
            left = left.mT
        places = {m.kv_head: i for i, m in enumerate(self.task.right)}
        index = torch.tensor([places[m.kv_head] for m in self.task.left], device=device)
        if self.normed:
            left = left.double()
            inner = (left @ left.mT * (right.double() @ right.double().mT)[index]).sum((1, 2))  # ||L^T R||^2
            left = left / inner.clamp(min=0).sqrt().where(inner > 0, 1.0)[:, None, None]
        return CircuitFactors(left, right, index, epsilon)

    def _stack(self, matrices: Sequence[Matrix]) -> Tensor:
        """Return same-shaped matrices as one stack; heads may be tensors of their own."""
        tensors = dict.fromkeys(m.tensor for m in matrices)
        own = [self._held[name].stack([m for m in matrices if m.tensor == name]).whole() for name in tensors]
        found = torch.cat(own)
        if not self.task.qk_norm or not set(matrices) & self._norms.keys():
            return found
        weights = found.double()
        if self.task.qk_norm == "layer":
            weights = weights - weights.mean(1, keepdim=True)
        return weights * torch.stack([self._gain(m) for m in matrices])[:, :, None]

    def _gain(self, matrix: Matrix) -> Tensor:
        """Return the gain of each of a head's rows: norms have one for each dimension of a head, or of all heads."""
        name, size = self._norms[matrix], matrix.shape[0]
        gain = self.checkpoint.read(name).double().flatten()
        start, stop = (matrix.cols if matrix.transposed else matrix.rows) or (0, size)
        if len(gain) != size:
            gain = gain[start:stop]
        if len(gain) != size:
            raise ArchitectureError(
                f"tensor {printable(name)!r} has {self.checkpoint.info(name).shape} entries, expected {size}, one for "
                f"each row of {matrix.name}, or one for each row of all heads. Leave --circuits out."
            )
        return gain + 1 if self.task.qk_norm == "rms_one_plus" else gain


def circuit_facts(held: HeldCircuits, method: Method, device: torch.device) -> StackFacts:
    """Find out what the metrics of one model's circuits need."""
    factors = held.factors(device)
    found = circuit_spectrum(factors.left, factors.right, right_of_left=factors.right_of_left, method=method)
    facts = Facts(
        sigmas=found.S,
        sigma_max=found.S[:, 0],
        resolved=found.resolved,
        squares=found.S.square().sum(-1),
        shape=held.task.circuits[0].shape,
        epsilon=factors.epsilon,
    )
    return StackFacts(facts, found.S.isfinite().all(-1), found)


def circuit_pair_facts(base: HeldCircuits, tuned: HeldCircuits, device: torch.device) -> StackFacts:
    """Find out what the metrics of pairs need of the circuits of two models: chance is that of d dimensions."""
    first, second = base.factors(device), tuned.factors(device)
    found = circuit_pair(first, second)
    S0, S1, delta = found.spectra.base.S, found.spectra.tuned.S, found.delta
    assert found.spectra.diagonal is not None
    known = overlap_facts(found.spectra) | {
        "shape": base.task.circuits[0].shape,
        "epsilon": second.epsilon,
        "sigmas": S1,
        "sigma_max": S1[:, 0],
        "resolved": found.spectra.tuned.resolved,
        "squares": S1.square().sum(-1),
        "base_epsilon": first.epsilon,
        "base_sigmas": S0,
        "base_resolved": found.spectra.base.resolved,
        "base_squares": S0.square().sum(-1),
        "delta_sigmas": lapack(delta, vectors=False).S,
        "delta_squares": delta.square().sum((1, 2)),
        "delta_along": (found.spectra.diagonal * S0).sum(-1),
    }
    return StackFacts(Facts(known), found.finite, None)
