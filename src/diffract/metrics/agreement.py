"""How the singular vectors of two matrices lie to each other, and what chance would give.

An overlap matrix holds |u0_i . u1_j|, rows for the base; the vectors live in d dimensions.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

Overlap = Float64[Tensor, "b M M"]
Sigmas = Float64[Tensor, "b M"]
PerMatrix = Float64[Tensor, "b"]

WINDOW = 0.05
"""Base vectors whose sigma is within 5% of a tuned vector's belong to its window."""

INTRUDERS = 10
INTRUDER_MATCH = 0.5


def overlap(cosines: Float64[Tensor, "b M M"]) -> Overlap:
    """|u0_i . u1_j|: the sign of a singular vector is arbitrary."""
    return cosines.abs()


def agreement(overlap: Overlap) -> Sigmas:
    """|u0_i . u1_i| for each i, in [0, 1]."""
    return overlap.diagonal(dim1=-2, dim2=-1)


def best_match(overlap: Overlap) -> Sigmas:
    """max_j |u0_i . u1_j| for each base vector i, in [0, 1]."""
    return overlap.amax(-1)


def window(base_sigmas: Sigmas, sigmas: Sigmas) -> Bool[Tensor, "b M M"]:
    """Whether base sigma i lies within 5% of tuned sigma j."""
    return (base_sigmas[:, :, None] - sigmas[:, None, :]).abs_() <= WINDOW * sigmas[:, None, :]


def agreement_window(overlap: Overlap, window: Bool[Tensor, "b M M"]) -> Sigmas:
    """Norm of u1_i projected on the base vectors whose sigma lies within 5% of its own, in [0, 1].

    Where sigmas nearly coincide single vectors mean nothing, the space they span does. Zero where the window is empty.
    """
    return (overlap * window).square_().sum(-2).sqrt_()


def agreement_window_chance(window: Bool[Tensor, "b M M"], dimension: int) -> PerMatrix:
    """Mean of sqrt(k_i / d), k_i being the number of base vectors in the window of i."""
    return (window.sum(-2).double() / dimension).sqrt().mean(-1)


def mean(values: Sigmas) -> PerMatrix:
    """Mean along the spectrum."""
    return values.mean(-1)


def subspace(overlap: Overlap, k: int) -> PerMatrix:
    """||U0_k^T U1_k||_F^2 / k: the share that the top k subspaces have in common. NaN for k > M."""
    if k > overlap.shape[-1]:
        return torch.full_like(overlap[:, 0, 0], torch.nan)
    return overlap[:, :k, :k].square().sum((-2, -1)) / k


def intruders(left_overlap: Overlap) -> PerMatrix:
    """How many of the top 10 left vectors of W1 have a best match below 0.5 in W0 (Shuttleworth et al. 2024).

    NaN where one of the matrices has no vectors.
    """
    matches = left_overlap[:, :, :INTRUDERS].amax(-2)
    return torch.where(matches.isnan().any(-1), torch.nan, (matches < INTRUDER_MATCH).sum(-1).double())


def cosine_chance(dimension: int) -> float:
    """Mean |cos| of random unit vectors: Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)), about sqrt(2 / (pi d)).

    >>> round(cosine_chance(2), 4)  # 2 / pi
    0.6366
    """
    return math.exp(math.lgamma(dimension / 2) - math.lgamma((dimension + 1) / 2)) / math.sqrt(math.pi)


def best_match_chance(dimension: int, count: int) -> float:
    """Best |cos| of a random unit vector with k = ``count`` others: about sqrt(2 ln k / d), at most 1.

    >>> best_match_chance(1, 1)
    1.0
    """
    return min(1.0, max(cosine_chance(dimension), math.sqrt(2 * math.log(count) / dimension)))
