"""Float64 products and the pieces in which large matrices are cast and multiplied.

Shapes: b matrices of m rows and n columns; M = min(m, n) is the short side, N = max(m, n) the long one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

PIECE_BYTES = {"cpu": 1 << 25, "cuda": 1 << 29}
"""Float64 bytes cast at once, by device. On the CPU one matrix at a time, so that it stays in the cache."""


def gram(x: Float64[Tensor, "b m n"]) -> Float64[Tensor, "b m m"]:
    """Return x x^T. On the CPU through NumPy, whose BLAS call knows that the product is symmetric (half the work)."""
    if x.device.type != "cpu":
        return x @ x.mT
    a = x.numpy()
    return torch.from_numpy(np.matmul(a, a.swapaxes(-1, -2)))


def product(x: Float64[Tensor, "b m k"], y: Float64[Tensor, "b k n"]) -> Float64[Tensor, "b m n"]:
    """Return x y. On the CPU through NumPy, as in ``gram``: one BLAS for all products."""
    return x @ y if x.device.type != "cpu" else torch.from_numpy(np.matmul(x.numpy(), y.numpy()))


def short_side(shape: tuple[int, ...]) -> str:
    """Return ``rows`` when the matrix has no more rows than columns, else ``cols``."""
    return "rows" if shape[-2] <= shape[-1] else "cols"


def short_first(x: Tensor, side: str) -> Tensor:
    """Return matrices as (short, long); a view."""
    return x if side == "rows" else x.mT


def pieces(shape: tuple[int, int, int], side: str, device: torch.device) -> Iterator[tuple[slice, slice, slice]]:
    """Yield index triples that cut a stack into parts of at most ``PIECE_BYTES``, along the batch and the long axis."""
    count, rows, cols = shape
    short, length = (rows, cols) if side == "rows" else (cols, rows)
    room = max(1, PIECE_BYTES["cpu" if device.type == "cpu" else "cuda"] // (8 * max(short, 1)))
    many = 1 if device.type == "cpu" else max(1, room // max(length, 1))
    step = min(room, max(length, 1))
    for first in range(0, count, many):
        for start in range(0, length, step):
            batch, span = slice(first, first + many), slice(start, start + step)
            yield (batch, slice(None), span) if side == "rows" else (batch, span, slice(None))
