"""SVF: a weight matrix with its singular values scaled one by one."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from diffract.edits.operations.directions import decomposed
from diffract.edits.operations.precision import exact, work_dtype


def svf(w: Float[Tensor, "m n"], z: float | Float[Tensor, " k"]) -> Float[Tensor, "m n"]:
    """Return U diag(S z) Vh, by LAPACK in float64 whatever the dtype.

    Args:
        w: Any float dtype, device and stride.
        z: One factor for all, or one for each of the M = min(m, n) singular values in descending order; any sign.

    Returns:
        In ``work_dtype`` of the input. W to rounding for z = 1, zero for z = 0 or a zero matrix. Where singular values
        are equal and their z are not, the result depends on which vectors LAPACK takes.

    Raises:
        ValueError: If z has another length or is not finite, or W is empty or not finite.

    Source: Sun, Cetin & Tang 2025, "Transformer-squared", singular value fine-tuning.

    >>> svf(torch.diag(torch.tensor([3.0, 2.0])), torch.tensor([2.0, -1.0])).diagonal()
    tensor([ 6., -2.], dtype=torch.float64)
    """
    x = exact(w)
    factors = torch.as_tensor(z, dtype=torch.float64, device=x.device).detach()
    if factors.ndim > 0 and factors.shape != (min(x.shape),):
        raise ValueError(f"z: expected a number or {min(x.shape)} of them; got shape {tuple(factors.shape)}")
    if not bool(factors.isfinite().all()):
        raise ValueError("z: expected finite factors, got NaN or an infinity")
    found = decomposed(x, gram=False)
    return found.added(slice(None), found.S * factors).to(work_dtype(w.dtype))
