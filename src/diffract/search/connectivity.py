"""``diffract connect``: what lies between models that were tuned from one base in several domains."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from diffract.edits import Interpolate, Merge
from diffract.errors import RunError, SelectionError, printable
from diffract.evaluate import Task, summarise
from diffract.run import Run
from diffract.search.plan import Estimate, Plan, Sketch, State, parse_budget
from diffract.search.scorer import RESAMPLES, TUNED, Scorer
from diffract.search.stage import (
    How,
    Model,
    Rows,
    Stage,
    described,
    finish,
    in_memory,
    manifest,
    of_same_vocabulary,
    planned,
    set_up,
    working,
)
from diffract.settings import Progress
from diffract.stats import interval
from diffract.tables import ITEMS, PAIRS, PATHS, SIMPLEX, Tables, frame

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Barrier:
    """A barrier on a path of K places.

    Attributes:
        gap: (K,) how much worse than the line between the ends each place is.
        gap_low: (K,) lower end of its interval.
        gap_high: (K,) upper end.
        height: The largest gap, at least 0: at both ends it is 0.
        low: Lower end of its interval.
        high: Upper end.
        where: The number of the place with the largest gap.
    """

    gap: Floats
    gap_low: Floats
    gap_high: Floats
    height: float
    low: float
    high: float
    where: int


def barrier(
    values: Floats, weights: Floats, at: Sequence[float], *, better: str, seed: int = 0, resamples: int = 2000,
    level: float = 0.95,
) -> Barrier:  # fmt: skip
    """Return the barrier max over a of (linear interpolation of the ends' quality - quality), positive where it is bad.

    Quality at place k is q_k = sum_i values_ki / sum_i weights_i; of bits, where lower is better, the sign is the
    opposite. The interval is that of the paired percentile bootstrap: items are drawn with replacement, for all places
    the same, and the maximum is taken anew in each draw. A maximum of noisy numbers is more often too high than too
    low, the more so the more places there are; so is the interval. That errs on the side of no connection.

    Args:
        values: (K, items), one row per place.
        weights: (items,).
        at: K places from 0 to 1, ascending, both ends among them.
        better: ``higher`` or ``lower``.
        seed: Of the draws.
        resamples: How many draws.
        level: Of the intervals.

    Source: Frankle et al. 2020 (the barrier as the highest rise above the line between the ends).
    """
    places = np.asarray(at, float)
    count = values.shape[1]
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
    found = gaps(values.sum(1) / weights.sum(), places, better)
    draws = gaps((drawn @ values.T) / (drawn @ weights)[:, None], places, better)
    gap_low, gap_high = interval(draws, level)
    low, high = interval(draws.max(1), level)
    where = int(found.argmax())
    return Barrier(found, gap_low, gap_high, float(found[where]), float(low), float(high), where)


def gaps(quality: Floats, at: Floats, better: str) -> Floats:
    """Return how much worse than the line between the ends each place is, along the last axis."""
    line = (1 - at) * quality[..., :1] + at * quality[..., -1:]
    found = line - quality if better == "higher" else quality - line
    found[..., [0, -1]] = 0.0  # exactly
    return found


def stacked(frames: Sequence[pl.DataFrame], task: Task) -> tuple[Floats, Floats]:
    """Return the values of several states as rows over the same items, and the items' weights.

    Raises:
        RunError: They have other items.
    """
    own = [frame.filter(pl.col("task") == task.name).sort("item") for frame in frames]
    if any(not frame["item"].equals(own[0]["item"]) for frame in own):
        raise RunError(f"task {printable(task.name)!r}: states were scored on different items. Evaluate them again.")
    return np.stack([frame["value"].to_numpy() for frame in own]), own[0]["weight"].to_numpy()


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


TOLERANCE = 0.01
"""Of the barrier, in the unit of the task."""

CORNERS = 3
"""Models of a simplex."""


def connect(
    base: Model,
    *models: str | tuple[str, Model],
    eval: str | Sequence[str],
    output: str | Path | None = None,
    steps: int = 11,
    grid: int = 5,
    scale: float = 1.0,
    tolerance: float = TOLERANCE,
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
    """Measure quality on the lines between models, and on the simplex of three; nothing is chosen.

    Args:
        base: What all descend from; its tokenizer serves for all, and theirs must be the same.
        models: Two or more, ``"math=PATH"`` or pairs of a name and a model.
        eval: Tasks. In a pair those count that are called like its two models; where there are not two such, all do.
        output: Write a run folder here; a search that was killed continues when it is started again.
        steps: Places on each line, both ends included.
        grid: Steps on an edge of the simplex.
        scale: What the changes are multiplied with on the simplex: base + scale * sum of w_i (model_i - base).
        tolerance: Two models are connected if the upper end of the barrier's interval is below it in all tasks that
            count, in the unit of the task.
        dry_run: Only say what it would cost; one evaluation is timed.
        budget: The most evaluations (``200``), or the most time that they may take (``30m``).
        data: A folder with a folder of files for each domain.
        limit: Items of each task at most.
        shots: Solved examples before each question.
        device: ``auto`` is CUDA where there is one.
        dtype: As of ``diffract.evaluate``.
        tokenizer: Where it is not beside the base.
        architecture: A JSON file that describes the model.
        force: Replace an existing run folder.
        progress: Called with evaluations done, all of them, and what is done now.

    Returns:
        The run; of a dry run the estimate.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    begun = time.monotonic()
    named = named_models(models)
    if steps < 3 or grid < 1 or not scale > 0 or not tolerance >= 0:
        raise SelectionError(
            f"expected steps from 3, grid from 1, scale above 0, tolerance from 0; got {steps}, {grid}, {scale}, "
            f"{tolerance}."
        )
    most = parse_budget(budget)
    how = How(eval, data, limit, shots, device, dtype, tokenizer, architecture)
    with working(None if dry_run else output, force=force) as cache:
        stage = set_up(base, how, ("held-out",))
        mixer = _load(stage, base, named, scale)
        search = ConnectSearch(stage.tasks["held-out"], mixer, steps, grid, tolerance)
        plan, estimate = planned(stage, search.sketches, ends=1 + len(named), budget=most, dry_run=dry_run)
        if estimate is not None:
            return estimate
        described_models = [described(BASE, "base", base, stage.subject.model)]
        described_models += [described(name, "tuned", named[name], mixer.models[name]) for name in named]
        scorer = stage.scorer(cache, progress)
        frames = search.run(scorer, plan)
        settings = how.settings() | {"steps": steps, "grid": grid, "scale": scale, "tolerance": tolerance}
        told = manifest(
            "connect",
            stage,
            described_models,
            settings | {"budget": budget},
            evaluations=scorer.done,
            left_out=list(plan.left_out),
            seconds=round(time.monotonic() - begun, 3),
        )
        tables = Tables(told, frames)
        if output is not None:
            finish(tables, output, cache, force=force)
    return Run(tables)


def named_models(models: Sequence[str | tuple[str, Model]]) -> dict[str, Model]:
    """Return models by name.

    Raises:
        SelectionError: One has no name, two have the same, or there are fewer than two.
    """
    found: dict[str, Model] = {}
    for given in models:
        name, model = given.partition("=")[::2] if isinstance(given, str) else given
        if not name or (isinstance(model, str) and not model):
            raise SelectionError(f"connect: expected NAME=MODEL, such as math=PATH; got {printable(given)!r}.")
        if name in found or name == BASE:
            raise SelectionError(f"connect: two models are called {printable(name)!r}. Name them apart.")
        found[name] = model
    if len(found) < 2:
        raise SelectionError(f"connect: expected two or more tuned models, got {len(found)}.")
    return found


def _load(stage: Stage, base: Model, named: Mapping[str, Model], scale: float) -> Mixer:
    """Load the models, and check that they are of one shape before anything is evaluated."""
    found = {name: of_same_vocabulary(reference, stage) for name, reference in named.items()}
    for model in found.values():
        stage.live.bench.other(model)
    return Mixer(found, in_memory(base, stage), scale)


@dataclass(frozen=True)
class ConnectSearch:
    """Lines between models, and a simplex.

    Attributes:
        tasks: Of the held-out split.
        mixer: Makes states.
        steps: Places on a line.
        grid: Steps on an edge of the simplex.
        tolerance: Of the barrier.
    """

    tasks: Sequence[Task]
    mixer: Mixer
    steps: int
    grid: int
    tolerance: float

    @property
    def places(self) -> tuple[float, ...]:
        """Places on a line."""
        return tuple(i / (self.steps - 1) for i in range(self.steps))

    @property
    def mixtures(self) -> list[dict[str, float]]:
        """Weights on the simplex; none but for three models."""
        names = tuple(self.mixer.models)
        return simplex_weights(names, self.grid) if len(names) == CORNERS else []

    @property
    def sketches(self) -> list[Sketch]:
        """One for each pair, and one for the simplex, all of whose points are between its ends, which do not count."""
        lines = [Sketch({"a": a, "b": b}, self.places, group="points of paths") for a, b in self.mixer.pairs()]
        count = len(self.mixtures)
        simplex = Sketch({"simplex": True}, tuple(map(float, range(count + 2))), group="points of the simplex")
        return [*lines, simplex] if count else lines

    def run(self, scorer: Scorer, plan: Plan) -> dict[str, pl.DataFrame]:
        """Measure what is planned, and find barriers."""
        scorer.total = plan.evaluations
        for state in (TUNED, *map(self.mixer.alone, self.mixer.models)):
            scorer.score("held-out", state, "ends of paths")
        paths: Rows = []
        pairs: Rows = []
        for number, (a, b) in enumerate(self.mixer.pairs()):
            inner = plan.points.get(("held-out", number), ())
            places = [0.0, *(self.places[i] for i in inner), 1.0]
            one_path, one_pair = self._path(scorer, a, b, places)
            paths += one_path
            pairs += one_pair
        chosen = plan.points.get(("held-out", len(self.mixer.pairs())), ())
        simplex = [row for i in chosen for row in self._mixture(scorer, self.mixtures[i - 1])]
        return {
            "paths": frame(paths, PATHS),
            "pairs": frame(pairs, PAIRS),
            "simplex": frame(simplex, SIMPLEX),
            "items": scorer.items().select(*ITEMS),
        }

    def _path(self, scorer: Scorer, a: str, b: str, places: Sequence[float]) -> tuple[Rows, Rows]:
        """Return the rows of one path, and of its barriers."""
        states = [self.mixer.between(a, b, at) for at in places]
        frames = [scorer.score("held-out", state, f"{a} to {b}") for state in states]
        rows = [summarise(items, self.tasks, resamples=RESAMPLES).rows(named=True) for items in frames]
        counting = tasks_that_count(a, b, [task.name for task in self.tasks])
        path, pair = [], []
        for number, task in enumerate(self.tasks):
            found = barrier(*stacked(frames, task), places, better=task.better)
            q = [own[number] for own in rows]
            for i, at in enumerate(places):
                line = (1 - at) * q[0]["quality"] + at * q[-1]["quality"]
                row = {"a": a, "b": b, "at": at, "state": scorer.number(states[i]), "task": task.name, "linear": line}
                row |= {key: q[i][key] for key in ("quality", "low", "high")}
                path.append(row | {"gap": found.gap[i], "gap_low": found.gap_low[i], "gap_high": found.gap_high[i]})
            pair.append({
                "a": a, "b": b, "task": task.name, "counts": task.name in counting, "quality_a": q[0]["quality"],
                "quality_b": q[-1]["quality"], "barrier": found.height, "low": found.low, "high": found.high,
                "at": places[found.where], "connected": found.high < self.tolerance,
            })  # fmt: skip
        whole = all(row["connected"] for row in pair if row["counts"])
        return path, [row | {"pair_connected": whole} for row in pair]

    def _mixture(self, scorer: Scorer, weights: Mapping[str, float]) -> Rows:
        state = self.mixer.mixed(weights)
        items = scorer.score("held-out", state, "simplex")
        rows = (
            summarise(items, self.tasks, resamples=RESAMPLES).select("task", "quality", "low", "high").rows(named=True)
        )
        which = {"models": list(weights), "weights": list(weights.values()), "state": scorer.number(state)}
        return [{**which, **row} for row in rows]


def tasks_that_count(a: str, b: str, tasks: Sequence[str]) -> list[str]:
    """Return the tasks that are called like the two models; all where there are not two such.

    >>> tasks_that_count("math", "text", ["math", "text", "code"])
    ['math', 'text']
    """
    own = [task for task in tasks if task in (a, b)]
    return own if len(own) == 2 else list(tasks)
