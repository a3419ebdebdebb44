"""The largest singular values without the rest: a block Krylov method with a residual bound.

Below, A is the matrix with its short side first, Q (M, p) an orthonormal basis that grows block by block,
B = Q^T A (p, N), and Y = A B^T (M, p).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffract.errors import DiffractError
from diffract.linalg.products import pieces, product, short_first, short_side

OVERSAMPLING = 4
"""Columns of a block beyond k; they carry what lies just below the k-th singular value."""


TINY = float(torch.finfo(torch.float64).tiny)
ZERO = 1e-12
"""Values below this share of sigma_1 count as zero; they have no right vector."""


@dataclass(frozen=True)
class TopSpectrum:
    """The k largest singular values of one matrix and their vectors.

    Attributes:
        S: (k,), descending, float64.
        U: (m, k).
        Vh: (k, n).
        residual: (k,), ||W v - sigma u||: within that distance of each value lies a singular value.
        error: (k,), the smaller of the residual and residual^2 / gap (Kato, Temple), the gap to the next value found.
        converged: Whether every error is below the tolerance.
    """

    S: Tensor
    U: Tensor
    Vh: Tensor
    residual: Tensor
    error: Tensor
    converged: bool


def top_spectrum(
    w: Float[Tensor, "m n"], k: int, *, tolerance: float = 1e-9, seed: int = 0, steps: int = 24
) -> TopSpectrum:
    """Return the k largest singular triplets of a matrix.

    Block Golub-Kahan iteration with full reorthogonalisation and Rayleigh-Ritz extraction (Golub, Luk, Overton 1981).

    Args:
        w: Any float dtype; float64 pieces of it are made as they are needed.
        k: How many, at most min(m, n).
        tolerance: Error, relative to sigma_1, at which to stop.
        seed: Of the starting block.
        steps: Block steps at most.

    Raises:
        DiffractError: ``k`` is not between 1 and min(m, n).
    """
    short, side = min(w.shape), short_side(tuple(w.shape))
    if not 1 <= k <= short:
        raise DiffractError(f"expected 1 <= k <= {short} for a matrix of shape {tuple(w.shape)}, got {k}.")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(short, min(k + OVERSAMPLING, short), generator=generator, dtype=torch.float64)
    block = torch.linalg.qr(start.to(w.device)).Q
    Q, B, Y = block[:, :0], block.new_zeros(0, max(w.shape)), block[:, :0]
    while True:
        across, image = _both_products(w, block, side)
        Q, B, Y = torch.cat([Q, block], 1), torch.cat([B, across]), torch.cat([Y, image], 1)
        S, ritz = _ritz(B, start.shape[1])
        P = Q @ ritz
        residual = (Y @ ritz / S.clamp(min=TINY) - S * P).norm(dim=0)
        residual = torch.where(ZERO * S[0] < S, residual, S)  # ||A^T u|| where v is not defined
        error = _error(S, residual)[:k]
        steps -= 1
        converged = bool((error <= tolerance * S[0]).all())
        if converged or steps == 0 or Q.shape[1] == short:
            break
        block = _orthogonal(image[:, : short - Q.shape[1]], Q)
    long = (ritz[:, :k].mT @ B) / S[:k, None].clamp(min=TINY)
    U, Vh = (P[:, :k], long) if side == "rows" else (long.mT, P[:, :k].mT)
    return TopSpectrum(S[:k], U, Vh, residual[:k], error, converged)


def _both_products(w: Tensor, block: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Return block^T A (c, N) and A A^T block (M, c) in one pass over the pieces of A."""
    across, image = [], torch.zeros_like(block)
    for index in pieces((1, *w.shape), side, w.device):
        a = short_first(w[None][index].double(), side)
        part = product(block.mT[None], a)
        image += product(a, part.mT)[0]
        across.append(part[0])
    return torch.cat(across, 1), image


def _ritz(B: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest Ritz values and their vectors' coordinates in the basis."""
    found = torch.linalg.svd(torch.linalg.qr(B.mT, mode="r").R, full_matrices=False)
    return found.S[:count], found.Vh.mT[:, :count]


def _error(S: Tensor, residual: Tensor) -> Tensor:
    """Bound the error of each value; the last one's gap is not known, so only its residual counts."""
    gap = -S.diff(append=S[-1:])
    gap[1:] = torch.minimum(gap[1:], gap[:-1])
    return torch.minimum(residual, residual.square() / gap.clamp(min=TINY))


def _orthogonal(block: Tensor, Q: Tensor) -> Tensor:
    """Return an orthonormal basis of what of the block is new; twice is enough (Parlett)."""
    for _ in range(2):
        block = torch.linalg.qr(block - Q @ (Q.mT @ block)).Q
    return block - Q @ (Q.mT @ block)
