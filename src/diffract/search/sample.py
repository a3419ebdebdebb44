"""Text as batches of tokens, what a model needs for it in bits, and the gradients of that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from diffract.errors import SelectionError, printable
from diffract.evaluate import Subject, Task
from diffract.evaluate.scoring import Row, windows
from diffract.evaluate.tasks import MultipleChoice, Piece, Question

SAMPLE_TOKENS = 1 << 16
"""Tokens of sample text."""

BATCH_TOKENS = 4096
"""Tokens that are computed at once, padding included."""


@dataclass(frozen=True)
class Batch:
    """Sequences, padded on the right.

    Attributes:
        ids: Tokens, (b, t + 1).
        known: Which of the first t tokens are no padding, (b, t).
        scored: Which of the last t tokens count as predictions, (b, t).
    """

    ids: Tensor
    known: Tensor
    scored: Tensor


def task_texts(task: Task) -> list[str]:
    """Return the texts of a task's items: of questions with their answer.

    Raises:
        SelectionError: The task's items are not known as text.
    """
    found = []
    for item in task.items:
        match item:
            case Piece():
                found.append(item.text)
            case Question():
                found.append(f"{item.prompt} {item.answer}")
            case MultipleChoice():
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
        batches: The tokens of the text, each predicted once.
        size_bytes: The length of the text.
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
    return Sample(tuple(batches(rows, subject.device)), size)


def batches(rows: Sequence[Row], device: torch.device) -> list[Batch]:
    """Return rows as batches of about ``BATCH_TOKENS`` tokens, padding included."""
    # Neighbours of one length need little padding.
    return [_batch(part, device) for part in _parts(sorted(rows, key=lambda row: len(row.ids)))]


def _parts(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield neighbours that together hold about ``BATCH_TOKENS`` tokens, padding included."""
    part: list[Row] = []
    for row in rows:
        # Rows come by length, so that this one is as long as the part will be padded to.
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


def sum_of_bits(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Return the bits that a model needs for the tokens of a batch that count."""
    output = model(input_ids=batch.ids[:, :-1], attention_mask=batch.known.long(), use_cache=False)
    logits, targets = output.logits[batch.scored], batch.ids[:, 1:][batch.scored]
    # A sum of thousands of logarithms in 16 bits would lose what single heads change.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, targets, reduction="sum") / log(2)


@contextmanager
def gradients_of(model: torch.nn.Module, wanted: Iterable[Tensor]) -> Iterator[None]:
    """Ask for the gradients of some parameters alone."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = {id(parameter) for parameter in wanted}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in chosen)
        with torch.enable_grad():
            yield
    finally:
        for parameter, asked in before.items():
            parameter.requires_grad_(asked)
