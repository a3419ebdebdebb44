"""Curves from sketches: planned, built, scored on both splits, and as rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffract.search.choice import choose
from diffract.search.curves import Curve, Point, Sketch
from diffract.search.plan import SPLITS, Budget, Estimate, Plan, cost, make_plan
from diffract.search.scorer import Scorer, seconds_of
from diffract.search.setup import Stage

Rows = list[dict[str, Any]]


def planned(
    stage: Stage, sketches: Sequence[Sketch], *, ends: int, effects: int = 0, budget: Budget, dry_run: bool
) -> tuple[Plan, Estimate | None]:
    """Return what will be evaluated, and of a dry run how long it takes.

    Raises:
        SelectionError: The budget does not suffice for anything.
    """
    timed = dry_run or budget.seconds is not None
    seconds = seconds_of(stage.evaluators(None)) if timed else {}
    splits = tuple(stage.tasks)
    plan = make_plan(sketches, ends=ends, effects=effects, splits=splits, budget=budget, seconds_each=seconds)
    return plan, Estimate(plan.counts, seconds, cost(plan.counts, seconds), plan.left_out) if dry_run else None


def build(sketches: Sequence[Sketch], plan: Plan, point_of: Callable[[Sketch, float], Point]) -> list[Curve]:
    """Return the curves that a plan keeps something of.

    Args:
        sketches: Of the curves.
        plan: Which points are kept; both ends always are.
        point_of: Makes the point of a sketch at a place.
    """
    found = []
    for number, sketch in enumerate(sketches):
        inner = plan.points.get(("selection", number), ())
        if inner or len(sketch.at) == 2:
            places = [sketch.at[0], *(sketch.at[i] for i in inner), sketch.at[-1]]
            found.append(Curve(sketch, tuple(point_of(sketch, at) for at in places)))
    return found


def measure(
    scorer: Scorer, sketches: Sequence[Sketch], curves: Sequence[Curve], plan: Plan, tolerance: float | None
) -> tuple[Rows, Rows]:
    """Score curves; return rows of their points in both splits, and of what is chosen.

    The selection split is done whole before the held-out one is looked at.
    """
    for curve in curves:
        for point in curve.points:
            scorer.score("selection", point.state, _name(curve))
    chosen = choose(scorer, curves, tolerance)
    for number, sketch in enumerate(sketches):
        wanted = {sketch.at[i] for i in plan.points.get(("held-out", number), ())}
        for curve in (c for c in curves if c.sketch is sketch):
            for point in (p for p in curve.points if p.at in wanted):
                scorer.score("held-out", point.state, _name(curve))
    return list(_rows(scorer, curves)), chosen


def _rows(scorer: Scorer, curves: Sequence[Curve]) -> Iterator[dict[str, Any]]:
    for curve in curves:
        for point in curve.points:
            for split in SPLITS:
                if scorer.scored(split, point.state):
                    yield from ({**point.labels, **row} for row in scorer.rows(split, point.state))


def _name(curve: Curve) -> str:
    return " ".join(str(value) for value in curve.sketch.labels.values() if isinstance(value, str))
