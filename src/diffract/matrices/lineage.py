"""Who descends from whom: how the entries of two models correlate, and the word that it comes to.

Training moves weights far less than a new seed does: of a descendant or a sibling the entries of a block's matrix
correlate by 0.9 and more, of two models that were trained apart by less than 0.05 in the median. Tables of tokens and
positions decide nothing, since strangers can have them in common to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from diffract.checkpoints import Checkpoint, row_blocks
from diffract.matrices.alike import counterparts
from diffract.matrices.layout import Layout
from diffract.matrices.rearranged import Side, find_blocks, first_rows, moved_layers, moved_units

RELATED, STRANGE = 0.9, 0.05
"""Median correlations from which on a model is a descendant (or sibling), and below which it is a stranger."""

FEWEST, LEAST_SHARE = 5, 0.5
"""Matrices of a common shape, and their share of the smaller model's blocks, below which nothing is told."""

SAMPLED, SAMPLED_ENTRIES = 8, 1 << 20
"""Matrices, and entries of each, that are looked at where a command does not read whole models anyway."""

LEAST_SPREAD, BELOW_1 = 1e-28, 1 - 1e-12
"""Variance, relative to the largest square, below which entries are one number up to rounding; the correlation that no
two tensors exceed which are not equal."""

CHUNK = 1 << 19
"""Entries that are cast to float64 at once."""

Digests: TypeAlias = Mapping[str, str]
"""By name of a tensor, as the base calls it, the digest of its bytes."""


@dataclass(frozen=True)
class Lineage:
    """How two models are related.

    Attributes:
        word: ``same`` (all bytes are equal), ``same values`` (equal once the wider dtype is rounded), ``descendant or
            sibling``, ``far``, ``rearranged``, ``stranger`` or ``cannot tell``.
        correlation: Median over the blocks' matrices, in [-1, 1]; of a rearranged model over what belongs together;
            ``None`` where it cannot be told.
        matrices: How many were correlated.
        share: What part of the entries of the smaller model's blocks has a partner of its shape, in [0, 1].
        shared: Matrices, tables too, that both have to the bit, by the base's names; empty where digests are not known.
        moved: Of a rearranged model where its layers, heads or neurons lie in the base.
    """

    word: str
    correlation: float | None
    matrices: int
    share: float = 1.0
    shared: tuple[str, ...] = ()
    moved: Mapping[str, str] = field(default_factory=dict)


def tell_lineage(
    base: Layout,
    tuned: Layout,
    *,
    whole: bool = False,
    known: Mapping[str, float] | None = None,
    digests: tuple[Digests, Digests] | None = None,
    seed: int = 0,
) -> Lineage:
    """Return how a model is related to another; the order of the two does not matter.

    Under five common matrices, or of whole models under half of the smaller one's entries, nothing is told. Before a
    model is called a stranger its layers are looked for in all layers of the other one, then its heads and neurons
    within their layer, so that pruned, upscaled, self-merged and permuted models are called ``rearranged``.

    Args:
        base: One model.
        tuned: The other.
        whole: Ask every matrix of the blocks, in blocks of rows; otherwise the first 2^20 entries of eight.
        known: Correlations that need no reading, by the base's names.
        digests: Of the tensors of both, where they are known; only with all of them ``same`` and ``same values`` are
            said.
        seed: Chooses the eight.
    """
    one, other = (base, find_blocks(base)), (tuned, find_blocks(tuned))
    pairs = _pairs(one, other)
    smaller = min(_entries(one), _entries(other))
    share = min(1.0, sum(base.entries[a].info.entries for a, _ in pairs) / smaller) if smaller else 0.0
    if not whole:
        chosen = np.random.default_rng(seed).permutation(len(pairs))[:SAMPLED]
        pairs = [pairs[i] for i in sorted(chosen)]
    before = known or {}
    every = [
        before[a] if a in before else _correlate((base.checkpoint, a), (tuned.checkpoint, b), whole=whole)
        for a, b in pairs
    ]
    found = [r for r in every if not math.isnan(r)]
    enough = len(found) >= FEWEST and (share >= LEAST_SHARE or not whole)
    r = median(found) if enough else None
    told: dict[str, Any] = {"matrices": len(found), "share": share, "shared": _shared(base, tuned, digests)}
    if digests is not None and (equal := _equal(base, tuned, digests)):
        return Lineage(equal, 1.0, **told)
    # some matrices that correlate by chance alone, in a descendant, may have been moved
    if r is None or r < RELATED or len(one[1]) != len(other[1]) or any(abs(r) < STRANGE for r in found):
        moved, again = moved_layers(one, other)
        if not moved:
            moved, again = moved_units(one, other)
        if moved:
            return Lineage("rearranged", again, **told, moved=moved)
    if r is None:
        return Lineage("cannot tell", None, **told)
    return Lineage("descendant or sibling" if r >= RELATED else "stranger" if abs(r) < STRANGE else "far", r, **told)


@dataclass
class EntrySums:
    """Sums over the entries of two tensors that come in pieces, from which their correlation follows.

    The first piece's mean is subtracted, as raw moments would lose a small variance beside a large mean, and its scale
    divided out, so that squares of 1e200 do not overflow. Exactly 1 is said of equal entries alone.
    """

    count: int = 0
    equal: bool = True
    units: tuple[Tensor, Tensor] | None = None
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    products: Tensor = field(default_factory=lambda: torch.zeros(2, 2, dtype=torch.float64))

    def add(self, one: Tensor, other: Tensor) -> None:
        """Take two pieces of one shape, in the dtypes that they are stored in; they are not changed."""
        for part, its in zip(one.flatten().split(CHUNK), other.flatten().split(CHUNK), strict=True):
            both = torch.stack((part.double(), its.double()))
            self.equal = self.equal and torch.equal(both[0], both[1])
            if self.units is None:
                # By the first piece, so that squares of very small or large entries stay within float64.
                scale = both.abs().amax(1, keepdim=True)
                self.units = both.mean(1, keepdim=True), scale.where(scale > 0, 1.0)
            both.sub_(self.units[0]).div_(self.units[1])
            self.count += len(part)
            self.sums += both.sum(1)
            self.products += both @ both.mT

    def correlation(self) -> float:
        """Return the correlation of all entries that came; NaN where one tensor does not vary or is not finite."""
        spread = self.products - torch.outer(self.sums, self.sums) / self.count
        squares = spread.diagonal().tolist()
        if not all(LEAST_SPREAD * self.count < square < math.inf for square in squares):
            return math.nan
        return 1.0 if self.equal else min(float(spread[0, 1]) / math.sqrt(squares[0] * squares[1]), BELOW_1)


def _correlate(one: tuple[Checkpoint, str], other: tuple[Checkpoint, str], *, whole: bool) -> float:
    """The correlation of two stored tensors of one shape, read side by side."""
    infos = [checkpoint.info(name) for checkpoint, name in (one, other)]
    sums = EntrySums()
    for rows in (
        row_blocks(max(infos, key=lambda i: i.size_bytes)) if whole else [first_rows(infos[0], SAMPLED_ENTRIES)]
    ):
        sums.add(*(checkpoint.read(name, rows) for checkpoint, name in (one, other)))
    return sums.correlation()


def _entries(side: Side) -> int:
    layout, blocks = side
    return sum(layout.entries[name].info.entries for roles in blocks.values() for name in roles.values())


def _pairs(one: Side, other: Side) -> list[tuple[str, str]]:
    """Names of the tensors that play one role in one layer and have one shape."""
    (base, ours), (tuned, theirs) = one, other
    found = [
        (name, theirs[layer][role])
        for layer, roles in ours.items()
        for role, name in roles.items()
        if role in theirs.get(layer, {})
    ]
    return [(a, b) for a, b in found if base.entries[a].info.shape == tuned.entries[b].info.shape]


def _shared(base: Layout, tuned: Layout, digests: tuple[Digests, Digests] | None) -> tuple[str, ...]:
    ours, theirs = digests or ({}, {})
    names = {own: name for name, own in counterparts(base, tuned).items()} if digests else {}
    return tuple(
        name
        for name, entry in base.entries.items()
        if len(entry.info.shape) > 1 and name in ours and ours[name] == theirs.get(names.get(name, name))
    )


def _equal(base: Layout, tuned: Layout, digests: tuple[Digests, Digests]) -> str:
    """``same``, ``same values`` or nothing; bytes are read again only where every difference may be one of dtypes."""
    names = {own: name for name, own in counterparts(base, tuned).items()}
    ours, theirs = ([n for n, e in side.entries.items() if e.outcome not in APART] for side in (base, tuned))
    pairs = [(name, names.get(name, name)) for name in ours]
    if {b for _, b in pairs} != set(theirs) or not all(a in digests[0] and b in digests[1] for a, b in pairs):
        return ""
    other = [(a, b) for a, b in pairs if digests[0][a] != digests[1][b]]
    if not other:
        return "same"
    if any(base.entries[a].info.dtype == tuned.entries[b].info.dtype for a, b in other):
        return ""
    return "same values" if all(_equal_values(base.checkpoint, tuned.checkpoint, pair) for pair in other) else ""


APART = ("tied", "buffer")
"""Outcomes of tensors that one of two equal models may lack."""


def _equal_values(one: Checkpoint, other: Checkpoint, names: tuple[str, str]) -> bool:
    infos = one.info(names[0]), other.info(names[1])
    if infos[0].shape != infos[1].shape:
        return False
    for rows in row_blocks(max(infos, key=lambda i: i.size_bytes)):
        x, y = one.read(names[0], rows), other.read(names[1], rows)
        # In one of both directions: each of two dtypes may hold what the other rounds.
        if not (torch.equal(x.to(y.dtype), y) or torch.equal(x, y.to(x.dtype))):
            return False
    return True
