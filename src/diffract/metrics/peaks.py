"""Density of ln sigma and its peaks, for one matrix a row or for the pooled heads of a layer.

Sigmas that are zero, NaN or infinite do not count, so rows of unequal length are padded with zeros. Sigmas that the
decomposition cannot tell from zero should be zeros too: their logarithms are those of rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from diffract.densities import BLOCK, kernel_sums, scott_bandwidth
from diffract.metrics.facts import built_in

Sigmas = Float64[Tensor, "b M"]
PerMatrix = Float64[Tensor, "b"]

POINTS = 256
PROMINENCE = 0.05
REACH = 3
"""Bandwidths by which the points go beyond the smallest and the largest value."""

FEWEST = 3
"""Values that a density takes at least, and that a peak holds."""

MASS = 0.05
"""Share of the sigmas that a peak holds at least."""

CHUNK_ENTRIES = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Kernels evaluated at once, by device. On the CPU as many as stay in the cache."""

EPSILON = float(torch.finfo(torch.float64).eps)


@dataclass(frozen=True)
class Density:
    """Kernel density of ln sigma for b samples.

    Attributes:
        grid: (b, points), ln sigma, equally spaced.
        values: (b, points), per unit of ln sigma; integrates to 1.
        bandwidth: (b,), in ln sigma.
    """

    grid: Tensor
    values: Tensor
    bandwidth: Tensor


@dataclass(frozen=True)
class Peaks:
    """Peaks of b densities, at most k in one, by ascending position; NaN beyond the last.

    Attributes:
        count: (b,); NaN where there is no density.
        positions: (b, k), in ln sigma.
        widths: (b, k), in ln sigma.
        prominences: (b, k), as a share of the density's highest value.
        masses: (b, k), share of the sigmas within the peak's extent.
        membership: (b, M), for each sigma the column of its peak, or -1.
    """

    count: Tensor
    positions: Tensor
    widths: Tensor
    prominences: Tensor
    masses: Tensor
    membership: Tensor


PEAK_COUNT = built_in(
    "peaks in the density of ln sigma: prominence 5% of the highest, at least 5% of the sigmas and three of them",
    unit="count",
    range="[0, M]",
    version=2,
    source="Scott 1992, 6.3",
    name="peak_count",
    facts=("peaks",),
)(attrgetter("count"))


def log_density(sigmas: Sigmas, *, bandwidth: float | None = None, points: int = POINTS) -> Density:
    """Gaussian kernel density of ln sigma: (1 / n h) sum_i phi((x - ln sigma_i) / h).

    Points run from min - 3 h to max + 3 h. Scott's bandwidth is h = n^(-1/5) s with s the standard deviation (n - 1)
    of ln sigma; the factor 1.06 of the normal reference rule is not in it. A bandwidth below the distance of two
    points is raised to it, or kernels would fall between them.

    Args:
        sigmas: One sample a row, in any order.
        bandwidth: In ln sigma; Scott's by default.
        points: Of the grid, at least 16.

    Returns:
        NaN for a row with fewer than three positive values, or whose values are all equal.

    Raises:
        ValueError: Too few points.

    Source: Scott 1992, Multivariate Density Estimation, section 6.3, with d = 1.
    """
    if points < BLOCK:
        raise ValueError(f"expected at least {BLOCK} points for a density, got {points}")
    x, valid = _logarithms(sigmas)
    n = valid.sum(-1).double()
    low, high = x.where(valid, torch.inf).amin(-1), x.where(valid, -torch.inf).amax(-1)
    # Where logarithms differ by their rounding alone, the sigmas are equal.
    known = (n >= FEWEST) & (high - low > 64 * EPSILON * torch.maximum(low.abs(), high.abs()).clamp(min=1.0))
    h = scott_bandwidth(x, valid, n) if bandwidth is None else torch.full_like(n, bandwidth)
    # No narrower than a step of the grid, between whose points a kernel would be lost.
    h = torch.maximum(h, (high - low) / (points - 1 - 2 * REACH)).where(known, torch.nan)
    start, step = low - REACH * h, (high - low + 2 * REACH * h) / (points - 1)
    grid = start[:, None] + step[:, None] * torch.arange(points, dtype=x.dtype, device=x.device)
    entries = CHUNK_ENTRIES["cpu" if x.device.type == "cpu" else "cuda"]
    kernels = kernel_sums((x - start[:, None]) / h[:, None], valid, step / h, points, entries=entries, xp=torch)
    return Density(grid, kernels / (n * h * math.sqrt(2 * math.pi))[:, None], h)


def find_peaks(
    density: Density, sigmas: Sigmas, *, prominence: float = PROMINENCE, mass: float = MASS, fewest: int = FEWEST
) -> Peaks:
    """Peaks of a density whose prominence is at least a share of its highest value and that hold enough sigmas.

    The prominence of a local maximum is its height over the higher one of two minima, on its left and on its right,
    each taken as far as the next point that is higher (or the end). Of equal maxima the left one counts as higher, so
    that a dip between two of them weighs what it would if they differed by rounding; SciPy's ``find_peaks`` gives
    both the full prominence.

    A peak's extent reaches on either side to where the density has fallen half-way to the valley there, the lowest
    point before the next peak or the end; the ends are interpolated between points. Its length is the width, for a
    lone peak the full width at half maximum. Extents never overlap, and a sigma belongs to the peak whose extent holds
    it. (Half prominence, as ``scipy.signal.peak_widths`` has it, would let the highest peak swallow valleys and lower
    peaks, its prominence being all of its height.)

    A peak whose extent holds less than a share ``mass`` of the sigmas, or fewer than ``fewest`` of them, is dropped,
    and its sigmas belong to none: a single sigma apart from the others is an outlier and no group of directions.

    Positions are points of the grid, so known to half the distance of two, about a tenth of a bandwidth.

    What noise gives: Gaussian matrices, defaults, share of 2,000 (200 of the two large shapes) with a second peak: 0
    for 128 x 2048, 512 x 512, 128 x 128, 64 x 64, 32 x 32 and 16 x 16, 0.0015 for 16 x 512. That is noise of equal
    variance: rows of two sizes alone make two peaks, see ``rowcol``.

    What it misses: Scott's bandwidth follows the whole spread, so of evenly spaced equal peaks it tells at most four
    apart with 128 sigmas and six with 2,048; more of them look like one. A smaller ``bandwidth`` of ``log_density``
    finds more, in noise too.

    Args:
        density: From ``log_density`` of the same sigmas.
        sigmas: One sample a row.
        prominence: Smallest one, as a share of the highest value.
        mass: Smallest share of the sigmas in a peak.
        fewest: Smallest number of them.
    """
    heights = density.values / density.values.amax(-1, keepdim=True)
    # local maxima; of a plateau the left end
    inner = heights[:, 1:-1]
    tops = (heights[:, :-2] < inner) & (inner >= heights[:, 2:]) & (inner >= prominence)
    rows, before = tops.nonzero(as_tuple=True)
    at = before + 1
    prominences = _prominences(heights[rows], at)
    kept = (prominences > 0) & (prominences >= prominence)
    rows, at, prominences = rows[kept], at[kept], prominences[kept]
    start, step = density.grid[rows, 0], (density.grid[:, 1] - density.grid[:, 0])[rows]
    ends = _extents(heights[rows], rows, at)
    lower, upper = (start + step * end for end in ends)
    x, valid = _logarithms(sigmas)
    held = (valid[rows] & (x[rows] >= lower[:, None]) & (x[rows] <= upper[:, None])).sum(-1)
    share = held.double() / valid.sum(-1)[rows]
    kept = (held >= fewest) & (share >= mass)
    rows, at, lower, upper, share, prominences = (
        column[kept] for column in (rows, at, lower, upper, share, prominences)
    )
    counts = torch.zeros_like(density.bandwidth, dtype=torch.int64).index_add_(0, rows, torch.ones_like(rows))
    columns = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    most = int(counts.max()) if len(counts) else 0
    fill = partial(start.new_full((len(counts), most), torch.nan).index_put, (rows, columns))
    return Peaks(
        count=counts.double().where(density.bandwidth.isfinite(), torch.nan),
        positions=fill(density.grid[rows, at]),
        widths=fill(upper - lower),
        prominences=fill(prominences),
        masses=fill(share),
        membership=_membership(sigmas, fill(lower), fill(upper)),
    )


def peak_count(sigmas: Sigmas) -> PerMatrix:
    """Number of peaks in the density of ln sigma; see ``find_peaks`` for what noise gives."""
    return spectral_peaks(sigmas).count


def spectral_peaks(sigmas: Sigmas) -> Peaks:
    """Peaks in the density of ln sigma, all by default."""
    return find_peaks(log_density(sigmas), sigmas)


def _logarithms(sigmas: Sigmas) -> tuple[Tensor, Tensor]:
    """Return ln sigma, 0 where a sigma does not count, and which ones do."""
    valid = (sigmas > 0) & sigmas.isfinite()
    return sigmas.where(valid, 1.0).log(), valid


def _prominences(heights: Float64[Tensor, "p points"], at: Int64[Tensor, "p"]) -> Float64[Tensor, "p"]:
    """Return the prominence of one maximum a row."""
    index = torch.arange(heights.shape[1], device=heights.device)
    own, peak = at[:, None], heights.gather(1, at[:, None])
    # Of equal heights the left one counts as the higher, so that one of them keeps its whole prominence.
    higher = (heights > peak) | ((heights == peak) & (index < own))
    left = index.where(higher & (index < own), -1).amax(-1, keepdim=True)
    right = index.where(higher & (index > own), heights.shape[1]).amin(-1, keepdim=True)
    left_base = heights.where((index > left) & (index < own), torch.inf).amin(-1)
    right_base = heights.where((index > own) & (index < right), torch.inf).amin(-1)
    return peak[:, 0] - torch.maximum(torch.minimum(left_base, peak[:, 0]), torch.minimum(right_base, peak[:, 0]))


def _extents(heights: Float64[Tensor, "p points"], rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Return where, in columns, heights fall half-way to the valley on the left and on the right of each peak."""
    last = heights.shape[1] - 1
    same = rows[1:] == rows[:-1]
    before = torch.cat([at.new_zeros(min(len(at), 1)), at[:-1].where(same, 0)])
    after = torch.cat([at[1:].where(same, last), at.new_full((min(len(at), 1),), last)])
    left = _half_way(heights, at, before)
    right = _half_way(heights.flip(-1), last - at, last - after)
    return left, last - right


def _half_way(heights: Tensor, at: Tensor, before: Tensor) -> Tensor:
    """Return the column left of ``at`` where the height falls half-way to the lowest one from ``before`` on."""
    index = torch.arange(heights.shape[1], device=heights.device)
    own = at[:, None]
    left = index < own
    valley = heights.where(left & (index >= before[:, None]), torch.inf).amin(-1, keepdim=True)
    level = (heights.gather(1, own) + valley) / 2
    low = index.where(left & (heights <= level), 0).amax(-1, keepdim=True)
    bottom = heights.gather(1, low)
    return (low + (level - bottom) / (heights.gather(1, low + 1) - bottom))[:, 0]


def _membership(sigmas: Sigmas, lower: Float64[Tensor, "b k"], upper: Float64[Tensor, "b k"]) -> Int64[Tensor, "b M"]:
    """Return for each sigma the extent that holds it, or -1."""
    x, valid = _logarithms(sigmas)
    found = torch.full_like(sigmas, -1, dtype=torch.int64)
    for peak, (low, high) in enumerate(zip(lower.mT, upper.mT, strict=True)):
        found = torch.where(valid & (x >= low[:, None]) & (x <= high[:, None]), peak, found)
    return found
