"""Shape of a matrix and of the distribution of its entries."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from diffract.linalg import Moments

Sigmas = Float64[Tensor, "b M"]
PerMatrix = Float64[Tensor, "b"]

EPSILON = float(torch.finfo(torch.float64).eps)


def aspect_ratio(shape: tuple[int, int], squares: PerMatrix) -> PerMatrix:
    """Q = max(m, n) / min(m, n), at least 1."""
    return torch.full_like(squares, max(shape) / min(shape))


def condition_number(sigmas: Sigmas, resolved: PerMatrix) -> PerMatrix:
    """sigma_1 / sigma_M, at least 1. NaN where the method cannot tell sigma_M from zero."""
    return torch.where(sigmas[:, -1] > resolved, sigmas[:, 0] / sigmas[:, -1], torch.nan)


def entry_std(moments: Moments) -> PerMatrix:
    """Standard deviation of the entries, normalised by their number. Zero for a constant matrix."""
    return _variance(moments).sqrt()


def entry_kurtosis(moments: Moments) -> PerMatrix:
    """E(w - mean)^4 / (E(w - mean)^2)^2 - 3: zero for a Gaussian. NaN for a constant matrix."""
    n = moments.count
    mean, second, third, fourth = (s / n for s in (moments.first, moments.second, moments.third, moments.fourth))
    central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    variance = _variance(moments)
    return torch.where(variance > 0, central / variance.square() - 3, torch.nan)


def _variance(moments: Moments) -> Tensor:
    """Variance; what summing squares cannot tell from zero counts as zero."""
    mean, second = moments.first / moments.count, moments.second / moments.count
    variance = second - mean.square()
    return variance.where(variance > 8 * EPSILON * second, 0.0)
