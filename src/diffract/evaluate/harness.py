"""Tasks of lm-evaluation-harness, on a model in memory."""

from __future__ import annotations

from collections.abc import Sequence

from diffract.errors import CheckpointError
from diffract.evaluate.batches import Budget
from diffract.evaluate.subject import Subject
from diffract.evaluate.task import Harness, Score


def score_harness(subject: Subject, tasks: Sequence[Harness], budget: Budget) -> list[Score]:
    """Return the scores of a task's items."""
    raise CheckpointError("lm-evaluation-harness: not yet")
