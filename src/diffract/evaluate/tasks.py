"""A task: items that a model is scored on, and what their scores mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import polars as pl

from diffract.corpora import Split
from diffract.schemas import ITEM_SCORES
from diffract.store import cache_key

if TYPE_CHECKING:
    from diffract.evaluate.model import Subject
    from diffract.evaluate.scoring import BatchLimit

VERSION = 2
"""Raised when the same items would get other scores; part of every key."""


class Item(Protocol):
    """What a model is scored on: a frozen dataclass, whose fields are all that its score depends on."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def id(self) -> str:
        """The name of the item, unique in its task."""
        ...

    @property
    def length(self) -> int:
        """About how long the item is; what is about equally long is computed together."""
        ...


@dataclass(frozen=True)
class Piece:
    """A piece of a held-out document."""

    id: str
    text: str

    @property
    def length(self) -> int:
        """Characters of the text."""
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
        """Characters of the prompt."""
        return len(self.prompt)


@dataclass(frozen=True)
class MultipleChoice:
    """A question with options, of which ``options[right]`` is right."""

    id: str
    prompt: str
    options: tuple[str, ...]
    right: int

    @property
    def length(self) -> int:
        """Characters of the prompt with its longest option."""
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
        """Always 1: there is nothing that could be computed together with a whole task."""
        return 1


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
        kind: The name of its kind: ``bits``, ``exact``, ``choice`` or ``lm-eval``.
        split: Which split the items are of.
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


@dataclass(frozen=True)
class Wanted:
    """One entry of a specification, and how its items are read.

    Attributes:
        name: What tables call the task.
        word: What the catalog calls the task; the same as ``name`` where it has none.
        levels: Which levels of made-up problems.
        source: Where the items are, if that was said.
        split: Which split the items are of.
        data: The folder of ``--data``.
        limit: Items at most.
        shots: Examples before a question.
    """

    name: str
    word: str
    levels: str
    source: str
    split: Split
    data: Path | None
    limit: int | None
    shots: int


@dataclass(frozen=True)
class FoundItems:
    """What was found for an entry of a specification; the attributes are those of a task."""

    items: Sequence[Item]
    sources: Sequence[str]
    notes: Sequence[str] = ()
    chance: float | None = None


@dataclass(frozen=True)
class TaskKind:
    """A way of measuring quality.

    Attributes:
        name: What manifests call the kind; part of every task's key.
        find: Finds the items of a task.
        score: Scores a model on items.
        better: ``lower`` or ``higher``.
        unit: What quality is measured in.
    """

    name: str
    find: Callable[[Wanted], FoundItems]
    score: Callable[[Subject, Sequence[Any], BatchLimit], list[Score]]
    better: Literal["lower", "higher"]
    unit: str

    def task(self, wanted: Wanted) -> Task:
        """Return the task that is wanted."""
        found = self.find(wanted)
        return Task(
            name=wanted.name,
            kind=self.name,
            split=wanted.split,
            key=cache_key("task", VERSION, self.name, [asdict(item) for item in found.items]),
            better=self.better,
            unit=self.unit,
            chance=found.chance,
            sources=tuple(found.sources),
            notes=tuple(found.notes),
            items=tuple(found.items),
        )


def task_kind(
    name: str,
    score: Callable[[Subject, Sequence[Any], BatchLimit], list[Score]],
    *,
    better: Literal["lower", "higher"] = "higher",
    unit: str = "accuracy",
) -> Callable[[Callable[[Wanted], FoundItems]], TaskKind]:
    """Declare a kind of task at the function that finds its items.

    Args:
        name: What manifests call the kind.
        score: Scores a model on items.
        better: ``lower`` or ``higher``.
        unit: What quality is measured in.

    Returns:
        A decorator that makes a record of a function. It registers nothing: ``diffract.evaluate.catalog`` lists what
        there is.
    """
    return lambda find: TaskKind(name, find, score, better=better, unit=unit)


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
