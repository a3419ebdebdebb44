"""What may be said of scores: tables with intervals of a quality, of a difference, and p-values.

Every quality is a ratio of sums over items, sum(value) / sum(weight); ``diffract.stats`` has the statistics themselves.
Items may be parts of documents, which resemble each other: what is independent, and drawn, is the document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from diffract.errors import RunError, printable
from diffract.evaluate.tasks import Task
from diffract.schemas import SUMMARY
from diffract.stats import (
    Floats,
    by_document,
    difference_interval,
    mcnemar,
    quality_interval,
    ratio_of_sums,
    sign_flip,
)

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
    """Return the quality of each task with its interval (``diffract.stats.quality_interval``).

    The interval is null where a task has fewer than five documents.

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
        own = items.filter(pl.col("task") == task.name)
        if own.is_empty():
            raise RunError(f"no scores of task {printable(task.name)!r}. Evaluate it first.")
        value, weight = own["value"].to_numpy(), own["weight"].to_numpy()
        parts = documents_of(own["item"])
        low, high = quality_interval(value, weight, parts, seed=seed, resamples=resamples, level=level)
        quality = float(ratio_of_sums(value, weight))
        rows.append((task.name, quality, low, high, len(value), task.unit, task.better, task.chance))
    return pl.DataFrame(rows, schema=SUMMARY, orient="row").with_columns(pl.col("low", "high").fill_nan(None))


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
    (``diffract.stats.difference_interval``) is null where a task has fewer than five documents. ``p`` is two-sided:
    McNemar's exact test where all values are 0 or 1 and every item is a document of its own, otherwise the sign-flip
    test of the documents' differences.

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
        x, y, weight, parts = _pairs(a, b, task.name)
        low, high = difference_interval(x, y, weight, parts, seed=seed, resamples=resamples, level=level)
        difference = float(ratio_of_sums(y - x, weight))
        gain = difference if task.better == "higher" else -difference
        (of_documents,) = by_document(parts, y - x)
        # McNemar's test counts items; where documents hold several, their signs are flipped together instead.
        binary = len(of_documents) == len(x) and bool(np.isin(np.concatenate([x, y]), (0.0, 1.0)).all())
        p = mcnemar(x, y) if binary else sign_flip(of_documents, seed=seed, resamples=resamples)
        rows.append((task.name, difference, low, high, gain, p, len(x)))
    return pl.DataFrame(rows, schema=PAIRED, orient="row").with_columns(pl.col("low", "high").fill_nan(None))


def documents_of(items: pl.Series) -> npt.NDArray[np.str_]:
    """Return the document that each item is a part of, by the items' names: ``DOCUMENT:PART``, or a document itself."""
    return items.str.replace(r":[^:]*$", "").to_numpy().astype(np.str_)


def _pairs(a: pl.DataFrame, b: pl.DataFrame, name: str) -> tuple[Floats, Floats, Floats, npt.NDArray[np.str_]]:
    """Return both values, the weight and the document of each item, in the order of a."""
    ours, theirs = (frame.filter(pl.col("task") == name).select("item", "value", "weight") for frame in (a, b))
    both = ours.join(theirs, on=["item", "weight"], how="inner", maintain_order="left", suffix="_b")
    if ours.is_empty() or not both.height == ours.height == theirs.height:
        raise RunError(
            f"task {printable(name)!r}: {ours.height} and {theirs.height} items, {both.height} of them the same; a "
            "paired comparison needs the same items. Evaluate both with the same tasks, split and limit."
        )
    x, y, weight = (both[column].to_numpy() for column in ("value", "value_b", "weight"))
    return x, y, weight, documents_of(both["item"])
