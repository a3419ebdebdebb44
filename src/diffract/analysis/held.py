"""Same-shaped matrices of one tensor, handed out whole or in pieces, from memory or as they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import polars as pl
import torch
from torch import Tensor

from diffract.checkpoints import Checkpoint, TensorInfo, as_bytes, tensor_digest
from diffract.checkpoints.checkpoint import Range, row_blocks, start_digest
from diffract.checkpoints.dtypes import TORCH_DTYPES
from diffract.checkpoints.files import origin_of
from diffract.matrices import Matrix, cut
from diffract.matrices.layout import KEEP_BYTES
from diffract.store import Cache, cache_key, remembered
from diffract.timing import timed

READ_ENTRIES = 1 << 25
"""Entries read at once of a larger one."""


@dataclass(frozen=True)
class Stack:
    """b matrices of one shape and stored dtype.

    Attributes:
        count: Number of matrices, b.
        shape: Of each.
        dtype: Stored dtype.
        pieces: Yields stacks (b, m, n) whose rows follow each other; may be called again.
        streamed: Whether it comes in several pieces, because it is too large to be kept.
    """

    count: int
    shape: tuple[int, int]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]
    streamed: bool = False

    def whole(self) -> Tensor:
        """Return all of it at once."""
        parts = list(self.pieces())
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def over(self, unit: Tensor) -> Stack:
        """Return the stack with each matrix divided by its unit, (b,), a power of two."""
        return replace(self, pieces=lambda: (one / unit[:, None, None] for one in self.pieces()))

    def rounding(self) -> tuple[int, int]:
        """Return the stored bits of the dtype's significand, and the exponent of its smallest normal number."""
        info = torch.finfo(self.dtype)
        return round(-math.log2(info.eps)), round(math.log2(info.smallest_normal))


class Held:
    """What some matrices need of a tensor while they are analysed: in memory if small, else read when asked for.

    Only the entries of the leading axis from the first that is needed to the last are read: a head's rows, an expert.

    Nothing is read before it is asked for: a digest that is known from the place alone saves the reading.

    Attributes:
        checkpoint: Where the tensor lies.
        name: The tensor's name.
        info: Its shape, dtype and place.
        span: The entries of its leading axis that are needed.
        whole: Whether these are all of them.
    """

    def __init__(self, checkpoint: Checkpoint, matrices: Sequence[Matrix], cache: Cache | None) -> None:
        self.name = matrices[0].tensor
        self.checkpoint, self.info, self._cache = checkpoint, checkpoint.info(self.name), cache
        self.span = self._span(matrices)
        self.whole = self.span == (0, self.info.shape[0])
        self._kept: Tensor | None = None
        self._digest = ""

    @property
    def _tensor(self) -> Tensor | None:
        """The entries that are needed, where they are few enough to be kept."""
        # No cached_property: before Python 3.12 its lock is that of all objects, and threads would read one by one.
        if self._kept is None and self._part.size_bytes <= KEEP_BYTES:
            self._kept = self.checkpoint.read(self.name, None if self.whole else self.span)
        return self._kept

    def _span(self, matrices: Sequence[Matrix]) -> Range:
        every = (0, self.info.shape[0])
        needed = [m.rows or every if m.index is None else (m.index, m.index + 1) for m in matrices]
        return min(first for first, _ in needed), max(last for _, last in needed)

    @property
    def _part(self) -> TensorInfo:
        """What the entries that are needed are, as if they were a tensor of their own."""
        count = self.span[1] - self.span[0]
        return replace(self.info, shape=(count, *self.info.shape[1:]))

    @property
    def digest(self) -> str:
        """The digest of the same bytes that are analysed: the tensor's, or its part's with the place of that."""
        if not self._digest:
            self._digest = self._known_or_read_digest()
        return self._digest

    def _known_or_read_digest(self) -> str:
        origin = origin_of(self.checkpoint, self.name)
        if origin is None:
            return self._read_digest()
        known = remembered(
            self._cache,
            lambda: cache_key("origin", origin, self.span),
            lambda: pl.DataFrame({"digest": [self._read_digest()]}),
        )
        return known["digest"][0]

    @timed("read")
    def _read_digest(self) -> str:
        if self.whole:
            return self.checkpoint.digest(self.name) if self._tensor is None else tensor_digest(self.info, self._tensor)
        hasher = start_digest(self._part)
        for start, stop in (rows or (0, self._part.shape[0]) for rows in row_blocks(self._part)):
            hasher.update(as_bytes(self.rows(self.span[0] + start, self.span[0] + stop)))
        # The same bytes elsewhere in the tensor are another part.
        return f"{hasher.hexdigest()} {self.span}"

    def rows(self, start: int, stop: int) -> Tensor:
        """Return some entries of the leading axis, which lie in the span, in the stored dtype."""
        if self._tensor is None:
            return self.checkpoint.read(self.name, (start, stop))
        return self._tensor[start - self.span[0] : stop - self.span[0]]

    def stack(self, batch: Sequence[Matrix]) -> Stack:
        """Return some matrices of the tensor."""
        count, shape, dtype = len(batch), batch[0].shape, TORCH_DTYPES[self.info.dtype]
        if self._tensor is not None:
            view = cut(self._tensor, batch, self.span[0])
            return Stack(count, shape, dtype, lambda: iter((view,)))
        # pieces follow the long side, and a file gives ranges of rows only: a wide matrix has to be read whole
        rows = replace(batch[0], rows=None)
        if rows.is_whole and count == 1 and shape[0] > shape[1]:
            return Stack(count, shape, dtype, partial(self._row_blocks, *self._span(batch)), streamed=True)
        first, last = self._span(batch)
        return Stack(count, shape, dtype, lambda: iter((cut(self.rows(first, last), batch, first),)))

    def _row_blocks(self, first: int, last: int) -> Iterator[Tensor]:
        step = max(1, READ_ENTRIES // self.info.shape[1])
        for start in range(first, last, step):
            yield self.checkpoint.read(self.name, (start, min(start + step, last)))[None]
