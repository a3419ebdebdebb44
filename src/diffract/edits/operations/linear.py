"""Weighted sums and means of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


def weighted_sum(tensors: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float]) -> Float[Tensor, "*shape"]:
    """Return sum_i w_i x_i, one pass over memory for each tensor.

    Args:
        tensors: x_i, one or more of one shape and dtype.
        weights: w_i, any numbers, as many.

    Raises:
        ValueError: The numbers of tensors and of weights differ.
    """
    if len(tensors) != len(weights):
        raise ValueError(f"expected one weight for each tensor, got {len(weights)} for {len(tensors)}")
    total = tensors[0] * weights[0]
    for x, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(x, alpha=weight)
    return total


def linear(tensors: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float]) -> Float[Tensor, "*shape"]:
    """Return the weighted mean sum_i w_i x_i / sum_i w_i.

    Equal weights give the plain mean, a "model soup" (Wortsman et al. 2022).

    Args:
        tensors: x_i, one or more of one shape and dtype.
        weights: w_i, as many; negative ones are allowed.

    Raises:
        ValueError: The weights sum to zero, or there are not as many as tensors.
    """
    whole = math.fsum(weights)
    if whole == 0:
        raise ValueError(f"a weighted mean needs weights whose sum is not zero, got {list(weights)}")
    return weighted_sum(tensors, [weight / whole for weight in weights])
