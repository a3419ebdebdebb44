"""Rewind: give heads, matrices, experts or tensors back the base's weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

from diffract.edits.edit import TUNED, Edit, Finite, Model, Planned, Shared, Unit, describe, words_of
from diffract.edits.rule import rounded
from diffract.errors import SelectionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffract.edits.bench import Bench, Other
    from diffract.edits.draft import Draft
    from diffract.edits.heads import Units

Order = Literal["reference", "magnitude", "random", "greedy"]


Names = Annotated[
    tuple[str, ...],
    BeforeValidator(words_of),
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

        every = units = find_units(bench, self.unit, self.select)
        if self.heads is not None:  # what else there is need not be in the base
            units = replace(units, parts=units.chosen(units.known(self.heads), self.kv))
        # A score says where a head stands among all of the model, whichever of them may be chosen.
        scored = units if self.order == "magnitude" and self.scores is None else find_units(bench, self.unit, None)
        compared = self.heads is None and self.order == "reference" and self.scores is None
        asked = {part.tensor for part in (scored if compared else units).parts}
        named = self.unit == "head" or self.heads is not None or self.select is not None
        references = [self.to] if self.reference is None or not compared else [self.to, self.reference]
        # What was named must be there, of all tensors only those of common layers.
        base, *others = bench.meet(references, asked, chosen=named)
        units = units.shared_with(base)
        scored = scored.shared_with(base) if self.scores is None else scored
        chosen, scores = self._choose(units, lambda: self._scores(draft, scored, base, *others))
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
            "shared parts": sum(len(part.owners) > 1 for part in every.parts),
            "names": list(chosen),
        }
        return Planned(changes, summary, [{"name": n, "score": scores.get(n), "rewound": n in chosen} for n in scores])

    def _choose(
        self, units: Units, measure: Callable[[], dict[str, float]]
    ) -> tuple[tuple[str, ...], dict[str, float]]:
        """Return the units that are rewound, in order, and what each was ordered by, which is measured if need be."""
        from diffract.edits.heads import least_first, shuffled

        if self.heads is not None:
            return tuple(name for name in self.heads if name in units.names), {}
        assert self.fraction is not None
        count = rounded(self.fraction, len(units.names))
        # Where no order decides anything none is measured: that would read all weights.
        if count in (0, len(units.names)):
            return units.names[:count], {}
        if self.order == "random":
            order = shuffled(units.names, self.seed)
            return tuple(order[::-1][:count] if self.reverse else order[:count]), {}
        every = measure()
        scores = {name: every[name] for name in units.names}
        order = least_first(scores)
        # Scores are changes, of which the least goes first, but for effects on quality: there the best does.
        if self.reverse != (self.order == "greedy"):
            order.reverse()
        return tuple(order[:count]), scores

    def _scores(self, draft: Draft, units: Units, *others: Other) -> dict[str, float]:
        """Return what units are ordered by, over all of them: changes against the base, and the reference's."""
        from diffract.edits.heads import change_norms, read_scores, reference_scores

        if self.order == "greedy":
            assert self.scores is not None
            return read_scores(self.scores, units, "effect", model=self.domain)
        if self.scores is None:
            domain = change_norms(units, draft.blocks, others[0])
        else:
            domain = read_scores(self.scores, units, "head_delta", model=self.domain)
        if self.order == "magnitude":
            return domain
        assert self.reference is not None
        if self.scores is None:
            reference = change_norms(units, others[1].blocks, others[0])
        elif isinstance(self.reference, str):
            reference = read_scores(self.scores, units, "head_delta", model=self.reference)
        else:
            raise SelectionError("with scores, reference is the name of a model in them, expected text.")
        return reference_scores(domain, reference)
