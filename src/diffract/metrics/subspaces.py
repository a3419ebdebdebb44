"""Principal angles between the spaces that the top k singular vectors of two matrices span, and what chance would give.

A signed overlap holds u0_i . u1_j, rows for the base; absolute values, as ``agreement`` takes them, do not do here. The
vectors live in d dimensions.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

SignedOverlap = Float64[Tensor, "b M M"]
PerMatrix = Float64[Tensor, "b"]

DRAWS = 4000
FEWEST_DRAWS = 8


def principal_angles(overlap: SignedOverlap, k: int) -> Float64[Tensor, "b k"]:
    """Arc cosines of the singular values of U0_k^T U1_k, in radians, ascending (Bjorck & Golub 1973).

    Angles below about sqrt(2 e) cannot be told from zero, e being the error of the overlap: 2e-8 for vectors that are
    orthonormal to rounding. The mean of their cos^2 is ``agreement.subspace``.

    Args:
        overlap: U0^T U1, signed.
        k: Vectors of either matrix that count.

    Returns:
        In [0, pi / 2]. NaN for k > M, and where the overlap holds NaN.
    """
    if k > overlap.shape[-1]:
        return torch.full((len(overlap), k), torch.nan, dtype=overlap.dtype, device=overlap.device)
    block = overlap[:, :k, :k]
    finite = block.isfinite().flatten(1).all(1)
    cosines = torch.linalg.svdvals(block.where(finite[:, None, None], 0.0)).clamp(max=1.0)
    return cosines.arccos().where(finite[:, None], torch.nan)


def largest_principal_angle(overlap: SignedOverlap, k: int) -> PerMatrix:
    """Largest of ``principal_angles``: zero only if the two spaces are the same."""
    return principal_angles(overlap, k)[:, -1]


def mean_principal_angle(overlap: SignedOverlap, k: int) -> PerMatrix:
    """Mean of ``principal_angles``."""
    return principal_angles(overlap, k).mean(-1)


@cache
def principal_angle_chance(dimension: int, k: int, *, seed: int = 0) -> tuple[float, float]:
    """Mean largest and mean mean angle between random k-dimensional spaces in d dimensions, by seeded simulation.

    The overlap is distributed as the first k rows of an orthonormal basis of the columns of k + (d - k) Gaussian rows.
    The QR factor of the latter has independent entries (Bartlett 1933), sqrt(chi^2_(d-k-i)) on its diagonal and
    Gaussian above, so that a draw costs k^3 whatever d is. For 2k > d spaces meet in at least 2k - d dimensions; the
    other angles are those of their complements.

    4,000 / k pairs of spaces are drawn, at least 8; the standard error of either mean is at most 0.008. The largest
    angle is near pi / 2 for any k well below d, and tells little there.

    Args:
        dimension: d.
        k: Of both spaces.
        seed: Of the simulation.

    Returns:
        Radians; NaN for k > d.

    >>> principal_angle_chance(5, 5)
    (0.0, 0.0)
    """
    if k > dimension:
        return math.nan, math.nan
    free = min(k, dimension - k)
    if free == 0:
        return 0.0, 0.0
    random, draws = np.random.default_rng(seed), max(DRAWS // free, FEWEST_DRAWS)
    rest = np.triu(random.standard_normal((draws, free, free)), 1)
    diagonal = np.arange(free)
    rest[:, diagonal, diagonal] = np.sqrt(random.chisquare(dimension - free - diagonal, (draws, free)))
    rows = np.concatenate([random.standard_normal((draws, free, free)), rest], axis=1)
    cosines = np.linalg.svd(np.linalg.qr(rows).Q[:, :free], compute_uv=False)
    angles = np.arccos(cosines.clip(max=1.0))
    return float(angles[:, -1].mean()), float(angles.sum(-1).mean() / k)
