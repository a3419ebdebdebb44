"""Evaluate a model: scores of items, a summary, and a manifest; what a run folder holds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import torch

from diffract._version import __version__
from diffract.corpora import Split
from diffract.errors import CheckpointError, RunError, printable
from diffract.evaluate.catalog import KINDS, load_tasks
from diffract.evaluate.model import Subject, has_adapters, load_subject, model_digest, tokenizer_digest
from diffract.evaluate.scoring import BatchLimit, chunks
from diffract.evaluate.statistics import SUMMARY, holm, paired, summarise
from diffract.evaluate.tasks import SCORES, VERSION, Item, Score, Task, score_table
from diffract.settings import Progress
from diffract.store import Cache, cache_folder, cache_key
from diffract.tables import RunTables, load, refuse_existing, whole_folder, write


@dataclass(frozen=True)
class Evaluation(RunTables):
    """The tables of an evaluation.

    Attributes:
        items: One row per task and item.
        summary: One row per task: quality and its interval.
        manifest: Version, model, tasks, settings, warnings.
    """

    KINDS = ("eval",)
    SCHEMAS = {"items": SCORES, "summary": SUMMARY}  # noqa: RUF012

    items: pl.DataFrame
    summary: pl.DataFrame
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> list[Task]:
        """What was evaluated, without the items themselves."""
        return [_task(row) for row in self.manifest["tasks"]]

    def against(self, other: Evaluation) -> pl.DataFrame:
        """Return ``paired`` of another evaluation and this one, and the p-values adjusted for the number of tasks.

        ``difference`` is this one's quality less the other's; ``p_holm`` are Holm's p-values over the tasks.

        Raises:
            RunError: The tasks or their items are not the same.
        """
        keys = {task.name: task.key for task in other.tasks}
        if strange := [task.name for task in self.tasks if keys.get(task.name) != task.key]:
            raise RunError(
                f"{printable(', '.join(strange))}: not the same items in both evaluations. Evaluate both with the same "
                "tasks, split, limit, shots and data."
            )
        table = paired(other.items, self.items, self.tasks)
        return table.with_columns(pl.Series("p_holm", holm(table["p"].to_list()), dtype=pl.Float64))

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write a run folder.

        Raises:
            RunError: Something else is there, or it cannot be written.
        """
        with whole_folder(folder, force=force) as draft:
            write(self, draft)


def evaluate(
    ref: str | Path | Any,
    tasks: str | Sequence[str] = "math,code,text",
    *,
    split: Split = "held-out",
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: Any = None,
    batch_tokens: int = 16_384,
    cache: bool = True,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a model.

    Args:
        ref: A folder with a model of transformers, ``org/name@revision`` on the hub, an adapter, or a loaded model.
        tasks: Names, see ``load_tasks``.
        split: ``held-out`` to report, ``selection`` to choose by.
        data: A folder with a folder of files for each domain.
        limit: Items of each task at most.
        shots: Solved examples before each question.
        device: ``auto`` is CUDA where there is one.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``, see ``load_subject``.
        tokenizer: A reference, or a loaded one, where it is not beside the model.
        batch_tokens: Tokens of a batch at most, padding included.
        cache: Use and keep scores.
        output: Write a run folder.
        force: Replace an existing run folder.
        progress: Is told the items done, all items, and the name of the task.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    begun = time.monotonic()
    if output is not None:
        refuse_existing(output, force=force)
    chosen = load_tasks(tasks, split=split, data=data, limit=limit, shots=shots)
    given = own_device()
    subject = load_subject(ref, device=device if given is None else str(given), dtype=dtype, tokenizer=tokenizer)
    notes: list[str] = [note for task in chosen for note in task.notes]
    with Cache(cache_folder()) if cache else nullcontext() as store:
        run = Evaluator(subject, chosen, cache=store, batch_tokens=batch_tokens, notes=notes.append, progress=progress)
        items = run.scores()
    notes += _unasked(items, chosen)
    settings = {"split": split, "limit": limit, "shots": shots, "data": str(data) if data else None}
    model = _described(subject, run.digests)
    manifest = _manifest(model, chosen, settings, list(dict.fromkeys(notes)), time.monotonic() - begun)
    found = Evaluation(items, summarise(items, chosen), manifest)
    if output is not None and place().rank == 0:
        found.save(output, force=force)
    return found


def load_evaluation(folder: str | Path) -> Evaluation:
    """Read an evaluation's run folder.

    Raises:
        RunError: A file is missing or unreadable, or the folder holds another kind of run.
    """
    return load(folder, Evaluation)


def _described(subject: Subject, digests: tuple[str, str]) -> dict[str, Any]:
    return {
        "reference": subject.name,
        "digest": digests[0],
        "tokenizer": digests[1],
        "context": subject.context,
        "device": subject.device.type,
        "dtype": str(next(iter(subject.model.parameters())).dtype).removeprefix("torch."),
    }


def _manifest(
    model: dict[str, Any], tasks: Sequence[Task], settings: dict[str, Any], notes: Sequence[str], seconds: float
) -> dict[str, Any]:
    return {
        "diffract": __version__,
        "kind": "eval",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "settings": settings,
        "models": [model],
        "metrics": {},
        "tasks": [task.settings() for task in tasks],
        "warnings": list(notes),
    }


def _unasked(items: pl.DataFrame, tasks: Sequence[Task]) -> list[str]:
    """Return what to say of questions that were too long."""
    names = [task.name for task in tasks if task.kind == "exact"]
    lost = items.filter(pl.col("task").is_in(names) & pl.col("output").is_null())
    return [
        f"{name}: {count} prompts leave no room in the model's context; they count as wrong"
        for name, count in lost.group_by("task", maintain_order=True).len().iter_rows()
    ]


def _task(row: dict[str, Any]) -> Task:
    kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items() if k != "items"}
    return Task(**kept)


@dataclass(frozen=True)
class ProcessRank:
    """Which process this is.

    Attributes:
        rank: The number of this process, from 0 on; the first one writes and prints.
        count: How many processes there are.
    """

    rank: int = 0
    count: int = 1


def place() -> ProcessRank:
    """Return which process this is; those that ``accelerate launch`` or ``torchrun`` started find each other first."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return ProcessRank()
    state = _state()
    return ProcessRank(state.process_index, state.num_processes)


def own_device() -> torch.device | None:
    """Return the device that a launcher gave this process, or ``None`` for the only process."""
    return None if int(os.environ.get("WORLD_SIZE", "1")) <= 1 else _state().device


def gather(values: Sequence[Any], where: ProcessRank) -> list[Any]:
    """Return the values of all processes, in the order of their ranks."""
    if where.count == 1:
        return list(values)
    from accelerate.utils import gather_object

    return gather_object(list(values))


def _state() -> Any:
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise CheckpointError("several processes need the accelerate package: pip install accelerate.") from error
    return PartialState(cpu=not torch.cuda.is_available())


PART = 64
"""Items that are computed, kept and shared out among processes together."""

SCORERS = {kind.name: kind.score for kind in KINDS}
"""What scores items, by the kind of their task."""


class Evaluator:
    """Scores a model as it stands now: its weights are digested at each call, so live edits are never confused.

    Attributes:
        digests: Digests of the model and of its tokenizer, as they were when ``scores`` was called last.
    """

    def __init__(
        self,
        subject: Subject,
        tasks: Sequence[Task],
        *,
        cache: Cache | None = None,
        batch_tokens: int = 16_384,
        notes: Callable[[str], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Take a model and tasks; nothing is computed yet.

        Args:
            subject: The model; its weights may change between calls of ``scores``.
            tasks: What it is scored on.
            cache: Where scores are kept, by all that they depend on.
            batch_tokens: Tokens of a batch at most, padding included.
            notes: Takes what the user should know.
            progress: Is told the items done, all items, and the name of the task.
        """
        self.subject, self.tasks, self.cache, self.progress = subject, tuple(tasks), cache, progress
        self.budget = BatchLimit(batch_tokens, notes)
        self.digests = ("", "")
        self._place = place()
        if cache and has_adapters(subject.model):
            self.cache = None
            self.budget.note("scores are not kept: the model holds adapters; merge them first")

    def scores(self) -> pl.DataFrame:
        """Return the scores of all items of all tasks, in their order; a model in training is not while it is scored.

        Raises:
            CheckpointError: The model cannot be evaluated: its numbers are not finite, memory does not suffice, or the
                tokenizer is not its own.
        """
        training = self.subject.model.training
        self.subject.model.eval()
        try:
            self.digests = model_digest(self.subject.model), tokenizer_digest(self.subject.tokenizer)
            self._done = 0
            tables = [self._task_scores(task) for task in self.tasks]
            return pl.concat([pl.DataFrame(schema=SCORES), *tables])
        finally:
            self.subject.model.train(training)

    def _task_scores(self, task: Task) -> pl.DataFrame:
        """Return a task's scores; parts of equally long items are computed together."""
        subject = self.subject
        dtype = str(next(iter(subject.model.parameters())).dtype)
        model = [*self.digests, dtype, subject.device.type, subject.context, *subject.start]
        order = sorted(task.items, key=lambda item: (-item.length, item.id))
        scores: list[Score] = []
        for number, part in enumerate(chunks(order, PART)):
            if number % self._place.count == self._place.rank:
                scores += self._part_scores(task, part, cache_key("scores", VERSION, PART, *model, task.key, number))
            self._done += len(part)
            if self.progress:
                self.progress(self._done, sum(len(t.items) for t in self.tasks), task.name)
        every = {score.item: score for score in gather(scores, self._place)}
        order_of = {item.id: i for i, item in enumerate(task.items)}
        return score_table(task.name, sorted(every.values(), key=lambda s: order_of.get(s.item, 0)))

    def _part_scores(self, task: Task, part: Sequence[Item], key: str) -> list[Score]:
        found = self.cache.get(key) if self.cache else None
        if found is not None:
            return [Score(*row) for row in found.select("item", "value", "weight", "output").iter_rows()]
        scores = SCORERS[task.kind](self.subject, part, self.budget)
        if self.cache:
            self.cache.put(key, score_table(task.name, scores))
        return scores
