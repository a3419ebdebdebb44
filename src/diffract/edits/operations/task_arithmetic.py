"""Sums of task vectors on top of a base."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from diffract.edits.operations.linear import weighted_sum


def task_arithmetic(
    base: Float[Tensor, "*shape"], tuned: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float]
) -> Float[Tensor, "*shape"]:
    """Return W0 + sum_i w_i (W_i - W0).

    Computed as (1 - sum_i w_i) W0 + sum_i w_i W_i, without the differences: one pass over memory for each tensor. An
    entry that no model changed comes out with an error of a few units of the wide dtype, far below half a unit of the
    stored one, so that rounding gives the base's own value back.

    Args:
        base: W0.
        tuned: W_i, of the shape and dtype of ``base``.
        weights: w_i, as many; negative ones forget a task.

    Raises:
        ValueError: The numbers of tuned tensors and of weights differ.

    Source: Ilharco et al. 2023, "Editing models with task arithmetic".
    """
    if len(tuned) != len(weights):
        raise ValueError(f"expected one weight for each tuned tensor, got {len(weights)} for {len(tuned)}")
    return weighted_sum([base, *tuned], [1 - math.fsum(weights), *weights])
