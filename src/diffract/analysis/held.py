"""Same-shaped matrices of one tensor, handed out whole or in pieces, from memory or as they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from diffract.checkpoints import Checkpoint, tensor_digest
from diffract.checkpoints.dtypes import TORCH_DTYPES
from diffract.matrices import Matrix, cut
from diffract.matrices.layout import KEEP_BYTES

BLOCK_ENTRIES = 1 << 25
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
    """One tensor of a checkpoint while it is analysed: in memory if it is small, else read when asked for."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.checkpoint, self.name, self.info = checkpoint, name, checkpoint.info(name)
        self._tensor = checkpoint.read(name) if self.info.size_bytes <= KEEP_BYTES else None

    @cached_property
    def digest(self) -> str:
        """The tensor's digest, of the same bytes that are analysed where it is held."""
        if self._tensor is None:
            return self.checkpoint.digest(self.name)
        return tensor_digest(self.info, self._tensor)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return some entries of the leading axis, in the stored dtype."""
        return self.checkpoint.read(self.name, (start, stop)) if self._tensor is None else self._tensor[start:stop]

    def stack(self, batch: Sequence[Matrix]) -> Stack:
        """Return some matrices of the tensor."""
        count, shape, dtype = len(batch), batch[0].shape, TORCH_DTYPES[self.info.dtype]
        if self._tensor is not None:
            view = cut(self._tensor, batch)
            return Stack(count, shape, dtype, lambda: iter((view,)))
        if batch[0].index is not None:
            # a stack of experts or layers is read from the first that is wanted to the last, not as a whole
            indices = [m.index for m in batch if m.index is not None]
            first, last = min(indices), max(indices)
            return Stack(
                count,
                shape,
                dtype,
                lambda: iter((cut(self.checkpoint.read(self.name, (first, last + 1)), batch, first),)),
            )
        # pieces follow the long side, and a file gives ranges of rows only: a wide matrix has to be read whole
        if batch[0].is_whole and shape[0] > shape[1]:
            return Stack(count, shape, dtype, self._row_blocks, streamed=True)
        return Stack(count, shape, dtype, lambda: iter((cut(self.checkpoint.read(self.name), batch),)))

    def _row_blocks(self) -> Iterator[Tensor]:
        rows, cols = self.info.shape
        step = max(1, BLOCK_ENTRIES // cols)
        for start in range(0, rows, step):
            yield self.checkpoint.read(self.name, (start, min(start + step, rows)))[None]
