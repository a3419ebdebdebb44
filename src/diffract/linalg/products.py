"""Float64 products and the pieces in which large matrices are cast and multiplied.

Shapes: b matrices of m rows and n columns; M = min(m, n) is the short side, N = max(m, n) the long one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from diffract.linalg.blas import add_gram, add_product

PIECE_BYTES = {"cpu": 1 << 25, "cuda": 1 << 29}
"""Float64 bytes cast at once, by device. On the CPU one matrix at a time, so that it stays in the cache."""


def add_grams(total: Float64[Tensor, "b m m"], x: Float64[Tensor, "b m n"]) -> None:
    """Add x x^T to the upper triangles of ``total``; ``symmetric.mirrored`` makes them whole."""
    if x.device.type != "cpu":
        total += x @ x.mT
        return
    for one, matrix in zip(total, x, strict=True):
        add_gram(one, matrix)


def add_products(total: Float64[Tensor, "b m m"], x: Float64[Tensor, "b m n"], y: Float64[Tensor, "b m n"]) -> None:
    """Add x y^T to ``total``."""
    if x.device.type != "cpu":
        total += x @ y.mT
        return
    for one, first, second in zip(total, x, y, strict=True):
        add_product(one, first, second)


def product(
    x: Float64[Tensor, "b m k"], y: Float64[Tensor, "b k n"], *, out: Float64[Tensor, "b m n"] | None = None
) -> Float64[Tensor, "b m n"]:
    """Return x y. On the CPU through NumPy: its BLAS is the faster one for float64 where torch's is made for Intel."""
    if x.device.type != "cpu":
        return torch.matmul(x, y, out=out)
    if out is None:
        out = x.new_empty(len(x), x.shape[1], y.shape[2])
    np.matmul(x.numpy(), y.numpy(), out=out.numpy())
    return out


def short_side(shape: tuple[int, ...]) -> str:
    """Return ``rows`` when the matrix has no more rows than columns, else ``cols``."""
    return "rows" if shape[-2] <= shape[-1] else "cols"


def short_first(x: Tensor, side: str) -> Tensor:
    """Return matrices as (short, long); a view."""
    return x if side == "rows" else x.mT


def pieces(shape: tuple[int, ...], side: str, device: torch.device) -> Iterator[tuple[slice, slice, slice]]:
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
