"""Same-shaped matrices of one tensor as one stack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from diffract.matrices.matrix import Matrix

if TYPE_CHECKING:  # looking at a model's structure needs no torch
    from torch import Tensor

BATCH_BYTES = 1 << 26
"""Float64 bytes of the matrices that are analysed together."""


def batches(matrices: Iterable[Matrix], budget_bytes: int = BATCH_BYTES) -> Iterator[tuple[Matrix, ...]]:
    """Yield runs of matrices that have one shape and part, within a byte budget, one matrix at least."""
    for _, run in groupby(matrices, key=lambda m: (m.shape, m.block, m.projection)):
        alike = list(run)
        step = max(1, budget_bytes // (8 * alike[0].entries))
        for start in range(0, len(alike), step):
            yield tuple(alike[start : start + step])


def cut(tensor: Tensor, matrices: Sequence[Matrix], first_index: int = 0) -> Tensor:
    """Return matrices of one tensor as a stack (b, m, n), a view where they are evenly spaced.

    Args:
        tensor: The stored tensor, or entries from ``first_index`` on of its leading axis.
        matrices: Same-shaped matrices of it.
        first_index: Where on the leading axis of a 3-D tensor ``tensor`` begins.
    """
    import torch

    views = [_view(tensor, m, first_index) for m in matrices]
    first = views[0]
    offsets = [view.storage_offset() for view in views]
    steps = {b - a for a, b in pairwise(offsets)} or {0}
    if len(steps) == 1 and min(steps) >= 0:
        return first.as_strided((len(views), *first.shape), (steps.pop(), *first.stride()), offsets[0])
    return torch.stack(views)


def _view(tensor: Tensor, matrix: Matrix, first_index: int) -> Tensor:
    stored = tensor if matrix.index is None else tensor[matrix.index - first_index]
    rows = slice(*matrix.rows) if matrix.rows else slice(None)
    cols = slice(*matrix.cols) if matrix.cols else slice(None)
    view = stored[rows, cols]
    return view.mT if matrix.transposed else view
