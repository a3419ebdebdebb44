"""``diffract search truncate``: how much of a change is needed, by which rule, and against what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffract.edits import Interpolate, Merge, Truncate
from diffract.edits.bench import Bench, Other
from diffract.edits.directions import kept, random_order
from diffract.edits.draft import flat, place_of
from diffract.edits.edit import Edit
from diffract.edits.mixing import seeded
from diffract.edits.spectral_edits import change_sigmas
from diffract.engine import single_threaded
from diffract.errors import SelectionError, choose
from diffract.run import Run
from diffract.search.plan import SPLITS, Estimate, Plan, Point, Sketch, State, parse_fractions
from diffract.search.run import Asked, Found, run_search
from diffract.search.scorer import TUNED, Scorer, Which
from diffract.search.stage import How, Model, Stage, build, measure
from diffract.settings import Progress
from diffract.tables import ITEMS, ON_TRUNCATION, QUALITY, TRUNCATION_CHOICE, frame

PLACE_BYTES = 4
"""Where a single entry is in its matrix."""


@dataclass(frozen=True)
class MatrixChange:
    """The change of one matrix.

    Attributes:
        name: Of the matrix.
        shape: Of it.
        sigmas: Singular values of D, descending.
        entry_bytes: Of one stored entry.
    """

    name: str
    shape: tuple[int, int]
    sigmas: Tensor
    entry_bytes: int

    @property
    def energy(self) -> float:
        """||D||_F^2."""
        return float(self.sigmas.square().sum())

    @property
    def size_bytes(self) -> int:
        """Of all of D."""
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
    with single_threaded():
        for m in bench.matrices(None, heads=False):
            info = bench.checkpoint.info(m.tensor)
            place = place_of(m, info.shape)
            tuned = bench.checkpoint.read(m.tensor)[place]
            sigmas = change_sigmas(flat(tuned), flat(base.read(m.tensor, place)))
            shape = tuple(flat(tuned).shape)
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
    wanted = [word.strip() for word in words if word.strip()]
    for word in wanted:
        choose("rule", word, RULES)
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

    def _made(self, rule: TruncationRule, at: float, seed: int) -> tuple[Edit, Kept, float | None]:
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

    def _truncation(self, step: Truncate) -> tuple[Edit, Kept, None]:
        return step, kept_by(step, self.changes), None

    def _dare(self, share: float, seed: int) -> tuple[Edit, Kept, float]:
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


def _state(step: Edit, found: Kept) -> State:
    """Name a state by its settings; all and nothing are the same whatever the rule."""
    if found.energy == 1 and isinstance(step, Truncate) and step.drop == 0:
        return TUNED
    told = {name: getattr(step, name) for name in step.model_fields_set if name not in ("base", "models")}
    return State((step.name, str(sorted(told.items()))), (step,))


def search_truncate(
    base: Model,
    tuned: Model,
    *,
    rules: str | Sequence[str] | None = None,
    eval: str | Sequence[str] = "math",
    output: str | Path | None = None,
    fractions: str | Sequence[float] = "0:1:0.125",
    seeds: int = 3,
    tolerance: float | None = None,
    choose_by: Which = "best",
    write: str | Path | None = None,
    dry_run: bool = False,
    budget: str | int | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: Any = None,
    architecture: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Run | Estimate:
    """Drop singular directions of the change by several rules, and measure what that does to quality.

    What is chosen is chosen on the selection split; the held-out split reports.

    Args:
        base: What the model was tuned from.
        tuned: The model that is searched.
        rules: As a list or separated by commas; all by default. ``drop`` keeps the largest directions, ``energy`` the
            fewest that hold a share, ``donoho-gavish`` and ``mp-edge`` what rises above noise. Controls, matched to
            ``drop`` at each fraction: ``tail`` keeps as many of the smallest; ``random`` as many by chance, so as many
            bytes; ``random-energy`` by chance until they hold as much energy; ``dare-energy`` and ``dare-bytes`` single
            entries by chance, scaled up, that hold as much energy or take as many bytes.
        eval: Tasks; the first decides.
        output: Write a run folder here; a search that was killed continues when it is started again.
        fractions: Of directions that are dropped, ``FROM:TO:STEP`` or a list.
        seeds: How many of each control by chance.
        tolerance: As of ``search_rewind``.
        choose_by: ``best``, or ``without-loss``: the fewest bytes.
        write: Write the chosen checkpoint here.
        dry_run: Only say what it would cost; one evaluation of each split is timed.
        budget: The most evaluations (``200``), or the most time that they may take (``30m``).
        data: A folder with a folder of files for each domain.
        limit: Items of each task at most, in each split.
        shots: Solved examples before each question.
        device: ``auto`` is CUDA where there is one.
        dtype: As of ``diffract.evaluate``.
        tokenizer: Where it is not beside the tuned model.
        architecture: A JSON file that describes the model.
        force: Replace an existing run folder, and the checkpoint.
        progress: Called with evaluations done, all of them, and what is done now.

    Returns:
        The tables of the run; of a dry run the estimate.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    wanted, at = parse_rules(rules), parse_fractions(fractions)
    how = How(eval, data, limit, shots, device, dtype, tokenizer, architecture)
    asked = Asked(seeds, tolerance, choose_by, budget, output, write, dry_run, force, progress)
    return run_search(base, tuned, how, asked, lambda stage, start: TruncateSearch(stage, start, wanted, at, seeds))


@dataclass
class TruncateSearch:
    """A search over what is kept of a change.

    Attributes:
        stage: The live model.
        base: What it was tuned from, in memory.
        rules: Which say what is kept.
        at: Fractions that are dropped.
        seeds: How many of each control by chance.
    """

    stage: Stage
    base: torch.nn.Module
    rules: tuple[TruncationRule, ...]
    at: tuple[float, ...]
    seeds: int

    def __post_init__(self) -> None:
        bench = self.stage.live.bench
        self.truncater = Truncater(self.base, matrix_changes_of(bench, bench.other(self.base)))
        self.kind: str = "search truncate"
        self.sketches: list[Sketch] = truncation_sketches(self.rules, self.seeds, self.at)

    @property
    def effects(self) -> int:
        """How many single units it measures."""
        return 0

    @property
    def ends(self) -> list[State]:
        """All of the change dropped, rules that make one state, and the base."""
        single = [s for s in self.sketches if s.labels["rule"] in SINGLE]
        dropped = Sketch({"rule": "drop", "seed": 0}, (0.0, 1.0))
        return [*(self.truncater.point(s, 1.0).state for s in [dropped, *single]), self.truncater.whole()]

    def settings(self) -> dict[str, Any]:
        """Return its settings as a manifest keeps them."""
        return {"rules": list(self.rules), "fractions": list(self.at)}

    def far(self, row: Mapping[str, Any]) -> float:
        """Say how far a chosen point goes: how few bytes it takes."""
        return -row["bytes"]

    def run(self, scorer: Scorer, plan: Plan, tolerance: float | None) -> Found:
        """Measure curves, and choose."""
        curves = build(self.sketches, plan, self.truncater.point)
        points, chosen = measure(scorer, self.sketches, curves, plan, tolerance)
        base = [{"rule": "base", **row} for split in SPLITS for row in scorer.rows(split, self.truncater.whole())]
        frames = {
            "points": frame(points + base, ON_TRUNCATION | QUALITY),
            "choice": frame(chosen, TRUNCATION_CHOICE),
            "items": scorer.items().select(*ITEMS),
        }
        return Found(frames, chosen)
