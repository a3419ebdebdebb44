"""A task: items that a model is scored on, and what their scores mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import polars as pl

from diffract.corpora import Split
from diffract.store import cache_key
from diffract.tables import ITEM_SCORES

VERSION = 1
"""Raised when the same items would get other scores; part of every key."""

Kind = Literal["bits", "exact", "choice", "lm-eval"]


@dataclass(frozen=True)
class Piece:
    """A piece of a held-out document."""

    id: str
    text: str

    @property
    def length(self) -> int:
        """About how long it is; what is about equally long is computed together."""
        return len(self.text)


@dataclass(frozen=True)
class Question:
    """A question with a number as its answer; at most ``tokens`` tokens may be said in reply."""

    id: str
    prompt: str
    answer: str
    tokens: int

    @property
    def length(self) -> int:
        """About how long it is."""
        return len(self.prompt)


@dataclass(frozen=True)
class Choice:
    """A question with options, of which ``options[right]`` is right."""

    id: str
    prompt: str
    options: tuple[str, ...]
    right: int

    @property
    def length(self) -> int:
        """About how long it is."""
        return len(self.prompt) + max(map(len, self.options))


@dataclass(frozen=True)
class Harness:
    """A whole task of lm-evaluation-harness; ``content`` is its release and a digest of tasks of one's own."""

    id: str
    split: str
    shots: int
    limit: int | None
    folder: str | None
    content: str

    @property
    def length(self) -> int:
        """It is alone."""
        return 1


Item = Piece | Question | Choice | Harness


@dataclass(frozen=True)
class Score:
    """What one item got: a row of ``ITEM_SCORES``."""

    item: str
    value: float
    weight: float = 1.0
    output: str | None = None


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: What tables call it.
        kind: ``bits``, ``exact``, ``choice`` or ``lm-eval``.
        split: Which split its items are of.
        key: Digest of all that scores depend on but the model and its tokenizer.
        better: ``lower`` or ``higher``.
        unit: ``bits per byte`` or ``accuracy``.
        chance: Quality of guessing, where that is known.
        sources: Where the items are from.
        notes: What was left out, for the user to know.
        items: What a model is scored on; empty where a task was read from a run folder.
    """

    name: str
    kind: str
    split: str
    key: str
    better: str
    unit: str
    chance: float | None = None
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    items: tuple[Item, ...] = field(default=(), repr=False)

    def settings(self) -> dict[str, Any]:
        """Return all but the items, as a manifest keeps them."""
        return {k: v for k, v in vars(self).items() if k != "items"} | {"items": len(self.items)}


def make_task(
    name: str,
    kind: Kind,
    split: str,
    items: Sequence[Item],
    *,
    sources: Sequence[str] = (),
    notes: Sequence[str] = (),
    chance: float | None = None,
) -> Task:
    """Return a task of items."""
    key = cache_key("task", VERSION, kind, [asdict(item) for item in items])
    better, unit = ("lower", "bits per byte") if kind == "bits" else ("higher", "accuracy")
    return Task(name, kind, split, key, better, unit, chance, tuple(sources), tuple(notes), tuple(items))


def score_table(name: str, scores: Sequence[Score]) -> pl.DataFrame:
    """Return scores of a task as a table."""
    return pl.DataFrame([(name, s.item, s.value, s.weight, s.output) for s in scores], schema=ITEM_SCORES, orient="row")


T = TypeVar("T")


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """Return at most ``limit`` items, evenly spaced over all.

    >>> spread(range(10), 3)
    [1, 5, 8]
    """
    if limit is None or limit >= len(items):
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * limit)] for i in range(limit)]


def half_of(key: str) -> Split:
    """Return the half of what is for evaluation only that an item is in, from its digest.

    >>> half_of("00" * 16), half_of("ff" * 16)
    ('held-out', 'selection')
    """
    return "held-out" if int(key[:16], 16) < 2**63 else "selection"
