"""Singular values and vectors of a stack of matrices, in float64 accuracy.

Two ways lead there:

``gram``    eigenvalues of the product of the short side with itself. Its error in sigma is at most about
            sqrt(c eps) sigma_1 at the very end of the spectrum and eps sigma_1^2 / sigma elsewhere: far below what
            half-precision weights can show, and an order of magnitude faster.
``lapack``  LAPACK's divide and conquer on the matrix itself; error eps sigma_1 everywhere.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffract.linalg.entries import Buffer
from diffract.linalg.exact import EPSILON, Spectrum, lapack
from diffract.linalg.products import PIECE_BYTES, product, short_first, short_side
from diffract.linalg.sums import Sums
from diffract.linalg.symmetric import eigenvalues, eigenvectors

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
    lead = w.shape[:-2]
    unflatten = lambda t: None if t is None else t.reshape(*lead, *t.shape[1:])  # noqa: E731
    return Spectrum(
        found.S.reshape(*lead, found.S.shape[-1]),
        found.method,
        found.resolved.reshape(lead),
        unflatten(found.U),
        unflatten(found.Vh),
    )


def takes_gram(dtype: torch.dtype, method: Method) -> bool:
    """Whether a stored dtype is analysed through Gram matrices."""
    return method == "gram" or (method == "auto" and dtype != torch.float64)


def gram_values(grams: Float64[Tensor, "b M M"]) -> Spectrum:
    """Return the singular values of matrices from the upper triangles of their Gram matrices.

    A non-finite matrix gives NaN; its row of squared norms tells, as sums of squares cannot cancel.
    """
    finite = grams.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    safe = grams if bool(finite.all()) else grams.where(finite[:, None, None], 0.0)
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
    U, Vh = _both_sides(S, P, stack, side)
    names = ["gram"] * len(S)
    resolved = GRAM_RESOLVES * S[:, 0]
    for i in weak.nonzero().flatten().tolist():
        one = lapack(stack[i : i + 1], vectors=True)
        assert one.U is not None and one.Vh is not None
        S[i], U[i], Vh[i], resolved[i], names[i] = one.S[0], one.U[0], one.Vh[0], one.resolved[0], "lapack"
    return Spectrum(S, tuple(names), resolved, U, Vh)


def _both_sides(S: Tensor, P: Tensor, stack: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Return U and Vh from the short-side vectors; the long side is Sigma^-1 P^T W, cast in pieces."""
    w = short_first(stack, side)
    scaled = P.mT * inverse(S)[:, :, None]
    step = max(1, PIECE_BYTES["cpu"] // (8 * w.shape[1]))
    along, cast = torch.empty(w.shape, dtype=torch.float64, device=w.device), Buffer(w.device)
    for k in range(0, w.shape[2], step):
        product(scaled, cast.fill(w[:, :, k : k + step]), out=along[:, :, k : k + step])
    return (P, along) if side == "rows" else (along.mT, P.mT)
