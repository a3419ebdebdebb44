"""States with heads rewound, and the curves along which more and more are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffract.edits.operations.rules import rounded
from diffract.edits.parts import Units
from diffract.edits.settings import Interpolate, Rewind, Shared
from diffract.search.curves import Point, Sketch, State
from diffract.search.orders import HeadOrder, Scores, arrange, variants
from diffract.search.scorer import TUNED


@dataclass(frozen=True)
class Rewinder:
    """Makes states of a tuned model.

    Attributes:
        base: What heads go back to, in memory.
        units: The heads.
        kv: When shared key-value heads go.
    """

    base: torch.nn.Module
    units: Units
    kv: Shared

    def state(self, names: Collection[str]) -> State:
        """Return the model with these heads rewound."""
        if not names:
            return TUNED
        return State(frozenset(names), (Rewind(to=self.base, heads=",".join(names), kv=self.kv),))

    def whole(self) -> State:
        """Return the base itself."""
        return State("base", (Interpolate(other=self.base, at=1),))

    def point(self, sketch: Sketch, at: float, ordered: Sequence[str]) -> Point:
        """Return a point of a curve."""
        names = list(ordered[: rounded(at, len(self.units.names))])
        labels = {**sketch.labels, "fraction": at, "count": len(names), "heads": names}
        return Point(at, self.state(names), labels)


def sketches_of(orders: Sequence[HeadOrder], seeds: int, at: tuple[float, ...]) -> list[Sketch]:
    """Return the curves of orders; random ones and reversed ones are controls."""
    return [
        Sketch(
            {"order": order, "seed": seed, "reverse": reverse},
            at,
            control=reverse or order == "random",
            group="points of reversed curves" if reverse else "points of curves",
            needs_effects=order == "greedy",
        )
        for order, seed, reverse in variants(orders, seeds)
    ]


def in_order(sketch: Sketch, units: Units, scores: Mapping[str, Scores]) -> tuple[str, ...]:
    """Return all heads in a curve's order."""
    labels: Mapping[str, Any] = sketch.labels
    return arrange(labels["order"], labels["seed"], labels["reverse"], units.names, scores.get(labels["order"])).names
