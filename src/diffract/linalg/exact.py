"""The singular value decomposition by LAPACK, and the record that every method returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

EPSILON = float(torch.finfo(torch.float64).eps)


@dataclass(frozen=True)
class Spectrum:
    """Singular value decomposition of b matrices W = U diag(S) Vh.

    Attributes:
        S: (b, M), descending, float64.
        method: ``gram`` or ``lapack``, for each matrix.
        resolved: (b,), the smallest sigma that the method tells from zero.
        U: (b, m, M), or ``None``.
        Vh: (b, M, n), rows are right singular vectors, or ``None``.
    """

    S: Tensor
    method: tuple[str, ...]
    resolved: Tensor
    U: Tensor | None = None
    Vh: Tensor | None = None


def lapack(stack: Float[Tensor, "b m n"], *, vectors: bool) -> Spectrum:
    """Return the decomposition by LAPACK in float64 (on CUDA by its most accurate driver)."""
    x = stack.double()
    driver = "gesvd" if x.is_cuda else None
    U = Vh = None
    if vectors:
        U, S, Vh = torch.linalg.svd(x, full_matrices=False, driver=driver)
    else:
        S = torch.linalg.svdvals(x, driver=driver)
    return Spectrum(S, ("lapack",) * len(S), max(x.shape[1:]) * EPSILON * S[:, 0], U, Vh)
