"""Statistics that metrics, tables, figures and findings share, each defined here and nowhere else. NumPy, no torch.

How a quantity is spread over heads (Gini, Lorenz, top share), ranks (Spearman, Holm), scores against a reference
domain, and what may be said of sampled numbers: percentile bootstrap, sign flips, McNemar. SciPy's distributions are
imported where they are used, as importing them takes 0.4 s. Numbers that do not exist are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

DRAWS_AT_ONCE = 1 << 22
"""Numbers that a bootstrap holds at a time."""

LARGEST_CORRELATION = 1 - 1e-12
"""Where Fisher's transformation stops, so that it stays finite."""


# How something is spread


def gini(values: Floats) -> float:
    """Gini coefficient of non-negative values: 0 when all are equal, towards 1 when one has all. NaN if all are zero.

    >>> gini(np.array([1.0, 1.0])), gini(np.array([0.0, 1.0]))
    (0.0, 0.5)
    """
    ordered = np.sort(values)
    n, total = len(ordered), ordered.sum()
    if n == 0 or total == 0:
        return math.nan
    return float(2 * (np.arange(1, n + 1) * ordered).sum() / (n * total) - (n + 1) / n)


def top_count(n: int, share: float = 0.1) -> int:
    """How many of n are the top ``share`` of them: ceil(share n), so that a tenth of 32 heads are 4."""
    return math.ceil(share * n)


def top_share(values: Floats, share: float = 0.1) -> Floats:
    """What the largest ``top_count`` of values have of their sum, along the last axis; NaN where the sum is zero.

    An even spread gives ``top_count(n, share) / n``.

    >>> float(top_share(np.array([3.0, 1.0]), 0.5))
    0.75
    """
    n = values.shape[-1]
    total = values.sum(-1)
    largest = np.sort(values, axis=-1)[..., n - top_count(n, share) :]
    with np.errstate(invalid="ignore"):
        return np.where(total != 0, largest.sum(-1) / np.where(total == 0, np.nan, total), np.nan)


def lorenz(values: Floats) -> tuple[Floats, Floats]:
    """Points of the Lorenz curve: the share of values, smallest first, and what they have of the sum (Lorenz 1905).

    Twice the area between it and the diagonal, by trapezia, is ``gini``.

    Args:
        values: n of them, non-negative.

    Returns:
        Both (n + 1,), from 0 to 1. The second is NaN if all values are zero.

    >>> lorenz(np.array([3.0, 1.0]))[1].tolist()
    [0.0, 0.25, 1.0]
    """
    n, total = len(values), values.sum()
    held = np.concatenate([[0.0], np.sort(values).cumsum()])
    return np.arange(n + 1) / max(n, 1), held / total if total else np.full(n + 1, math.nan)


def scale01(values: Floats) -> Floats:
    """(X - min X) / (max X - min X) over all heads that have a value; NaN for the others, and for all if X is constant.

    >>> scale01(np.array([2.0, 4.0, 3.0])).tolist()
    [0.0, 1.0, 0.5]
    """
    known = values[np.isfinite(values)]
    if known.size == 0 or known.min() == known.max():
        return np.full(values.shape, math.nan)
    return np.where(np.isfinite(values), (values - known.min()) / (known.max() - known.min()), math.nan)


def reference_score(change_domain: Floats, change_reference: Floats) -> Floats:
    """Reference-domain score scale01(||W_domain - W_base||_F) - scale01(||W_reference - W_base||_F), in [-1, 1].

    High: specific to the domain. Low: rewind first.

    Args:
        change_domain: Frobenius norm of each head's change under training on the domain.
        change_reference: The same under training on the reference corpus.
    """
    return scale01(change_domain) - scale01(change_reference)


# Ranks


def out_of_line(changes: Floats, among: Floats) -> NDArray[np.bool_]:
    """Return which changes stand out: ln of the change lies over 6 MAD, and over ln 3, above the median of the others.

    Args:
        changes: (n,), sizes of changes, at least 0; of these no change is never out of line.
        among: The sizes that they are judged by. Where half of them or more did not change, whatever changed is.

    >>> out_of_line(np.array([0.0, 0.01, 9.0]), np.array([0.01, 0.012, 0.009, 0.011, 9.0])).tolist()
    [False, False, True]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs, others = np.log(changes), np.log(among)
        middle = np.median(others)
        spread = np.median(np.abs(others - middle)) if np.isfinite(middle) else 0.0
    return (changes > 0) & (logs > middle + max(6 * spread, math.log(3)))


def spearman(first: Floats, second: Floats) -> Floats:
    """Spearman's rank correlation, in [-1, 1]: Pearson's of the ranks, equal values sharing their mean rank.

    Args:
        first: (*b, n), the values of the one.
        second: (*b, n), those of the other.

    Returns:
        (*b,); NaN for fewer than three values (two always give 1 or -1), for constant ones, and where one is NaN.

    >>> round(float(spearman(np.array([1.0, 5.0, 9.0]), np.array([2.0, 4.0, 3.0]))), 12)
    0.5
    """
    from scipy.stats import rankdata

    n = first.shape[-1]
    if n < 3:
        return np.full(first.shape[:-1], math.nan)
    x, y = (rankdata(v, axis=-1) - (n + 1) / 2 for v in (first, second))
    size = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return (x * y).sum(-1) / np.where(size == 0, np.nan, size)


def spearman_interval(rho: float, count: int) -> tuple[float, float]:
    """95% interval of a rank correlation over ``count`` points, at least four (Bonett & Wright 2000).

    By Fisher's transformation, with the standard error sqrt((1 + rho^2 / 2) / (count - 3)); approximate below ten
    points. Of a partial correlation ``count`` is less by the number of quantities that were taken out.
    """
    width = 1.96 * float(np.sqrt((1 + rho**2 / 2) / (count - 3)))
    middle = _fisher(rho)
    return float(np.tanh(middle - width)), float(np.tanh(middle + width))


def spearman_pvalue(rho: float, count: int) -> float:
    """Two-sided p-value of a rank correlation over so many points, less what was taken out of both.

    By Fisher's transformation under the null hypothesis, z = arctanh(rho) sqrt(count - 3).
    """
    from scipy.stats import norm

    return float(2 * norm.sf(abs(_fisher(rho)) * np.sqrt(count - 3)))


def _fisher(rho: float) -> float:
    return np.arctanh(np.clip(rho, -LARGEST_CORRELATION, LARGEST_CORRELATION))


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's (1979) adjusted p-values: max over j <= i of min(1, (n - j + 1) p_(j)), in the order given.

    Rejecting where they are at most alpha keeps the chance of any false rejection at alpha, whatever the dependence.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = np.minimum(1.0, values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted.tolist()


# Sampled numbers


def ratio_of_sums(value: Floats, weight: Floats) -> Floats:
    """sum(value) / sum(weight) along the last axis: the quality that items with these values and weights have."""
    return value.sum(-1) / weight.sum(-1)


def bootstrap(
    statistic: Callable[..., ArrayLike],
    *samples: Floats,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile interval of a statistic over items drawn with replacement.

    Args:
        statistic: Takes as many arrays (draws, n) as there are samples, and returns (draws,).
        samples: (n,) each, of the same items: an item is drawn with all its values together.
        seed: Of the draws.
        resamples: How many draws.
        level: Share of draws inside.

    Returns:
        Both ends. One item gives an interval without width.

    Source: Efron & Tibshirani 1993, chapters 6 and 13.
    """
    n = len(samples[0])

    def drawn(draw: np.random.Generator, count: int) -> ArrayLike:
        at = draw.integers(0, n, size=(count, n))
        return statistic(*(values[at] for values in samples))

    low, high = interval(_in_chunks(n, resamples, drawn, seed), level)
    return float(low), float(high)


def interval(draws: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """Return the ends between which the share ``level`` of draws lies, as many outside on either side.

    Args:
        draws: (draws, *b).
        level: Share of draws inside.
    """
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(draws, [tail, 1.0 - tail], axis=0)
    return low, high


def mcnemar(a: Floats, b: Floats) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Of the n items that exactly one of the two gets right, k are a's; under the null hypothesis k is binomial(n, 1/2),
    and p = min(1, 2 P(K <= min(k, n - k))) (McNemar 1947; exact form, e.g. Fay 2010).

    Args:
        a: 0 or 1 for each item.
        b: The same of the other.

    Returns:
        1 where they never differ.

    >>> mcnemar(np.zeros(5), np.ones(5))
    0.0625
    """
    from scipy.stats import binom

    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    return min(1.0, float(2.0 * binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)))


def sign_flip(difference: Floats, *, seed: int = 0, resamples: int = 2000) -> float:
    """Return the two-sided p-value of the sign-flip (paired permutation) test of a sum of differences.

    Under the null hypothesis each difference is as likely to have the other sign. With T = |sum d_i| and R random sign
    vectors, p = (1 + #{|sum s_i d_i| >= T}) / (1 + R), which never understates it (Phipson & Smyth 2010).

    Args:
        difference: One number for each item.
        seed: Of the signs.
        resamples: R.

    Returns:
        At least 1 / (1 + R); 1 where all differences are zero.
    """

    def flipped(draw: np.random.Generator, count: int) -> Floats:
        signs = draw.integers(0, 2, size=(count, len(difference)), dtype=np.int8)
        return (2 * signs - 1).astype(np.float64) @ difference

    observed = abs(difference.sum())
    slack = 1e-12 * np.abs(difference).sum()  # sums of the same numbers in another order differ in their last bits
    sums = _in_chunks(len(difference), resamples, flipped, seed)
    return float((1 + np.count_nonzero(np.abs(sums) >= observed - slack)) / (1 + resamples))


def _in_chunks(
    size: int, resamples: int, compute: Callable[[np.random.Generator, int], ArrayLike], seed: int
) -> Floats:
    """Make all draws from one stream, so many at a time that memory stays flat."""
    draw = np.random.default_rng(seed)
    at_once = max(1, DRAWS_AT_ONCE // max(size, 1))
    counts = [min(at_once, resamples - begun) for begun in range(0, resamples, at_once)]
    return np.concatenate([np.asarray(compute(draw, count)) for count in counts])
