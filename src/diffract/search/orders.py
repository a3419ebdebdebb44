"""In which order heads are rewound: by measured effects, by cheaper predictions of them, and by chance as a control."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from diffract.edits.order import least_first, shuffled
from diffract.errors import SelectionError, printable, suggest
from diffract.metrics.concentration import spearman

HeadOrder = Literal["greedy", "reference", "magnitude", "random", "first-order", "activation"]
ORDERS: tuple[HeadOrder, ...] = get_args(HeadOrder)

BEST_FIRST: tuple[HeadOrder, ...] = ("greedy", "first-order")
"""Orders whose score is a gain: the highest goes first. Of the others the lowest does."""

Scores = Mapping[str, float]
"""One number for each head by its name, in the model's order."""


@dataclass(frozen=True)
class Ordered:
    """Heads in the order in which they are rewound.

    Attributes:
        order: How it was found.
        seed: Of order random.
        reverse: Whether it is taken from its end.
        names: The heads.
    """

    order: HeadOrder
    seed: int
    reverse: bool
    names: tuple[str, ...]


def parse_orders(given: str | Sequence[str] | None, *, reference: bool) -> tuple[HeadOrder, ...]:
    """Read names of orders, separated by commas; all that can be had for nothing.

    Args:
        given: Their names.
        reference: Whether there is a reference, without which order ``reference`` cannot be had.

    Raises:
        SelectionError: One is unknown, or needs a reference.
    """
    if given is None:
        return tuple(order for order in ORDERS if order != "reference" or reference)
    words = given.split(",") if isinstance(given, str) else given
    wanted = list(dict.fromkeys(word.strip() for word in words if word.strip()))
    for word in wanted:
        if word not in ORDERS:
            near = suggest(word, ORDERS) or f" Known: {', '.join(ORDERS)}."
            raise SelectionError(f"unknown order {printable(word)!r}.{near}")
    if "reference" in wanted and not reference:
        raise SelectionError("order reference needs a reference: the base tuned on reference text. Pass --reference.")
    if not wanted:
        raise SelectionError(f"expected orders, got none. Known: {', '.join(ORDERS)}.")
    return tuple(order for order in ORDERS if order in wanted)


def variants(orders: Sequence[HeadOrder], seeds: int) -> Iterator[tuple[HeadOrder, int, bool]]:
    """Yield order, seed and reverse of every curve; a random order taken from its end would be another random one."""
    for order in orders:
        for seed in range(seeds if order == "random" else 1):
            yield order, seed, False
    for order in orders:
        if order != "random":
            yield order, 0, True


def arrange(order: HeadOrder, seed: int, reverse: bool, names: Sequence[str], scores: Scores | None) -> Ordered:
    """Return heads in an order, as ``diffract rewind`` would take them.

    Raises:
        SelectionError: A head has no score.
    """
    if order == "random":
        found = shuffled(tuple(names), seed)
    else:
        assert scores is not None
        found = least_first(scores)
        if order in BEST_FIRST:
            found.reverse()
    return Ordered(order, seed, reverse, tuple(found[::-1] if reverse else found))


def agreement(effects: Scores, scores: Scores, order: HeadOrder) -> float:
    """Return the rank correlation of an order's scores with measured effects; 1 if it ranks heads as greedy does."""
    gains, found = (np.array([values[name] for name in effects], float) for values in (effects, scores))
    return spearman(gains, found if order in BEST_FIRST else -found)
