"""The singular directions of one matrix, and sums of some of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from diffract.linalg import Sums, gram_vectors, lapack
from diffract.linalg.blas import product


@dataclass(frozen=True)
class Directions:
    """A singular value decomposition, U diag(S) Vh.

    Attributes:
        U: Left vectors as columns.
        S: Descending.
        Vh: Right vectors as rows.
        resolved: Smallest sigma that the method tells from zero.
    """

    U: Float64[Tensor, "m M"]
    S: Float64[Tensor, " M"]
    Vh: Float64[Tensor, "M n"]
    resolved: float

    @property
    def told(self) -> Float64[Tensor, " M"]:
        """Singular values; those that the method cannot tell from zero are zero."""
        return self.S.where(self.resolved < self.S, 0.0)

    def added(self, chosen: slice | Tensor, S: Tensor | None = None) -> Float64[Tensor, "m n"]:
        """Return the sum of sigma_i u_i v_i^T over some directions, with other sigmas if they are given."""
        sigmas = self.S if S is None else S
        return matmul(self.U[:, chosen] * sigmas[chosen], self.Vh[chosen])

    def factors(
        self, chosen: slice, dtype: torch.dtype = torch.float64
    ) -> tuple[Float64[Tensor, "m k"], Float64[Tensor, "k n"]]:
        """Return U sqrt(S) and sqrt(S) Vh of some directions: their product is the sum of these.

        Both hold values of ``dtype``, what they will be stored in.

        Raises:
            ValueError: If one of them overflows it.
        """
        roots = self.S[chosen].sqrt()
        found = self.U[:, chosen] * roots, roots[:, None] * self.Vh[chosen]
        B, A = (factor.to(dtype).double() for factor in found)
        if not bool(B.isfinite().all() and A.isfinite().all()):
            raise ValueError(f"factor_dtype: expected one that holds the factors; they overflow {dtype}")
        return B, A


def decomposed(x: Float64[Tensor, "m n"], *, gram: bool) -> Directions:
    """Return the singular directions of a finite matrix.

    Args:
        x: The matrix.
        gram: Whether the Gram matrix may serve, as for entries that come from 16 or 32 stored bits. Even then LAPACK
            runs where sigma_M <= 1e-5 sigma_1 (see ``linalg.gram_vectors``), and U diag(S) Vh is x to float64
            rounding; vectors are orthonormal to eps (sigma_1 / sigma)^2 <= 2e-6. Otherwise LAPACK, to eps.
    """
    stack = x[None]
    if gram:
        sums = Sums(1, tuple(x.shape), powers=0, products=True, device=x.device)
        sums.add(stack)
        found = gram_vectors(sums.gram, stack)
    else:
        found = lapack(stack, vectors=True)
    assert found.U is not None and found.Vh is not None
    return Directions(found.U[0], found.S[0], found.Vh[0], float(found.resolved[0]))


def matmul(x: Float64[Tensor, "m k"], y: Float64[Tensor, "k n"]) -> Float64[Tensor, "m n"]:
    """Return x y; zeros for k = 0."""
    return product(x[None], y[None])[0]


def fewer(kept: slice, total: int, device: torch.device) -> tuple[Int64[Tensor, " k"], bool]:
    """Return the kept directions and ``True``, or the dropped ones and ``False``: whichever are fewer."""
    every = torch.arange(total, device=device)
    chosen = every[kept]
    if 2 * len(chosen) <= total:
        return chosen, True
    return torch.cat([every[: kept.start], every[kept.stop :]]), False


def energy_share(S: Float64[Tensor, " M"], kept: slice) -> float:
    """Share of sum sigma^2 that the kept directions hold, in [0, 1]; 1 for a zero matrix."""
    energy = S.square()
    whole = float(energy.sum())
    return min(float(energy[kept].sum()) / whole, 1.0) if whole > 0 else 1.0
