"""Sample text for the cheaper orders, in batches of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffract.errors import SelectionError, printable
from diffract.evaluate import Subject, Task
from diffract.evaluate.likelihood import Row
from diffract.evaluate.task import Choice, Piece, Question
from diffract.evaluate.text import windows

SAMPLE_TOKENS = 1 << 16
"""Tokens of sample text."""

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Batch:
    """Sequences, padded on the right.

    Attributes:
        ids: (b, t + 1) tokens.
        known: (b, t) which of the first t are no padding.
        scored: (b, t) which of the last t count as predictions.
    """

    ids: Tensor
    known: Tensor
    scored: Tensor


def task_texts(task: Task) -> list[str]:
    """Return the texts of a task's items: of questions with their answer.

    Raises:
        SelectionError: Its items are not known as text.
    """
    found = []
    for item in task.items:
        match item:
            case Piece():
                found.append(item.text)
            case Question():
                found.append(f"{item.prompt} {item.answer}")
            case Choice():
                found.append(f"{item.prompt} {item.options[item.right]}")
            case _:
                break
    if not found:
        raise SelectionError(
            f"task {printable(task.name)!r} has no text to sample. Leave out orders first-order and activation, "
            "or name a task of text."
        )
    return found


@dataclass(frozen=True)
class Sample:
    """Sample text as batches.

    Attributes:
        batches: Its tokens, each predicted once.
        size_bytes: Its length.
    """

    batches: tuple[Batch, ...]
    size_bytes: int


def take_sample(subject: Subject, texts: Sequence[str], *, tokens: int = SAMPLE_TOKENS) -> Sample:
    """Return the first texts that together have so many tokens, one at least."""
    rows: list[Row] = []
    size = 0
    for text in texts:
        rows += windows([*subject.start, *subject.encode([text])[0]], subject.context, "sample")
        size += len(text.encode())
        if sum(row.scored for row in rows) >= tokens:
            break
    rows.sort(key=lambda row: len(row.ids))
    return Sample(tuple(_batch(part, subject.device) for part in _parts(rows)), size)


def _parts(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield neighbours that together hold about ``BATCH_TOKENS`` tokens, padding included."""
    part: list[Row] = []
    for row in rows:
        if part and (len(part) + 1) * len(row.ids) > BATCH_TOKENS:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _batch(rows: list[Row], device: torch.device) -> Batch:
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    known, scored = (torch.zeros(len(rows), longest - 1, dtype=torch.bool) for _ in range(2))
    for i, row in enumerate(rows):
        length = len(row.ids)
        ids[i, :length] = torch.as_tensor(row.ids)
        known[i, : length - 1] = True
        scored[i, length - 1 - row.scored : length - 1] = True
    return Batch(ids.to(device), known.to(device), scored.to(device))
