"""Evaluate a model: scores of items, a summary, and a manifest; what a run folder holds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch

from diffract.errors import CheckpointError, RunError, printable
from diffract.evaluate.catalog import KINDS
from diffract.evaluate.model import Subject, has_adapters, model_digest, tokenizer_digest
from diffract.evaluate.scoring import BatchLimit, chunks
from diffract.evaluate.statistics import paired, summarise
from diffract.evaluate.tasks import VERSION, Item, Score, Task, score_table
from diffract.schemas import ITEM_SCORES
from diffract.settings import Progress
from diffract.stats import FEWEST_DOCUMENTS, holm
from diffract.store import MOST_BYTES, Cache, cache_folder, cache_key
from diffract.tables import Tables, new_manifest


def compare_scores(before: Tables, after: Tables) -> pl.DataFrame:
    """Return ``paired`` of two evaluations, and Holm's p-values over the tasks as ``p_holm``.

    Args:
        before: The tables of an evaluation.
        after: Those of another one on the same items; ``difference`` is its quality less the first one's.

    Raises:
        RunError: The tasks or their items are not the same.
    """
    tasks = [_task(row) for row in after.manifest["tasks"]]
    keys = {task.name: task.key for task in map(_task, before.manifest["tasks"])}
    if strange := [task.name for task in tasks if keys.get(task.name) != task.key]:
        raise RunError(
            f"{printable(', '.join(strange))}: not the same items in both evaluations. Evaluate both with the same "
            "tasks, split, limit, shots and data."
        )
    table = paired(before["items"], after["items"], tasks)
    return table.with_columns(pl.Series("p_holm", holm(table["p"].to_list()), dtype=pl.Float64))


def score(
    subject: Subject,
    tasks: Sequence[Task],
    settings: Mapping[str, Any],
    *,
    cache: bool = True,
    batch_tokens: int = 16_384,
    progress: Progress | None = None,
) -> Tables:
    """Score a model on tasks: the tables of an evaluation.

    Args:
        subject: The model.
        tasks: What it is scored on.
        settings: How tasks were chosen, for the manifest.
        cache: Use and keep scores.
        batch_tokens: Tokens that are computed at once, padding included.
        progress: Takes how far work has come.

    Raises:
        CheckpointError: The model cannot be evaluated.
    """
    begun = time.monotonic()
    notes: list[str] = [note for task in tasks for note in task.notes]
    with Cache(cache_folder(), most_bytes=MOST_BYTES) if cache else nullcontext() as store:
        run = Evaluator(subject, tasks, cache=store, batch_tokens=batch_tokens, notes=notes.append, progress=progress)
        items = run.scores()
    notes += _unasked(items, tasks)
    summary = summarise(items, tasks)
    notes += [
        f"{name}: no interval, as its items are parts of fewer than {FEWEST_DOCUMENTS} documents"
        for name in summary.filter(pl.col("low").is_null())["task"]
    ]
    manifest = new_manifest(
        "eval",
        models=[_described(subject, run.digests)],
        settings=dict(settings),
        seconds=round(time.monotonic() - begun, 3),
        tasks=[task.settings() for task in tasks],
        warnings=list(dict.fromkeys(notes)),
    )
    return Tables(manifest, {"items": items, "summary": summary})


def _described(subject: Subject, digests: tuple[str, str]) -> dict[str, Any]:
    return {
        "reference": subject.name,
        "digest": digests[0],
        "tokenizer": digests[1],
        "context": subject.context,
        "device": subject.device.type,
        "dtype": str(next(iter(subject.model.parameters())).dtype).removeprefix("torch."),
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
            return pl.concat([pl.DataFrame(schema=ITEM_SCORES), *tables])
        finally:
            self.subject.model.train(training)

    def _task_scores(self, task: Task) -> pl.DataFrame:
        """Return a task's scores; parts of equally long items are computed together."""
        subject = self.subject
        dtype = str(next(iter(subject.model.parameters())).dtype)
        model = [*self.digests, dtype, subject.device.type, subject.context, *subject.start]
        # A part is the unit of the cache: which items it holds must depend on nothing but the task.
        order = sorted(task.items, key=lambda item: (-item.length, item.id))
        scores: list[Score] = []
        for number, part in enumerate(chunks(order, PART)):
            # Parts take turns among processes: neighbours are of one length, so that all have about the same work.
            if number % self._place.count == self._place.rank:
                scores += self._part_scores(task, part, cache_key("scores", VERSION, PART, *model, task.key, number))
            self._done += len(part)
            if self.progress:
                self.progress(self._done, sum(len(t.items) for t in self.tasks), task.name)
        # Items come back in the order of the task, whichever process had them.
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
