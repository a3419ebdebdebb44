"""Merging changes that disagree: trim, elect a sign for each entry, average those that agree with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from diffract.edits.operations.linear import weighted_sum

DIGIT_BITS = 16
"""Bits of the magnitude that are found in one pass over the blocks."""

PIECE_ENTRIES = 1 << 19
"""Entries that are counted at once: their temporaries stay in the cache, and are many beside the bins."""

ROW_ENTRIES = 32
"""Entries that are looked at together for those that still count after the first pass."""

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def magnitude_threshold(blocks: Callable[[], Iterable[Tensor]], keep: int) -> float:
    """Return the exact ``keep``-th largest |x| over all blocks, in flat memory.

    The bits of |x|, read as an integer, are ordered as |x| is. They are found 16 at a time from the top, each time from
    counts over the entries whose higher bits are those found so far: two passes for float32, four for float64.

    Args:
        blocks: Gives the same float32 or float64 blocks, all of one dtype, at each call; called once for each pass.
        keep: From 1 to the number of entries.

    Returns:
        0 where fewer than ``keep`` entries are not zero; infinity is the largest magnitude.

    Raises:
        ValueError: ``keep`` is below 1 or above the number of entries, or an entry is NaN.
    """
    if keep < 1:
        raise ValueError(f"expected to keep at least one entry, got keep={keep}")
    prefix, rest, width, known = 0, keep, DIGIT_BITS, 0
    dtype = torch.float32
    while known < width:
        counts, dtype = _count_digits(blocks(), prefix, known)
        if rest > (entries := int(counts.sum())):
            raise ValueError(f"expected to keep at most all {entries} entries, got keep={keep}")
        digit, larger = _pick(counts, rest)
        prefix, rest = prefix << DIGIT_BITS | digit, rest - larger
        width, known = torch.finfo(dtype).bits, known + DIGIT_BITS
    return torch.tensor(prefix, dtype=_INTEGERS[dtype]).view(dtype).item()


def _count_digits(blocks: Iterable[Tensor], prefix: int, known: int) -> tuple[Int64[Tensor, "digits"], torch.dtype]:
    """Return how often each 16-bit digit follows the ``known`` bits of ``prefix`` in magnitudes, and their dtype."""
    total, dtype = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64), torch.float32
    for block in blocks:
        total, dtype = total.to(block.device), block.dtype
        for piece in block.flatten().split(PIECE_ENTRIES):
            counts = _count_piece(piece, prefix, known)
            if known == 0 and _may_hold_nan(counts, dtype) and piece.isnan().any():
                raise ValueError("a threshold needs magnitudes that can be ordered, got NaN")
            total += counts
    return total, dtype


def _count_piece(piece: Float[Tensor, " entries"], prefix: int, known: int) -> Int64[Tensor, "digits"]:
    integers = _INTEGERS[piece.dtype]
    magnitudes = piece.view(integers).bitwise_and(torch.iinfo(integers).max)
    undecided = torch.iinfo(integers).bits - known
    if known:
        magnitudes = _beginning_with(magnitudes, prefix, undecided).bitwise_and_((1 << undecided) - 1)
    return torch.bincount(magnitudes.bitwise_right_shift_(undecided - DIGIT_BITS), minlength=1 << DIGIT_BITS)


def _beginning_with(magnitudes: Int[Tensor, " entries"], prefix: int, undecided: int) -> Int[Tensor, " matching"]:
    """Return the magnitudes whose bits above the ``undecided`` ones are ``prefix``.

    Few are. Rows without any are left out first, which is several times faster than to choose among all entries.
    """
    rows = magnitudes[: len(magnitudes) // ROW_ENTRIES * ROW_ENTRIES].view(-1, ROW_ENTRIES)
    holds = (rows >> undecided).eq_(prefix).amax(1)
    left = torch.cat((rows[holds.nonzero().flatten()].flatten(), magnitudes[rows.numel() :]))
    return left.masked_select(left >> undecided == prefix)


def _may_hold_nan(counts: Int64[Tensor, "digits"], dtype: torch.dtype) -> bool:
    """Whether a magnitude begins as infinity does, or is above it; cheaper than to look at each entry."""
    infinity = torch.tensor(torch.inf, dtype=dtype).view(_INTEGERS[dtype]).item()
    return bool(counts[int(infinity) >> torch.finfo(dtype).bits - DIGIT_BITS :].any())


def _pick(counts: Int64[Tensor, "digits"], rank: int) -> tuple[int, int]:
    """Return the digit of the ``rank``-th largest entry, and how many entries have larger ones."""
    reached = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, rank))
    return len(counts) - 1 - place, int(reached[place - 1]) if place else 0


def trim(delta: Float[Tensor, "*shape"], threshold: float) -> Float[Tensor, "*shape"]:
    """Return the change with entries of |x| < ``threshold`` set to zero.

    Entries equal to the threshold all stay. Changes of 16-bit weights take few values, so that more than the share
    asked for may stay: mostly by less than a hundredth of it, by a quarter where the threshold is a common value, and
    nearly twice the share for changes as small as the rounding. Zeros are no votes in what follows, whether the
    threshold keeps them or not.

    Args:
        delta: The change, float32 or float64. NaN stays.
        threshold: By `magnitude_threshold`, of the whole change in the same dtype. At 0 the change itself is returned,
            not a copy.
    """
    if threshold == 0:
        return delta
    # hardshrink keeps |x| > its bound: the largest number below the threshold.
    below = torch.nextafter(torch.tensor(threshold, dtype=delta.dtype), torch.zeros((), dtype=delta.dtype))
    return torch.nn.functional.hardshrink(delta, below.item())


def elect_and_merge(deltas: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float]) -> Float[Tensor, "*shape"]:
    """Return the disjoint mean of the changes: at each entry, the weighted mean of those that have the elected sign.

    The elected sign is that of sum_i w_i d_i. The mean is over the d_i that are not zero and have this sign, and
    divides by the sum of their weights only. Serves trimmed changes (TIES) and randomly dropped ones (DARE-TIES) alike.

    Args:
        deltas: d_i, one or more of one shape and dtype.
        weights: w_i, as many, above zero.

    Returns:
        0 where the weighted sum is zero: no change, or sides of equal weight. NaN where a change is NaN.

    Raises:
        ValueError: A weight is not above zero, or there are not as many as changes.

    Source: Yadav et al. 2023, "TIES-merging", section 4, there with equal weights.
    """
    if not all(weight > 0 for weight in weights):
        raise ValueError(f"expected weights above zero, got {list(weights)}")
    sign = weighted_sum(deltas, weights).sign_()
    total, mass = torch.zeros_like(sign), torch.zeros_like(sign)
    # Signs as factors, not booleans as masks: these passes over memory are several times faster.
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing = (sign * delta).clamp_min_(0)
        total.add_(agreeing, alpha=weight)
        mass.add_(agreeing.sign_(), alpha=weight)
    return total.div_(mass.clamp_min_(min(weights))).mul_(sign)


def ties(
    base: Float[Tensor, "*shape"],
    tuned: Sequence[Float[Tensor, "*shape"]],
    thresholds: Sequence[float],
    weights: Sequence[float],
    scale: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """Return W0 + scale * the disjoint mean of the trimmed changes W_i - W0.

    Args:
        base: W0.
        tuned: W_i, of the shape and dtype of ``base``.
        thresholds: Of each change, by `magnitude_threshold` over all its blocks; 0 does not trim.
        weights: Of each model, above zero.
        scale: Of the merged change.

    Raises:
        ValueError: A weight is not above zero, or there are not as many thresholds and weights as tuned tensors.

    Source: Yadav et al. 2023, "TIES-merging: resolving interference when merging models", algorithm 1.
    """
    deltas = [trim(one - base, threshold) for one, threshold in zip(tuned, thresholds, strict=True)]
    return torch.add(base, elect_and_merge(deltas, weights), alpha=scale)
