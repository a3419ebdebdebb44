"""Mixtures of models: on the line between two, and on the simplex of three."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch

from diffract.edits.settings import Interpolate, Merge
from diffract.search.curves import State
from diffract.search.scorer import TUNED

BASE = "base"
"""What the base is called among the models."""


@dataclass(frozen=True)
class Mixer:
    """Makes states of the base.

    Attributes:
        models: The others by name, in memory.
        base: The base, in memory, as it is.
        scale: What mixed changes are multiplied with.
    """

    models: Mapping[str, torch.nn.Module]
    base: torch.nn.Module
    scale: float = 1.0

    def pairs(self) -> list[tuple[str, str]]:
        """Return all pairs, those of tuned models first."""
        return [*combinations(self.models, 2), *((BASE, name) for name in self.models)]

    def between(self, a: str, b: str, at: float) -> State:
        """Return (1 - at) a + at b."""
        if at == 0:
            return self.alone(a)
        if at == 1:
            return self.alone(b)
        start = () if a == BASE else (Interpolate(other=self.models[a], at=1),)
        steps = (*start, Interpolate(other=self.models[b], at=at))
        return State(_key({a: 1 - at, b: at}, 1.0), steps)

    def alone(self, name: str) -> State:
        """Return one model."""
        if name == BASE:
            return TUNED
        return State(_key({name: 1.0}, 1.0), (Interpolate(other=self.models[name], at=1),))

    def mixed(self, weights: Mapping[str, float]) -> State:
        """Return base + scale * sum of w_i (model_i - base); for scale 1 that is the mean by weights that sum to 1."""
        present = {name: weight for name, weight in weights.items() if weight > 0}
        if self.scale == 1 and len(present) == 1:
            return self.alone(next(iter(present)))
        if self.scale == 1 and len(present) == 2:
            (a, _), (b, at) = present.items()
            return self.between(a, b, at)
        step = Merge(
            models={name: self.models[name] for name in present},
            base=self.base,
            called=BASE,
            weights={BASE: 0.0, **present},
            scale=self.scale,
        )
        return State(_key(present, self.scale), (step,))


def simplex_weights(names: tuple[str, ...], grid: int) -> list[dict[str, float]]:
    """Return all weights k / grid of three models that sum to 1.

    >>> len(simplex_weights(("a", "b", "c"), 2))
    6
    """
    a, b, c = names
    return [
        {a: i / grid, b: j / grid, c: (grid - i - j) / grid}
        for i in range(grid, -1, -1)
        for j in range(grid - i, -1, -1)
    ]


def _key(weights: Mapping[str, float], scale: float) -> tuple[object, ...]:
    """Name a mixture; decimals that differ in their last bits are one."""
    return scale, tuple(sorted((name, round(weight, 9)) for name, weight in weights.items()))
