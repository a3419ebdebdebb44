"""Where the time of an analysis goes: seconds in reading, casting, products, eigensolvers and tables."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, local
from typing import Literal, get_args

Piece = Literal["read", "cast", "product", "eigensolver", "tables", "other"]
"""What time is spent on; ``other`` is what tasks do besides, such as sums of entries and metrics of spectra."""


class Stopwatch:
    """Adds up seconds by what they are spent on, of all threads together.

    Attributes:
        seconds: Of each piece, without what is counted as another piece within it.
    """

    def __init__(self) -> None:
        self.seconds: dict[Piece, float] = dict.fromkeys(get_args(Piece), 0.0)
        self._lock, self._thread = Lock(), local()

    @contextmanager
    def timing(self, piece: Piece) -> Iterator[None]:
        """Count the seconds of a block, but for those of blocks within it."""
        outer, begun = getattr(self._thread, "within", 0.0), time.perf_counter()
        self._thread.within = 0.0
        try:
            yield
        finally:
            took = time.perf_counter() - begun
            with self._lock:
                self.seconds[piece] += took - self._thread.within
            self._thread.within = outer + took


# One for the process, not handed down: what is timed lies ten calls below, in functions of tensors alone.
_running: list[Stopwatch] = []


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Count what ``timed`` marks while the block lasts, in all threads of this process."""
    watch = Stopwatch()
    _running.append(watch)
    try:
        yield watch
    finally:
        _running.remove(watch)


@contextmanager
def timed(piece: Piece) -> Iterator[None]:
    """Mark a block, or as a decorator a function, as something whose time is of interest; free where nobody asks."""
    if not _running:
        yield
        return
    with _running[-1].timing(piece):
        yield
