"""Products on the CPU by BLAS's own routines, as SciPy exports them to compiled code.

NumPy and torch offer general products only (NumPy notices x @ x.T, but copies the result and cannot add to one), and
SciPy's Python wrappers hold the interpreter's lock, so that threads would wait for each other. These calls add in
place, do half the work for a Gram matrix, and let other threads run. Sums over pieces take them all from one library:
the threads of two libraries would keep each other from the cores between calls.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from scipy.linalg import cython_blas  # pyright: ignore[reportAttributeAccessIssue] (compiled)
from torch import Tensor

from diffract.timing import timed

ONE = ctypes.byref(ctypes.c_double(1.0))


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add x x^T to the upper triangle of ``total``; what lies below the diagonal means nothing.

    Args:
        total: (M, M), float64, C-contiguous, on the CPU.
        x: (M, K), float64, one of its strides 1.
    """
    assert total.is_contiguous()
    n, k = x.shape
    by_rows, lda = _layout(x)
    # Fortran sees C's upper triangle as the lower one, and rows as columns
    trans = b"T" if by_rows else b"N"
    _routine("dsyrk", 10)(
        b"L", trans, _int(n), _int(k), ONE, x.data_ptr(), _int(lda), ONE, total.data_ptr(), _int(n)
    )  # fmt: skip


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x y^T to ``total``.

    Args:
        total: (M, M), float64, C-contiguous, on the CPU.
        x: (M, K), float64, one of its strides 1.
        y: (M, K), float64, the same one of its strides 1.
    """
    assert total.is_contiguous()
    n, k = x.shape
    by_rows, ldx = _layout(x)
    same, ldy = _layout(y)
    assert same == by_rows
    first, second = (b"T", b"N") if by_rows else (b"N", b"T")  # Fortran sees total^T = y x^T
    _routine("dgemm", 13)(
        first, second, _int(n), _int(n), _int(k), ONE, y.data_ptr(), _int(ldy), x.data_ptr(), _int(ldx), ONE,
        total.data_ptr(), _int(n),
    )  # fmt: skip


def row_dots(x: Tensor, y: Tensor) -> list[float]:
    """Return the sum of x * y over each row.

    Args:
        x: (b, k), float64, on the CPU; rows contiguous.
        y: (b, k), as ``x``.
    """
    assert x.stride(1) == y.stride(1) == 1
    ddot, one, k = _routine("ddot", 5, ctypes.c_double), _int(1), _int(x.shape[1])
    first, second = x.data_ptr(), y.data_ptr()
    steps = 8 * x.stride(0), 8 * y.stride(0)
    return [ddot(k, first + i * steps[0], one, second + i * steps[1], one) for i in range(len(x))]


def _layout(x: Tensor) -> tuple[bool, int]:
    """Whether rows are contiguous (else columns are), and the distance of neighbouring ones."""
    by_rows = x.stride(1) == 1
    assert by_rows or x.stride(0) == 1
    return by_rows, max(x.stride(0), x.shape[1]) if by_rows else max(x.stride(1), x.shape[0])


def _int(value: int) -> Any:
    return ctypes.byref(ctypes.c_int(value))


@cache
def _routine(name: str, arguments: int, result: Any = None) -> Any:
    """The function, from the capsule that SciPy keeps for Cython; ctypes lets go of the lock while it runs.

    Leading ``bytes`` are the routine's flags, everything else is a pointer.
    """
    capsule = cython_blas.__pyx_capi__[name]
    python = ctypes.pythonapi
    python.PyCapsule_GetName.restype, python.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    python.PyCapsule_GetPointer.restype = ctypes.c_void_p
    python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = python.PyCapsule_GetPointer(capsule, python.PyCapsule_GetName(capsule))
    return ctypes.CFUNCTYPE(result, *[ctypes.c_void_p] * arguments)(address)


Entries = Float64[Tensor, "b k"]
PerMatrix = Float64[Tensor, "b"]

BLOCK_ENTRIES = 1 << 18
"""Entries that are summed at once."""


class Buffer:
    """Float64 memory that is filled again and again; fresh memory for each piece costs as much as the cast."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.float64, device=device)

    def like(self, shape: tuple[int, ...]) -> Tensor:
        """Return contiguous memory of a shape; what it held before is gone."""
        size = math.prod(shape)
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.float64, device=self._memory.device)
        return self._memory[:size].view(shape)

    @timed("cast")
    def fill(self, piece: Tensor) -> Tensor:
        """Return a piece as contiguous float64."""
        return self.like(tuple(piece.shape)).copy_(piece)


def blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Return the entries of matrices (b, m, n) as views (b, k) that stay in the cache while they are summed."""
    return x.flatten(1).split(BLOCK_ENTRIES, dim=1)


def power_sums(x: Entries, scratch: Buffer, centre: PerMatrix | None = None) -> Float64[Tensor, "p b"]:
    """Return the sum of squares, and sums of the first four powers of x - centre; of the first two of x without one."""
    squares = dots(x, x)
    if centre is None:
        return torch.stack([squares, _totals(x), squares])
    shifted, square = scratch.like((2, *x.shape))
    if x.device.type == "cpu":  # NumPy multiplies on the thread that calls it
        np.subtract(x.numpy(), centre.numpy()[:, None], out=shifted.numpy())
        np.multiply(shifted.numpy(), shifted.numpy(), out=square.numpy())
    else:
        torch.sub(x, centre[:, None], out=shifted)
        torch.mul(shifted, shifted, out=square)
    high = dots(square, shifted), dots(square, square)
    return torch.stack([squares, _totals(shifted), dots(shifted, shifted), *high])


def _totals(x: Entries) -> PerMatrix:
    """Return the sum of each row; NumPy sums on the thread that calls it."""
    return torch.from_numpy(x.numpy().sum(1)) if x.device.type == "cpu" else x.sum(1)


def dots(x: Entries, y: Entries) -> PerMatrix:
    """Return the sum of x * y over each row, by BLAS."""
    if x.device.type != "cpu":
        return torch.linalg.vecdot(x, y)
    return torch.from_numpy(np.array(row_dots(x, y)))


def changed_count(d: Entries) -> PerMatrix:
    """Return the number of entries that are not zero."""
    if d.device.type != "cpu":
        return torch.count_nonzero(d, dim=1).double()
    return torch.from_numpy(np.array([float(np.count_nonzero(row != 0)) for row in d.numpy()]))


def rounding_squares(x: Entries, mantissa_bits: int, smallest_exponent: int, scratch: Buffer) -> PerMatrix:
    """Return the sum of ulp^2 / 12 of the stored dtype at each entry: the mean squared error of rounding to it.

    ulp(x) = 2^(max(floor(log2 |x|), smallest_exponent) - mantissa_bits). The power of two below |x| is x with its
    sign and significand bits cleared.
    """
    power = scratch.like(tuple(x.shape))
    # by its bits, as log2 would round to the next power of two just below it
    torch.bitwise_and(x.view(torch.int64), 0x7FF0000000000000, out=power.view(torch.int64))
    power.clamp_(min=2.0**smallest_exponent)
    return dots(power, power) * (4.0**-mantissa_bits / 12)


PIECE_BYTES = {"cpu": 1 << 25, "cuda": 1 << 29}
"""Float64 bytes cast at once, by device. On the CPU one matrix at a time, so that it stays in the cache."""


@timed("product")
def add_grams(total: Float64[Tensor, "b m m"], x: Float64[Tensor, "b m n"]) -> None:
    """Add x x^T to the upper triangles of ``total``; ``exact.mirrored`` makes them whole."""
    if x.device.type != "cpu":
        total += x @ x.mT
        return
    for one, matrix in zip(total, x, strict=True):
        add_gram(one, matrix)


@timed("product")
def add_products(total: Float64[Tensor, "b m m"], x: Float64[Tensor, "b m n"], y: Float64[Tensor, "b m n"]) -> None:
    """Add x y^T to ``total``."""
    if x.device.type != "cpu":
        total += x @ y.mT
        return
    for one, first, second in zip(total, x, y, strict=True):
        add_product(one, first, second)


@timed("product")
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
