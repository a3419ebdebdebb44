"""The permutation null: the spectrum that the same entries have when their places mean nothing."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

Eigenvalues = Float64[Tensor, "b M"]
PerMatrix = Float64[Tensor, "b"]

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def entry_order(shape: tuple[int, int], *, seed: int, device: torch.device | str = "cpu") -> Int64[Tensor, "mn"]:
    """Return the random order of the m n entries that this seed and shape mean, uniform over all orders.

    Drawn on the CPU whatever the device, so that it is the same everywhere. It takes longer than using it: draw it
    once for all matrices of a shape.

    >>> entry_order((1, 3), seed=0).sort().values
    tensor([0, 1, 2])
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(shape[0] * shape[1], generator=generator).to(device)


def permuted(matrices: Float[Tensor, "b m n"], order: Int64[Tensor, "mn"]) -> Float[Tensor, "b m n"]:
    """Return the same entries in another order: entry i, counted along the rows, is entry order[i] of the matrix.

    One order serves all matrices of a shape, so a matrix has the same null alone and in a batch. Each null is by
    itself a uniform draw; two of them are not independent of each other.

    Args:
        matrices: In their stored dtype, which stays.
        order: From ``entry_order``, on the same device.
    """
    words = matrices.flatten(1).view(WORDS[matrices.element_size()])  # moved as integers, half again as fast as bf16
    return words.gather(1, order.expand(len(words), -1)).view(matrices.dtype).view(matrices.shape)


def wasserstein(a: Eigenvalues, b: Eigenvalues) -> PerMatrix:
    """Wasserstein-1 distance of two samples of one size: mean |a_(i) - b_(i)| over their sorted values.

    Zero if and only if the samples are equal; in the unit of the values. NaN where a value is NaN.
    """
    return (a.sort(-1).values - b.sort(-1).values).abs().mean(-1)


def null_w1(eigenvalues: Eigenvalues, null_eigenvalues: Eigenvalues) -> PerMatrix:
    """Wasserstein-1 distance of a spectrum from that of its permuted matrix, over the mean eigenvalue.

    Both have the same mean, ||W||_F^2 / (N M), so the value lies in [0, 2): near 0 where the entries' distribution
    explains the spectrum, 2 (1 - 1 / M) at most, for all weight on one eigenvalue against equal ones. NaN for a zero
    matrix.
    """
    return wasserstein(eigenvalues, null_eigenvalues) / eigenvalues.mean(-1)
