"""Spectra of products that are never multiplied out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffract.linalg.exact import Spectrum, lapack


@dataclass(frozen=True)
class LowRank:
    """b matrices as products B A, multiplied out one piece at a time.

    Attributes:
        B: (b, m, r), float64.
        A: (b, r, n), float64.
    """

    B: Tensor
    A: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(b, m, n)."""
        return (self.B.shape[0], self.B.shape[1], self.A.shape[2])

    def rows(self, start: int, stop: int) -> LowRank:
        """Return some rows of every matrix."""
        return LowRank(self.B[:, start:stop], self.A)

    def __getitem__(self, index: tuple[slice, slice, slice]) -> Float64[Tensor, "b m n"]:
        batch, rows, cols = index
        return self.B[batch, rows] @ self.A[batch, :, cols]


def factored_spectrum(B: Float[Tensor, "b m r"], A: Float[Tensor, "b r n"], *, vectors: bool = False) -> Spectrum:
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
