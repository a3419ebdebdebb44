"""Iso-C: the sum of several changes with all its singular values made equal."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Float64
from torch import Tensor

from diffract.edits.operations.directions import decomposed
from diffract.edits.operations.precision import exact, require_same_shape, wider
from diffract.linalg import takes_gram


def iso_c(deltas: Sequence[Float[Tensor, "m n"]]) -> Float64[Tensor, "m n"]:
    """Return mean(S) U Vh of the sum U diag(S) Vh of the changes: its isotropic version.

    Singular vectors of zeros are arbitrary, and would get as much weight as all others. A sum of rank r < M therefore
    keeps its rank: its r singular values become their mean and the others stay zero. The nuclear norm is that of the
    sum either way; for full rank this is the source's definition.

    Args:
        deltas: D_i = W_i - W0, one or more, in the ``work_dtype`` of their checkpoints: float64 goes by LAPACK, float32
            (from 16 bits) by the Gram matrix where that is accurate enough (see ``decomposed``).

    Returns:
        r equal singular values, r the rank. Zero for a zero sum.

    Raises:
        ValueError: If there is none, shapes differ or are empty, or a value is not finite.

    Source: Marczak et al. 2025, "No task left behind", Iso-C.

    >>> import torch
    >>> iso_c([torch.diag(torch.tensor([5.0, 0.0])), torch.diag(torch.tensor([0.0, -3.0]))]).diagonal()
    tensor([ 4., -4.], dtype=torch.float64)
    """
    if not deltas:
        raise ValueError("expected one change or more, got none")
    require_same_shape(*deltas)
    total = exact(deltas[0]).clone()
    for delta in deltas[1:]:
        total += exact(delta)
    found = decomposed(total, gram=takes_gram(wider(*(d.dtype for d in deltas)), "auto"))
    rank = int((found.told > 0).sum())
    if rank == 0:
        return total.zero_()
    return found.added(slice(0, rank), found.S[:rank].mean().expand(len(found.S)))
