"""How the singular vectors of a tuned matrix agree with those of its base, each number beside what chance gives.

Only resolved directions count: the vectors of a sigma that rounding hides are chosen by rounding. Chance levels are of
independent random directions, and exact: the cosines of a random unit vector in d dimensions with k orthonormal ones
are k Gaussians over the length of d of them, and that length does not depend on the direction. Directions of two
models that have large rows, or columns, in common are not independent: ``nulls`` draws levels for these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64
from scipy.special import erfc
from torch import Tensor

from diffract.metrics.facts import OF_VECTORS, Metric, built_in

PerMatrix = Float64[Tensor, "b"]
Sigmas = Float64[Tensor, "b M"]
Overlap = Float64[Tensor, "b M M"]
SignedOverlap = Float64[Tensor, "b M M"]
Resolved = Bool[Tensor, "b M"]

WINDOW = 0.05
"""Base vectors whose sigma is within 5% of a tuned vector's belong to its window."""

TOP = (8, 32)
"""Dimensions of the leading spaces that are compared."""

# Number and bound of the paper that found them.
INTRUDERS = 10
INTRUDER_MATCH = 0.5


def resolved_directions(
    sigmas: Sigmas, floor: PerMatrix, squares: PerMatrix, epsilon: float, shape: tuple[int, int]
) -> Resolved:
    """Whether a singular direction is the matrix's own and not chosen by rounding.

    Rounding the entries to a dtype of machine epsilon eps adds noise of about eps ||W||_F / sqrt(m n) an entry, whose
    largest singular value is about eps ||W||_F (1 / sqrt(m) + 1 / sqrt(n)): a direction of smaller sigma drowns in it.

    Args:
        sigmas: Descending.
        floor: The smallest sigma that the method tells from zero.
        squares: ||W||_F^2.
        epsilon: Machine epsilon of the stored dtype.
        shape: (m, n).
    """
    rounding = epsilon * squares.sqrt() * (shape[0] ** -0.5 + shape[1] ** -0.5)
    return sigmas > torch.maximum(floor, rounding)[:, None]


def overlap(cosines: SignedOverlap, base_directions: Resolved, directions: Resolved) -> Overlap:
    """|u0_i . u1_j|, as the sign of a singular vector is arbitrary; 0 where either direction is not resolved."""
    if bool(base_directions.all()) and bool(directions.all()):
        return cosines.abs()
    return cosines.abs().where(base_directions[:, :, None] & directions[:, None, :], 0.0)


def agreement(overlap: Overlap, base_directions: Resolved, directions: Resolved) -> Sigmas:
    """|u0_i . u1_i| for each i that is resolved in both, in [0, 1]; NaN for the others."""
    return overlap.diagonal(dim1=-2, dim2=-1).where(base_directions & directions, torch.nan)


def best_match(overlap: Overlap, base_directions: Resolved, directions: Resolved) -> Sigmas:
    """max_j |u0_i . u1_j| for each resolved base vector i, in [0, 1]; NaN for the others, and with no tuned one."""
    return overlap.amax(-1).where(base_directions & directions.any(-1, keepdim=True), torch.nan)


def window(base_sigmas: Sigmas, sigmas: Sigmas, base_directions: Resolved) -> Bool[Tensor, "b M M"]:
    """Whether base sigma i is resolved and lies within 5% of tuned sigma j."""
    near = (base_sigmas[:, :, None] - sigmas[:, None, :]).abs_() <= WINDOW * sigmas[:, None, :]
    return near.logical_and_(base_directions[:, :, None])


def agreement_window(
    overlap: Overlap, window: Bool[Tensor, "b M M"], base_directions: Resolved, directions: Resolved
) -> Sigmas:
    """Norm of u1_i projected on the base vectors whose sigma lies within 5% of its own, in [0, 1].

    Where sigmas nearly coincide single vectors mean nothing, the space they span does. Zero where the window is empty,
    NaN for a direction that is not resolved, and where the base has none that is.
    """
    inside = (overlap * window).square_().sum(-2).sqrt_()
    return inside.where(directions & base_directions.any(-1, keepdim=True), torch.nan)


def subspace(overlap: Overlap, base_directions: Resolved, directions: Resolved, *, k: int) -> PerMatrix:
    """||U0_k^T U1_k||_F^2 / k: the share that the top k spaces have in common. NaN where fewer are resolved."""
    shared = overlap[:, :k, :k].square().sum((-2, -1)) / k
    return shared.where(_common(base_directions, directions) >= k, torch.nan)


@built_in(
    "top 10 resolved left vectors of W1 whose best match in W0 is below 0.5",
    unit="count",
    range="[0, 10]",
    source="Shuttleworth et al. 2024",
    invariant=OF_VECTORS,
    version=2,
)
def intruders(left_overlap: Overlap, base_directions: Resolved, directions: Resolved) -> PerMatrix:
    """How many of the top 10 left vectors of W1 have a best match below 0.5 in W0 (Shuttleworth et al. 2024).

    Plain noise makes some: read it beside noise of equal norm. NaN where one of the matrices has no resolved vectors.
    """
    strange = left_overlap[:, :, :INTRUDERS].amax(-2) < INTRUDER_MATCH
    count = (strange & directions[:, :INTRUDERS]).sum(-1).double()
    return count.where(_common(base_directions, directions) > 0, torch.nan)


def principal_angles(overlap: SignedOverlap, k: int) -> Float64[Tensor, "b k"]:
    """Arc cosines of the singular values of U0_k^T U1_k, in radians, ascending (Bjorck & Golub 1973).

    Angles below about sqrt(2 e) cannot be told from zero, e being the error of the overlap: 2e-8 for vectors that are
    orthonormal to rounding. The mean of their cos^2 is ``subspace``.

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
    # Rounding may take a cosine past 1, of which there is no angle; LAPACK refuses NaN.
    cosines = torch.linalg.svdvals(block.where(finite[:, None, None], 0.0)).clamp(max=1.0)
    return cosines.arccos().where(finite[:, None], torch.nan)


def mean_principal_angle(overlap: SignedOverlap, base_directions: Resolved, directions: Resolved, *, k: int) -> Tensor:
    """Mean of ``principal_angles``. NaN where fewer than k directions are resolved."""
    return principal_angles(overlap, k).mean(-1).where(_common(base_directions, directions) >= k, torch.nan)


def _common(base_directions: Resolved, directions: Resolved) -> Tensor:
    """Number of directions that are resolved in both; as sigmas descend they are the first ones."""
    return torch.minimum(base_directions.sum(-1), directions.sum(-1))


def cosine_chance(dimension: int) -> float:
    """Mean |cos| of random unit vectors: Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)), about sqrt(2 / (pi d)).

    >>> round(cosine_chance(2), 4)  # 2 / pi
    0.6366
    """
    return math.exp(math.lgamma(dimension / 2) - math.lgamma((dimension + 1) / 2)) / math.sqrt(math.pi)


REACH, NODES = 12.0, 200
"""Where the integrand below has fallen to nothing for any number of vectors, and Gauss's nodes up to there."""


@cache
def best_match_chance(dimension: int, count: int) -> float:
    """Mean largest |cos| of a random unit vector with k = ``count`` orthonormal ones in d dimensions.

    The mean largest of k |Gaussians|, the integral of 1 - (2 Phi(x) - 1)^k over x > 0, divided by the mean length of d
    of them.

    >>> round(best_match_chance(1, 1), 9)
    1.0
    >>> round(best_match_chance(3, 1), 12)  # cos is uniform
    0.5
    """
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    x = REACH / 2 * (nodes + 1)
    largest = REACH / 2 * float(weights @ -np.expm1(count * np.log1p(-erfc(x / math.sqrt(2)))))
    length = math.sqrt(2) * math.exp(math.lgamma((dimension + 1) / 2) - math.lgamma(dimension / 2))
    return min(1.0, largest / length)


def window_chance(window: Bool[Tensor, "b M M"], directions: Resolved, *, dimension: int) -> PerMatrix:
    """Mean norm of random unit vectors in windows of k: Gamma((k+1)/2) Gamma(d/2) / (Gamma(k/2) Gamma((d+1)/2)).

    The mean is over the resolved tuned vectors, k being the number of base vectors in the window of each.
    """
    k, d = window.sum(-2).double(), dimension
    whole = math.lgamma(d / 2) - math.lgamma((d + 1) / 2)
    norm = (torch.lgamma((k + 1) / 2) - torch.lgamma(k / 2) + whole).exp()  # 0 for k = 0, as Gamma(0) is infinite
    return norm.where(directions, torch.nan).nanmean(-1)


CHANCE_DRAWS = 4000
FEWEST_DRAWS = 8


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
    random, draws = np.random.default_rng(seed), max(CHANCE_DRAWS // free, FEWEST_DRAWS)
    rest = np.triu(random.standard_normal((draws, free, free)), 1)
    diagonal = np.arange(free)
    rest[:, diagonal, diagonal] = np.sqrt(random.chisquare(dimension - free - diagonal, (draws, free)))
    rows = np.concatenate([random.standard_normal((draws, free, free)), rest], axis=1)
    cosines = np.linalg.svd(np.linalg.qr(rows).Q[:, :free], compute_uv=False)
    angles = np.arccos(cosines.clip(max=1.0))
    return float(angles[:, -1].mean()), float(angles.sum(-1).mean() / k)


DIRECTIONS = ("base_directions", "directions")


def _chance(
    base_directions: Resolved,
    directions: Resolved,
    shape: tuple[int, int],
    *,
    side: int,
    fewest: int,
    level: Callable[[int, int], float],
) -> PerMatrix:
    """A chance level by the dimension and the number of tuned vectors; NaN where fewer directions are resolved."""
    # No tuned vector has no level; one is asked for it all the same and the last line makes it NaN.
    levels = [level(shape[side], max(count, 1)) for count in directions.sum(-1).tolist()]
    found = torch.tensor(levels, dtype=torch.float64, device=directions.device)
    return found.where(_common(base_directions, directions) >= fewest, torch.nan)


def _metrics(side: str) -> tuple[tuple[Metric, ...], tuple[Metric, ...]]:
    """The metrics of one side's vectors, each beside its chance level; and those of the angles of its top spaces."""
    axis, overlaps, who = ("left", "right").index(side), f"{side}_overlap", f"{side} singular vectors"
    doubt = f"; not where the same {('rows', 'columns')[axis]} are large in both models: there see *_rowcol"
    angle: dict[str, Any] = {"unit": "rad", "range": "[0, pi/2]", "source": "Bjorck & Golub 1973"}

    def row(name: str, summary: str, *facts: str, **words: Any) -> Callable[[Callable[..., Tensor]], Metric]:
        words = {"range": "[0, 1]", "invariant": OF_VECTORS, "version": 2} | words
        return built_in(summary, name=f"{side}_{name}", facts=facts, **words)

    def chance(name: str, summary: str, level: Callable[[int, int], float], fewest: int = 1, **words: Any) -> Metric:
        declare = row(f"{name}_chance", f"chance level: {summary}{doubt}", *DIRECTIONS, "shape", **words)
        return declare(partial(_chance, side=axis, fewest=fewest, level=level))

    def by_window(window: Tensor, directions: Tensor, shape: tuple[int, int]) -> Tensor:
        return window_chance(window, directions, dimension=shape[axis])

    mean = partial(torch.nanmean, dim=-1)
    agreeing = [
        row("agreement_mean", f"mean |cos| of matching {who}", f"{side}_agreement")(mean),
        chance("agreement", "mean |cos| of random unit vectors", lambda d, _: cosine_chance(d)),
        row("best_match_mean", f"mean over base {who} of the largest |cos|", f"{side}_best_match")(mean),
        chance("best_match", "mean largest |cos| of a random unit vector with as many others", best_match_chance),
    ]
    angles = []
    for k in TOP:
        shared = f"||{side} top-{k} overlap||_F^2 / {k}"
        agreeing.append(row(f"subspace_{k}", shared, overlaps, *DIRECTIONS)(partial(subspace, k=k)))
        agreeing.append(chance(f"subspace_{k}", f"{k} / d", lambda d, _, k=k: k / d, k))
        between, cosines = f"mean principal angle between the {side} top-{k} spaces", f"{side}_cosines"
        angles.append(row(f"angle_{k}", between, cosines, *DIRECTIONS, **angle)(partial(mean_principal_angle, k=k)))
        random = lambda d, _, k=k: principal_angle_chance(d, k)[1]  # noqa: E731
        angles.append(chance(f"angle_{k}", f"random spaces of {k} dimensions", random, k, **angle))
    in_window = f"mean norm of tuned {who} in the span of base ones with sigma within 5%"
    agreeing += [
        row("agreement_window_mean", in_window, f"{side}_agreement_window")(mean),
        row("agreement_window_chance", f"chance level: mean norm of random unit vectors in as many dimensions{doubt}",
            "window", "directions", "shape")(by_window),
    ]  # fmt: skip
    return tuple(agreeing), tuple(angles)


_LEFT, _RIGHT = _metrics("left"), _metrics("right")

AGREEMENT = (*_LEFT[0], *_RIGHT[0])
"""Metrics of agreement, of both sides."""

ANGLES = (*_LEFT[1], *_RIGHT[1])
"""Metrics of the angles between top spaces, of both sides."""
