"""The one loop of every search: for each curve, for each point: edit, score; choose; report."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import torch

from diffract.checkpoints import open_checkpoint
from diffract.edits.directions import Decompositions
from diffract.edits.edit import Edit
from diffract.edits.to_files import apply
from diffract.errors import SelectionError
from diffract.evaluate import Evaluator, load_subject, summarise
from diffract.evaluate.model import model_digest, tokenizer_digest
from diffract.run import Run
from diffract.search.certificate import CERTIFICATE, Chosen, Claim, certify
from diffract.search.plan import (
    SPLITS,
    UNCHANGED,
    Estimate,
    Point,
    SearchCurve,
    SearchPlan,
    Which,
    cost,
    make_plan,
    parse_budget,
)
from diffract.search.scorer import Rows, Scorer, seconds_of
from diffract.search.stage import Model, SearchRequest, Stage, finish, scratch, set_up, working
from diffract.store import refuse_existing
from diffract.tables import Tables, new_manifest

PER_ITEM = 1e-9
"""Relative difference of a value that still counts as the same: sums in another order, no other weights."""

JUDGED_ON_TRAINING = (
    "judged without --beside: on the text that training minimised every edit can only lose; name text of the same "
    "domain that training did not see the like of"
)

NUMBERS = ("quality", "low", "high", "gain", "gain_low", "gain_high", "p")
"""What tables say of a chosen point in each split."""


class QualitySearch(ABC):
    """What one kind of search is about: its curves, which edits make their points, and what goes into its tables.

    Attributes:
        kind: The name of the kind of run.
        stage: The live model, and what was asked.
        models: The loaded models, by the names that the request has for them.
        curves: The curves.
        ends: The points at the ends of all curves, beside the live model itself.
        ends_called: What is said while these are measured.
        effects: How many single units are measured alone, if the budget suffices.
    """

    kind: str
    stage: Stage
    models: Mapping[str, torch.nn.Module]
    curves: Sequence[SearchCurve]
    ends: Sequence[Point]
    ends_called: str = "ends of curves"
    effects: int = 0

    @abstractmethod
    def told(self) -> dict[str, Any]:
        """Return the settings that this kind alone has, as a manifest keeps them."""

    def learn(self, scorer: Scorer, *, effects: bool) -> None:  # noqa: B027 (most kinds know their curves beforehand)
        """Find out what points depend on, such as the effects of single units, if these are planned."""

    @abstractmethod
    def point(self, curve: SearchCurve, at: float) -> Point:
        """Return the model at a place on a curve."""

    @abstractmethod
    def tables(self, scorer: Scorer, curves: Sequence[SearchCurve], chosen: Rows) -> dict[str, pl.DataFrame]:
        """Return the tables, once all points of the curves are scored."""

    def choose(self, scorer: Scorer, curves: Sequence[SearchCurve]) -> Rows:
        """Return rows of what is chosen of each curve, with numbers of both splits."""
        if "beside" not in self.stage.roles.values():
            self.stage.notes.append(JUDGED_ON_TRAINING)
        return choose_points(scorer, curves, self.stage.asked.tolerance)

    def best(self, chosen: Rows) -> Mapping[str, Any] | None:
        """Return the row of what is chosen of all curves, if there is one."""
        return winner(chosen, self.stage.asked.choose_by, self.far)

    def claims(self) -> dict[str, Claim]:
        """Return what each task says of the checkpoint that is chosen: the first decides."""
        roles = self.stage.roles
        first = next(iter(roles))
        return {name: "target" if name == first else "kept" if roles[name] == "kept" else "sentinel" for name in roles}

    def learned_on(self) -> Mapping[str, Sequence[str]]:
        """Return the documents that something was learned on, by task; choosing is no learning."""
        return {}

    def far(self, row: Mapping[str, Any]) -> float:
        """Return how far a chosen point goes."""
        return row["fraction"]


def run_search(asked: SearchRequest, open_search: Callable[[Stage], QualitySearch]) -> Run | Estimate:
    """Search, and write what was found.

    Args:
        asked: What is asked of every search.
        open_search: Makes the search, once the live model is loaded.

    Returns:
        The run; of a dry run what it would cost.
    """
    begun = time.monotonic()
    if asked.write is not None and not asked.dry_run:
        refuse_existing(asked.write, force=asked.force)
    with working(asked) as cache, scratch(cache) as folder:
        stage = set_up(asked, Decompositions(folder))
        search = open_search(stage)
        stage.notes += stage.live.bench.notes
        stage.live.bench.permissions.check(open_checkpoint(model).config for model in search.models.values())
        if asked.write is not None and all(curve.control for curve in search.curves):
            raise SelectionError("only controls are searched, of which none is chosen: there is nothing to write.")
        plan, seconds_each = _planned(stage, search)
        if asked.dry_run:
            return Estimate(
                evaluations=plan.counts,
                seconds_each=seconds_each,
                seconds=cost(plan.counts, seconds_each),
                left_out=plan.left_out,
            )
        scorer = stage.scorer(cache)
        scorer.total = plan.evaluations
        for point in (UNCHANGED, *search.ends):
            for split in asked.splits:
                scorer.score(split, point, search.ends_called)
        search.learn(scorer, effects=plan.effects)
        curves = {
            number: replace(curve, points=tuple(search.point(curve, at) for at in places))
            for number, curve in enumerate(search.curves)
            if (places := plan.places.get((asked.splits[0], number)))
        }
        chosen: Rows = []
        # The selection split is done whole, and points are chosen, before any curve is looked at on the held-out one.
        for split in asked.splits:
            for number, curve in curves.items():
                places = plan.places.get((split, number), ())
                for point in curve.points:
                    if point.at in places:
                        scorer.score(split, point, curve.name)
            if split == "selection":
                chosen = search.choose(scorer, list(curves.values()))
        frames = search.tables(scorer, list(curves.values()), chosen)
        told: dict[str, Any] = {"evaluations": scorer.done, "left_out": list(plan.left_out)}
        seconds = round(time.monotonic() - begun, 3)
        if "selection" in asked.splits:
            best = search.best(chosen)
            told |= {"chosen": best, "written": _written(stage, search, scorer, best)}
        if told.get("written"):
            cost_of = {"evaluations": scorer.done, "seconds": seconds}
            told["written"]["certificate"] = _certified(search, scorer, chosen, cost_of | told)
        tables = Tables(_manifest(stage, search, seconds=seconds, **told), frames)
        finish(tables, asked, cache)
    return Run(tables)


def _planned(stage: Stage, search: QualitySearch) -> tuple[SearchPlan, dict[Any, float]]:
    """Return what will be evaluated, and how long one evaluation takes where that is asked for."""
    budget = parse_budget(stage.asked.budget)
    timed = stage.asked.dry_run or budget.seconds is not None
    seconds_each = seconds_of(stage.evaluators(None)) if timed else {}
    plan = make_plan(
        search.curves,
        ends=1 + len(search.ends),
        effects=search.effects,
        splits=stage.asked.splits,
        budget=budget,
        seconds_each=seconds_each,
    )
    return plan, seconds_each


def _manifest(stage: Stage, search: QualitySearch, **told: Any) -> dict[str, Any]:
    """Return the manifest of a search, once all is done: what can be a note is known, and no model is edited."""
    return new_manifest(
        search.kind,
        models=models_told(stage, search),
        settings=stage.asked.told() | search.told(),
        tokenizer=tokenizer_digest(stage.subject.tokenizer),
        tasks={split: [task.settings() for task in tasks] for split, tasks in stage.tasks.items()},
        warnings=list(dict.fromkeys([*stage.notes, *stage.live.bench.permissions.unneeded()])),
        **told,
    )


def models_told(stage: Stage, search: QualitySearch) -> list[dict[str, Any]]:
    """Return what a manifest says of the models of a search."""
    models = []
    for name, model in search.models.items():
        given = stage.asked.models[name]
        reference = type(given).__name__ if isinstance(given, torch.nn.Module) else str(given)
        role = "base" if name == "base" else "tuned"
        models.append({"model": name, "role": role, "reference": reference, "digest": model_digest(model)})
    return models


def choose_points(scorer: Scorer, curves: Iterable[SearchCurve], tolerance: float | None) -> Rows:
    """Return two rows for each curve: its best point and the furthest without loss, with numbers of both splits.

    The task that is first decides. What is chosen is scored on the held-out split, if it was not yet.
    """
    found = []
    for curve in curves:
        gains = [scorer.rows("selection", point)[0] for point in curve.points]
        chosen: dict[Which, Point] = {
            "best": best_point(curve.points, gains),
            "without-loss": furthest_without_loss(curve.points, gains, tolerance),
        }
        for which, point in chosen.items():
            row = {"task": gains[0]["task"], **point.labels, "which": which, "state": scorer.number(point)}
            row["control"] = curve.control
            for split in SPLITS:
                scorer.score(split, point, split)
                numbers, prefix = scorer.rows(split, point)[0], split.replace("-", "_")
                row |= {f"{prefix}_{name}": numbers[name] for name in NUMBERS}
            found.append(row)
    return found


def best_point(points: Sequence[Point], gains: Sequence[Mapping[str, Any]]) -> Point:
    """Return the point of the highest gain, of equal ones the nearest to the tuned model; that one gains 0."""
    pairs = zip(points, gains, strict=True)
    # The point where nothing is edited takes part: where all lose, nothing is the best edit.
    return max(pairs, key=lambda pair: (pair[1]["gain"], -pair[0].at))[0]


def furthest_without_loss(
    points: Sequence[Point], gains: Sequence[Mapping[str, Any]], tolerance: float | None
) -> Point:
    """Return the furthest point without loss; the tuned model has none.

    Without a tolerance that is: no loss is shown, the paired interval of the gain reaches 0 (its upper end is not
    below). With a tolerance t: a loss of more than t is excluded, the interval's lower end is at least -t. Where there
    is no interval nothing is excluded: the gain itself must not be below 0.
    """

    def is_without_loss(gain: Mapping[str, Any]) -> bool:
        if gain["gain_low"] is None:
            # Without an interval only the gain itself can be asked.
            return gain["gain"] >= 0
        return gain["gain_high"] >= 0 if tolerance is None else gain["gain_low"] >= -tolerance

    pairs = zip(points, gains, strict=True)
    return max((p for p, gain in pairs if p.at == 0 or is_without_loss(gain)), key=lambda p: p.at)


def winner(rows: Iterable[Mapping[str, Any]], which: str, far: Callable[[Mapping[str, Any]], float]) -> Any:
    """Return the row that is chosen of all curves that are no controls, by the selection split; the first of equals.

    ``best`` has the highest gain, ``without-loss`` goes furthest.
    """
    measure = far if which == "without-loss" else lambda row: row["selection_gain"]
    return max((row for row in rows if row["which"] == which and not row["control"]), key=measure, default=None)


def _written(
    stage: Stage, search: QualitySearch, scorer: Scorer, row: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Write what was chosen, where that is asked for: a checkpoint with the same edits as the live model had.

    Returns:
        For the manifest: where it is, whether every item's score is the live model's, and both qualities.
    """
    asked, tasks = stage.asked, stage.tasks["held-out"]
    if asked.write is None:
        return None
    if row is None:
        stage.notes.append(f"{asked.write} is not written: the budget sufficed for controls alone")
        return None
    point, base = scorer.points[row["state"]], asked.models["base"]
    recipe = {
        "model": asked.models["tuned"],
        "steps": [plain_step(step, search.models["base"], base) for step in point.steps],
        **({} if asked.architecture is None else {"architecture": str(asked.architecture)}),
        "allow": asked.allow,
    }
    apply(recipe, asked.write, force=asked.force)
    subject = load_subject(asked.write, device=asked.device, dtype=asked.dtype, tokenizer=asked.tokenizer)
    live, found = scorer.score("held-out", point), Evaluator(subject, tasks).scores()
    qualities = [summarise(items, tasks, resamples=1)["quality"].to_list() for items in (live, found)]
    rows = [{"task": task.name, "live": a, "written": b} for task, a, b in zip(tasks, *qualities, strict=True)]
    same = same_scores(live, found)
    if not same:
        both = ", ".join(f"{row['task']} {row['written']:.6g} against {row['live']:.6g}" for row in rows)
        stage.notes.append(
            f"{asked.write} does not score as the live model did ({both}); weights that are computed, not taken from "
            "the base, are rounded to the stored dtype when they are written"
        )
    return {"folder": str(asked.write), "same_scores": same, "held_out": rows, "items": found}


def _certified(search: QualitySearch, scorer: Scorer, chosen: Rows, told: Mapping[str, Any]) -> str | None:
    """Write the certificate of the checkpoint that was written, and return where; say it where there is none."""
    stage, written = search.stage, told["written"]
    learned = {"models": models_told(stage, search), "settings": stage.asked.told() | search.told()}
    versions = {"torch": torch.__version__, "recipe": told["chosen"]}
    refused = certify(
        written["folder"],
        scorer,
        Chosen(
            claims=search.claims(),
            items=written.pop("items"),
            controls=[row for row in chosen if row["control"]],
            texts=search.learned_on(),
            told={**learned, **versions, "cost": {k: told[k] for k in ("evaluations", "seconds")}},
        ),
    )
    stage.notes += [f"no certificate: {reason}" for reason in refused]
    return None if refused else str(Path(written["folder"]) / CERTIFICATE)


def same_scores(one: pl.DataFrame, other: pl.DataFrame) -> bool:
    """Whether two tables of scores agree, item by item, to rounding."""
    both = one.join(other, on=["task", "item"], how="full", suffix="_b")
    near = (pl.col("value") - pl.col("value_b")).abs() <= PER_ITEM * pl.col("value").abs()
    return bool(both.select(near.fill_null(value=False).all()).item())


def plain_step(step: Edit, start: torch.nn.Module, base: Model) -> dict[str, Any]:
    """Return a step as a recipe has it, with the user's reference to the base in place of its copy in memory."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(v) for name, v in value.items()}
        return base if value is start else value

    return {step.name: {name: plain(getattr(step, name)) for name in step.model_fields_set}}
