"""What rewinding heads would do, predicted without measuring each: from one backward or one forward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import log
from typing import Any

import torch
from torch import Tensor

from diffract.edits.bench import Other
from diffract.edits.draft import everything, together
from diffract.edits.heads import TensorPart, Units
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
    rows.sort(key=lambda row: len(row.ids))  # neighbours of one length need little padding
    return Sample(tuple(_batch(part, subject.device) for part in _parts(rows)), size)


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


def first_order_gains(model: torch.nn.Module, base: Other, units: Units, sample: Sample) -> dict[str, float]:
    """Return for each head the gain in bits per byte that the loss's slope promises, positive where rewinding helps.

    With L(W) the bits that the model W needs for the sample, by its bytes, the first-order change of rewinding the
    parts P of a head is sum over P of <dL/dW[P], W0[P] - W1[P]> / owners(P), and the gain is its negative. A part with
    several owners, such as a shared key-value head, is split among them, so that the gains of all heads add up to the
    first-order gain of rewinding them all. Exact in the limit of small changes; curvature is left out.

    Args:
        model: The tuned model W1, in evaluation mode; its gradients are empty afterwards.
        base: The base W0.
        units: The heads.
        sample: The text that the loss is of.

    Source: the first-order term of Taylor's formula, as in Molchanov et al. 2017.
    """
    by_tensor: dict[str, list[TensorPart]] = defaultdict(list)
    for part in units.parts:
        by_tensor[part.tensor].append(part)
    gains = dict.fromkeys(units.names, 0.0)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {name: parameters[name] for name in by_tensor}
    with gradients_of(model, wanted.values()):
        for batch in sample.batches:
            bits = sum_of_bits(model, batch)
            found = torch.autograd.grad(bits / sample.size_bytes, list(wanted.values()), allow_unused=True)
            for (name, parameter), slope in zip(wanted.items(), found, strict=True):
                if slope is None:
                    continue
                start = base.read(name, everything(tuple(parameter.shape))).to(parameter.device)
                start, end = together(start, parameter.detach())
                along = slope.to(start.dtype) * (start - end)
                for part in by_tensor[name]:
                    # Summed in 64 bits: the terms have both signs and nearly cancel.
                    share = -float(along[part.place].sum(dtype=torch.float64)) / len(part.owners)
                    for owner in part.owners:
                        gains[owner] += share
    return gains


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


def activation_changes(model: torch.nn.Module, base: Other, units: Units, sample: Sample) -> dict[str, float]:
    """Return for each head the root of the mean over tokens of the sum over its parts of ||D[P] x||^2.

    x is what the part's projection got as input in the tuned model, D = W1 - W0; of an output projection D[P] and x
    are the head's columns. The square of a part with several owners is divided by their number, as in ``head_delta``,
    of which this is the analogue with real input in place of white noise.

    Args:
        model: The tuned model W1, in evaluation mode.
        base: The base W0.
        units: The heads.
        sample: The text that is the input.

    Raises:
        SelectionError: The input of a projection cannot be seen.
    """
    by_tensor: dict[str, list[TensorPart]] = defaultdict(list)
    for part in units.parts:
        if part.counts:
            by_tensor[part.tensor].append(part)
    squares = dict.fromkeys(units.names, 0.0)
    seen: set[str] = set()

    def look(name: str, module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.add(name)
        weight = module.weight.detach()
        change = weight.float() - base.read(name, everything(tuple(weight.shape))).to(weight.device).float()
        x = inputs[0][batch.known].float()  # of the batch that runs: hooks are called from within the loop below
        for part in by_tensor[name]:
            rows, cols = part.place
            # Other modules than Linear, such as GPT-2's Conv1D, store their weight as (in, out).
            linear = isinstance(module, torch.nn.Linear)
            found = x[:, cols] @ change[part.place].T if linear else x[:, rows] @ change[part.place]
            square = float(torch.linalg.vector_norm(found, dtype=torch.float64).square())
            squares.update((owner, squares[owner] + square / len(part.owners)) for owner in part.owners)

    with ExitStack() as hooks, torch.no_grad():
        for name in by_tensor:
            module = model.get_submodule(name.rpartition(".")[0])
            hooks.callback(module.register_forward_pre_hook(partial(look, name)).remove)
        for batch in sample.batches:
            model(input_ids=batch.ids[:, :-1], attention_mask=batch.known.long(), use_cache=False)
    if unseen := [name for name in by_tensor if name not in seen]:
        raise SelectionError(f"order activation: the input of {printable(unseen[0])} cannot be seen. Leave it out.")
    tokens = sum(int(batch.known.sum()) for batch in sample.batches)
    return {name: (value / tokens) ** 0.5 for name, value in squares.items()}
