"""Densities that are drawn over a spectrum. The fits themselves are columns of the metrics table.

lambda = sigma^2 / N; x may be any array. Tail densities live on x >= xmin, where each integrates to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.special import erfcx

Array = NDArray[np.float64]
Row = Mapping[str, float | None]


def marchenko_pastur(x: Array, variance: float, rows: int, cols: int) -> Array:
    """N / (2 pi M v) sqrt((l+ - x)(x - l-)) / x on [l-, l+], l+- = v (1 +- sqrt(M / N))^2; zero elsewhere.

    Args:
        x: Positive.
        variance: v of the entries, positive.
        rows: Of the matrix; M = min(rows, cols), N = max(rows, cols).
        cols: Of the matrix.

    Source: Marchenko & Pastur 1967.
    """
    low, high = marchenko_pastur_edges(variance, rows, cols)
    ratio = min(rows, cols) / max(rows, cols)
    return np.sqrt(np.clip((high - x) * (x - low), 0, None)) / (2 * math.pi * ratio * variance * x)


def marchenko_pastur_edges(variance: float, rows: int, cols: int) -> tuple[float, float]:
    """Return l- and l+.

    >>> marchenko_pastur_edges(1.0, 16, 64)
    (0.25, 2.25)
    """
    root = math.sqrt(min(rows, cols) / max(rows, cols))
    return variance * (1 - root) ** 2, variance * (1 + root) ** 2


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
    if not fall > 1e-300:
        return -math.log(alpha - 1) if alpha > 1 else math.nan

    def exponent(t: float) -> float:
        return (1 - alpha) * t - fall * math.expm1(t)

    summit = max(0.0, math.log(max(1 - alpha, fall) / fall))
    # Where the exponent has fallen so far, what follows is below the rounding of what came before.
    end = summit + math.log1p((60 + 20 * abs(1 - alpha)) / fall)
    highest = exponent(summit)
    parts = [(0.0, summit), (summit, end)]
    return highest + math.log(
        sum(quad(lambda t: math.exp(exponent(t) - highest), *ends, limit=200)[0] for ends in parts)
    )
