"""``diffract search truncate``: how much of a change is needed, by which rule, and against what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Literal, get_args

import polars as pl
import torch
from torch import Tensor

from diffract.edits import Interpolate, Merge, Truncate
from diffract.edits.bench import Bench, Other
from diffract.edits.directions import kept, random_order
from diffract.edits.draft import flat, place_of
from diffract.edits.live import threads_of_matrices
from diffract.edits.mixing import seeded
from diffract.edits.spectral_edits import change_sigmas
from diffract.errors import SelectionError, choose
from diffract.schemas import ITEMS, ON_TRUNCATION, QUALITY, TRUNCATION_CHOICE
from diffract.search.plan import UNCHANGED, Point, SearchCurve
from diffract.search.run import QualitySearch
from diffract.search.scorer import Rows, Scorer
from diffract.search.stage import Stage
from diffract.tables import frame

PLACE_BYTES = 4
"""Bytes that say where a single entry is in its matrix."""


@dataclass(frozen=True)
class MatrixChange:
    """The change of one matrix.

    Attributes:
        name: The name of the matrix.
        shape: The shape of the matrix.
        sigmas: Singular values of D, descending.
        entry_bytes: Bytes of one stored entry.
    """

    name: str
    shape: tuple[int, int]
    sigmas: Tensor
    entry_bytes: int

    @property
    def energy(self) -> float:
        """The energy ||D||_F^2 of the change D."""
        return float(self.sigmas.square().sum())

    @property
    def size_bytes(self) -> int:
        """Bytes that all of D takes."""
        return self.entry_bytes * prod(self.shape)


@dataclass(frozen=True)
class Kept:
    """What is kept of the change of all matrices.

    Attributes:
        directions: Singular directions; ``None`` for entries by chance.
        energy: Share of sum ||D||_F^2, in [0, 1]; of entries by chance its expectation.
        bytes: Share of what all of D takes.
    """

    directions: int | None
    energy: float
    bytes: float


def matrix_changes_of(bench: Bench, base: Other) -> list[MatrixChange]:
    """Return the change of every matrix of the model; vectors have none."""
    found = []
    for m in base.shared_matrices(bench.matrices(None, heads=False)):
        info = bench.checkpoint.info(m.tensor)
        place = place_of(m, info.shape)
        tuned = flat(bench.checkpoint.read(m.tensor)[place])
        with threads_of_matrices(info):
            sigmas = change_sigmas(tuned, flat(base.read(m.tensor, place)), known=bench.decompositions)
        shape = tuple(tuned.shape)
        found.append(MatrixChange(m.name, (shape[0], shape[1]), sigmas.cpu(), tuned.element_size()))
    return found


def kept_by(step: Truncate, changes: Sequence[MatrixChange]) -> Kept:
    """Return what a truncation keeps; 1 and 1 of a change that is zero."""
    directions, energy, size = 0, 0.0, 0.0
    for change in changes:
        order = random_order(change.sigmas, seeded(step.seed, change.name)) if step.side == "random" else None
        chosen = kept(change.sigmas, change.shape, step.criterion(), order)
        sigmas = change.sigmas if order is None else change.sigmas[order]
        count = chosen.stop - chosen.start
        directions += count
        energy += float(sigmas[chosen].square().sum())
        # Whoever stores more directions than this stores the change itself.
        size += min(change.entry_bytes * count * sum(change.shape), change.size_bytes)
    whole = sum(change.energy for change in changes)
    return Kept(directions, min(1.0, energy / whole) if whole else 1.0, size / total_bytes(changes))


def kept_by_chance(share: float, changes: Sequence[MatrixChange]) -> Kept:
    """Return what is kept where each entry is with this probability."""
    size = sum(min(share * c.size_bytes * (1 + PLACE_BYTES / c.entry_bytes), c.size_bytes) for c in changes)
    return Kept(None, share, size / total_bytes(changes))


def share_for_bytes(size: float, changes: Sequence[MatrixChange]) -> float:
    """Return which share of entries, stored one by one, takes this share of bytes; all where all bytes may be used."""
    if size >= 1:
        return 1.0
    each = sum(c.size_bytes * (1 + PLACE_BYTES / c.entry_bytes) for c in changes)
    return size * total_bytes(changes) / each


def total_bytes(changes: Sequence[MatrixChange]) -> int:
    """Return what all of D takes."""
    return sum(change.size_bytes for change in changes)


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
    wanted = [choose("rule", word.strip(), RULES) for word in words if word.strip()]
    if not wanted:
        raise SelectionError(f"expected rules, got none. Known: {', '.join(RULES)}.")
    return tuple(rule for rule in RULES if rule in wanted)


def truncation_curves(rules: Sequence[TruncationRule], seeds: int, at: tuple[float, ...]) -> list[SearchCurve]:
    """Return the curves of rules; those by chance once for each seed."""
    return [
        SearchCurve(
            rule,
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
    """Makes points of a tuned model of whose change a part is kept.

    Attributes:
        base: What the model was tuned from, in memory.
        changes: The changes of its matrices.
    """

    base: torch.nn.Module
    changes: Sequence[MatrixChange]

    def whole(self) -> Point:
        """Return the base itself, vectors included."""
        return Point("base", (Interpolate(other=self.base, at=1),), labels={"rule": "base"})

    def point(self, curve: SearchCurve, at: float) -> Point:
        """Return the model at a fraction, as a rule makes it.

        Controls keep as many directions, as much energy or as many bytes as ``drop`` does at this fraction; of single
        rules the one model is at 1.
        """
        rule, seed = curve.labels["rule"], curve.labels["seed"]
        if rule.startswith("dare") and 0 < at < 1:
            like = kept_by(Truncate(base=self.base, drop=at), self.changes)
            share = like.energy if rule == "dare-energy" else share_for_bytes(like.bytes, self.changes)
            # DARE scales what it keeps by 1 / (1 - drop), so that something must be kept.
            drop = min(1 - share, 1 - 1e-9)
            step, found = self._dare(drop, seed), kept_by_chance(share, self.changes)
        else:
            step, drop = self._truncation(rule, at, seed), None
            found = kept_by(step, self.changes)
        labels = {**curve.labels, "fraction": at, **asdict(found), "drop": drop}
        if found.energy == 1 and isinstance(step, Truncate) and step.drop == 0:
            return Point(UNCHANGED.key, (), at, labels=labels)
        # Named by its settings: where two curves ask for the same edit, one evaluation serves both.
        told = {name: getattr(step, name) for name in step.model_fields_set if name not in ("base", "models")}
        return Point((step.name, str(sorted(told.items()))), (step,), at, labels=labels)

    def _truncation(self, rule: TruncationRule, at: float, seed: int) -> Truncate:
        """Return the truncation of a rule at a fraction; at 0 and 1 all rules with a number are one."""
        if rule in SINGLE and at == 1:
            return Truncate(base=self.base, rule=rule)  # pyright: ignore[reportArgumentType]
        plain = Truncate(base=self.base, drop=at)
        if at in (0, 1) or rule == "drop":
            return plain
        if rule == "random":
            return Truncate(base=self.base, drop=at, side="random", seed=seed)
        if rule == "tail":
            return Truncate(base=self.base, band=(at, 1.0))
        if rule == "energy":
            return Truncate(base=self.base, energy=1 - at)
        share = min(1.0, max(kept_by(plain, self.changes).energy, 1e-12))  # an edit cannot be asked for no energy
        return Truncate(base=self.base, energy=share, side="random", seed=seed)

    def _dare(self, drop: float, seed: int) -> Merge:
        """Return the edit that keeps entries of D by chance; of all matrices, no vectors, as a truncation does."""
        return Merge(
            models={"base": self.base},
            base=self.base,
            method="dare",
            weights={"base": 0.0},
            drop=drop,
            seed=seed,
            select=ALL_MATRICES,
        )


@dataclass
class TruncateSearch(QualitySearch):
    """A search over what is kept of a change.

    Attributes:
        stage: The live model.
        rules: Which say what is kept.
        at: Fractions that are dropped.
    """

    stage: Stage
    rules: tuple[TruncationRule, ...]
    at: tuple[float, ...]

    def __post_init__(self) -> None:
        stage, bench = self.stage, self.stage.live.bench
        base = stage.in_memory(stage.asked.models["base"])
        self.kind = "search truncate"
        self.models = {"base": base, "tuned": stage.subject.model}
        (other,) = bench.meet([base], {m.tensor for m in bench.matrices(None, heads=False)}, chosen=False)
        self.truncater = Truncater(base, matrix_changes_of(bench, other))
        self.curves = truncation_curves(self.rules, stage.asked.seeds, self.at)
        # All of the change dropped is the end of every curve but those of rules that make one model.
        ends = [*truncation_curves(["drop"], 1, (0.0, 1.0)), *(c for c in self.curves if c.labels["rule"] in SINGLE)]
        self.ends = [*(self.truncater.point(curve, 1.0) for curve in ends), self.truncater.whole()]

    def told(self) -> dict[str, Any]:
        """Return the settings that this kind alone has, as a manifest keeps them."""
        return {"rules": list(self.rules), "fractions": list(self.at)}

    def far(self, row: Mapping[str, Any]) -> float:
        """Return how far a chosen point goes: how few bytes it takes."""
        return -row["bytes"]

    def point(self, curve: SearchCurve, at: float) -> Point:
        """Return the model at a fraction, as the curve's rule makes it."""
        return self.truncater.point(curve, at)

    def tables(self, scorer: Scorer, curves: Sequence[SearchCurve], chosen: Rows) -> dict[str, pl.DataFrame]:
        """Return points of curves and of the base, what was chosen, and items."""
        points = [point for curve in curves for point in curve.points]
        return {
            "points": frame(scorer.labelled([*points, self.truncater.whole()]), ON_TRUNCATION | QUALITY),
            "choice": frame(chosen, TRUNCATION_CHOICE),
            "items": scorer.items().select(*ITEMS),
        }
