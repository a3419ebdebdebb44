"""What may be said of scores: intervals of a quality, of a difference, and p-values.

Every quality is a ratio of sums over items, sum(value) / sum(weight). Items are drawn with replacement, value and
weight together (Efron & Tibshirani 1993, chapters 6, 13: the percentile bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import binom

from diffract.errors import RunError, printable
from diffract.evaluate.tasks import Task
from diffract.tables import SUMMARY

Floats = NDArray[np.float64]

DRAWS_AT_ONCE = 1 << 22
"""Numbers that are held at a time."""

PAIRED: dict[str, Any] = {
    "task": pl.String,
    "difference": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "gain": pl.Float64,
    "p": pl.Float64,
    "items": pl.Int64,
}
"""Columns of ``paired``; ``low`` and ``high`` are of the difference."""


def summarise(
    items: pl.DataFrame, tasks: Sequence[Task], *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> pl.DataFrame:
    """Return the quality of each task with its interval by the percentile bootstrap over items.

    Args:
        items: A table of scores.
        tasks: Which, in this order.
        seed: Of the draws.
        resamples: How many draws.
        level: Of the interval.

    Raises:
        RunError: A task has no items in the table.
    """
    rows = []
    for task in tasks:
        value, weight = _columns(items, task.name)
        low, high = bootstrap(value, weight, seed=seed, resamples=resamples, level=level)
        quality = float(value.sum() / weight.sum())
        rows.append((task.name, quality, low, high, len(value), task.unit, task.better, task.chance))
    return pl.DataFrame(rows, schema=SUMMARY, orient="row")


def paired(
    a: pl.DataFrame,
    b: pl.DataFrame,
    tasks: Sequence[Task],
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> pl.DataFrame:
    """Return how much better or worse ``b`` is than ``a``, item by item.

    ``difference`` is quality of b - quality of a; ``gain`` is the same, signed so that positive is better. Its interval
    is that of the paired bootstrap: both are computed on the same drawn items. ``p`` is two-sided: McNemar's exact test
    where all values are 0 or 1, otherwise the sign-flip test of the items' differences.

    Args:
        a: Scores of the one.
        b: Scores of the other, on the same items.
        tasks: Which, in this order.
        seed: Of the draws.
        resamples: How many draws.
        level: Of the interval.

    Raises:
        RunError: A task's items are not the same in both.
    """
    rows = []
    for task in tasks:
        x, y, weight = _pairs(a, b, task.name)
        low, high = bootstrap(y - x, weight, seed=seed, resamples=resamples, level=level)
        difference = float((y - x).sum() / weight.sum())
        gain = difference if task.better == "higher" else -difference
        binary = bool(np.isin(np.concatenate([x, y]), (0.0, 1.0)).all())
        p = mcnemar(x, y) if binary else sign_flip(y - x, seed=seed, resamples=resamples)
        rows.append((task.name, difference, low, high, gain, p, len(x)))
    return pl.DataFrame(rows, schema=PAIRED, orient="row")


def bootstrap(
    value: Floats, weight: Floats, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of sum(value) / sum(weight) over items drawn with replacement.

    Args:
        value: One number for each item.
        weight: Positive, one for each item.
        seed: Of the draws.
        resamples: How many draws.
        level: Share of draws inside.

    Returns:
        Both ends. One item gives an interval without width.
    """
    ratios = _in_chunks(len(value), resamples, lambda draw, count: _drawn_ratios(value, weight, draw, count), seed)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(ratios, [tail, 1.0 - tail])
    return float(low), float(high)


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
    observed = abs(difference.sum())
    slack = 1e-12 * np.abs(difference).sum()  # sums of the same numbers in another order differ in their last bits
    sums = _in_chunks(len(difference), resamples, lambda draw, count: _flipped_sums(difference, draw, count), seed)
    return float((1 + np.count_nonzero(np.abs(sums) >= observed - slack)) / (1 + resamples))


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


def _columns(items: pl.DataFrame, name: str) -> tuple[Floats, Floats]:
    own = items.filter(pl.col("task") == name)
    if own.is_empty():
        raise RunError(f"no scores of task {printable(name)!r}. Evaluate it first.")
    return own["value"].to_numpy(), own["weight"].to_numpy()


def _pairs(a: pl.DataFrame, b: pl.DataFrame, name: str) -> tuple[Floats, Floats, Floats]:
    """Return both values and the weight of each item, in the order of a."""
    ours, theirs = (frame.filter(pl.col("task") == name).select("item", "value", "weight") for frame in (a, b))
    both = ours.join(theirs, on=["item", "weight"], how="inner", maintain_order="left", suffix="_b")
    if ours.is_empty() or not both.height == ours.height == theirs.height:
        raise RunError(
            f"task {printable(name)!r}: {ours.height} and {theirs.height} items, {both.height} of them the same; a "
            "paired comparison needs the same items. Evaluate both with the same tasks, split and limit."
        )
    return both["value"].to_numpy(), both["value_b"].to_numpy(), both["weight"].to_numpy()


def _in_chunks(size: int, resamples: int, compute: Callable[[np.random.Generator, int], Floats], seed: int) -> Floats:
    draw = np.random.default_rng(seed)
    at_once = max(1, DRAWS_AT_ONCE // max(size, 1))
    counts = [min(at_once, resamples - begun) for begun in range(0, resamples, at_once)]
    return np.concatenate([compute(draw, count) for count in counts])


def _drawn_ratios(value: Floats, weight: Floats, draw: np.random.Generator, count: int) -> Floats:
    at = draw.integers(0, len(value), size=(count, len(value)))
    return value[at].sum(axis=1) / weight[at].sum(axis=1)


def _flipped_sums(difference: Floats, draw: np.random.Generator, count: int) -> Floats:
    signs = draw.integers(0, 2, size=(count, len(difference)), dtype=np.int8)
    return (2 * signs - 1).astype(np.float64) @ difference
