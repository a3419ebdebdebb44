"""PiSSA: the principal part of a weight matrix as an adapter, and the residual that stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffract.edits.operations.directions import decomposed, matmul
from diffract.edits.operations.precision import exact


@dataclass(frozen=True)
class Pissa:
    """W = residual + B A.

    Attributes:
        A: sqrt(S_r) Vh_r, values of the factor dtype.
        B: U_r sqrt(S_r), likewise.
        residual: W - B A.
    """

    A: Float64[Tensor, "r n"]
    B: Float64[Tensor, "m r"]
    residual: Float64[Tensor, "m n"]


def pissa(w: Float[Tensor, "m n"], rank: int, *, factor_dtype: torch.dtype = torch.float32) -> Pissa:
    """Split W into the adapter B A of its top singular directions and the residual W - B A.

    B = U_r sqrt(S_r) and A = sqrt(S_r) Vh_r, by LAPACK in float64, are rounded to the dtype that they are stored in
    before the residual is taken, so that the residual holds their rounding too and the sum is W. To go back: residual
    + B A.

    Args:
        w: Any float dtype, device and stride.
        rank: r, from 1 to min(m, n).
        factor_dtype: What A and B will be stored in.

    Returns:
        All in float64. A zero matrix gives zero factors.

    Raises:
        ValueError: If the rank is out of range, W is empty or not finite, or a factor overflows its dtype.

    Source: Meng, Wang & Zhang 2024, "PiSSA".

    >>> pissa(torch.diag(torch.tensor([9.0, 2.0])), 1).residual.diagonal()
    tensor([0., 2.], dtype=torch.float64)
    """
    x = exact(w)
    if not 1 <= rank <= min(x.shape):
        raise ValueError(f"rank: expected 1 to {min(x.shape)} for a matrix of shape {tuple(x.shape)}; got {rank!r}")
    B, A = decomposed(x, gram=False).factors(slice(0, rank), factor_dtype)
    return Pissa(A, B, x - matmul(B, A))
