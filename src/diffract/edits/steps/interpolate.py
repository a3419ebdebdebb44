"""Interpolate: walk from the model to another one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from diffract.edits.bench import Bench, Other
from diffract.edits.draft import Apply, Change, Draft, Place
from diffract.edits.entrywise import weighted_places
from diffract.edits.operations.interpolate import interpolate
from diffract.edits.operations.slerp import angle, slerp
from diffract.edits.step import Model, Planned, Step, both, describe

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Interpolate(Step):
    """Interpolate between two checkpoints: (1 - a) of the model and a of the other."""

    name: ClassVar[str] = "interpolate"

    other: Annotated[Model, Field(alias="with")]
    """The checkpoint at a = 1."""
    at: Finite
    """The weight a of the other; it may leave 0 to 1."""
    groups: dict[str, Finite] = Field(default_factory=dict)
    """Other weights for some matrices by selection, such as {'layers 0-7': 0.3, 'mlp': 0.8}; the last that fits counts."""
    method: Literal["linear", "slerp"] = "linear"
    """linear, or slerp: along the arc between two tensors."""
    select: str | None = None
    """Matrices that move, such as 'layers 8-, attn'; every tensor by default."""

    def plan(self, bench: Bench, draft: Draft) -> Planned:
        """Return what the step changes."""
        other = bench.other(self.other)
        changes = {}
        for name, parts in weighted_places(bench, self.select, self.at, self.groups).items():
            make = _straight if self.method == "linear" else _arc(draft, other, name)
            moved = tuple((place, make(other, name, at)) for place, at in parts if at != 0)
            if moved:
                changes[name] = Change(moved)
        return Planned(changes, {"with": describe(self.other), "tensors moved": len(changes)})


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
