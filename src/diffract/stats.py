"""Statistics that metrics, tables, figures and findings share, each defined here and nowhere else. NumPy, no torch.

How a quantity is spread over heads (Gini, Lorenz, top share), ranks (Spearman, Holm), scores against a reference
domain, and what may be said of sampled numbers: intervals of a quality and of a difference (Wilson, Newcombe, bootstrap
over documents), sign flips, McNemar. SciPy's distributions are imported where they are used, as importing them takes
0.4 s. Numbers that do not exist are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

DRAWS_AT_ONCE = 1 << 22
"""Numbers that a bootstrap holds at a time."""

FEWEST_DOCUMENTS, MANY_DOCUMENTS = 5, 20
"""Documents below which there is no interval, and from which on they are drawn with replacement."""

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


# Sampled numbers: a quality is sum(value) / sum(weight) over items, which may be parts of documents


def quality_interval(
    value: Floats, weight: Floats, document: ArrayLike, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Return the interval of a quality, sum(value) / sum(weight).

    Of an accuracy whose items are all documents of their own it is Wilson's, otherwise ``document_interval``.

    Args:
        value: (n,) one number for each item.
        weight: (n,) what each item counts.
        document: (n,) the name of the document that each item is a part of.
        seed: Of the draws.
        resamples: How many draws.
        level: Of the interval.

    Returns:
        Both ends; NaN where there are too few documents.
    """
    if _is_accuracy(value, weight, document):
        return wilson(int(value.sum()), len(value), level=level)
    return document_interval(value, weight, document, seed=seed, resamples=resamples, level=level)


def difference_interval(
    before: Floats, after: Floats, weight: Floats, document: ArrayLike, *, seed: int = 0, resamples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:  # fmt: skip
    """Return the interval of a paired difference of qualities, sum(after - before) / sum(weight).

    Of accuracies whose items are all documents of their own it is Newcombe's, otherwise ``document_interval``.

    Args:
        before: (n,) one number for each item.
        after: (n,) the same of the other.
        weight: (n,) what each item counts.
        document: (n,) the name of the document that each item is a part of.
        seed: Of the draws.
        resamples: How many draws.
        level: Of the interval.

    Returns:
        Both ends; NaN where there are too few documents.
    """
    if _is_accuracy(before, weight, document) and _is_accuracy(after, weight, document):
        return newcombe(before, after, level=level)
    return document_interval(after - before, weight, document, seed=seed, resamples=resamples, level=level)


def _is_accuracy(value: Floats, weight: Floats, document: ArrayLike) -> bool:
    """Whether a quality is the share of independent items that are right."""
    alone = len(np.unique(document)) == len(value)
    # Only of such items the number of right ones is binomial.
    return alone and bool((weight == 1).all()) and bool(np.isin(value, (0.0, 1.0)).all())


def wilson(right: int, count: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share: all p whose own standard error does not exclude what was seen.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n). Unlike the bootstrap's it has a width where
    none or all are right.

    Args:
        right: How many are right.
        count: n, of how many.
        level: Of the interval.

    Source: Wilson 1927.

    >>> [round(end, 4) for end in wilson(0, 80)]
    [0.0, 0.0458]
    """
    z, p = NormalDist().inv_cdf((1 + level) / 2), right / count
    middle = p + z * z / (2 * count)
    width = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    # At 0 and 1 the bounds are exact, where rounding would leave an eps.
    low, high = ((middle + side * width) / (1 + z * z / count) for side in (-1, 1))
    return max(0.0, low) if right else 0.0, min(1.0, high) if right < count else 1.0


def newcombe(before: Floats, after: Floats, *, level: float = 0.95) -> tuple[float, float]:
    """Return Newcombe's interval of a difference of two paired shares, after - before.

    Wilson's intervals of both shares, joined as the sides of a triangle whose angle is the correlation phi of the
    pairs; phi is corrected for continuity where it is positive (method 10). Items on which both agree count too, so
    that the interval has a width where the two never differ.

    Args:
        before: (n,) 0 or 1 for each item.
        after: (n,) the same of the other.
        level: Of the interval.

    Source: Newcombe 1998, Statistics in Medicine 17, 2635-2650.

    >>> a, b = np.repeat([[1, 1, 0], [1, 0, 1]], [36, 12, 2], axis=1).astype(float)
    >>> [round(end, 4) for end in newcombe(b, a)]
    [0.0569, 0.3404]
    """
    n = len(before)
    both, neither = float((before * after).sum()), float(((1 - before) * (1 - after)).sum())
    first, second = float(before.sum()), float(after.sum())
    product = both * neither - (first - both) * (second - both)
    # The continuity correction, which may weaken a positive correlation and not turn it round.
    product = max(product - n / 2, 0.0) if product > 0 else product
    size = math.sqrt(first * (n - first) * second * (n - second))
    phi = product / size if size else 0.0
    (low_1, high_1), (low_2, high_2) = wilson(int(first), n, level=level), wilson(int(second), n, level=level)
    p_1, p_2 = first / n, second / n

    def side(own: float, other: float) -> float:
        return math.sqrt(max(0.0, own * own - 2 * phi * own * other + other * other))

    return p_2 - p_1 - side(p_2 - low_2, high_1 - p_1), p_2 - p_1 + side(high_2 - p_2, p_1 - low_1)


def document_interval(
    value: Floats, weight: Floats, document: ArrayLike, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Return the interval of sum(value) / sum(weight) over documents, whose parts are not independent.

    From 20 documents on by the percentile bootstrap over documents. Below that it covers too rarely (0.85 with five),
    so that the interval is Student's t of the documents' means m_d = value_d / weight_d about the quality q, each
    counting what its document weighs: q +- t_(D-1) sqrt(D / (D - 1) sum weight_d^2 (m_d - q)^2) / sum weight_d. Under
    five documents there is none.

    Args:
        value: (n,) one number for each item.
        weight: (n,) what each item counts.
        document: (n,) the name of the document that each item is a part of.
        seed: Of the draws.
        resamples: How many draws.
        level: Of the interval.

    Returns:
        Both ends; NaN where there are too few documents.

    Source: Cochran 1977, section 6.3 (the variance of a ratio of sums).
    """
    values, weights = by_document(document, value, weight)
    count = len(values)
    if count < FEWEST_DOCUMENTS:
        return math.nan, math.nan
    if count >= MANY_DOCUMENTS:
        return bootstrap(ratio_of_sums, values, weights, seed=seed, resamples=resamples, level=level)
    from scipy.stats import t

    quality = float(ratio_of_sums(values, weights))
    # The error of a ratio of sums by its linearisation: documents count by their weights.
    error = math.sqrt(count / (count - 1) * ((values - quality * weights) ** 2).sum()) / weights.sum()
    width = float(t.ppf((1 + level) / 2, count - 1)) * error
    return quality - width, quality + width


def by_document(document: ArrayLike, *numbers: Floats) -> list[Floats]:
    """Return the sums of items' numbers over each document, in the order of the documents' names.

    Args:
        document: (n,) names.
        numbers: Each (*b, n).

    Returns:
        Each (*b, D).

    >>> by_document(["b", "a", "b"], np.array([1.0, 2.0, 3.0]))[0].tolist()
    [2.0, 4.0]
    """
    order = np.argsort(names := np.asarray(document), kind="stable")
    _, begins = np.unique(names[order], return_index=True)
    return [np.add.reduceat(number[..., order], begins, axis=-1) for number in numbers]


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
        # In float64, as the product sums in the dtype of its factors.
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
