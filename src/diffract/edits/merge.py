"""Merge: one checkpoint of several that were tuned from one base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from diffract.edits.bench import Bench, Other, Planned, flat, matrix_changes, together, weighted_places
from diffract.edits.draft import Apply, Change, Draft, Place
from diffract.edits.interpolate import arc
from diffract.edits.mixing import (
    dare,
    elect_and_merge,
    linear,
    magnitude_threshold,
    seeded,
    task_arithmetic,
    ties,
    weighted_sum,
)
from diffract.edits.settings import OF_MATRICES, Merge, describe
from diffract.edits.spectral_merges import iso_c, tsv_merge
from diffract.matrices import Matrix

MATRIX_MERGES: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {"tsv": tsv_merge, "iso-c": iso_c}


def plan_merge(step: Merge, bench: Bench, draft: Draft) -> Planned:
    """Return what the step changes."""
    mix = Mix(step, draft, None if step.base is None else bench.other(step.base), [
        bench.other(reference) for reference in step.models.values()
    ])  # fmt: skip
    moved = weighted_places(bench, step.select, 1.0, {})
    changes = {name: Change(tuple((p, mix.apply(name)) for p, _ in parts)) for name, parts in moved.items()}
    if step.method in OF_MATRICES:
        kept = bench.matrices(step.select, heads=False)
        changes |= matrix_changes(bench, kept, mix.of_matrix)
    models = {step.called: bench.checkpoint.reference}
    models |= {name: describe(reference) for name, reference in step.models.items()}
    return Planned(changes, {"method": step.method, "models": models, "tensors": len(changes)})


class Mix:
    """Computes merged values of parts of tensors; what needs whole tensors is measured when it is first needed."""

    def __init__(self, step: Merge, draft: Draft, base: Other | None, others: Sequence[Other]) -> None:
        self.step, self.draft, self.base, self.others = step, draft, base, others
        self._known: dict[str, list[float]] = {}

    def apply(self, name: str) -> Apply:
        """Return what computes parts of a tensor."""
        make: Mapping[str, Callable[[str], Apply]] = {
            "linear": self._linear,
            "slerp": self._slerp,
            "task-arithmetic": self._task_arithmetic,
            "dare": partial(self._from_changes, self._dare),
            "ties": self._ties,
            "dare-ties": partial(self._from_changes, self._dare_ties),
        }
        return make.get(self.step.method, partial(self._from_changes, self._mean))(name)

    def of_matrix(self, values: Tensor, matrix: Matrix, place: Place) -> Tensor:
        """Return one matrix merged by a method of matrices."""
        base, *tuned = map(flat, self._all(matrix.tensor, values, place))
        merged = MATRIX_MERGES[self.step.method]([w - base for w in tuned])
        return (base + self.step.scale * merged).to(base.dtype)

    def _linear(self, name: str) -> Apply:
        shares = self.step.shares
        return lambda values, place: linear(together(values, *self._read(name, place)), shares)

    def _slerp(self, name: str) -> Apply:
        (other,), (one, two) = self.others, self.step.shares
        return arc(self.draft, other, name)(two / (one + two))

    def _task_arithmetic(self, name: str) -> Apply:
        weights = [self.step.scale * share for share in self.step.shares]

        def apply(values: Tensor, place: Place) -> Tensor:
            base, *tuned = self._all(name, values, place)
            return task_arithmetic(base, tuned, weights)

        return apply

    def _ties(self, name: str) -> Apply:
        def apply(values: Tensor, place: Place) -> Tensor:
            base, *tuned = self._all(name, values, place)
            return ties(base, tuned, self._thresholds(name), self.step.shares, self.step.scale)

        return apply

    def _from_changes(self, merge: Callable[[str, Place, list[Tensor]], Tensor], name: str) -> Apply:
        """Return base + scale times what a method makes of the changes."""

        def apply(values: Tensor, place: Place) -> Tensor:
            base, *tuned = self._all(name, values, place)
            return torch.add(base, merge(name, place, [w - base for w in tuned]), alpha=self.step.scale)

        return apply

    def _mean(self, name: str, place: Place, deltas: list[Tensor]) -> Tensor:
        return linear(deltas, [1.0] * len(deltas))

    def _dare(self, name: str, place: Place, deltas: list[Tensor]) -> Tensor:
        return weighted_sum(self._dropped(name, place, deltas), self.step.shares)

    def _dare_ties(self, name: str, place: Place, deltas: list[Tensor]) -> Tensor:
        return elect_and_merge(self._dropped(name, place, deltas), self.step.shares)

    def _dropped(self, name: str, place: Place, deltas: list[Tensor]) -> list[Tensor]:
        models = (self.step.called, *self.step.models)
        where = str([(span.start, span.stop) for span in place])
        return [
            dare(delta, self.step.drop, seeded(self.step.seed, model, name, where, device=delta.device))
            for model, delta in zip(models, deltas, strict=True)
        ]

    def _thresholds(self, name: str) -> list[float]:
        """Return the least magnitude that each model's change keeps; over the whole tensor, measured once."""
        if name not in self._known:
            self._known[name] = [self._threshold(name, i) for i in range(1 + len(self.others))]
        return self._known[name]

    def _threshold(self, name: str, number: int) -> float:
        assert self.base is not None
        base, source = self.base, self.draft if number == 0 else self.others[number - 1]
        entries = self.draft.checkpoint.info(name).entries

        def deltas() -> Iterator[Tensor]:
            for rows, block in source.blocks(name):
                tuned, origin = together(block, base.block(name, rows))
                yield tuned - origin

        return magnitude_threshold(deltas, max(1, round(self.step.density * entries)))

    def _all(self, name: str, values: Tensor, place: Place) -> tuple[Tensor, ...]:
        """Return a part in the base, in the model, and in the others."""
        assert self.base is not None
        return together(self.base.read(name, place), values, *self._read(name, place))

    def _read(self, name: str, place: Place) -> list[Tensor]:
        return [other.read(name, place) for other in self.others]
