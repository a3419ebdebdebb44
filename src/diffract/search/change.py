"""What a rule keeps of a change: directions, energy, bytes.

Bytes of a matrix of m x n entries, each of b bytes as the tuned model stores it: all of D takes b m n; r directions as
two factors take b r (m + n), or b m n where that is less; K single entries take K (b + 4), value and place, or b m n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from diffract.edits.bench import Bench, Other
from diffract.edits.draft import place_of
from diffract.edits.operations.dare import seeded
from diffract.edits.operations.rules import kept, random_order
from diffract.edits.operations.truncate import change_sigmas
from diffract.edits.planning import flat
from diffract.edits.settings import Truncate
from diffract.engine import single_threaded

PLACE_BYTES = 4
"""Where a single entry is in its matrix."""


@dataclass(frozen=True)
class MatrixChange:
    """The change of one matrix.

    Attributes:
        name: Of the matrix.
        shape: Of it.
        sigmas: Singular values of D, descending.
        entry_bytes: Of one stored entry.
    """

    name: str
    shape: tuple[int, int]
    sigmas: Tensor
    entry_bytes: int

    @property
    def energy(self) -> float:
        """||D||_F^2."""
        return float(self.sigmas.square().sum())

    @property
    def size_bytes(self) -> int:
        """Of all of D."""
        return self.entry_bytes * prod(self.shape)


@dataclass(frozen=True)
class Kept:
    """What is kept of the change of all matrices.

    Attributes:
        directions: Singular directions; ``None`` for entries by chance.
        energy: Share of sum ||D||_F^2, in [0, 1]; of entries by chance its expectation.
        bytes: Share of what all of D takes.
    """

    directions: int | None
    energy: float
    bytes: float


def matrix_changes_of(bench: Bench, base: Other) -> list[MatrixChange]:
    """Return the change of every matrix of the model; vectors have none."""
    found = []
    with single_threaded():
        for m in bench.matrices(None, heads=False):
            info = bench.checkpoint.info(m.tensor)
            place = place_of(m, info.shape)
            tuned = bench.checkpoint.read(m.tensor)[place]
            sigmas = change_sigmas(flat(tuned), flat(base.read(m.tensor, place)))
            shape = tuple(flat(tuned).shape)
            found.append(MatrixChange(m.name, (shape[0], shape[1]), sigmas.cpu(), tuned.element_size()))
    return found


def kept_by(step: Truncate, changes: Sequence[MatrixChange]) -> Kept:
    """Return what a truncation keeps; 1 and 1 of a change that is zero."""
    directions, energy, size = 0, 0.0, 0.0
    for change in changes:
        order = random_order(change.sigmas, seeded(step.seed, change.name)) if step.side == "random" else None
        chosen = kept(change.sigmas, change.shape, step.criterion(), order)
        sigmas = change.sigmas if order is None else change.sigmas[order]
        count = chosen.stop - chosen.start
        directions += count
        energy += float(sigmas[chosen].square().sum())
        size += min(change.entry_bytes * count * sum(change.shape), change.size_bytes)
    whole = sum(change.energy for change in changes)
    return Kept(directions, min(1.0, energy / whole) if whole else 1.0, size / total_bytes(changes))


def kept_by_chance(share: float, changes: Sequence[MatrixChange]) -> Kept:
    """Return what is kept where each entry is with this probability."""
    size = sum(min(share * c.size_bytes * (1 + PLACE_BYTES / c.entry_bytes), c.size_bytes) for c in changes)
    return Kept(None, share, size / total_bytes(changes))


def share_for_bytes(size: float, changes: Sequence[MatrixChange]) -> float:
    """Return which share of entries, stored one by one, takes this share of bytes; all where all bytes may be used."""
    if size >= 1:
        return 1.0
    each = sum(c.size_bytes * (1 + PLACE_BYTES / c.entry_bytes) for c in changes)
    return size * total_bytes(changes) / each


def total_bytes(changes: Sequence[MatrixChange]) -> int:
    """Return what all of D takes."""
    return sum(change.size_bytes for change in changes)
