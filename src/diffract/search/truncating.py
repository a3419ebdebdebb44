"""States with the change truncated, and the curves along which less and less of it is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from diffract.edits.settings import Interpolate, Merge, Settings, Truncate
from diffract.errors import SelectionError, printable, suggest
from diffract.search.change import Kept, MatrixChange, kept_by, kept_by_chance, share_for_bytes
from diffract.search.curves import Point, Sketch, State
from diffract.search.scorer import TUNED

TruncationRule = Literal[
    "drop",
    "energy",
    "donoho-gavish",
    "mp-edge",
    "tail",
    "random",
    "random-energy",
    "dare-energy",
    "dare-bytes",
]
RULES: tuple[TruncationRule, ...] = get_args(TruncationRule)

SINGLE: tuple[TruncationRule, ...] = ("donoho-gavish", "mp-edge")
"""Rules without a number: one state each."""

BY_CHANCE: tuple[TruncationRule, ...] = ("random", "random-energy", "dare-energy", "dare-bytes")
CONTROLS: tuple[TruncationRule, ...] = ("tail", *BY_CHANCE)

ALL_MATRICES = "*"
"""A selection: every matrix, and no vector."""


def parse_rules(given: str | Sequence[str] | None) -> tuple[TruncationRule, ...]:
    """Read names of rules, separated by commas; all for nothing.

    Raises:
        SelectionError: One is unknown.
    """
    words = RULES if given is None else given.split(",") if isinstance(given, str) else given
    wanted = [word.strip() for word in words if word.strip()]
    for word in wanted:
        if word not in RULES:
            near = suggest(word, RULES) or f" Known: {', '.join(RULES)}."
            raise SelectionError(f"unknown rule {printable(word)!r}.{near}")
    if not wanted:
        raise SelectionError(f"expected rules, got none. Known: {', '.join(RULES)}.")
    return tuple(rule for rule in RULES if rule in wanted)


def truncation_sketches(rules: Sequence[TruncationRule], seeds: int, at: tuple[float, ...]) -> list[Sketch]:
    """Return the curves of rules; those by chance once for each seed."""
    return [
        Sketch(
            {"rule": rule, "seed": seed},
            (0.0, 1.0) if rule in SINGLE else at,
            control=rule in CONTROLS,
            group="points of controls" if rule in CONTROLS else "points of curves",
        )
        for rule in rules
        for seed in range(seeds if rule in BY_CHANCE else 1)
    ]


@dataclass(frozen=True)
class Truncater:
    """Makes states of a tuned model.

    Attributes:
        base: What it was tuned from, in memory.
        changes: Of its matrices.
    """

    base: torch.nn.Module
    changes: Sequence[MatrixChange]

    def whole(self) -> State:
        """Return the base itself, vectors included."""
        return State("base", (Interpolate(other=self.base, at=1),))

    def point(self, sketch: Sketch, at: float) -> Point:
        """Return a point of a curve."""
        step, found, drop = self._made(sketch.labels["rule"], at, sketch.labels["seed"])
        labels = {**sketch.labels, "fraction": at, **asdict(found), "drop": drop}
        return Point(at, _state(step, found), labels)

    def _made(self, rule: TruncationRule, at: float, seed: int) -> tuple[Settings, Kept, float | None]:
        """Return the step, what it keeps, and DARE's probability.

        Controls keep as many directions, as much energy or as many bytes as ``drop`` does at this fraction; of single
        rules the one state is at 1.
        """
        if rule in SINGLE and at == 1:
            return self._truncation(Truncate(base=self.base, rule=rule))  # pyright: ignore[reportArgumentType]
        plain = Truncate(base=self.base, drop=at)
        if at in (0, 1) or rule in ("drop", "random"):
            chance: dict[str, Any] = {"side": "random", "seed": seed} if rule == "random" and 0 < at < 1 else {}
            return self._truncation(plain.model_copy(update=chance))
        if rule == "tail":
            return self._truncation(Truncate(base=self.base, band=(at, 1.0)))
        if rule == "energy":
            return self._truncation(Truncate(base=self.base, energy=1 - at))
        like = kept_by(plain, self.changes)
        if rule == "random-energy":
            share = min(1.0, max(like.energy, 1e-12))
            return self._truncation(Truncate(base=self.base, energy=share, side="random", seed=seed))
        share = like.energy if rule == "dare-energy" else share_for_bytes(like.bytes, self.changes)
        return self._dare(share, seed)

    def _truncation(self, step: Truncate) -> tuple[Settings, Kept, None]:
        return step, kept_by(step, self.changes), None

    def _dare(self, share: float, seed: int) -> tuple[Settings, Kept, float]:
        """Keep entries of D by chance, enlarged by 1 / share; all matrices, no vectors, as a truncation does."""
        drop = min(1 - share, 1 - 1e-9)
        step = Merge(
            models={"base": self.base},
            base=self.base,
            method="dare",
            weights={"base": 0.0},
            drop=drop,
            seed=seed,
            select=ALL_MATRICES,
        )
        return step, kept_by_chance(share, self.changes), drop


def _state(step: Settings, found: Kept) -> State:
    """Name a state by its settings; all and nothing are the same whatever the rule."""
    if found.energy == 1 and isinstance(step, Truncate) and step.drop == 0:
        return TUNED
    told = {name: getattr(step, name) for name in step.model_fields_set if name not in ("base", "models")}
    return State((step.name, str(sorted(told.items()))), (step,))
