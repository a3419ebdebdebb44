"""The Tracy-Widom law (beta = 1): how far the largest eigenvalue of pure noise strays from the edge of its law."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float64
from scipy.special import airy
from torch import Tensor

QUANTILE_99 = 2.02344928138
"""99% quantile of the law."""

NODES = 40
"""Of the quadrature below; more of them change nothing."""

REACH = 14.0
"""Argument at which the kernel is cut off: Ai(14) = 1e-16."""

LOWEST = -10.0
"""Below it F_1 is less than 1e-21, and the nodes do not resolve the kernel."""


def tracy_widom_cdf(s: Float64[Tensor, "*b"]) -> Float64[Tensor, "*b"]:
    """F_1(s) = det(1 - V_s), V_s(x, y) = Ai(s + (x + y) / 2) / 2 on x, y > 0 (Ferrari & Spohn 2005).

    The determinant is taken at Gauss-Legendre nodes, as in Bornemann 2010. Ai is SciPy's, computed on the CPU: that
    of PyTorch 2.13 is off by 3e-6 between -4 and -1.

    Args:
        s: Standardised largest eigenvalues.

    Returns:
        In [0, 1], to an absolute error of 1e-13. NaN for NaN.
    """
    origin = s.detach().clamp(min=LOWEST).cpu().numpy()[..., None]
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    half = np.maximum(REACH - origin, 1.0)
    x, root = half * (nodes + 1), np.sqrt(half * weights)
    kernel = airy(origin[..., None] + (x[..., :, None] + x[..., None, :]) / 2)[0] / 2
    system = torch.from_numpy(np.eye(NODES) - root[..., :, None] * kernel * root[..., None, :])
    return torch.linalg.det(system.to(s.device)).clamp(0.0, 1.0)


def fluctuation_edge(shape: tuple[int, int]) -> float:
    """Return what the largest eigenvalue of an m x n noise matrix of variance 1 stays below with probability 99%.

    (mu + 2.0234 s) / N with mu = (sqrt(N - 1) + sqrt(M))^2 and s = (sqrt(N - 1) + sqrt(M)) (1 / sqrt(N - 1) +
    1 / sqrt(M))^(1/3) (Johnstone 2001, theorem 1.1), for eigenvalues sigma^2 / N. It scales with the variance of the
    entries. For a 1 x 1 matrix, where the formula has no value, N - 1 is taken as 1.
    """
    long, short = math.sqrt(max(max(shape) - 1, 1)), math.sqrt(min(shape))
    scale = (long + short) * (1 / long + 1 / short) ** (1 / 3)
    return ((long + short) ** 2 + QUANTILE_99 * scale) / max(shape)
