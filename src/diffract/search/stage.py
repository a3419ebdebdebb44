"""What a search works with: tasks of both splits, the live model, and others in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffract.corpora import Split
from diffract.edits.live import LiveModel
from diffract.errors import CheckpointError, RunError, printable
from diffract.evaluate import Evaluator, Subject, Task, load_subject, load_tasks
from diffract.evaluate.model import model_digest, tokenizer_digest
from diffract.search.plan import SPLITS, Budget, Curve, Estimate, Plan, Point, Sketch, cost, make_plan
from diffract.search.scorer import Scorer, chosen_points, seconds_of
from diffract.settings import Progress
from diffract.store import Cache, held, refuse_existing, whole_folder
from diffract.tables import Tables, new_manifest, write

Model = str | Path | torch.nn.Module
"""A folder with a model of transformers, ``org/name@revision`` on the hub, or a loaded model."""


@dataclass(frozen=True)
class How:
    """How models are loaded and evaluated.

    Attributes:
        eval: Tasks, as ``diffract.evaluate.load_tasks`` reads them.
        data: A folder with a folder of files for each domain.
        limit: Items of each task at most, in each split.
        shots: Solved examples before each question.
        device: Where the model is evaluated.
        dtype: What it is computed in.
        tokenizer: Where it is not beside the model.
        architecture: A JSON file that describes the model.
        batch_tokens: Evaluated at once.
    """

    eval: str | Sequence[str]
    data: str | Path | None = None
    limit: int | None = None
    shots: int = 0
    device: str = "auto"
    dtype: str = "auto"
    tokenizer: Any = None
    architecture: str | Path | None = None
    batch_tokens: int = 16_384

    def tasks(self, splits: Sequence[Split]) -> dict[Split, list[Task]]:
        """Return the tasks of splits.

        Raises:
            DiffractError: One cannot be loaded.
        """
        return {
            split: load_tasks(self.eval, split=split, data=self.data, limit=self.limit, shots=self.shots)
            for split in splits
        }

    def settings(self) -> dict[str, Any]:
        """Return them as a manifest keeps them."""
        plain = self.eval if isinstance(self.eval, str) else ",".join(self.eval)
        kept = {"limit": self.limit, "shots": self.shots, "device": self.device, "dtype": self.dtype}
        return {"eval": plain, "data": str(self.data) if self.data else None, **kept}


@dataclass
class Stage:
    """A loaded model that is searched, and its tasks.

    Attributes:
        how: How it was loaded.
        subject: It.
        live: Changes it.
        tasks: For each split.
        notes: What the user should know.
    """

    how: How
    subject: Subject
    live: LiveModel
    tasks: Mapping[Split, Sequence[Task]]
    notes: list[str]

    def evaluators(
        self, cache: Cache | None, progress: Callable[[float, float, str], None] | None = None
    ) -> dict[Split, Evaluator]:
        """Return what scores the model on each split."""
        return {
            split: Evaluator(
                self.subject,
                tasks,
                cache=cache,
                batch_tokens=self.how.batch_tokens,
                notes=self.notes.append,
                progress=progress,
            )
            for split, tasks in self.tasks.items()
        }

    def scorer(self, cache: Cache | None, progress: Progress | None) -> Scorer:
        """Return what scores states of the model."""
        told: list[Scorer] = []

        def tell(done: float, total: float, _task: str) -> None:
            told[0].tell(done / max(total, 1))

        told.append(Scorer(self.live, self.evaluators(cache, tell), self.tasks, progress=progress))
        return told[0]


def set_up(model: Model, how: How, splits: Sequence[Split] = SPLITS) -> Stage:
    """Load the model that is searched, and the tasks of splits.

    Raises:
        DiffractError: A task or the model cannot be loaded.
    """
    tasks = how.tasks(splits)
    subject = load_subject(model, device=how.device, dtype=how.dtype, tokenizer=how.tokenizer)
    notes = list(dict.fromkeys(note for own in tasks.values() for task in own for note in task.notes))
    return Stage(how, subject, LiveModel(subject.model, architecture=how.architecture), tasks, notes)


def in_memory(model: Model, stage: Stage) -> torch.nn.Module:
    """Return another model on the CPU, whose weights edits of the live one read.

    Raises:
        DiffractError: It cannot be loaded.
    """
    if isinstance(model, torch.nn.Module):
        return model
    return load_subject(model, device="cpu", dtype=stage.how.dtype, tokenizer=stage.subject.tokenizer).model


def of_same_vocabulary(model: Model, stage: Stage) -> torch.nn.Module:
    """Return another model on the CPU that can be mixed with the live one.

    A loaded model has no tokenizer, and is taken to have the same.

    Raises:
        CheckpointError: It cannot be loaded, or has another tokenizer: a mixture of both would make no sense.
    """
    if isinstance(model, torch.nn.Module):
        return model
    found = load_subject(model, device="cpu", dtype=stage.how.dtype, tokenizer=stage.how.tokenizer)
    if found.tokenizer.get_vocab() != stage.subject.tokenizer.get_vocab():
        raise CheckpointError(
            f"{printable(model)} and {printable(stage.subject.name)} have different tokenizers: their tokens do not "
            "mean the same. Take models of one vocabulary, or say with --tokenizer which one is right for all."
        )
    return found.model


def described(name: str, role: str, reference: Model, model: torch.nn.Module) -> dict[str, Any]:
    """Return what a manifest says of a model; it must be as it was loaded."""
    shown = type(reference).__name__ if isinstance(reference, torch.nn.Module) else str(reference)
    return {"model": name, "role": role, "reference": shown, "digest": model_digest(model)}


def manifest(
    kind: str, stage: Stage, models: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], **found: Any
) -> dict[str, Any]:
    """Return the manifest of a search."""
    return new_manifest(
        kind,
        models=models,
        settings=dict(settings),
        tokenizer=tokenizer_digest(stage.subject.tokenizer),
        tasks={split: [task.settings() for task in tasks] for split, tasks in stage.tasks.items()},
        warnings=list(dict.fromkeys(stage.notes)),
        **found,
    )


KEPT = "cache"
"""Subfolder of a finished run with the scores, for another search into the same folder."""


@contextmanager
def working(output: str | Path | None, *, force: bool) -> Iterator[Cache | None]:
    """Yield a cache beside the run folder that will be written; nothing where none will be.

    A search that was killed leaves it, and goes on from it when it is started again. One that replaces a finished run
    begins with that run's scores: they count only where weights, task and settings are the same.

    Raises:
        RunError: The folder exists, or another process is searching for it.
    """
    if output is None:
        yield None
        return
    refuse_existing(output, force=force)
    folder, before = work_folder(output), Path(output) / KEPT
    if before.is_dir() and not folder.exists():
        shutil.copytree(before, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder) as free:
        if not free:
            raise RunError(f"another process is searching into {str(folder)!r}. Wait for it, or write elsewhere.")
        with Cache(folder) as cache:
            yield cache


def work_folder(output: str | Path) -> Path:
    """Return where an unfinished search is."""
    return Path(output).with_name(Path(output).name + ".work")


def finish(tables: Tables, output: str | Path, cache: Cache | None, *, force: bool) -> None:
    """Write the run folder, with the scores in it, and remove the one for work."""
    with whole_folder(output, force=force) as draft:
        write(tables, draft)
        if cache is not None:
            cache.close()
            shutil.copytree(cache.path.parent, draft / KEPT)
    shutil.rmtree(work_folder(output), ignore_errors=True)


Rows = list[dict[str, Any]]


def planned(
    stage: Stage, sketches: Sequence[Sketch], *, ends: int, effects: int = 0, budget: Budget, dry_run: bool
) -> tuple[Plan, Estimate | None]:
    """Return what will be evaluated, and of a dry run how long it takes.

    Raises:
        SelectionError: The budget does not suffice for anything.
    """
    timed = dry_run or budget.seconds is not None
    seconds = seconds_of(stage.evaluators(None)) if timed else {}
    splits = tuple(stage.tasks)
    plan = make_plan(sketches, ends=ends, effects=effects, splits=splits, budget=budget, seconds_each=seconds)
    return plan, Estimate(plan.counts, seconds, cost(plan.counts, seconds), plan.left_out) if dry_run else None


def build(sketches: Sequence[Sketch], plan: Plan, point_of: Callable[[Sketch, float], Point]) -> list[Curve]:
    """Return the curves that a plan keeps something of.

    Args:
        sketches: Of the curves.
        plan: Which points are kept; both ends always are.
        point_of: Makes the point of a sketch at a place.
    """
    found = []
    for number, sketch in enumerate(sketches):
        inner = plan.points.get(("selection", number), ())
        if inner or len(sketch.at) == 2:
            places = [sketch.at[0], *(sketch.at[i] for i in inner), sketch.at[-1]]
            found.append(Curve(sketch, tuple(point_of(sketch, at) for at in places)))
    return found


def measure(
    scorer: Scorer, sketches: Sequence[Sketch], curves: Sequence[Curve], plan: Plan, tolerance: float | None
) -> tuple[Rows, Rows]:
    """Score curves; return rows of their points in both splits, and of what is chosen.

    The selection split is done whole before the held-out one is looked at.
    """
    for curve in curves:
        for point in curve.points:
            scorer.score("selection", point.state, _name(curve))
    chosen = chosen_points(scorer, curves, tolerance)
    for number, sketch in enumerate(sketches):
        wanted = {sketch.at[i] for i in plan.points.get(("held-out", number), ())}
        for curve in (c for c in curves if c.sketch is sketch):
            for point in (p for p in curve.points if p.at in wanted):
                scorer.score("held-out", point.state, _name(curve))
    return list(_rows(scorer, curves)), chosen


def _rows(scorer: Scorer, curves: Sequence[Curve]) -> Iterator[dict[str, Any]]:
    for curve in curves:
        for point in curve.points:
            for split in SPLITS:
                if scorer.scored(split, point.state):
                    yield from ({**point.labels, **row} for row in scorer.rows(split, point.state))


def _name(curve: Curve) -> str:
    return " ".join(str(value) for value in curve.sketch.labels.values() if isinstance(value, str))
