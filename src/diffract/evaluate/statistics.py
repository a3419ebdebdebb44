"""What may be said of scores: tables with intervals of a quality, of a difference, and p-values.

Every quality is a ratio of sums over items, sum(value) / sum(weight). Items are drawn with replacement, value and
weight together; ``diffract.stats`` has the statistics themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from diffract.errors import RunError, printable
from diffract.evaluate.tasks import Task
from diffract.stats import Floats, bootstrap, mcnemar, ratio_of_sums, sign_flip
from diffract.tables import SUMMARY

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
        low, high = bootstrap(ratio_of_sums, value, weight, seed=seed, resamples=resamples, level=level)
        quality = float(ratio_of_sums(value, weight))
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
        low, high = bootstrap(ratio_of_sums, y - x, weight, seed=seed, resamples=resamples, level=level)
        difference = float(ratio_of_sums(y - x, weight))
        gain = difference if task.better == "higher" else -difference
        binary = bool(np.isin(np.concatenate([x, y]), (0.0, 1.0)).all())
        p = mcnemar(x, y) if binary else sign_flip(y - x, seed=seed, resamples=resamples)
        rows.append((task.name, difference, low, high, gain, p, len(x)))
    return pl.DataFrame(rows, schema=PAIRED, orient="row")


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
