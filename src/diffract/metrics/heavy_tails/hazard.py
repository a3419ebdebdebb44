"""The normal distribution beyond a point z: its hazard h(z) = phi(z) / Q(z), Q(z) = P(N > z), and its moments.

Of N - z given N > z, the mean is D(z) = h(z) - z, and mean square over squared mean is q(z) = (1 - z D) / D^2, which
rises from 1 at z = -inf to 2 at z = inf. For large z both differences cancel; there the continued fraction
h = z + 1/(z + 2/(z + 3/(z + ...))) serves: with K = 1/(z + 3/(z + 4/(z + ...))) it gives D = 1/(z + 2K) and q = 2K / D.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64
from torch import Tensor

Points = Float64[Tensor, "*s"]

LARGE = 8.0
"""From here on fractions of ``DEPTH`` levels are exact to a few eps; up to here differences lose 1e-13 at most."""

DEPTH = 14

BEYOND = 25.0
"""Where Q comes near the smallest float, and ``SHALLOW`` levels suffice."""

SHALLOW = 4

HALF = math.sqrt(0.5)
AT_ZERO = math.sqrt(2 / math.pi)
"""h(0)."""


def excess(z: Points) -> tuple[Points, Points]:
    """D(z) and q(z)."""
    large, near, far = z >= LARGE, z.clamp(max=LARGE), z.clamp(min=LARGE)
    D = AT_ZERO / torch.special.erfcx(near * HALF) - near
    q = (1 - near * D) / D.square()
    if not bool(large.any()):
        return D, q
    K = fraction(far, 3, DEPTH)
    D_far = 1 / (far + 2 * K)
    return torch.where(large, D_far, D), torch.where(large, 2 * K / D_far, q)


def log_hazard(z: Points) -> Points:
    """The logarithm of h(z)."""
    near = z.clamp(max=LARGE)
    log_density = -0.5 * (near.square() + math.log(2 * math.pi))
    far = z.clamp(min=LARGE)
    return torch.where(z < LARGE, log_density - torch.special.log_ndtr(-near), (far + fraction(far, 2, DEPTH)).log())


def survival_ratio(z: Float64[Tensor, "t 1"], v: Float64[Tensor, "t m"]) -> Float64[Tensor, "t m"]:
    """Q(z + v) / Q(z) for v >= 0 and z however large."""
    beyond = z[:, 0] >= BEYOND
    if not bool(beyond.any()):
        return _direct_ratio(z, v)
    near, far = (~beyond).nonzero()[:, 0], beyond.nonzero()[:, 0]
    found = torch.empty_like(v)
    found[near], found[far] = _direct_ratio(z[near], v[near]), _far_ratio(z[far], v[far])
    return found


def _direct_ratio(z: Tensor, v: Tensor) -> Tensor:
    return (v + z).mul_(HALF).erfc_().div_((z * HALF).erfc_())


def _far_ratio(z: Tensor, v: Tensor) -> Tensor:
    """exp(-v (z + v / 2)) h(z) / h(z + v)."""
    end = z + v
    hazards = (z + fraction(z, 2, SHALLOW)) / (end + fraction(end, 2, SHALLOW))
    return (0.5 * v).add_(z).mul_(v).neg_().exp_().mul_(hazards)


def fraction(z: Points, first: int, depth: int) -> Points:
    """1 / (z + first / (z + (first + 1) / (z + ...))), ``depth`` numerators, for z > 0."""
    found = z.clone()
    for numerator in range(first + depth - 1, first - 1, -1):
        found.reciprocal_().mul_(numerator).add_(z)
    return found.reciprocal_()
