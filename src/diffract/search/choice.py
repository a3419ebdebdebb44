"""Which point of a curve is chosen: on the selection split, reported on the held-out one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from diffract.corpora import Split
from diffract.search.curves import Curve, Point
from diffract.search.plan import SPLITS
from diffract.search.scorer import Scorer

Which = Literal["best", "without-loss"]

NUMBERS = ("quality", "low", "high", "gain", "gain_low", "gain_high", "p")
"""What is said of a chosen point in each split."""


def best(points: Sequence[Point], gains: Sequence[Mapping[str, Any]]) -> Point:
    """Return the point of the highest gain, of equal ones the nearest to the tuned model; that one gains 0."""
    pairs = zip(points, gains, strict=True)
    return max(pairs, key=lambda pair: (pair[1]["gain"], -pair[0].at))[0]


def without_loss(points: Sequence[Point], gains: Sequence[Mapping[str, Any]], tolerance: float | None) -> Point:
    """Return the furthest point without loss; the tuned model has none.

    Without a tolerance that is: no loss is shown, the paired interval of the gain reaches 0 (its upper end is not
    below). With a tolerance t: a loss of more than t is excluded, the interval's lower end is at least -t.
    """
    pairs = zip(points, gains, strict=True)
    return max((p for p, g in pairs if p.at == 0 or is_without_loss(g, tolerance)), key=lambda p: p.at)


def is_without_loss(gain: Mapping[str, Any], tolerance: float | None) -> bool:
    """Whether a gain with its interval counts as no loss."""
    return gain["gain_high"] >= 0 if tolerance is None else gain["gain_low"] >= -tolerance


def choose(scorer: Scorer, curves: Iterable[Curve], tolerance: float | None) -> list[dict[str, Any]]:
    """Return two rows for each curve: its best point and the furthest without loss, with numbers of both splits.

    The task that is first decides. What is chosen is scored on the held-out split, if it was not yet.
    """
    found = []
    for curve in curves:
        gains = [of_first(scorer, "selection", point) for point in curve.points]
        chosen: dict[Which, Point] = {
            "best": best(curve.points, gains),
            "without-loss": without_loss(curve.points, gains, tolerance),
        }
        found += [chosen_row(scorer, which, point, curve) for which, point in chosen.items()]
    return found


def chosen_row(scorer: Scorer, which: Which, point: Point, curve: Curve) -> dict[str, Any]:
    """Return what both splits say of a point."""
    row = {**point.labels, "which": which, "state": scorer.number(point.state), "control": curve.sketch.control}
    for split in SPLITS:
        numbers, prefix = of_first(scorer, split, point), split.replace("-", "_")
        row |= {f"{prefix}_{name}": numbers[name] for name in NUMBERS}
    return {"task": scorer.first, **row}


def of_first(scorer: Scorer, split: Split, point: Point) -> dict[str, Any]:
    """Return the row of the task that decides."""
    return scorer.rows(split, point.state, "held-out")[0]


def winner(rows: Iterable[Mapping[str, Any]], which: str, far: Callable[[Mapping[str, Any]], float]) -> Any:
    """Return the row that is chosen of all curves that are no controls, by the selection split; the first of equals.

    ``best`` has the highest gain, ``without-loss`` goes furthest.
    """
    measure = far if which == "without-loss" else lambda row: row["selection_gain"]
    return max((row for row in rows if row["which"] == which and not row["control"]), key=measure, default=None)
