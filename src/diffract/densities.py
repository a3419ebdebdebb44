"""Densities of spectra: the Marchenko-Pastur law, four tail laws, and kernel densities, each defined here alone.

lambda = sigma^2 / N; M = min(m, n), N = max(m, n), gamma = M / N in (0, 1]. Tail densities live on x >= xmin, where
each integrates to 1.

The Marchenko-Pastur law and the kernel sums are needed twice: for drawing, where torch is not wanted, and for thousands
of matrices at once, on whatever device they lie. They use only what NumPy and torch spell alike, and take the library
as ``xp``: NumPy by default, ``torch`` for tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Row = Mapping[str, float | None]


# The Marchenko-Pastur law (Marchenko & Pastur 1967)

HALVINGS = 56
"""Of [0, pi]: what is left of the interval is below the spacing of float64 numbers near its middle."""


def aspect(rows: int, cols: int) -> float:
    """Return gamma = M / N.

    >>> aspect(16, 64)
    0.25
    """
    return min(rows, cols) / max(rows, cols)


def marchenko_pastur_edges(variance: Any, gamma: float) -> tuple[Any, Any]:
    """Return l- and l+ = v (1 -+ sqrt(gamma))^2, of one variance or of an array of them.

    >>> marchenko_pastur_edges(1.0, 0.25)
    (0.25, 2.25)
    """
    root = math.sqrt(gamma)
    return variance * (1 - root) ** 2, variance * (1 + root) ** 2


def marchenko_pastur(x: Array, variance: float, gamma: float) -> Array:
    """sqrt((l+ - x)(x - l-)) / (2 pi gamma v x) on [l-, l+]; zero elsewhere.

    Args:
        x: Positive.
        variance: v of the entries, positive.
        gamma: M / N.
    """
    low, high = marchenko_pastur_edges(variance, gamma)
    return np.sqrt(np.clip((high - x) * (x - low), 0, None)) / (2 * math.pi * gamma * variance * x)


def marchenko_pastur_cdf(x: Any, variance: Any, gamma: Any, *, xp: Any = np) -> Any:
    """Share of the law at or below x, in closed form; absolute error about eps / sqrt(gamma).

    With x = v (1 + gamma - 2 sqrt(gamma) cos theta), theta in [0, pi], it is

        (theta + sin(theta) / r - (1 - r^2) / r^2 arg(1 - r e^(-i theta))) / pi,    r = sqrt(gamma).

    Args:
        x: Where; an array that is broadcast with the other two.
        variance: Of the entries, an array.
        gamma: M / N, a number or an array.
        xp: The library of the arrays.

    Returns:
        In [0, 1]; 0 below l-, 1 above l+. NaN where the variance is zero or NaN, or x is NaN.

    >>> marchenko_pastur_cdf(np.array([0.0, 4.0, 9.0]), np.array(1.0), 1.0).tolist()
    [0.0, 1.0, 1.0]
    """
    root = xp.sqrt(_like(gamma, x, xp))
    # In units of the variance; a variance of zero has no law.
    low, width = (1 - root) ** 2, 4 * root
    x = x / xp.where(variance > 0, variance, math.nan)
    # Two square roots keep full precision at both ends, where an arccosine would lose half the digits.
    above, below = xp.sqrt(xp.clip(x - low, 0.0, None)), xp.sqrt(xp.clip(low + width - x, 0.0, None))
    return _cdf_of_angle(2 * xp.atan2(above, below), root, xp)


def marchenko_pastur_quantile(share: Any, variance: Any, gamma: Any, *, xp: Any = np) -> Any:
    """The x at which ``marchenko_pastur_cdf`` is ``share``, by bisection over the angle; 0.5 gives the median.

    Args:
        share: In [0, 1], a number or an array that is broadcast with the other two.
        variance: Of the entries, an array.
        gamma: M / N, a number or an array.
        xp: The library of the arrays.

    Returns:
        In [l-, l+]. Zero for a zero variance; NaN where the share lies outside [0, 1] or anything is NaN.
    """
    target, root = _like(share, variance, xp), xp.sqrt(_like(gamma, variance, xp))
    below, above = xp.zeros_like(target + root), xp.full_like(target + root, math.pi)
    # Over the angle, where the law has no square root at its ends: halves are then equally good everywhere.
    for _ in range(HALVINGS):
        middle = (below + above) / 2
        less = _cdf_of_angle(middle, root, xp) < target
        below, above = xp.where(less, middle, below), xp.where(less, above, middle)
    half = xp.where((target > 0) & (target < 1), (below + above) / 4, math.pi / 2 * target)
    x = variance * ((1 - root) ** 2 + 4 * root * xp.sin(half) ** 2)
    return xp.where((target >= 0) & (target <= 1), x, math.nan)


def _like(value: Any, other: Any, xp: Any) -> Any:
    return xp.asarray(value, dtype=other.dtype, device=other.device)


def _cdf_of_angle(theta: Any, root: Any, xp: Any) -> Any:
    """The closed form; rounding may leave [0, 1] by an eps."""
    sine, cosine = xp.sin(theta), xp.cos(theta)
    lean = xp.atan2(root * sine, 1 - root * cosine)
    share = (theta + sine / root - (1 - root**2) / root**2 * lean) / math.pi
    return xp.clip(share, 0.0, 1.0)


# Tails


def power_law(x: Array, alpha: float, xmin: float) -> Array:
    """(alpha - 1) / xmin (x / xmin)^-alpha."""
    return (alpha - 1) / xmin * (x / xmin) ** -alpha


def truncated_power_law(x: Array, alpha: float, rate: float, xmin: float) -> Array:
    """x^-alpha exp(-rate x), divided by its integral from xmin on (a quadrature in ln x).

    NaN where that integral is infinite: no positive rate, and alpha not above 1.
    """
    fall = rate * xmin
    return np.exp(-alpha * np.log(x / xmin) - fall * (x / xmin - 1) - _log_mass(alpha, fall)) / xmin


def exponential(x: Array, rate: float, xmin: float) -> Array:
    """Rate exp(-rate (x - xmin))."""
    return rate * np.exp(-rate * (x - xmin))


def log_normal(x: Array, mu: float, sigma: float, xmin: float) -> Array:
    """The log-normal density, divided by its share above xmin.

    Written from xmin outward, so that it holds where that share is too small for a float.
    """
    from scipy.special import erfcx

    z, t = (math.log(xmin) - mu) / sigma, np.log(x / xmin)
    hazard = math.sqrt(2 / math.pi) / erfcx(z / math.sqrt(2))
    return hazard / (x * sigma) * np.exp(-t / sigma * (z + t / (2 * sigma)))


TAILS: dict[str, tuple[str, Callable[..., Array], tuple[str, ...]]] = {
    "pl": ("power law", power_law, ("alpha", "xmin")),
    "tpl": ("truncated power law", truncated_power_law, ("alpha", "rate", "xmin")),
    "exp": ("exponential", exponential, ("rate", "xmin")),
    "ln": ("log-normal", log_normal, ("mu", "sigma", "xmin")),
}
"""By prefix of the columns: a name, the density, and which columns are its parameters."""


def tail_parameters(row: Row, prefix: str) -> tuple[float, ...] | None:
    """Return a fit's parameters, ``None`` where the row lacks one or one is no number."""
    found = [row.get(f"{prefix}_{name}") for name in TAILS[prefix][2]]
    numbers = [float(v) for v in found if v is not None and math.isfinite(v)]
    return tuple(numbers) if len(numbers) == len(found) else None


def _log_mass(alpha: float, fall: float) -> float:
    """Logarithm of the integral of s^-alpha exp(-fall (s - 1)) over s >= 1."""
    from scipy.integrate import quad  # takes 0.3 s to import, and a scan draws nothing

    if not fall > 1e-300:
        return -math.log(alpha - 1) if alpha > 1 else math.nan

    def exponent(t: float) -> float:
        return (1 - alpha) * t - fall * math.expm1(t)

    # Split at its highest point, so that the quadrature cannot step over a narrow top; scaled by it, none overflows.
    summit = max(0.0, math.log(max(1 - alpha, fall) / fall))
    # Where the exponent has fallen so far, what follows is below the rounding of what came before.
    end = summit + math.log1p((60 + 20 * abs(1 - alpha)) / fall)
    highest = exponent(summit)
    parts = [(0.0, summit), (summit, end)]
    return highest + math.log(
        sum(quad(lambda t: math.exp(exponent(t) - highest), *ends, limit=200)[0] for ends in parts)
    )


# Kernel densities

BLOCK = 16
FAR = 40.0
"""Bandwidths at which a kernel is zero in float64."""


def kernel_density(values: Array, grid: Array) -> Array:
    """Density of one sample by Gaussian kernels of Scott's bandwidth: (1 / n h) sum_i phi((x - x_i) / h).

    Values that are all equal get a bandwidth of one step of the grid, or the kernel might fall between its points.

    Args:
        values: n of them, at least one.
        grid: Where; equally spaced, at least two points.

    Source: Scott 1992, Multivariate Density Estimation, section 6.3, with d = 1.
    """
    n, step = len(values), float(grid[1] - grid[0])
    counted = np.ones((1, n), bool)
    width = float(scott_bandwidth(values[None], counted, np.array([float(n)]))[0]) if n > 1 else 0.0
    width = max(width, step)
    sums = kernel_sums((values[None] - grid[0]) / width, counted, np.array([step / width]), len(grid))
    return sums[0] / (n * width * math.sqrt(2 * math.pi))


def scott_bandwidth(x: Any, counted: Any, n: Any) -> Any:
    """Return n^(-1/5) s, (b,), with s the standard deviation (n - 1) of those n values (b, m) that are ``counted``.

    The factor 1.06 of the normal reference rule is not in it (Scott 1992, section 6.3). ``n`` is (b,), floating.
    """
    mean = (x * counted).sum(-1) / n
    variance = ((x - mean[:, None]) ** 2 * counted).sum(-1) / (n - 1)
    return variance**0.5 * n**-0.2


def kernel_sums(x: Any, counted: Any, step: Any, points: int, *, entries: int = 1 << 16, xp: Any = np) -> Any:
    """Return sum_i exp(-(j s - x_i)^2 / 2) at j = 0 .. points - 1 for b samples, (b, points).

    From the left edge c of a block of points, at the distance k s,

        exp(-(c + k s - x)^2 / 2) = exp(-(k s)^2 / 2) exp(-(c - x)^2 / 2) exp(s (x - c))^k

    so that two exponentials serve all points of a block, where one for each point would cost most of a scan.

    Args:
        x: (b, m), in bandwidths, counted from the first point of each sample's own grid.
        counted: (b, m), which of them are meant.
        step: (b,), distance of two points in bandwidths, not much above one.
        points: Of the grid.
        entries: Kernels evaluated at once.
        xp: The library of the arrays.
    """
    like: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
    blocks = -(-points // BLOCK)
    rows = max(1, entries // (blocks * max(x.shape[1], 1)))
    edges = step[:, None] * (BLOCK * xp.arange(blocks, **like))
    within = xp.arange(BLOCK, **like)
    sums = xp.empty((len(x), blocks, BLOCK), **like)
    for first in range(0, len(x), rows):
        part = slice(first, first + rows)
        # Beyond that far a kernel is zero, while the ratio below would overflow.
        distance = xp.clip(x[part, None, :] - edges[part, :, None], -FAR, FAR)
        ratio = xp.exp(step[part, None, None] * distance)
        # In place: a fresh array for each step would leave the cache.
        distance *= distance
        distance *= -0.5
        kernel = xp.exp(distance, out=distance)
        kernel *= counted[part, None, :]
        # exp(-(d - k s)^2 / 2) = exp(-d^2 / 2) exp(s d)^k exp(-(k s)^2 / 2): one exponential serves sixteen points.
        for k in range(BLOCK):
            xp.sum(kernel, -1, out=sums[part, :, k])
            kernel *= ratio
    sums *= xp.exp(-0.5 * (step[:, None] * within) ** 2)[:, None, :]
    return sums.reshape(len(x), blocks * BLOCK)[:, :points]
