"""LASER: a weight matrix of which only the top singular directions remain."""

from __future__ import annotations

import math
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from diffract.edits.operations.precision import exact, work_dtype
from diffract.edits.operations.rules import Rule, share_of
from diffract.edits.operations.truncate import Truncated, truncate


def laser(w: Float[Tensor, "m n"], rho: float) -> Truncated:
    """Return the top floor(rho M) singular directions of W, at least 1: its best approximation of that rank.

    Floor is the source's choice. rho means the decimal number that it prints as: 0.29 of 100 is 29, though the product
    of the floats is below. By LAPACK in float64 whatever the dtype.

    Args:
        w: Any float dtype, device and stride.
        rho: Fraction of the rank that remains, 0 to 1.

    Returns:
        The values in ``work_dtype`` of the input, and what of ||W||_F^2 they hold. W itself for rho = 1. A zero matrix
        stays, with nothing kept.

    Raises:
        ValueError: If rho is out of range, or W is empty or not finite.

    Source: Sharma, Ash & Misra 2024, "The truth is in there".

    >>> import torch
    >>> laser(torch.diag(torch.tensor([1.0, 5.0, 3.0])), 0.67).values.diagonal()
    tensor([0., 5., 3.], dtype=torch.float64)
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho: expected a fraction from 0 to 1; got {rho!r}")
    x = exact(w)
    nothing = x.new_zeros(()).expand(x.shape)
    found = truncate(x, nothing, Rule(rank=max(1, math.floor(share_of(rho, min(x.shape))))))
    return replace(found, values=found.values.to(work_dtype(w.dtype)))
