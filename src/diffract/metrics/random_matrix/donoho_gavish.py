"""The singular value below which noise outweighs signal (Gavish & Donoho 2014).

Of a low-rank matrix plus noise, keeping the singular values above this threshold has the least squared error among
hard thresholds, as both sides grow. beta = M / N = min(m, n) / max(m, n).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from jaxtyping import Float64
from torch import Tensor

from diffract.metrics.random_matrix.marchenko_pastur import mp_quantile

Sigmas = Float64[Tensor, "b M"]
PerMatrix = Float64[Tensor, "b"]


def known_noise_factor(beta: float) -> float:
    """lambda_*(beta) = sqrt(2 (beta + 1) + 8 beta / (beta + 1 + sqrt(beta^2 + 14 beta + 1))).

    >>> round(known_noise_factor(1.0), 12) == round(4 / math.sqrt(3), 12)
    True
    """
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))


@cache
def unknown_noise_factor(beta: float) -> float:
    """omega(beta) = lambda_*(beta) / sqrt(mu_beta), mu_beta the median of the Marchenko-Pastur law of variance 1.

    >>> round(unknown_noise_factor(1.0), 4)
    2.8584
    """
    median = mp_quantile(0.5, torch.ones((), dtype=torch.float64), beta)
    return known_noise_factor(beta) / math.sqrt(median.item())


def hard_threshold(sigmas: Sigmas, shape: tuple[int, int]) -> PerMatrix:
    """omega(beta) times the median singular value: the threshold where the noise level is not known.

    Args:
        sigmas: Singular values, descending, all M of them.
        shape: (m, n) of the matrices.

    Returns:
        In the unit of the sigmas. Zero where half of them are zero, as for a rank-one matrix: all others are kept.
        NaN where the median is NaN.
    """
    last = sigmas.shape[-1] - 1
    median = (sigmas[:, last // 2] + sigmas[:, last - last // 2]) / 2
    return unknown_noise_factor(min(shape) / max(shape)) * median


def hard_threshold_known_noise(noise_std: PerMatrix, shape: tuple[int, int]) -> PerMatrix:
    """lambda_*(beta) sqrt(N) s for noise entries of standard deviation s.

    Args:
        noise_std: s, for instance the square root of ``fit_bulk``'s variance.
        shape: (m, n) of the matrices.
    """
    return known_noise_factor(min(shape) / max(shape)) * math.sqrt(max(shape)) * noise_std


def rank_above_threshold(sigmas: Sigmas, shape: tuple[int, int]) -> PerMatrix:
    """Number of singular values above ``hard_threshold``. NaN where that is."""
    threshold = hard_threshold(sigmas, shape)
    return (sigmas > threshold[:, None]).sum(-1).double().where(threshold.isfinite(), torch.nan)
