"""Which parts of which tensors an entrywise edit moves: every tensor, or the matrices of a selection."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from diffract.edits.bench import Bench
from diffract.edits.draft import Place, everything, place_of
from diffract.matrices import Matrix

Weighted = dict[str, list[tuple[Place, float]]]
"""For each tensor its parts, and a number for each."""


def weighted_places(bench: Bench, select: str | None, weight: float, groups: Mapping[str, float]) -> Weighted:
    """Return what moves, and by how much.

    Args:
        bench: The model.
        select: Matrices that move; every tensor, 1-D ones included, for ``None``.
        weight: Of all that no group names.
        groups: Weights by selection; of several that name a matrix the last counts.
    """
    kept = bench.matrices(select, heads=True)
    weights = {m.name: weight for m in kept}
    for text, other in groups.items():
        weights |= {m.name: other for m in bench.matrices(text, heads=True) if m.name in weights}
    by_tensor: dict[str, list[Matrix]] = defaultdict(list)
    for m in kept:
        by_tensor[m.tensor].append(m)
    if select is None:
        by_tensor |= {name: [] for name in bench.entries() if name not in by_tensor}
    return {name: _parts(bench, name, matrices, weights, weight) for name, matrices in by_tensor.items()}


def _parts(
    bench: Bench, name: str, matrices: Iterable[Matrix], weights: Mapping[str, float], weight: float
) -> list[tuple[Place, float]]:
    """Return the parts of a tensor; one part where all of it moves alike."""
    shape = bench.checkpoint.info(name).shape
    matrices = list(matrices)
    values = {weights[m.name] for m in matrices} or {weight}
    if len(values) == 1 and len(matrices) in (0, len(bench.layout.entries[name].matrices)):
        return [(everything(shape), values.pop())]
    return [(place_of(m, shape), weights[m.name]) for m in matrices]
