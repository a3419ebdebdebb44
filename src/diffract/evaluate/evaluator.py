"""Scores of a model as it stands now; what was scored before is not scored again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import polars as pl

from diffract.cache import Cache, cache_key
from diffract.evaluate.batches import Budget, chunks
from diffract.evaluate.choices import score_choices
from diffract.evaluate.digests import has_adapters, model_digest, tokenizer_digest
from diffract.evaluate.exact import score_questions
from diffract.evaluate.harness import score_harness
from diffract.evaluate.processes import gather, place
from diffract.evaluate.subject import Subject
from diffract.evaluate.task import SCORES, VERSION, Item, Score, Task, score_table
from diffract.evaluate.text import score_texts

PART = 64
"""Items that are computed, kept and shared out among processes together."""

SCORERS: dict[str, Callable[[Subject, Any, Budget], list[Score]]] = {
    "bits": score_texts,
    "exact": score_questions,
    "choice": score_choices,
    "lm-eval": score_harness,
}

Progress = Callable[[float, float, str], None]
"""Called with the items done, all items, and the task."""


class Evaluator:
    """Scores a model as it stands now: its weights are digested at each call, so live edits are never confused.

    Attributes:
        digests: Of the model and of its tokenizer, as they were when ``scores`` was called last.
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
            batch_tokens: At once, padding included.
            notes: Takes what the user should know.
            progress: Takes how far work has come.
        """
        self.subject, self.tasks, self.cache, self.progress = subject, tuple(tasks), cache, progress
        self.budget = Budget(batch_tokens, notes)
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
            model = self._model_key()
            self._done = 0
            tables = [self._task_scores(task, model) for task in self.tasks]
            return pl.concat([pl.DataFrame(schema=SCORES), *tables])
        finally:
            self.subject.model.train(training)

    def _model_key(self) -> list[str | int]:
        """Return all that scores depend on but the task."""
        subject = self.subject
        dtype = str(next(iter(subject.model.parameters())).dtype)
        self.digests = model_digest(subject.model), tokenizer_digest(subject.tokenizer)
        return [*self.digests, dtype, subject.device.type, subject.context, *subject.start]

    def _task_scores(self, task: Task, model: list[str | int]) -> pl.DataFrame:
        """Return a task's scores; parts of equally long items are computed together."""
        order = sorted(task.items, key=lambda item: (-item.length, item.id))
        scores: list[Score] = []
        for number, part in enumerate(chunks(order, PART)):
            if number % self._place.count == self._place.rank:
                scores += self._part_scores(task, part, cache_key("scores", VERSION, PART, *model, task.key, number))
            self._tell(len(part), task)
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

    def _tell(self, count: int, task: Task) -> None:
        self._done += count
        if self.progress:
            self.progress(self._done, sum(len(t.items) for t in self.tasks), task.name)
