"""Work in batches as large as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from diffract.errors import CheckpointError

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Budget:
    """How much is computed at once.

    Attributes:
        tokens: In a batch, padding included, at most; halved when memory runs out. One item is a batch in any case.
        notes: Takes what the user should know.
    """

    tokens: int
    notes: Callable[[str], None] | None = None

    def note(self, text: str) -> None:
        """Tell something."""
        if self.notes is not None:
            self.notes(text)


def run_batches(
    items: Sequence[T],
    length: Callable[[T], int],
    compute: Callable[[list[T]], list[R]],
    budget: Budget,
    *,
    most: int | None = None,
) -> list[R]:
    """Return the results of items in their order; long ones are computed first, and together with long ones.

    Args:
        items: What is to be done.
        length: Tokens that an item needs in a batch where it is the longest.
        compute: Does a batch.
        budget: How much at once; it stays halved where memory ran out.
        most: Tokens in a batch, where something else bounds them further.

    Raises:
        CheckpointError: Memory does not suffice for one item.
    """
    order = sorted(range(len(items)), key=lambda i: (-length(items[i]), i))
    results: dict[int, R] = {}
    while order:
        longest = max(1, length(items[order[0]]))
        allowed = budget.tokens if most is None else min(budget.tokens, most)
        batch = order[: max(1, allowed // longest)]
        found = _tried(compute, [items[i] for i in batch], longest)
        if found is None:
            _halve(budget, len(batch) * longest)
            continue
        results.update(zip(batch, found, strict=True))
        order = order[len(batch) :]
    return [results[i] for i in range(len(items))]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether memory ran out; on a CPU torch has no class for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _tried(compute: Callable[[list[T]], list[R]], batch: list[T], longest: int) -> list[R] | None:
    """Return a batch's results, or ``None`` if memory ran out; what it held is free by then."""
    try:
        return compute(batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(batch) == 1:
            raise CheckpointError(
                f"out of memory with one item of {longest} tokens. Use another device, or a smaller dtype."
            ) from error
    return None


def _halve(budget: Budget, tokens: int) -> None:
    budget.tokens = max(1, tokens // 2)
    budget.note(f"out of memory: batches of {budget.tokens} tokens from here on")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield consecutive parts of at most ``size`` items."""
    for begun in range(0, len(items), size):
        yield items[begun : begun + size]
