"""``diffract connect``: what lies between models that were tuned from one base in several domains."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffract.errors import SelectionError, printable
from diffract.evaluate import Task, summarise
from diffract.search.barrier import barrier, stacked
from diffract.search.curves import Sketch
from diffract.search.measure import Rows, planned
from diffract.search.mixing import BASE, Mixer, simplex_weights
from diffract.search.plan import Estimate, Plan, parse_budget
from diffract.search.scorer import RESAMPLES, TUNED, Progress, Scorer
from diffract.search.setup import How, Model, Stage, described, in_memory, manifest, of_same_vocabulary, set_up
from diffract.search.tables import ITEMS, PAIRS, PATHS, SIMPLEX, ConnectTables
from diffract.search.work import finish, working
from diffract.tables import frame

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
) -> ConnectTables | Estimate:
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
        The tables of the run; of a dry run the estimate.

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
        tables = search.run(scorer, plan)
        settings = how.settings() | {"steps": steps, "grid": grid, "scale": scale, "tolerance": tolerance}
        tables.manifest.update(
            manifest(
                "connect",
                stage,
                described_models,
                settings | {"budget": budget},
                evaluations=scorer.done,
                left_out=list(plan.left_out),
                seconds=round(time.monotonic() - begun, 3),
            )
        )
        if output is not None:
            finish(tables, output, cache, force=force)
    return tables


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

    def run(self, scorer: Scorer, plan: Plan) -> ConnectTables:
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
        return ConnectTables(
            frame(paths, PATHS),
            frame(pairs, PAIRS),
            frame(simplex, SIMPLEX),
            scorer.items().select(*ITEMS),
        )

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
