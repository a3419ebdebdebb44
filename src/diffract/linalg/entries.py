"""Sums over the entries of b matrices, given as rows (b, k).

On the CPU through NumPy, few calls a row: each call into torch gives the interpreter's lock away and takes it back, for
which threads that analyse small matrices side by side would wait for each other.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from diffract.linalg.blas import row_dots

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
        size = 1
        for extent in shape:
            size *= extent
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.float64, device=self._memory.device)
        return self._memory[:size].view(shape)

    def fill(self, piece: Tensor) -> Tensor:
        """Return a piece as contiguous float64."""
        return self.like(tuple(piece.shape)).copy_(piece)


def blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Return the entries of matrices (b, m, n) as views (b, k) that stay in the cache while they are summed."""
    return x.flatten(1).split(BLOCK_ENTRIES, dim=1)


def power_sums(x: Entries, scratch: Buffer, highest: int) -> Float64[Tensor, "4 b"]:
    """Return the sums of the first ``highest`` (0, 2 or 4) powers; zeros for the others."""
    sums = x.new_zeros(4, len(x))
    if highest == 0:
        return sums
    squares = scratch.like(tuple(x.shape)) if highest > 2 else None
    if x.device.type == "cpu":
        _fill_powers(sums.numpy(), x, squares)
        return sums
    sums[0], sums[1] = x.sum(1), dots(x, x)
    if squares is not None:
        torch.mul(x, x, out=squares)
        sums[2], sums[3] = dots(squares, x), dots(squares, squares)
    return sums


def _fill_powers(sums: np.ndarray, x: Entries, squares: Entries | None) -> None:
    entries = x.numpy()
    sums[0], sums[1] = entries.sum(1), row_dots(x, x)
    if squares is not None:
        np.multiply(entries, entries, out=squares.numpy())
        sums[2], sums[3] = row_dots(squares, x), row_dots(squares, squares)


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
    torch.bitwise_and(x.view(torch.int64), 0x7FF0000000000000, out=power.view(torch.int64))
    power.clamp_(min=2.0**smallest_exponent)
    return dots(power, power) * (4.0**-mantissa_bits / 12)
