"""Singular values and vectors of a stack of matrices, in float64 accuracy.

Two ways lead there:

``gram``    eigenvalues of the product of the short side with itself. Its error in sigma is at most about
            sqrt(c eps) sigma_1 at the very end of the spectrum and eps sigma_1^2 / sigma elsewhere: far below what
            half-precision weights can show, and an order of magnitude faster.
``lapack``  LAPACK's divide and conquer on the matrix itself; error eps sigma_1 everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffract.errors import DiffractError
from diffract.linalg.blas import PIECE_BYTES, Buffer, pieces, product, short_first, short_side
from diffract.linalg.exact import EPSILON, Spectrum, eigenvalues, eigenvectors, lapack
from diffract.linalg.sums import Sums

Method = Literal["auto", "gram", "exact"]

GRAM_RESOLVES = (32 * EPSILON) ** 0.5
"""Smallest sigma / sigma_1 that eigenvalues of a Gram matrix tell from zero; measured in benchmarks/accuracy.py."""

GRAM_VECTORS = 1e-5
"""Smallest sigma_M / sigma_1 at which vectors come from the Gram matrix; below it LAPACK computes them.

Long-side vectors are Sigma^-1 P^T W, orthogonal up to eps (sigma_1 / sigma)^2.
"""


def spectrum(w: Float[Tensor, "*b m n"], *, vectors: bool = False, method: Method = "auto") -> Spectrum:
    """Return the singular value decomposition of a stack of matrices.

    Args:
        w: Any float dtype and device, finite.
        vectors: Whether singular vectors are wanted.
        method: ``auto`` takes the Gram matrix where that is as accurate as the stored precision can show (never for
            float64 input, and for vectors only where sigma_M > 1e-5 sigma_1); ``exact`` is LAPACK throughout.

    Returns:
        The decomposition, leading axes as in ``w`` (``method`` is flat). A zero matrix has zero sigmas.

    >>> spectrum(torch.tensor([[3.0, 0.0], [0.0, -4.0]])).S
    tensor([4., 3.], dtype=torch.float64)
    """
    stack = w.reshape(-1, *w.shape[-2:])
    if takes_gram(stack.dtype, method):
        sums = Sums(len(stack), tuple(stack.shape[1:]), powers=0, products=True, device=stack.device)
        sums.add(stack)
        found = gram_vectors(sums.gram, stack, method) if vectors else gram_values(sums.gram)
    else:
        found = lapack(stack, vectors=vectors)
    known = {name: t for name in ("S", "resolved", "U", "Vh") if (t := getattr(found, name)) is not None}
    return replace(found, **{name: t.reshape((*w.shape[:-2], *t.shape[1:])) for name, t in known.items()})


def takes_gram(dtype: torch.dtype, method: Method) -> bool:
    """Whether a stored dtype is analysed through Gram matrices."""
    return method == "gram" or (method == "auto" and dtype != torch.float64)


def gram_values(grams: Float64[Tensor, "b M M"]) -> Spectrum:
    """Return the singular values of matrices from the upper triangles of their Gram matrices.

    A non-finite matrix gives NaN; its row of squared norms tells, as sums of squares cannot cancel.
    """
    finite = grams.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    # LAPACK refuses a whole stack for one NaN in it.
    safe = grams if bool(finite.all()) else grams.where(finite[:, None, None], 0.0)
    # Rounding takes eigenvalues of a singular matrix slightly below zero.
    S = eigenvalues(safe).flip(-1).clamp_(min=0.0).sqrt_()
    S[~finite] = torch.nan
    return Spectrum(S, ("gram",) * len(S), GRAM_RESOLVES * S[:, 0])


def gram_eigen(grams: Float64[Tensor, "b M M"]) -> tuple[Tensor, Tensor]:
    """Return singular values (b, M), descending, and short-side vectors P (b, M, M) as columns."""
    values, vectors = eigenvectors(grams)
    return values.flip(-1).clamp_(min=0.0).sqrt_(), vectors.flip(-1)


def inverse(S: Float64[Tensor, "b M"]) -> Float64[Tensor, "b M"]:
    """Return 1 / sigma, and 0 for directions that a Gram matrix cannot tell from the null space."""
    return torch.where(GRAM_RESOLVES * S[:, :1] < S, 1 / S, 0.0)


def gram_vectors(grams: Float64[Tensor, "b M M"], stack: Float[Tensor, "b m n"], method: Method = "auto") -> Spectrum:
    """Return the decomposition from Gram matrices; matrices whose last sigmas are too small for it go to LAPACK."""
    S, P = gram_eigen(grams)
    weak = S[:, -1] <= GRAM_VECTORS * S[:, 0] if method == "auto" else torch.zeros(len(S), dtype=torch.bool)
    side = short_side(tuple(stack.shape))
    w = short_first(stack, side)
    scaled = P.mT * inverse(S)[:, :, None]  # vectors of the long side are Sigma^-1 P^T W, whose W is cast in pieces
    step = max(1, PIECE_BYTES["cpu"] // (8 * w.shape[1]))
    along, cast = torch.empty(w.shape, dtype=torch.float64, device=w.device), Buffer(w.device)
    for k in range(0, w.shape[2], step):
        product(scaled, cast.fill(w[:, :, k : k + step]), out=along[:, :, k : k + step])
    U, Vh = (P, along) if side == "rows" else (along.mT, P.mT)
    names, resolved = ["gram"] * len(S), GRAM_RESOLVES * S[:, 0]
    for i in weak.nonzero().flatten().tolist():
        one = lapack(stack[i : i + 1], vectors=True)
        assert one.U is not None and one.Vh is not None
        S[i], U[i], Vh[i], resolved[i], names[i] = one.S[0], one.U[0], one.Vh[0], one.resolved[0], "lapack"
    return Spectrum(S, tuple(names), resolved=resolved, U=U, Vh=Vh)


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
        # R of B^T = Q R has the singular values of B and is as small as the subspace; B is as wide as the matrix.
        ritz_svd = torch.linalg.svd(torch.linalg.qr(B.mT, mode="r").R, full_matrices=False)
        S, ritz = ritz_svd.S[: start.shape[1]], ritz_svd.Vh.mT[:, : start.shape[1]]
        P = Q @ ritz
        residual = (Y @ ritz / S.clamp(min=TINY) - S * P).norm(dim=0)
        residual = torch.where(ZERO * S[0] < S, residual, S)  # ||A^T u|| where v is not defined
        # Where values lie apart the square over the gap is far smaller; where they coincide only the residual bounds
        # them, as it does the last one, whose gap is not known.
        gap = -S.diff(append=S[-1:])
        gap[1:] = torch.minimum(gap[1:], gap[:-1])
        error = torch.minimum(residual, residual.square() / gap.clamp(min=TINY))[:k]
        steps -= 1
        converged = bool((error <= tolerance * S[0]).all())
        if converged or steps == 0 or Q.shape[1] == short:
            break
        block = image[:, : short - Q.shape[1]]
        # What of it is new; once leaves a part of Q of the size of rounding over the rest, twice is enough (Parlett).
        for _ in range(2):
            block = torch.linalg.qr(block - Q @ (Q.mT @ block)).Q
        block = block - Q @ (Q.mT @ block)
    long = (ritz[:, :k].mT @ B) / S[:k, None].clamp(min=TINY)
    U, Vh = (P[:, :k], long) if side == "rows" else (long.mT, P[:, :k].mT)
    return TopSpectrum(S[:k], U, Vh, residual=residual[:k], error=error, converged=converged)


def _both_products(w: Tensor, block: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Return block^T A (c, N) and A A^T block (M, c) in one pass over the pieces of A."""
    across, image = [], torch.zeros_like(block)
    for index in pieces((1, *w.shape), side, w.device):
        a = short_first(w[None][index].double(), side)
        part = product(block.mT[None], a)
        image += product(a, part.mT)[0]
        across.append(part[0])
    return torch.cat(across, 1), image
