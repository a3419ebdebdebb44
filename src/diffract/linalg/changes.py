"""Inner products of several changes of the same matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffract.linalg.factored import LowRank
from diffract.linalg.products import pieces, short_side
from diffract.linalg.sums import Buffer
from diffract.linalg.symmetric import mirrored


def change_grams(base: Float[Tensor, "b m n"], tuned: Sequence[Tensor | LowRank]) -> Float64[Tensor, "b k k"]:
    """Return the inner products <X_i, X_j> of X_0 = W0 and of the changes X_a = W_a - W0, k = 1 + a of them.

    <X, Y> is the sum of x * y over all entries, so that the diagonal holds squared Frobenius norms. Memory is k pieces
    in float64, whatever the size of the matrices.

    Args:
        base: W0.
        tuned: Each the W_a, of any float dtype and stride; or the change itself, as factors.

    Returns:
        Symmetric. A change that is not finite spoils its own row and column, a base that is not finite all of them.
    """
    count, rows, cols = base.shape
    device = base.device
    grams = torch.zeros(count, 1 + len(tuned), 1 + len(tuned), dtype=torch.float64, device=device)
    buffer = Buffer(device)
    for index in pieces((count, rows, cols), short_side((rows, cols)), device):
        part = base[index]
        x = buffer.like((len(part), 1 + len(tuned), *part.shape[1:]))
        x[:, 0].copy_(part)
        for place, one in enumerate(tuned, start=1):
            x[:, place].copy_(one[index])
            if not isinstance(one, LowRank):
                x[:, place].sub_(x[:, 0])
        _add_grams(grams[index[0]], x.flatten(2))
    return mirrored(grams)


def _add_grams(total: Float64[Tensor, "b k k"], x: Float64[Tensor, "b k n"]) -> None:
    """Add x x^T to the upper triangles; k is small and n large, where products by vectors are the fastest on a CPU."""
    if x.device.type != "cpu":
        total += x @ x.mT
        return
    for one, rows in zip(total, x, strict=True):
        for i, row in enumerate(rows):
            one[i, i:] += torch.mv(rows[i:], row)
