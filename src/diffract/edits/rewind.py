"""Rewind: give heads, matrices, experts or tensors back the base's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

from diffract.edits.edit import TUNED, Edit, Finite, Model, Planned, Shared, Unit, describe
from diffract.edits.rule import rounded
from diffract.errors import SelectionError

if TYPE_CHECKING:
    from diffract.edits.bench import Bench
    from diffract.edits.draft import Draft
    from diffract.edits.heads import Units

Order = Literal["reference", "magnitude", "random", "greedy"]


def _names(value: object) -> object:
    """Read ``L3.h5,L7.h0`` as recipes and the command line have it."""
    return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value


Names = Annotated[
    tuple[str, ...],
    BeforeValidator(_names),
    PlainSerializer(",".join, when_used="json"),
    WithJsonSchema({"type": "string"}),
]
"""Names of heads or other units; text with commas in a recipe."""


class Rewind(Edit):
    """Give chosen attention heads of a tuned model back the base's weights."""

    name: ClassVar = "rewind"
    usage: ClassVar = "diffract rewind TUNED --to BASE --order reference --reference TEXT --fraction 0.15 -o OUT"
    arguments: ClassVar = (TUNED,)

    to: Model
    """The base."""
    fraction: Annotated[float | None, Field(ge=0, le=1)] = None
    """Share of the heads that is rewound, rounded to a whole number of them."""
    heads: Names | None = None
    """Heads by name instead, such as L3.h5,L7.h0."""
    order: Order = "magnitude"
    """Which go first: magnitude (least changed), reference (least specific), greedy (best measured) or random."""
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
    amount: Finite = 1.0
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
        """Return changes of the chosen units' parts towards the base."""
        from diffract.edits.draft import Change
        from diffract.edits.heads import find_units, places_by_tensor

        base = bench.other(self.to)
        units = find_units(bench, self.unit, self.select)
        chosen, scores = self._choose(bench, draft, units)
        parts = units.chosen(chosen, self.kv)
        changes = {
            name: Change(tuple((place, base.towards(name, self.amount)) for place in places))
            for name, places in places_by_tensor(bench, parts).items()
        }
        summary = {
            "base": describe(self.to),
            "rewound": len(chosen),
            "of": len(units.names),
            "shared parts rewound": sum(len(part.owners) > 1 for part in parts),
            "shared parts": sum(len(part.owners) > 1 for part in units.parts),
            "names": list(chosen),
        }
        return Planned(changes, summary, [{"name": n, "score": scores.get(n), "rewound": n in chosen} for n in scores])

    def _choose(self, bench: Bench, draft: Draft, units: Units) -> tuple[tuple[str, ...], dict[str, float]]:
        """Return the units that are rewound, in order, and what each was ordered by."""
        from diffract.edits.heads import find_units, least_first, shuffled

        if self.heads is not None:
            return units.known(self.heads), {}
        assert self.fraction is not None
        count = rounded(self.fraction, len(units.names))
        # Where no order decides anything none is measured: that would read all weights.
        if count in (0, len(units.names)):
            return units.names[:count], {}
        if self.order == "random":
            order = shuffled(units.names, self.seed)
            return tuple(order[::-1][:count] if self.reverse else order[:count]), {}
        # A score says where a head stands among all of the model, whichever of them may be chosen.
        every = self._scores(bench, draft, find_units(bench, self.unit, None))
        scores = {name: every[name] for name in units.names}
        order = least_first(scores)
        # Scores are changes, of which the least goes first, but for effects on quality: there the best does.
        if self.reverse != (self.order == "greedy"):
            order.reverse()
        return tuple(order[:count]), scores

    def _scores(self, bench: Bench, draft: Draft, units: Units) -> dict[str, float]:
        """Return what units are ordered by, over all of them."""
        from diffract.edits.heads import change_norms, read_scores, reference_scores

        base = bench.other(self.to)
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
