"""Merge: one checkpoint of several that were tuned from one base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from diffract.edits.edit import Argument, Edit, Finite, Model, Planned, describe
from diffract.edits.interpolate import arc
from diffract.errors import RecipeError, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from diffract.edits.bench import Bench, Other
    from diffract.edits.draft import Apply, Draft, Place
    from diffract.matrices import Matrix

Method = Literal["linear", "slerp", "task-arithmetic", "dare", "ties", "dare-ties", "tsv", "iso-c"]

WITHOUT_BASE = ("linear", "slerp")
"""Merges that need no common base."""

OF_MATRICES = ("tsv", "iso-c")
"""Merges that are defined for matrices; other tensors get the mean change."""

WITH_ELECTION = ("ties", "dare-ties")
"""Merges in which models vote on signs."""


class Merge(Edit):
    """Merge the model with others: their mean, or their changes against a common base."""

    name: ClassVar = "merge"
    usage: ClassVar = "diffract merge BASE math=PATH code=PATH --method ties -o OUT"
    arguments: ClassVar = (
        Argument("models", "[BASE] NAME=MODEL...", "Their common base, and the checkpoints to merge.", many=True),
    )
    not_options: ClassVar = ("models", "base", "called")

    models: Annotated[dict[str, Model], Field(min_length=1)]
    """The others, by name."""
    base: Model | None = None
    """What all were tuned from; linear and slerp need none."""
    called: str = "model"
    """Name of the model that is edited, for weights."""
    method: Method = "task-arithmetic"
    """linear, slerp, task-arithmetic, dare, ties, dare-ties, tsv or iso-c."""
    weights: dict[str, Finite] = Field(default_factory=dict)
    """Weight of each model by name; 1 where nothing is said. linear and slerp divide by their sum."""
    scale: Finite = 1.0
    """What the merged change is multiplied with; linear and slerp have none."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Of ties: share of each change's entries that is kept, the largest."""
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of dare and dare-ties: probability with which an entry of a change is dropped."""
    seed: int = 0
    """Of dare and dare-ties."""
    select: str | None = None
    """Matrices that are merged, such as 'layers 8-, attn'; every tensor by default."""

    @model_validator(mode="after")
    def _check(self) -> Merge:
        names = (self.called, *self.models)
        if self.called in self.models:
            raise ValueError(f"two models are called {self.called!r}")
        if strange := [name for name in self.weights if name not in names]:
            raise ValueError(f"weights: no model is called {strange[0]!r}, expected some of {', '.join(names)}")
        if self.base is None and self.method not in WITHOUT_BASE:
            raise ValueError(f"method {self.method} needs a base")
        if self.method == "slerp" and len(self.models) > 1:
            raise ValueError(f"slerp goes between two models, got {len(names)}")
        if self.method in WITHOUT_BASE and self.scale != 1.0:
            raise ValueError(f"method {self.method} knows no scale: it mixes models, not changes; weights are theirs")
        if self.method in OF_MATRICES and self.weights:
            raise ValueError(f"method {self.method} knows no weights; scale is the weight of all")
        if self.method in WITH_ELECTION and min(self.shares) <= 0:
            raise ValueError(f"method {self.method} expects weights above zero")
        if self.method in WITHOUT_BASE and sum(self.shares) == 0:
            raise ValueError("the weights sum to 0")
        return self

    @property
    def shares(self) -> list[float]:
        """Weights in the order of the models, the edited one first."""
        return [self.weights.get(name, 1.0) for name in (self.called, *self.models)]

    @classmethod
    def as_recipe(cls, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Sort out a base without a name, the first checkpoint, which is edited, and the others."""
        given = arguments["models"]
        base = [text for text in given if "=" not in text]
        named = [tuple(text.split("=", 1)) for text in given if "=" in text]
        if len(base) > 1 or len(named) < 2:
            raise RecipeError(
                f"merge: expected at most one base and two or more NAME=MODEL, got {printable(' '.join(given))}."
            )
        if len(dict(named)) < len(named):
            raise RecipeError("merge: two checkpoints have one name. Name them apart.")
        (first, model), *others = named
        settings = {"called": first, "models": dict(others), **({"base": base[0]} if base else {}), **options}
        return {"model": model, "steps": [{cls.name: settings}]}

    def plan(self, bench: Bench, draft: Draft) -> Planned:
        """Return changes of every tensor, or of the selected matrices, to what the models come to together."""
        from diffract.edits.draft import Change, matrix_changes
        from diffract.edits.heads import weighted_places

        asked = weighted_places(bench, self.select, weight=1.0, groups={})
        references = [*self.models.values(), *([] if self.base is None else [self.base])]
        found = bench.meet(references, asked, chosen=self.select is not None)
        others = found[: len(self.models)]
        mix = Mix(self, draft, base=None if self.base is None else found[-1], others=others)
        changes = {}
        for name, parts in asked.items():
            moved = [there for place, _ in parts if (there := others[0].shared(name, place)) is not None]
            if moved:
                changes[name] = Change(tuple((place, mix.apply(name)) for place in moved))
        if self.method in OF_MATRICES:
            matrices = others[0].shared_matrices(bench.matrices(self.select, heads=False))
            changes |= matrix_changes(draft, matrices, mix.of_matrix)
        models = {self.called: bench.checkpoint.reference}
        models |= {name: describe(reference) for name, reference in self.models.items()}
        return Planned(changes, {"method": self.method, "models": models, "tensors": len(changes)})


@dataclass
class Mix:
    """Computes merged values of parts of tensors; what needs whole tensors is measured when it is first needed.

    Attributes:
        step: How models are merged.
        draft: The model that is edited.
        base: What all were tuned from.
        others: The other models.
        thresholds: By tensor, the least magnitude that each model's change keeps.
    """

    step: Merge
    draft: Draft
    base: Other | None
    others: list[Other]
    thresholds: dict[str, list[float]] = field(default_factory=dict)

    def apply(self, name: str) -> Apply:
        """Return what computes parts of a tensor."""
        import torch

        from diffract.edits import mixing
        from diffract.edits.draft import together

        # Methods differ in what they need: models alone, the base too, changes, or thresholds over whole tensors.
        step, shares = self.step, self.step.shares
        if step.method == "slerp":
            (other,), (one, two) = self.others, shares
            return other.towards(name, two / (one + two), arc(self.draft, other, name))

        def merged(values: Tensor, place: Place) -> Tensor:
            if step.method == "linear":
                return mixing.linear(together(values, *self._read(name, place)), shares)
            base, *tuned = self._all(name, values, place)
            if step.method == "task-arithmetic":
                return mixing.task_arithmetic(base, tuned, [step.scale * share for share in shares])
            if step.method == "ties":
                if name not in self.thresholds:  # which are of the whole tensor, and this is a block of it
                    self.thresholds[name] = [self._threshold(name, source) for source in (self.draft, *self.others)]
                return mixing.ties(base, tuned, thresholds=self.thresholds[name], weights=shares, scale=step.scale)
            deltas = [w - base for w in tuned]
            if step.method == "dare":
                change = mixing.weighted_sum(self._dropped(name, place, deltas), shares)
            elif step.method == "dare-ties":
                change = mixing.elect_and_merge(self._dropped(name, place, deltas), shares)
            else:  # a merge of matrices has no say in vectors
                change = mixing.linear(deltas, [1.0] * len(deltas))
            return torch.add(base, change, alpha=step.scale)

        return merged

    def of_matrix(self, values: Tensor, matrix: Matrix, place: Place) -> Tensor:
        """Return one matrix merged by a method of matrices."""
        from diffract.edits.draft import flat
        from diffract.edits.spectral_merges import iso_c, tsv_merge

        base, *tuned = map(flat, self._all(matrix.tensor, values, place))
        merge = tsv_merge if self.step.method == "tsv" else iso_c
        return (base + self.step.scale * merge([w - base for w in tuned])).to(base.dtype)

    def _dropped(self, name: str, place: Place, deltas: list[Tensor]) -> list[Tensor]:
        """Drop entries at random; seeds follow from model, tensor and place: the order of work plays no part."""
        from diffract.edits.mixing import dare, seeded

        models = (self.step.called, *self.step.models)
        where = str([(span.start, span.stop) for span in place])
        return [
            dare(delta, self.step.drop, seeded(self.step.seed, model, name, where, device=delta.device))
            for model, delta in zip(models, deltas, strict=True)
        ]

    def _threshold(self, name: str, source: Draft | Other) -> float:
        """Return the least magnitude that a model's change keeps."""
        from math import prod

        from diffract.edits.mixing import magnitude_threshold

        assert self.base is not None
        base, shape = self.base, self.draft.checkpoint.info(name).shape
        entries = prod((base.rows[name], *shape[1:]) if name in base.rows else shape)

        def deltas() -> Iterator[Tensor]:
            for _, tuned, origin in base.beside(name, source.blocks(name)):
                yield tuned - origin

        return magnitude_threshold(deltas, max(1, round(self.step.density * entries)))

    def _all(self, name: str, values: Tensor, place: Place) -> tuple[Tensor, ...]:
        """Return a part in the base, in the model, and in the others."""
        from diffract.edits.draft import together

        assert self.base is not None
        return together(self.base.read(name, place), values, *self._read(name, place))

    def _read(self, name: str, place: Place) -> list[Tensor]:
        return [other.read(name, place) for other in self.others]
