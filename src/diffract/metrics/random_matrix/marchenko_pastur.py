"""The Marchenko-Pastur law: where the eigenvalues of pure noise lie (Marchenko & Pastur 1967).

For an m x n matrix of independent entries of mean 0 and variance v, N = max(m, n), M = min(m, n) and gamma = M / N,
the eigenvalues lambda_i = sigma_i^2 / N follow a law on [l-, l+], l+- = v (1 +- sqrt(gamma))^2, as both sides grow.

Written with an angle, lambda = v (1 + gamma - 2 sqrt(gamma) cos theta) for theta in [0, pi], it has a closed form

    F = (theta + sin(theta) / r - (1 - r^2) / r^2 atan2(r sin theta, 1 - r cos theta)) / pi,    r = sqrt(gamma),

which is (theta + sin theta) / pi for square matrices.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64
from torch import Tensor

HALVINGS = 56
"""Of [0, pi]: what is left of the interval is below the spacing of float64 numbers near its middle."""


def mp_edges(variance: Float64[Tensor, "*b"], gamma: float) -> tuple[Float64[Tensor, "*b"], Float64[Tensor, "*b"]]:
    """Return l- and l+ = v (1 -+ sqrt(gamma))^2, gamma = M / N in (0, 1]."""
    root = math.sqrt(gamma)
    return variance * (1 - root) ** 2, variance * (1 + root) ** 2


def mp_density(
    x: Float64[Tensor, "*#b"], variance: Float64[Tensor, "*#b"], gamma: Float64[Tensor, "*#b"] | float
) -> Float64[Tensor, "*b"]:
    """sqrt((l+ - x)(x - l-)) / (2 pi gamma v x) on [l-, l+], zero elsewhere.

    Args:
        x: Where; broadcast with the other two.
        variance: Of the entries.
        gamma: M / N, in (0, 1].

    Returns:
        Integrates to 1. Infinite at x = 0 for gamma = 1; NaN where the variance is zero or NaN, or x is NaN.
    """
    x, ratio, low, width = _scaled(x, variance, gamma)
    root = ((low + width - x) * (x - low)).clamp(min=0.0).sqrt()
    density = root / (2 * math.pi * ratio * x * variance)
    outside = (x < low) | (x > low + width)
    return density.where(~outside, 0.0).where((x != 0) | (low != 0), torch.inf)


def mp_cdf(
    x: Float64[Tensor, "*#b"], variance: Float64[Tensor, "*#b"], gamma: Float64[Tensor, "*#b"] | float
) -> Float64[Tensor, "*b"]:
    """Share of the law at or below x, in closed form (see the top of the file); absolute error about eps / sqrt(gamma).

    Args:
        x: Where; broadcast with the other two.
        variance: Of the entries.
        gamma: M / N, in (0, 1].

    Returns:
        In [0, 1]; 0 below l-, 1 above l+. NaN where the variance is zero or NaN, or x is NaN.

    >>> mp_cdf(torch.tensor([0.0, 4.0, 9.0]).double(), torch.tensor(1.0).double(), 1.0)
    tensor([0., 1., 1.], dtype=torch.float64)
    """
    x, ratio, low, width = _scaled(x, variance, gamma)
    # Two square roots keep full precision at both ends, where an arccosine would lose half the digits.
    theta = 2 * torch.atan2((x - low).clamp(min=0.0).sqrt(), (low + width - x).clamp(min=0.0).sqrt())
    return _cdf_of_angle(theta, ratio.sqrt())


def mp_quantile(
    share: Float64[Tensor, "*#b"] | float, variance: Float64[Tensor, "*#b"], gamma: Float64[Tensor, "*#b"] | float
) -> Float64[Tensor, "*b"]:
    """The x at which ``mp_cdf`` is ``share``, by bisection over the angle; 0.5 gives the median.

    Args:
        share: In [0, 1]; broadcast with the other two.
        variance: Of the entries.
        gamma: M / N, in (0, 1].

    Returns:
        In [l-, l+]. Zero for a zero variance; NaN where the share lies outside [0, 1] or anything is NaN.
    """
    target, root = _like(share, variance), _like(gamma, variance).sqrt()
    target, root = torch.broadcast_tensors(target, root)
    below, above = torch.zeros_like(root), torch.full_like(root, math.pi)
    for _ in range(HALVINGS):
        middle = (below + above) / 2
        less = _cdf_of_angle(middle, root) < target
        below, above = middle.where(less, below), above.where(less, middle)
    half = ((below + above) / 4).where((target > 0) & (target < 1), math.pi / 2 * target)
    x = variance * ((1 - root).square() + 4 * root * half.sin().square())
    return x.where((target >= 0) & (target <= 1), torch.nan)


def _scaled(x: Tensor, variance: Tensor, gamma: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x / v, gamma as a tensor, and the lower end and the width of the law of variance one."""
    ratio = _like(gamma, x)
    root = ratio.sqrt()
    return x / variance.where(variance > 0, torch.nan), ratio, (1 - root).square(), 4 * root


def _like(value: Tensor | float, other: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=other.dtype, device=other.device)


def _cdf_of_angle(theta: Tensor, root: Tensor) -> Tensor:
    """The closed form; rounding may leave [0, 1] by an eps."""
    sine, cosine = theta.sin(), theta.cos()
    lean = torch.atan2(root * sine, 1 - root * cosine)
    share = (theta + sine / root - (1 - root.square()) / root.square() * lean) / math.pi
    return share.clamp(0.0, 1.0)
