"""Dropping entries of a change at random, and the seeds that make it reproducible."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

STEPS = 1 << 32
"""Half a random 64-bit word decides each entry, so that probabilities are multiples of 2^-32."""

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def dare(delta: Float[Tensor, "*shape"], drop: float, generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """Return the change with each entry kept with probability 1 - p and divided by 1 - p, else zero.

    p is ``drop`` rounded to a multiple of 2^-32, at most 1 - 2^-32; the scale is that of the rounded p, so that the
    expectation is the change itself. Split into pieces of an even number of entries, with one generator for all of them
    in order, a change on the CPU comes out as it does whole.

    Args:
        delta: The change, float32 or float64. Both dtypes drop the same entries.
        drop: p, in [0, 1). At 0 the change itself is returned, not a copy.
        generator: On the device of ``delta``. Each kind of device has its own random numbers.

    Returns:
        Dropped entries are 0.0, whatever they were (NaN and infinity too).

    Raises:
        ValueError: ``drop`` is not in [0, 1).

    Source: Yu et al. 2024, "Language models are super Mario", section 3.2.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"expected the share of entries to drop in [0, 1), got {drop}")
    if drop == 0:
        return delta
    dropped = min(round(drop * STEPS), STEPS - 1)
    integers = _INTEGERS[delta.dtype]
    # Integers all the way: comparing into booleans and choosing by them is several times slower than these four passes.
    ones = _random_integers(delta.shape, generator).ge_(dropped - STEPS // 2).neg_().to(integers)
    return ones.bitwise_and_(delta.view(integers)).view(delta.dtype).mul_(STEPS / (STEPS - dropped))


def _random_integers(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return int32, all equally likely; two from each 64-bit word, the fastest source that torch has."""
    words = torch.empty((shape.numel() + 1) // 2, dtype=torch.int64, device=generator.device)
    return words.random_(-(1 << 63), None, generator=generator).view(torch.int32)[: shape.numel()].view(shape)


def seeded(seed: int, *labels: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose state follows from the seed and the labels alone.

    It is seeded by 8 bytes of BLAKE2b over the seed and the labels, each with its length before it, so that ("ab", "c")
    and ("a", "bc") differ. Torch's CPU generator uses 32 bits of them: two sets of labels share their random numbers
    with chance 2^-32.

    Args:
        seed: Any integer.
        labels: What tells this use from others: names of model and tensor, first row of the block.
        device: Where random numbers will be drawn.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (str(seed), *labels):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return torch.Generator(device).manual_seed(int.from_bytes(digest.digest(), "little"))
