"""Interpolate: walk from the model to another one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

from torch import Tensor

from diffract.edits.bench import Bench, Other, Planned, both, weighted_places
from diffract.edits.draft import Apply, Change, Draft, Place
from diffract.edits.mixing import angle, interpolate, slerp
from diffract.edits.settings import Interpolate, describe

Between = Callable[[Tensor, Tensor, float], Tensor]
"""``between(a, b, at)`` lies at ``at`` of the way from a to b."""


def plan_interpolate(step: Interpolate, bench: Bench, draft: Draft) -> Planned:
    """Return what the step changes."""
    other = bench.other(step.other)
    changes = {}
    for name, parts in weighted_places(bench, step.select, step.at, step.groups).items():
        make = straight(other, name) if step.method == "linear" else arc(draft, other, name)
        moved = tuple((place, make(at)) for place, at in parts if at != 0)
        if moved:
            changes[name] = Change(moved)
    return Planned(changes, {"with": describe(step.other), "tensors moved": len(changes)})


def straight(other: Other, name: str) -> Callable[[float], Apply]:
    """Return what leads a tensor towards the other's, in a line, for each weight of the other."""
    return lambda at: partial(_moved, other, name, at, interpolate)


def arc(draft: Draft, other: Other, name: str) -> Callable[[float], Apply]:
    """Return the same along the arc between the two whole tensors, whose angle is measured when it is needed."""

    @cache
    def theta() -> float:
        return angle(both(block, other.block(name, rows)) for rows, block in draft.blocks(name))

    return lambda at: partial(_moved, other, name, at, lambda a, b, at: slerp(a, b, at, theta()))


def _moved(other: Other, name: str, at: float, between: Between, values: Tensor, place: Place) -> Tensor:
    end = other.read(name, place)
    return end if at == 1 else between(*both(values, end), at)
