"""``diffract connect``: what lies between models that were tuned from one base in several domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from diffract.edits import Interpolate, Merge
from diffract.errors import RunError, SelectionError, printable
from diffract.evaluate import Task, summarise
from diffract.evaluate.statistics import documents_of
from diffract.schemas import ITEMS, PAIRS, PATHS, SIMPLEX
from diffract.search.plan import UNCHANGED, Point, SearchCurve
from diffract.search.run import QualitySearch
from diffract.search.scorer import RESAMPLES, Rows, Scorer
from diffract.search.stage import Model, Stage
from diffract.stats import FEWEST_DOCUMENTS, by_document, interval
from diffract.tables import frame

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
    opposite. The interval is that of the paired percentile bootstrap: documents are drawn with replacement, for all
    places the same, and the maximum is taken anew in each draw. A maximum of noisy numbers is more often too high than
    too low, the more so the more places there are; so is the interval. That errs on the side of no connection. Under
    five documents there is no interval, and the ends of all are NaN.

    Args:
        values: (K, documents), one row per place.
        weights: (documents,).
        at: K places from 0 to 1, ascending, both ends among them.
        better: ``higher`` or ``lower``.
        seed: Of the draws.
        resamples: How many draws.
        level: Of the intervals.

    Source: Frankle et al. 2020 (the barrier as the highest rise above the line between the ends).
    """
    places = np.asarray(at, float)
    count = values.shape[1]
    # Counts of each document in each draw: two matrix products then give all sums, of all places on the same ones.
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
    found = gaps(values.sum(1) / weights.sum(), places, better)
    draws = gaps((drawn @ values.T) / (drawn @ weights)[:, None], places, better)
    if count < FEWEST_DOCUMENTS:
        draws = np.full_like(draws, np.nan)
    gap_low, gap_high = interval(draws, level)
    low, high = interval(draws.max(1), level)
    where = int(found.argmax())
    return Barrier(
        gap=found,
        gap_low=gap_low,
        gap_high=gap_high,
        height=float(found[where]),
        low=float(low),
        high=float(high),
        where=where,
    )


def gaps(quality: Floats, at: Floats, better: str) -> Floats:
    """Return how much worse than the line between the ends each place is, along the last axis."""
    line = (1 - at) * quality[..., :1] + at * quality[..., -1:]
    found = line - quality if better == "higher" else quality - line
    found[..., [0, -1]] = 0.0  # rounding must not make a barrier of the ends themselves
    return found


def stacked(frames: Sequence[pl.DataFrame], task: Task) -> tuple[Floats, Floats]:
    """Return the values of several states as rows over the same documents, and the documents' weights.

    Raises:
        RunError: They have other items.
    """
    own = [frame.filter(pl.col("task") == task.name).sort("item") for frame in frames]
    if any(not frame["item"].equals(own[0]["item"]) for frame in own):
        raise RunError(f"task {printable(task.name)!r}: states were scored on different items. Evaluate them again.")
    values, weights = np.stack([frame["value"].to_numpy() for frame in own]), own[0]["weight"].to_numpy()
    values, weights = by_document(documents_of(own[0]["item"]), values, weights)
    return values, weights


BASE = "base"
"""What the base is called among the models."""


@dataclass(frozen=True)
class Mixer:
    """Makes points of the base, which is the live model.

    Attributes:
        models: The others by name, in memory.
        base: The base, in memory, as it is while the live one is changed.
        scale: What mixed changes are multiplied with.
    """

    models: Mapping[str, torch.nn.Module]
    base: torch.nn.Module
    scale: float = 1.0

    def pairs(self) -> list[tuple[str, str]]:
        """Return all pairs, those of tuned models first."""
        return [*combinations(self.models, 2), *((BASE, name) for name in self.models)]

    def between(self, a: str, b: str, at: float) -> Point:
        """Return (1 - at) a + at b."""
        if at in (0, 1):
            alone = self.alone(b if at else a)
            return Point(alone.key, alone.steps, at)
        start = () if a == BASE else (Interpolate(other=self.models[a], at=1),)
        return Point(_key({a: 1 - at, b: at}, 1.0), (*start, Interpolate(other=self.models[b], at=at)), at)

    def alone(self, name: str) -> Point:
        """Return one model."""
        if name == BASE:
            return UNCHANGED
        return Point(_key({name: 1.0}, 1.0), (Interpolate(other=self.models[name], at=1),))

    def mixed(self, weights: Mapping[str, float]) -> Point:
        """Return base + scale * sum of w_i (model_i - base); for scale 1 that is the mean by weights that sum to 1."""
        present = {name: weight for name, weight in weights.items() if weight > 0}
        # On its corners and edges the unscaled simplex meets the paths: they are made alike, to the last bit, so that
        # one evaluation serves both.
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
        return Point(_key(present, self.scale), (step,))


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


CORNERS = 3
"""Models of a simplex."""


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


@dataclass
class ConnectSearch(QualitySearch):
    """Lines between models, and the simplex of three; nothing is chosen.

    Attributes:
        stage: The base, live.
        steps: How many places there are on a line.
        grid: How many steps there are on an edge of the simplex.
        scale: What mixed changes are multiplied with.
        tolerance: Models are connected where the barrier's interval ends below it.

    Raises:
        SelectionError: A number makes no sense.
        DiffractError: A model cannot be loaded, or not be mixed with the others.
    """

    stage: Stage
    steps: int
    grid: int
    scale: float
    tolerance: float

    def __post_init__(self) -> None:
        stage = self.stage
        asked = stage.asked.models
        models = {name: stage.of_same_vocabulary(model) for name, model in asked.items() if name != BASE}
        bench = stage.live.bench
        bench.meet(list(models.values()), bench.entries(), chosen=False)  # refused before anything is evaluated
        self.kind = "connect"
        self.models = {BASE: stage.subject.model, **models}
        self.mixer = Mixer(models, stage.in_memory(asked[BASE]), self.scale)
        self.mixtures = simplex_weights(tuple(models), self.grid) if len(models) == CORNERS else []
        self.ends_called = "ends of paths"
        self.ends = [self.mixer.alone(name) for name in models]
        at = tuple(i / (self.steps - 1) for i in range(self.steps))
        self.curves = [
            SearchCurve(f"{a} to {b}", {"a": a, "b": b}, at, group="points of paths") for a, b in self.mixer.pairs()
        ]
        if self.mixtures:
            # A mixture's place is its number. All of them are measured as far as the budget goes: none is an end.
            places = tuple(map(float, range(len(self.mixtures))))
            self.curves.append(SearchCurve("simplex", {}, places, group="points of the simplex", ends=False))

    def told(self) -> dict[str, Any]:
        """Return the settings that this kind alone has, as a manifest keeps them."""
        return {"steps": self.steps, "grid": self.grid, "scale": self.scale, "tolerance": self.tolerance}

    def point(self, curve: SearchCurve, at: float) -> Point:
        """Return the model at a place between two others, or the mixture of a number."""
        if curve.ends:
            return self.mixer.between(curve.labels["a"], curve.labels["b"], at)
        weights = self.mixtures[int(at)]
        found = self.mixer.mixed(weights)
        return Point(found.key, found.steps, at, {"models": list(weights), "weights": list(weights.values())})

    def tables(self, scorer: Scorer, curves: Sequence[SearchCurve], chosen: Rows) -> dict[str, pl.DataFrame]:
        """Return paths, their barriers, the simplex, and items."""
        paths, pairs, simplex = [], [], []
        for curve in curves:
            if curve.ends:
                path, pair = self._path(scorer, curve)
                paths += path
                pairs += pair
            else:
                simplex += [
                    {**point.labels, "state": scorer.number(point), **row}
                    for point in curve.points
                    for row in summarise(scorer.score("held-out", point), scorer.tasks["held-out"], resamples=RESAMPLES)
                    .select("task", "quality", "low", "high")
                    .rows(named=True)
                ]
        return {
            "paths": frame(paths, PATHS).with_columns(pl.col("gap_low", "gap_high").fill_nan(None)),
            "pairs": frame(pairs, PAIRS).with_columns(pl.col("low", "high").fill_nan(None)),
            "simplex": frame(simplex, SIMPLEX),
            "items": scorer.items().select(*ITEMS),
        }

    def _path(self, scorer: Scorer, curve: SearchCurve) -> tuple[Rows, Rows]:
        """Return the rows of one path, and of its barriers."""
        a, b, tasks = curve.labels["a"], curve.labels["b"], scorer.tasks["held-out"]
        places = [point.at for point in curve.points]
        frames = [scorer.score("held-out", point) for point in curve.points]
        rows = [summarise(items, tasks, resamples=RESAMPLES).rows(named=True) for items in frames]
        counting = tasks_that_count(a, b, [task.name for task in tasks])
        path, pair = [], []
        for number, task in enumerate(tasks):
            found = barrier(*stacked(frames, task), places, better=task.better)
            q = [own[number] for own in rows]
            for i, point in enumerate(curve.points):
                line = (1 - point.at) * q[0]["quality"] + point.at * q[-1]["quality"]
                row = {"a": a, "b": b, "at": point.at, "state": scorer.number(point), "task": task.name, "linear": line}
                row |= {key: q[i][key] for key in ("quality", "low", "high")}
                path.append(row | {"gap": found.gap[i], "gap_low": found.gap_low[i], "gap_high": found.gap_high[i]})
            pair.append({
                "a": a, "b": b, "task": task.name, "counts": task.name in counting, "quality_a": q[0]["quality"],
                "quality_b": q[-1]["quality"], "barrier": found.height, "low": found.low, "high": found.high,
                "at": places[found.where], "connected": found.high < self.tolerance,
            })  # fmt: skip
        whole = all(row["connected"] for row in pair if row["counts"])
        return path, [row | {"pair_connected": whole} for row in pair]


def tasks_that_count(a: str, b: str, tasks: Sequence[str]) -> list[str]:
    """Return the tasks that are called like the two models; all where there are not two such.

    >>> tasks_that_count("math", "text", ["math", "text", "code"])
    ['math', 'text']
    """
    own = [task for task in tasks if task in (a, b)]
    return own if len(own) == 2 else list(tasks)
