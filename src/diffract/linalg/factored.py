"""Spectra of products that are never multiplied out."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from diffract.linalg.spectrum import Spectrum, lapack


def factored_spectrum(
    B: Float[Tensor, "b m r"], A: Float[Tensor, "b r n"], *, vectors: bool = False
) -> Spectrum:
    """Return the singular value decomposition of B A, min(r, m, n) values of it: the others are zero.

    With B = Q_B R_B and A^T = Q_A R_A the singular values of B A are those of the small R_B R_A^T.

    Args:
        B: Left factors.
        A: Right factors.
        vectors: Whether singular vectors are wanted.
    """
    left, right = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().mT)
    core = lapack(left.R @ right.R.mT, vectors=vectors)
    if core.U is None or core.Vh is None:
        return core
    return Spectrum(core.S, core.method, core.resolved, left.Q @ core.U, core.Vh @ right.Q.mT)
