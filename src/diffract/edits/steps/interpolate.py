"""Interpolate: walk from the model to another one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch import Tensor

from diffract.edits.bench import Bench, Other
from diffract.edits.draft import Apply, Change, Draft, Place
from diffract.edits.entrywise import weighted_places
from diffract.edits.operations.interpolate import interpolate
from diffract.edits.operations.slerp import angle, slerp
from diffract.edits.planning import Planned, both
from diffract.edits.settings import Interpolate, describe


def plan_interpolate(step: Interpolate, bench: Bench, draft: Draft) -> Planned:
    """Return what the step changes."""
    other = bench.other(step.other)
    changes = {}
    for name, parts in weighted_places(bench, step.select, step.at, step.groups).items():
        make = _straight if step.method == "linear" else _arc(draft, other, name)
        moved = tuple((place, make(other, name, at)) for place, at in parts if at != 0)
        if moved:
            changes[name] = Change(moved)
    return Planned(changes, {"with": describe(step.other), "tensors moved": len(changes)})


def _straight(other: Other, name: str, at: float) -> Apply:
    def apply(values: Tensor, place: Place) -> Tensor:
        end = other.read(name, place)
        return end if at == 1 else interpolate(*both(values, end), at)

    return apply


def _arc(draft: Draft, other: Other, name: str) -> Callable[[Other, str, float], Apply]:
    """Return what ``_straight`` is, along the arc between two whole tensors, whose angle is measured when needed."""

    @cache
    def theta() -> float:
        return angle(both(block, other.block(name, rows)) for rows, block in draft.blocks(name))

    def make(other: Other, name: str, at: float) -> Apply:
        def apply(values: Tensor, place: Place) -> Tensor:
            end = other.read(name, place)
            return end if at == 1 else slerp(*both(values, end), at, theta())

        return apply

    return make
