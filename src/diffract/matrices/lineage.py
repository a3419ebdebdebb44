"""Who descends from whom: the correlation of two models' entries tells a descendant from a stranger.

Training leaves weights correlated with those that it began from (0.94 to 1 after a stage, 0.91 and more between two
stages of one base); matrices of independent runs correlate by chance alone, a few thousandths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Float64
from torch import Tensor

from diffract.checkpoints import Checkpoint, TensorInfo
from diffract.matrices.layout import Layout
from diffract.matrices.pairing import MAY_DIFFER

SAMPLE_ENTRIES = 1 << 18
"""Entries of each matrix that are correlated: its first rows."""

FEWEST = 5
"""Matrices without which nothing is told."""

RELATED, STRANGE = 0.9, 0.05
"""Median correlations from which on a model is a descendant (or sibling), and below which it is a stranger."""

PROBES = 8
"""Rows of a matrix that are looked for elsewhere in the other model."""


@dataclass(frozen=True)
class Lineage:
    """How two models are related.

    Attributes:
        word: ``same values``, ``descendant or sibling``, ``far``, ``rearranged``, ``stranger`` or ``cannot tell``.
        correlation: Median over the matrices of both models, in [-1, 1]; ``None`` where it cannot be told.
        matrices: How many have a common name and shape.
    """

    word: str
    correlation: float | None
    matrices: int


def tell_lineage(base: Layout, tuned: Layout) -> Lineage:
    """Return how a model is related to another, from the matrices of its blocks; tables of tokens decide nothing.

    Strangers can share tables to the bit. Under five common matrices, or under half of the tuned model's entries,
    nothing is told. Before a model is called a stranger its rows are looked for in all layers of the other one, so that
    pruned models, doubled layers and permuted heads or neurons are called ``rearranged``.
    """
    own = dict(_blocks(tuned))
    common = {n: info for n, info in own.items() if n in base.entries and base.entries[n].info.shape == info.shape}
    entries = sum(info.entries for info in common.values())
    found = [correlation(*(_sample(side.checkpoint, info) for side in (base, tuned))) for info in common.values()]
    known = [r for r in found if not math.isnan(r)]
    if len(known) < FEWEST or entries < 0.5 * sum(info.entries for info in own.values()):
        return Lineage("cannot tell", None, len(known))
    r = median(known)
    if r >= RELATED:
        return Lineage("same values" if min(known) >= 1 else "descendant or sibling", r, len(known))
    if abs(r) >= STRANGE:
        return Lineage("far", r, len(known))
    return Lineage("rearranged" if _rearranged(base, tuned) else "stranger", r, len(known))


def correlation(one: Float64[Tensor, "..."], other: Float64[Tensor, "..."]) -> float:
    """Return Pearson's correlation of the entries of two tensors; NaN where one does not vary or is not finite."""
    one, other = one - one.mean(), other - other.mean()
    if bool((one == other).all()):
        return 1.0 if bool(one.any()) else float("nan")
    # not above 1 - 1e-12, which equal entries alone may have
    return min(float((one * other).sum() / (one.norm() * other.norm())), 1 - 1e-12)


def shared_matrices(one: Layout, other: Layout) -> list[str]:
    """Return the stored matrices, tables too, that two models have in common to the bit; blocks of rows are read."""
    infos = [e.info for e in one.entries.values() if len(e.info.shape) > 1]
    same = [i.name for i in infos if i.name in other.entries and other.entries[i.name].info.shape == i.shape]
    return [name for name in same if one.checkpoint.digest(name) == other.checkpoint.digest(name)]


def _blocks(layout: Layout) -> Iterator[tuple[str, TensorInfo]]:
    """The stored matrices of a model's blocks; without a known architecture all but those with a table's name."""
    for name, entry in layout.entries.items():
        table = any(m.block in MAY_DIFFER for m in entry.matrices) or "embed" in name.lower()
        if entry.matrices and not table and min(entry.info.shape) > 1:
            yield name, entry.info


def _sample(checkpoint: Checkpoint, info: TensorInfo) -> Float64[Tensor, "rows ..."]:
    rows = max(1, min(info.shape[0], SAMPLE_ENTRIES * info.shape[0] // info.entries))
    return checkpoint.read(info.name, (0, rows)).double()


def _rearranged(base: Layout, tuned: Layout) -> bool:
    """Whether most rows of the tuned model lie somewhere in the base, in any layer and at any place."""
    shapes: dict[tuple[int, ...], list[Tensor]] = {}
    for _, info in _blocks(base):
        shapes.setdefault(info.shape[1:], []).append(_sample(base.checkpoint, info).reshape(-1, *info.shape[1:]))
    closest = []
    for _, info in _blocks(tuned):
        if len(info.shape) != 2 or info.shape[1:] not in shapes:
            continue
        rows = _sample(tuned.checkpoint, info)
        probes = torch.nn.functional.normalize(rows[:: max(1, len(rows) // PROBES)][:PROBES], dim=1)
        best = torch.zeros(len(probes), dtype=torch.float64)
        for candidates in shapes[info.shape[1:]]:
            cosines = torch.nn.functional.normalize(candidates, dim=1) @ probes.T
            best = best.maximum(cosines.abs().amax(0))
        closest += best.tolist()
    return bool(closest) and median(closest) >= RELATED
