"""A change as two thin factors: what a LoRA adapter of the tuned matrix over its base holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffract.edits.operations.directions import decomposed, matmul
from diffract.edits.operations.precision import exact, require_same_shape, wider
from diffract.edits.operations.rules import Rule, kept
from diffract.linalg import takes_gram


@dataclass(frozen=True)
class LowRankDelta:
    """Factors of the kept directions of D = W1 - W0, and what they miss.

    Attributes:
        B: U_k sqrt(S_k), values of the factor dtype.
        A: sqrt(S_k) Vh_k, likewise.
        kept: k.
        total: M = min(m, n).
        change: ||D||_F.
        error: ||D - B A||_F, from the factors themselves.
    """

    B: Float64[Tensor, "m k"]
    A: Float64[Tensor, "k n"]
    kept: int
    total: int
    change: float
    error: float

    @property
    def error_relative(self) -> float:
        """Error / ||D||_F; 0 if nothing changed."""
        return self.error / self.change if self.change > 0 else 0.0


def low_rank(
    tuned: Float[Tensor, "m n"],
    base: Float[Tensor, "m n"],
    rule: Rule,
    *,
    factor_dtype: torch.dtype = torch.float64,
) -> LowRankDelta:
    """Return B = U_k sqrt(S_k) and A = sqrt(S_k) Vh_k of the kept singular directions of D = W1 - W0.

    The factors are balanced, B^T B = A A^T = diag(S_k). D is formed in float64. Input of up to 32 bits goes by D's Gram
    matrix where sigma_M > 1e-5 sigma_1, everything else by LAPACK (see ``decomposed``); either way B A of all
    directions is D to float64 rounding. Directions that the method cannot tell from zero count as zero for the rule;
    a rule that keeps them all the same, as ``rank`` does, gets them as they are.

    Args:
        tuned: W1, any float dtype, device and stride.
        base: W0, of the same shape.
        rule: Which directions to keep.
        factor_dtype: What A and B will be stored in; the error is that of their values then.

    Returns:
        Factors of k = 0 if nothing is kept, or nothing changed.

    Raises:
        ValueError: If the shapes differ or are empty, a value is not finite, or a factor overflows its dtype.

    >>> found = low_rank(torch.tensor([[9.0, 0.0], [0.0, 4.0]]), torch.zeros(2, 2), Rule(rank=1))
    >>> (found.B @ found.A).tolist(), found.error
    ([[9.0, 0.0], [0.0, 0.0]], 4.0)
    """
    require_same_shape(tuned, base)
    delta = exact(exact(tuned) - exact(base))
    found = decomposed(delta, gram=takes_gram(wider(tuned.dtype, base.dtype), "auto"))
    chosen = kept(found.told, (delta.shape[0], delta.shape[1]), rule)
    B, A = found.factors(chosen, factor_dtype)
    whole = float(delta.norm())
    error = float(delta.sub_(matmul(B, A)).norm()) if B.shape[1] else whole
    return LowRankDelta(B, A, B.shape[1], len(found.S), whole, error)
