"""From a number and its interval to a verdict in words: always by the same rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from diffract.studies.finding import Number, Verdict

RESAMPLES = 2000
FEWEST = 5
"""Points below which a rank correlation says nothing."""


def shown(number: Number) -> str:
    """Return a number with its interval, for a sentence.

    >>> shown(Number("gain", 0.25, 0.125, 0.5, "bits per byte"))
    '0.25 bits per byte (95% interval 0.125 to 0.5)'
    """
    unit = f" {number.unit}" if number.unit else ""
    interval = "" if number.low is None else f" (95% interval {number.low:.3g} to {number.high:.3g})"
    return f"{number.value:.3g}{unit}{interval}" if number.value is not None else "no number"


def better(number: Number, claim: str, *, than: float = 0.0) -> tuple[Verdict, str]:
    """Judge a claim that holds if a number is above another.

    Args:
        number: With its interval.
        claim: What holds if the whole interval is above.
        than: What it is held against.
    """
    said = f"{number.name[0].upper()}{number.name[1:]}: {shown(number)}"
    if number.value is None or number.low is None or number.high is None:
        return "cannot tell", f"{said}; there is no interval to judge by."
    if number.low > than:
        return "holds", f"{said}; {claim}."
    if number.high < than:
        return "does not hold", f"{said}; the opposite of what is claimed ({claim})."
    return "cannot tell", f"{said}; the interval includes {than:.3g}: it cannot be told whether {claim}."


def median(name: str, values: Sequence[float | None], *, unit: str = "", chance: float | None = None) -> Number:
    """Return a median over matrices or heads with its percentile-bootstrap interval over them."""
    known = np.array([v for v in values if v is not None], dtype=float)
    if not len(known):
        return Number(name, None, unit=unit, chance=chance)
    if np.ptp(known) == 0:
        return Number(name, float(known[0]), float(known[0]), float(known[0]), unit, chance)
    found = stats.bootstrap((known,), np.median, n_resamples=RESAMPLES, method="percentile", rng=0, vectorized=True)
    low, high = (float(end) for end in found.confidence_interval)
    return Number(name, float(np.median(known)), low, high, unit, chance)


def rank_correlation(name: str, a: npt.ArrayLike, b: npt.ArrayLike, *, given: int = 0) -> Number:
    """Return Spearman's correlation with its interval by Fisher's transformation (Bonett & Wright 2000).

    No interval below four points more than are ``given``; it is approximate below ten.

    Args:
        name: What to call it.
        a: One value for each point.
        b: The same of the other.
        given: Quantities that were taken out of both before, as in a partial correlation.
    """
    count = np.size(a) - given
    if count < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Number(name, None, chance=0.0)
    rho = float(np.asarray(stats.spearmanr(a, b))[0])
    if count < FEWEST:
        return Number(name, rho, chance=0.0)
    width = 1.96 * _fisher_error(rho, count)
    middle = np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12))
    low, high = (float(np.tanh(middle + side * width)) for side in (-1, 1))
    return Number(name, rho, low, high, chance=0.0)


def rank_pvalue(rho: float, count: int) -> float:
    """Return the two-sided p-value of a rank correlation over so many points, less what was taken out of both.

    By Fisher's transformation under the null hypothesis, z = arctanh(rho) sqrt(count - 3).
    """
    return float(2 * stats.norm.sf(abs(np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12))) * np.sqrt(count - 3)))


def _fisher_error(rho: float, count: int) -> float:
    return float(np.sqrt((1 + rho**2 / 2) / (count - 3)))
