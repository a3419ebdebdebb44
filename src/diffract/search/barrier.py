"""Barriers between models: how far quality on a path falls below the line between its ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diffract.errors import RunError, printable
from diffract.evaluate import Task

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Barrier:
    """A barrier on a path of K places.

    Attributes:
        gap: (K,) how much worse than the line between the ends each place is.
        gap_low: (K,) lower end of its interval.
        gap_high: (K,) upper end.
        height: The largest gap, at least 0: at both ends it is 0.
        low: Lower end of its interval.
        high: Upper end.
        where: The number of the place with the largest gap.
    """

    gap: Floats
    gap_low: Floats
    gap_high: Floats
    height: float
    low: float
    high: float
    where: int


def barrier(
    values: Floats, weights: Floats, at: Sequence[float], *, better: str, seed: int = 0, resamples: int = 2000,
    level: float = 0.95,
) -> Barrier:  # fmt: skip
    """Return the barrier max over a of (linear interpolation of the ends' quality - quality), positive where it is bad.

    Quality at place k is q_k = sum_i values_ki / sum_i weights_i; of bits, where lower is better, the sign is the
    opposite. The interval is that of the paired percentile bootstrap: items are drawn with replacement, for all places
    the same, and the maximum is taken anew in each draw. A maximum of noisy numbers is more often too high than too
    low, the more so the more places there are; so is the interval. That errs on the side of no connection.

    Args:
        values: (K, items), one row per place.
        weights: (items,).
        at: K places from 0 to 1, ascending, both ends among them.
        better: ``higher`` or ``lower``.
        seed: Of the draws.
        resamples: How many draws.
        level: Of the intervals.

    Source: Frankle et al. 2020 (the barrier as the highest rise above the line between the ends).
    """
    places = np.asarray(at, float)
    count = values.shape[1]
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
    found = gaps(values.sum(1) / weights.sum(), places, better)
    draws = gaps((drawn @ values.T) / (drawn @ weights)[:, None], places, better)
    tails = [(1 - level) / 2, (1 + level) / 2]
    gap_low, gap_high = np.quantile(draws, tails, axis=0)
    low, high = np.quantile(draws.max(1), tails)
    where = int(found.argmax())
    return Barrier(found, gap_low, gap_high, float(found[where]), float(low), float(high), where)


def gaps(quality: Floats, at: Floats, better: str) -> Floats:
    """Return how much worse than the line between the ends each place is, along the last axis."""
    line = (1 - at) * quality[..., :1] + at * quality[..., -1:]
    found = line - quality if better == "higher" else quality - line
    found[..., [0, -1]] = 0.0  # exactly
    return found


def stacked(frames: Sequence[pl.DataFrame], task: Task) -> tuple[Floats, Floats]:
    """Return the values of several states as rows over the same items, and the items' weights.

    Raises:
        RunError: They have other items.
    """
    own = [frame.filter(pl.col("task") == task.name).sort("item") for frame in frames]
    if any(not frame["item"].equals(own[0]["item"]) for frame in own):
        raise RunError(f"task {printable(task.name)!r}: states were scored on different items. Evaluate them again.")
    return np.stack([frame["value"].to_numpy() for frame in own]), own[0]["weight"].to_numpy()
