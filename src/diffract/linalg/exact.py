"""The singular value decomposition by LAPACK, and the record that every method returns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffract.timing import timed

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


@timed("eigensolver")
def lapack(stack: Float[Tensor, "b m n"], *, vectors: bool) -> Spectrum:
    """Return the decomposition by LAPACK in float64 (on CUDA by its most accurate driver)."""
    x = stack.double()
    driver = "gesvd" if x.is_cuda else None
    U = Vh = None
    if vectors:
        U, S, Vh = torch.linalg.svd(x, full_matrices=False, driver=driver)
    else:
        S = torch.linalg.svdvals(x, driver=driver)
    return Spectrum(S, ("lapack",) * len(S), resolved=max(x.shape[1:]) * EPSILON * S[:, 0], U=U, Vh=Vh)


Symmetric = Float64[Tensor, "b M M"]


@timed("eigensolver")
def eigenvalues(a: Symmetric) -> Float64[Tensor, "b M"]:
    """Return all eigenvalues, ascending."""
    if a.device.type != "cpu":
        return torch.linalg.eigvalsh(a, UPLO="U")
    return torch.from_numpy(np.linalg.eigvalsh(a.numpy(), UPLO="U"))


@timed("eigensolver")
def eigenvectors(a: Symmetric) -> tuple[Float64[Tensor, "b M"], Symmetric]:
    """Return all eigenvalues, ascending, and orthonormal eigenvectors as columns."""
    if a.device.type != "cpu":
        values, vectors = torch.linalg.eigh(a, UPLO="U")
        return values, vectors
    found = np.linalg.eigh(a.numpy(), UPLO="U")
    return torch.from_numpy(found.eigenvalues), torch.from_numpy(found.eigenvectors)


def mirrored(a: Symmetric) -> Symmetric:
    """Return the symmetric matrices whose upper triangles ``a`` holds; what lies below them is overwritten."""
    return a.triu_().add_(a.triu(1).mT)


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
    return replace(core, U=left.Q @ core.U, Vh=core.Vh @ right.Q.mT)
