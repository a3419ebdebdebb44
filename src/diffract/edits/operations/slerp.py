"""The arc between two tensors, each taken whole as one vector."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from diffract.edits.operations.interpolate import interpolate
from diffract.edits.operations.linear import weighted_sum

PARALLEL = 2.0**-26
"""Radians. For ``at`` in [0, 1] the weights of arc and line differ by at most angle^2 / 6 of themselves: below this
angle by less than a float64 can show."""

ANTIPARALLEL = 2.0**-12
"""Radians short of pi. The arc's weights grow as 1 / sin(angle) there, and the rounding of float32 with them: here from
2^-24 to 2^-12, which is half a unit of float16 and less than half a unit of bfloat16."""

PIECE_ENTRIES = 1 << 18
"""Entries that are widened and summed at once: they stay in the cache."""


def angle(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the angle between two flattened tensors, arccos(<a, b> / (|a| |b|)), in radians from 0 to pi.

    Sums are in float64. Near 0 and near pi the cosine resolves angles down to about 1e-8.

    Args:
        pairs: The blocks of a and of b, side by side.

    Returns:
        0 where one of the two is zero.

    Raises:
        ValueError: An entry is not finite, or the sum of the squares is beyond float64.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for a, b in pairs:
        sums = sums.to(a.device)
        pieces = zip(a.flatten().split(PIECE_ENTRIES), b.flatten().split(PIECE_ENTRIES), strict=True)
        for x, y in ((x.double(), y.double()) for x, y in pieces):
            sums += torch.stack((x.dot(x), y.dot(y), x.dot(y)))
    aa, bb, ab = sums.tolist()
    if not math.isfinite(aa + bb):
        raise ValueError("expected finite entries with squares that can be summed, got NaN, infinity or an overflow")
    if aa == 0 or bb == 0:
        return 0.0
    return math.acos(max(-1.0, min(1.0, ab / math.sqrt(aa) / math.sqrt(bb))))


def slerp(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], at: float, angle: float) -> Float[Tensor, "*shape"]:
    """Return sin((1 - at) angle) / sin(angle) a + sin(at angle) / sin(angle) b.

    The tensors keep their norms: with |a| = |b| the result has that norm too, otherwise it goes from one to the other.

    The line takes the arc's place in two cases. (1) Below ``PARALLEL``, zero tensors among them: the two agree to
    rounding there, and nothing jumps. (2) Within ``ANTIPARALLEL`` of pi: no one arc joins opposite tensors, so that any
    choice jumps; the line through (or near) zero is the one that amplifies no rounding.

    Args:
        a: Where the arc is at 0.
        b: Where it is at 1; shape and dtype of ``a``.
        at: Any number; outside [0, 1] the circle goes on.
        angle: Of the whole tensors, by `angle`.

    Returns:
        At exactly 0 ``a`` itself and at exactly 1 ``b`` itself, not a copy.

    Raises:
        ValueError: The angle is not in [0, pi].

    Source: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3.
    """
    if not 0 <= angle <= math.pi:
        raise ValueError(f"expected an angle from 0 to pi radians, got {angle}")
    if at in (0, 1) or angle < PARALLEL or math.pi - angle < ANTIPARALLEL:
        return interpolate(a, b, at)
    return weighted_sum((a, b), (math.sin((1 - at) * angle) / math.sin(angle), math.sin(at * angle) / math.sin(angle)))
