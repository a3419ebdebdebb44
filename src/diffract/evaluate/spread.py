"""Which items are taken: of a split, and of many some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from diffract.corpora import Split

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
