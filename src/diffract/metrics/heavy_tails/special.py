"""The normal distribution beyond a point z: its hazard h(z) = phi(z) / Q(z), Q(z) = P(N > z), and its moments.

Of N - z given N > z, the mean is D(z) = h(z) - z, and mean square over squared mean is q(z) = (1 - z D) / D^2, which
rises from 1 at z = -inf to 2 at z = inf. For large z both differences cancel; there the continued fraction
h = z + 1/(z + 2/(z + 3/(z + ...))) serves: with K = 1/(z + 3/(z + 4/(z + ...))) it gives D = 1/(z + 2K) and q = 2K / D.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from diffract.metrics.heavy_tails.fit import piece_entries

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
    # From the deepest level up, as their number is known: forwards, numerators and denominators would overflow.
    for numerator in range(first + depth - 1, first - 1, -1):
        found.reciprocal_().mul_(numerator).add_(z)
    return found.reciprocal_()


PerTail = Float64[Tensor, "t"]

FALL = 38.0
"""e^-38 is less than rounding."""

LEAST = (1e-2, 1e-8)
NODES = (28, 48, 96)
"""Nodes for z above the first, the second, and neither bound: relative error 1e-12 down to z = 1e-40; tests hold it."""


@dataclass(frozen=True)
class TailMoments:
    """R, and moments of s and of w = z (e^s - 1) under the normalised integrand."""

    R: PerTail
    s: PerTail
    w: PerTail
    var_s: PerTail
    cov: PerTail
    var_w: PerTail


def mills(a: Float64[Tensor, "*#s"], z: Float64[Tensor, "*#s"]) -> Float64[Tensor, "*s"]:
    """R(a, z) for a, z >= 0 that broadcast against each other; 1 / a for z = 0."""
    a, z = torch.broadcast_tensors(a, z)
    positive = z.clamp(min=torch.finfo(z.dtype).tiny)
    found = _by_nodes(_integral, a.flatten(), positive.flatten())
    return torch.where(z > 0, found.view(a.shape), 1 / a)


def moments(a: PerTail, z: PerTail) -> TailMoments:
    """R and what Newton's method needs: first and second moments of s and w, for a >= 0 and z > 0."""
    end, mass, *sums = _by_nodes(_integrals, a, z)
    s, s2, w, sw, w2 = (total / mass for total in sums)
    s, s2, sw = s * end, s2 * end**2, sw * end
    return TailMoments(R=mass * end, s=s, w=w, var_s=s2 - s * s, cov=sw - s * w, var_w=w2 - w * w)


def _by_nodes(integrate: Callable[[Tensor, Tensor, int], Tensor], a: PerTail, z: PerTail) -> Float64[Tensor, "k t"]:
    """Integrate with the rule that z asks for, in pieces whose nodes make one temporary."""
    if not bool((z < LEAST[0]).any()):
        return _in_pieces(integrate, a, z, NODES[0])
    # The smaller z, the longer the integrand stays flat before it falls: more nodes.
    rule = sum(((z < least).long() for least in LEAST), torch.zeros_like(z, dtype=torch.long))
    members = [(rule == k).nonzero()[:, 0] for k in range(len(NODES))]
    found = [_in_pieces(integrate, a[i], z[i], n) for i, n in zip(members, NODES, strict=True) if len(i)]
    whole = torch.cat(found, 1)
    return torch.empty_like(whole).index_copy_(1, torch.cat(members), whole)


def _in_pieces(integrate: Callable[[Tensor, Tensor, int], Tensor], a: Tensor, z: Tensor, nodes: int) -> Tensor:
    size = piece_entries(a.device) // nodes
    return torch.cat([integrate(*part, nodes) for part in zip(a.split(size), z.split(size), strict=True)], 1)


def _integral(a: PerTail, z: PerTail, nodes: int) -> Float64[Tensor, "1 t"]:
    x, weights = _rule(nodes, a.device)
    end = _end(a, z)
    return (weights @ _integrand(a, z, end, x)[0] * end)[None]


def _integrals(a: PerTail, z: PerTail, nodes: int) -> Float64[Tensor, "7 t"]:
    """Return T, and the integrals of 1, x, x^2, w, x w, w^2 against the integrand, x = s / T."""
    x, weights = _rule(nodes, a.device)
    powers = torch.stack([weights, weights * x, weights * x**2])
    end = _end(a, z)
    density, w = _integrand(a, z, end, x)
    plain = powers @ density
    once = powers[:2] @ density.mul_(w)
    twice = weights @ density.mul_(w)
    return torch.cat([end[None], plain, once, twice[None]])


def _integrand(
    a: PerTail, z: PerTail, end: PerTail, x: Tensor
) -> tuple[Float64[Tensor, "n t"], Float64[Tensor, "n t"]]:
    """Return the integrand and w at the nodes."""
    x = x[:, None]
    w = (x * end).expm1_().mul_(z)
    return torch.addcmul(w, x, a * end).neg_().exp_(), w


def _end(a: PerTail, z: PerTail) -> PerTail:
    """Return T with a T + z (e^T - 1) close to ``FALL``; Newton's method from above, where it cannot miss."""
    # Either bound drops one of the two terms; both lie above the end.
    end = torch.minimum(FALL / (a + z), (FALL / z).log1p())
    level = a + z + FALL
    for _ in range(2):
        slope = torch.addcmul(a, z, end.exp())
        end = end - torch.addcmul(slope - level, a, end).div_(slope)
    return end


@cache
def _rule(nodes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of the Gauss-Legendre rule on [0, 1]."""
    x, weights = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy((x + 1) / 2).to(device), torch.from_numpy(weights / 2).to(device)
