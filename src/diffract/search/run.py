"""What searches of heads and of directions have in common: from loaded models to a run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

import polars as pl
import torch

from diffract.edits.edit import Edit
from diffract.edits.to_files import apply
from diffract.errors import SelectionError, choose
from diffract.evaluate import Evaluator, load_subject, summarise
from diffract.run import Run
from diffract.search.plan import SPLITS, Estimate, Plan, Sketch, State, parse_budget
from diffract.search.scorer import TUNED, Scorer, Which, winner
from diffract.search.stage import (
    How,
    Model,
    Rows,
    Stage,
    described,
    finish,
    in_memory,
    manifest,
    planned,
    set_up,
    working,
)
from diffract.settings import Progress
from diffract.store import refuse_existing
from diffract.tables import Tables

PER_ITEM = 1e-9
"""Relative difference of a value that still counts as the same: sums in another order, no other weights."""


def write_chosen(
    output: str | Path,
    stage: Stage,
    live: pl.DataFrame,
    model: Model,
    steps: Sequence[Mapping[str, Any]],
    *,
    force: bool,
) -> dict[str, Any]:
    """Write a checkpoint by a recipe, load it, and score it on the held-out split.

    Args:
        output: The folder to write.
        stage: How models are loaded and evaluated.
        live: The held-out scores of the same edit in memory.
        model: What the recipe edits.
        steps: Of the recipe; the references in them are the user's own, not copies in memory.
        force: Replace a folder that an edit has written.

    Returns:
        For the manifest: where it is, whether every item's score is the live model's, and both qualities.
    """
    recipe = {"model": model, "steps": list(steps), **_architecture(stage)}
    apply(recipe, output, force=force)
    tasks = stage.tasks["held-out"]
    subject = load_subject(output, device=stage.how.device, dtype=stage.how.dtype, tokenizer=stage.how.tokenizer)
    found = Evaluator(subject, tasks, batch_tokens=stage.how.batch_tokens).scores()
    qualities = [summarise(items, tasks, resamples=1)["quality"].to_list() for items in (live, found)]
    rows = [{"task": task.name, "live": a, "written": b} for task, a, b in zip(tasks, *qualities, strict=True)]
    return {"folder": str(output), "same_scores": same_scores(live, found), "held_out": rows}


def same_scores(one: pl.DataFrame, other: pl.DataFrame) -> bool:
    """Whether two tables of scores agree, item by item, to rounding."""
    both = one.join(other, on=["task", "item"], how="full", suffix="_b")
    near = (pl.col("value") - pl.col("value_b")).abs() <= PER_ITEM * pl.col("value").abs()
    return bool(both.select(near.fill_null(value=False).all()).item())


def _architecture(stage: Stage) -> dict[str, str]:
    return {} if stage.how.architecture is None else {"architecture": str(stage.how.architecture)}


@dataclass(frozen=True)
class Asked:
    """What is asked of every search.

    Attributes:
        seeds: How many random ones of each kind.
        tolerance: Of loss, see ``choice.without_loss``.
        choose_by: Which point is written.
        budget: The most that it may cost.
        output: The run folder.
        write: The checkpoint to write.
        dry_run: Whether only the cost is wanted.
        force: Replace what is there.
        progress: Takes how far work has come.

    Raises:
        SelectionError: A value makes no sense.
    """

    seeds: int
    tolerance: float | None
    choose_by: str
    budget: str | int | None
    output: str | Path | None
    write: str | Path | None
    dry_run: bool
    force: bool
    progress: Progress | None

    def __post_init__(self) -> None:
        choose("choice", self.choose_by, get_args(Which))
        parse_budget(self.budget)
        if self.seeds < 1:
            raise SelectionError(f"seeds: expected 1 or more, got {self.seeds}.")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise SelectionError(f"tolerance: expected a loss from 0, got {self.tolerance}.")

    def settings(self) -> dict[str, Any]:
        """Return them as a manifest keeps them."""
        return {name: getattr(self, name) for name in ("seeds", "tolerance", "choose_by", "budget")}


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        frames: Its tables by name.
        chosen: Rows of what was chosen.
    """

    frames: dict[str, pl.DataFrame]
    chosen: Rows


class Search(Protocol):
    """A search over states of a model.

    Attributes:
        kind: What the manifest calls it.
        sketches: Its curves.
    """

    kind: str
    sketches: list[Sketch]

    @property
    def effects(self) -> int:
        """How many single units it measures."""
        ...

    @property
    def ends(self) -> Sequence[State]:
        """States at the ends of its curves, beside the tuned model."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return its settings as a manifest keeps them."""
        ...

    def run(self, scorer: Scorer, plan: Plan, tolerance: float | None) -> Found:
        """Measure and choose."""
        ...

    def far(self, row: Mapping[str, Any]) -> float:
        """Say how far a chosen point goes."""
        ...


def run_search(
    base: Model, tuned: Model, how: How, asked: Asked, make: Callable[[Stage, torch.nn.Module], Search]
) -> Run | Estimate:
    """Search, and write what was found.

    Args:
        base: What the model was tuned from.
        tuned: The model.
        how: How models are loaded and evaluated.
        asked: What else is wanted.
        make: Makes the search of a live model and the base in memory.
    """
    begun = time.monotonic()
    if asked.write is not None and not asked.dry_run:
        refuse_existing(asked.write, force=asked.force)
    with working(None if asked.dry_run else asked.output, force=asked.force) as cache:
        stage = set_up(tuned, how)
        start = in_memory(base, stage)
        search = make(stage, start)
        if asked.write is not None and all(sketch.control for sketch in search.sketches):
            raise SelectionError("only controls are searched, of which none is chosen: there is nothing to write.")
        plan, estimate = planned(
            stage,
            search.sketches,
            ends=1 + len(search.ends),
            effects=search.effects,
            budget=parse_budget(asked.budget),
            dry_run=asked.dry_run,
        )
        if estimate is not None:
            return estimate
        models = [described("base", "base", base, start), described("tuned", "tuned", tuned, stage.subject.model)]
        scorer = stage.scorer(cache, asked.progress)
        found = _measured(search, scorer, plan, asked.tolerance)
        best = winner(found.chosen, asked.choose_by, search.far)
        written = None
        if asked.write is not None and best is not None:
            written = _write(asked, stage, scorer, best, (base, start, tuned))
        elif asked.write is not None:
            stage.notes.append(f"{asked.write} is not written: the budget sufficed for controls alone")
        notes = {"chosen": best, "written": written, "left_out": list(plan.left_out)}
        settings = how.settings() | search.settings() | asked.settings()
        seconds = round(time.monotonic() - begun, 3)
        told = manifest(search.kind, stage, models, settings, seconds=seconds, evaluations=scorer.done, **notes)
        tables = Tables(told, found.frames)
        if asked.output is not None:
            finish(tables, asked.output, cache, force=asked.force)
    return Run(tables)


def _measured(search: Search, scorer: Scorer, plan: Plan, tolerance: float | None) -> Found:
    """Score both ends of all curves, the tuned model first, and search."""
    scorer.total = plan.evaluations
    for state in (TUNED, *search.ends):
        for split in SPLITS:
            scorer.score(split, state, "ends of curves")
    return search.run(scorer, plan, tolerance)


def _write(
    asked: Asked, stage: Stage, scorer: Scorer, row: Mapping[str, Any], models: tuple[Model, torch.nn.Module, Model]
) -> dict[str, Any]:
    """Write what was chosen: a checkpoint with the same steps as the live model had."""
    base, start, tuned = models
    state = scorer.states[row["state"]]
    steps = [plain_step(step, start, base) for step in state.steps]
    assert asked.write is not None
    live = scorer.score("held-out", state)
    found = write_chosen(asked.write, stage, live, tuned, steps, force=asked.force)
    if not found["same_scores"]:
        both = ", ".join(f"{row['task']} {row['written']:.6g} against {row['live']:.6g}" for row in found["held_out"])
        stage.notes.append(
            f"{asked.write} does not score as the live model did ({both}); weights that are computed, not taken from "
            "the base, are rounded to the stored dtype when they are written"
        )
    return found


def plain_step(step: Edit, start: torch.nn.Module, base: Model) -> dict[str, Any]:
    """Return a step as a recipe has it, with the user's reference to the base in place of its copy in memory."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(v) for name, v in value.items()}
        return base if value is start else value

    return {step.name: {name: plain(getattr(step, name)) for name in step.model_fields_set}}
