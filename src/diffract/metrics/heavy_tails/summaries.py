"""Numbers that combine a tail's exponent with the size of the eigenvalues."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64
from torch import Tensor

PerMatrix = Float64[Tensor, "b"]


def alpha_hat(alpha: PerMatrix, largest: PerMatrix) -> PerMatrix:
    """The weighted exponent, alpha log10 lambda_1; NaN without an alpha, -inf for lambda_1 = 0.

    Source: Martin, Peng, Mahoney (2021), Predicting trends in the quality of neural networks, Nature Communications 12.

    >>> alpha_hat(torch.tensor([2.5]).double(), torch.tensor([100.0]).double())
    tensor([5.], dtype=torch.float64)
    """
    return alpha * largest.log10()


def log10_alpha_norm(values: Float64[Tensor, "b n"], alpha: PerMatrix) -> PerMatrix:
    """The logarithm of the alpha-norm, log10 sum lambda_i^alpha, without over- or underflow.

    Args:
        values: Eigenvalues in any order; those that are not finite or not above zero do not count.
        alpha: The exponent.

    Returns:
        NaN without an alpha, -inf without values.

    Source: as ``alpha_hat``.

    >>> log10_alpha_norm(torch.tensor([[1e200, 0.0]], dtype=torch.float64), torch.tensor([3.0]).double())
    tensor([600.], dtype=torch.float64)
    """
    counted = (values > 0) & values.isfinite()
    powers = (alpha[:, None] * values.log()).where(counted, -torch.inf)
    total = powers.logsumexp(1) / math.log(10)
    return total.where(~alpha.isnan(), torch.nan)
