"""Rewind: give heads, matrices, experts or tensors back the base's weights."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from diffract.edits.bench import Bench, Other
from diffract.edits.draft import Apply, Change, Draft, Place
from diffract.edits.operations.interpolate import interpolate
from diffract.edits.order import Order, change_norms, least_first, read_scores, reference_scores, shuffled
from diffract.edits.parts import Shared, Unit, Units, find_units, parse_heads, places_by_tensor
from diffract.edits.step import Model, Planned, Step, both, describe
from diffract.errors import SelectionError


class Rewind(Step):
    """Rewind what changed for nothing: heads of the model become those of the base again."""

    name: ClassVar[str] = "rewind"

    to: Model
    """The base."""
    fraction: Annotated[float | None, Field(ge=0, le=1)] = None
    """Share of the heads that is rewound, rounded to a whole number of them."""
    heads: str | None = None
    """Heads by name instead, such as L3.h5,L7.h0."""
    order: Order = "magnitude"
    """Which go first: magnitude (least changed), reference (least specific to the domain), greedy (best measured), random."""
    reference: Model | None = None
    """Order reference: a checkpoint of the base tuned on reference text, or its name in the scores file."""
    scores: str | None = None
    """A heads.parquet instead of measuring changes; order greedy: a table of layer, head and effect on quality."""
    domain: str | None = None
    """What the scores file calls the model, where it speaks of several."""
    reverse: bool = False
    """Take the order from its end: a control."""
    seed: int = 0
    """Of order random."""
    amount: float = 1.0
    """How far to go back: 1 is the base, 0.5 half way."""
    unit: Unit = "head"
    """What is rewound together: head, matrix, expert or tensor."""
    select: str | None = None
    """Matrices that count, such as 'layers 8-, attn'; all by default."""
    kv: Shared = "all"
    """When shared key-value heads go: with all of their query heads, with the majority, or never."""

    @model_validator(mode="after")
    def _check(self) -> Rewind:
        if (self.heads is None) == (self.fraction is None):
            raise ValueError("expected either a fraction or a list of heads")
        if self.heads is None and self.order == "reference" and self.reference is None:
            raise ValueError("order reference needs a reference")
        if self.heads is None and self.order == "greedy" and self.scores is None:
            raise ValueError("order greedy needs scores: the effect of each head alone")
        if self.scores is not None and self.unit != "head":
            raise ValueError(f"scores are of heads, expected unit head, got {self.unit}")
        return self

    def plan(self, bench: Bench, draft: Draft) -> Planned:
        """Return what the step changes."""
        base = bench.other(self.to)
        units = find_units(bench, self.unit, self.select)
        chosen, scores = self._choose(bench, draft, base, units)
        parts = list(units.chosen(chosen, self.kv))
        changes = {}
        for name, places in places_by_tensor(bench, parts).items():
            changes[name] = Change(tuple((place, _back(base, name, self.amount)) for place in places))
        summary = {
            "base": describe(self.to),
            "rewound": len(chosen),
            "of": len(units.names),
            "shared parts rewound": sum(len(part.owners) > 1 for part in parts),
            "shared parts": sum(len(part.owners) > 1 for part in units.parts),
            "names": chosen,
        }
        return Planned(changes, summary, [{"name": n, "score": scores.get(n), "rewound": n in chosen} for n in scores])

    def _choose(self, bench: Bench, draft: Draft, base: Other, units: Units) -> tuple[list[str], dict[str, float]]:
        """Return the units that are rewound, in order, and what each was ordered by."""
        if self.heads is not None:
            return parse_heads(self.heads, units), {}
        assert self.fraction is not None
        count = int(self.fraction * len(units.names) + 0.5)
        if count in (0, len(units.names)):
            return list(units.names)[:count], {}
        if self.order == "random":
            return shuffled(units.names, self.seed)[:count], {}
        scores = self._scores(bench, draft, base, units)
        order = least_first(scores)
        if self.reverse != (self.order == "greedy"):  # the best effect comes first
            order.reverse()
        return order[:count], scores

    def _scores(self, bench: Bench, draft: Draft, base: Other, units: Units) -> dict[str, float]:
        if self.order == "greedy":
            assert self.scores is not None
            return read_scores(self.scores, units, "effect", model=self.domain)
        if self.scores is None:
            domain = change_norms(units, draft.blocks, base)
        else:
            domain = read_scores(self.scores, units, "head_delta", model=self.domain)
        if self.order == "magnitude":
            return domain
        assert self.reference is not None
        if self.scores is None:
            reference = change_norms(units, bench.other(self.reference).blocks, base)
        elif isinstance(self.reference, str):
            reference = read_scores(self.scores, units, "head_delta", model=self.reference)
        else:
            raise SelectionError("with scores, reference is the name of a model in them, expected text.")
        return reference_scores(domain, reference)


def _back(base: Other, name: str, amount: float) -> Apply:
    """Return a function that leads values back to the base's; all the way without arithmetic."""

    def apply(values: Tensor, place: Place) -> Tensor:
        origin = base.read(name, place)
        return origin if amount == 1 else interpolate(*both(values, origin), amount)

    return apply
