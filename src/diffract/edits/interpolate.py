"""Interpolate: walk from the model to another one, in a line or along an arc."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from diffract.edits.edit import EDITED, Argument, Edit, Finite, Model, Planned, describe

if TYPE_CHECKING:
    from diffract.edits.bench import Bench, Between, Other
    from diffract.edits.draft import Draft


class Interpolate(Edit):
    """Interpolate between two checkpoints: (1 - a) of the model and a of the other."""

    name: ClassVar = "interpolate"
    usage: ClassVar = "diffract interpolate MODEL OTHER --at 0.5 -o OUT"
    arguments: ClassVar = (EDITED, Argument("other", "OTHER", "The checkpoint at a = 1."))
    not_options: ClassVar = ("other",)

    other: Annotated[Model, Field(alias="with")]
    """The checkpoint at a = 1."""
    at: Finite
    """The weight a of the other; it may leave 0 to 1."""
    groups: dict[str, Finite] = Field(default_factory=dict)
    """Other weights by selection, vectors with their matrices: {'layers 0-7': 0.3, 'mlp': 0.8}; the last counts."""
    method: Literal["linear", "slerp"] = "linear"
    """linear, or slerp: along the arc between two tensors."""
    select: str | None = None
    """Matrices that move, such as 'layers 8-, attn'; every tensor by default."""

    def plan(self, bench: Bench, draft: Draft) -> Planned:
        """Return changes of every tensor, or of the selected matrices, towards the other's."""
        from diffract.edits.draft import Change
        from diffract.edits.heads import weighted_places
        from diffract.edits.mixing import interpolate

        asked = weighted_places(bench, self.select, weight=self.at, groups=self.groups)
        (other,) = bench.meet([self.other], asked, chosen=self.select is not None)
        changes = {}
        for name, parts in asked.items():
            between = interpolate if self.method == "linear" else arc(draft, other, name)
            there = ((other.shared(name, place), at) for place, at in parts if at != 0)
            moved = tuple((place, other.towards(name, at, between)) for place, at in there if place is not None)
            if moved:
                changes[name] = Change(moved)
        return Planned(changes, {"with": describe(self.other), "tensors moved": len(changes)})


def arc(draft: Draft, other: Other, name: str) -> Between:
    """Return what goes along the arc between two whole tensors; the angle is measured once, when first needed."""
    from diffract.edits.mixing import angle, slerp

    # The angle is of whole tensors, whatever block or part is asked for first; dry runs and heads need none of it.
    @cache
    def theta() -> float:
        return angle((one, two) for _, one, two in other.beside(name, draft.blocks(name)))

    return lambda a, b, at: slerp(a, b, at, theta())
