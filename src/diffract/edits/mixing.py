"""Weighted sums and means of tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor


def weighted_sum(tensors: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float]) -> Float[Tensor, "*shape"]:
    """Return sum_i w_i x_i, one pass over memory for each tensor.

    Args:
        tensors: x_i, one or more of one shape and dtype.
        weights: w_i, any numbers, as many.

    Raises:
        ValueError: The numbers of tensors and of weights differ.
    """
    if len(tensors) != len(weights):
        raise ValueError(f"expected one weight for each tensor, got {len(weights)} for {len(tensors)}")
    total = tensors[0] * weights[0]
    for x, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(x, alpha=weight)
    return total


def linear(tensors: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float]) -> Float[Tensor, "*shape"]:
    """Return the weighted mean sum_i w_i x_i / sum_i w_i.

    Equal weights give the plain mean, a "model soup" (Wortsman et al. 2022).

    Args:
        tensors: x_i, one or more of one shape and dtype.
        weights: w_i, as many; negative ones are allowed.

    Raises:
        ValueError: The weights sum to zero, or there are not as many as tensors.
    """
    whole = math.fsum(weights)
    if whole == 0:
        raise ValueError(f"a weighted mean needs weights whose sum is not zero, got {list(weights)}")
    return weighted_sum(tensors, [weight / whole for weight in weights])


def interpolate(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], at: float) -> Float[Tensor, "*shape"]:
    """Return (1 - at) a + at b.

    Rewinding a tuned tensor to its base is the same line, from tuned to base.

    Args:
        a: Where the line is at 0.
        b: Where it is at 1; shape and dtype of ``a``.
        at: Any number; outside [0, 1] the line goes on beyond its ends.

    Returns:
        At exactly 0 ``a`` itself and at exactly 1 ``b`` itself, not a copy: every bit is kept, of NaN and -0.0 too.
        Entries that are equal in both are kept to the last bit at every ``at`` (-0.0 in both may become 0.0).
    """
    if at == 0:
        return a
    if at == 1:
        return b
    return torch.lerp(a, b, at)


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


def task_arithmetic(
    base: Float[Tensor, "*shape"], tuned: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float]
) -> Float[Tensor, "*shape"]:
    """Return W0 + sum_i w_i (W_i - W0).

    Computed as (1 - sum_i w_i) W0 + sum_i w_i W_i, without the differences: one pass over memory for each tensor. An
    entry that no model changed comes out with an error of a few units of the wide dtype, far below half a unit of the
    stored one, so that rounding gives the base's own value back.

    Args:
        base: W0.
        tuned: W_i, of the shape and dtype of ``base``.
        weights: w_i, as many; negative ones forget a task.

    Raises:
        ValueError: The numbers of tuned tensors and of weights differ.

    Source: Ilharco et al. 2023, "Editing models with task arithmetic".
    """
    if len(tuned) != len(weights):
        raise ValueError(f"expected one weight for each tuned tensor, got {len(weights)} for {len(tuned)}")
    return weighted_sum([base, *tuned], [1 - math.fsum(weights), *weights])


DIGIT_BITS = 16
"""Bits of the magnitude that are found in one pass over the blocks."""

COUNTED_ENTRIES = 1 << 19
"""Entries that are counted at once: their temporaries stay in the cache, and are many beside the bins."""

ROW_ENTRIES = 32
"""Entries that are looked at together for those that still count after the first pass."""


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
        # The digit of the entry that is the rest-th largest, and how many have larger ones.
        reached = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(reached, rest))
        prefix = prefix << DIGIT_BITS | len(counts) - 1 - place
        rest -= int(reached[place - 1]) if place else 0
        width, known = torch.finfo(dtype).bits, known + DIGIT_BITS
    return torch.tensor(prefix, dtype=_INTEGERS[dtype]).view(dtype).item()


def _count_digits(blocks: Iterable[Tensor], prefix: int, known: int) -> tuple[Int64[Tensor, "digits"], torch.dtype]:
    """Return how often each 16-bit digit follows the ``known`` bits of ``prefix`` in magnitudes, and their dtype."""
    total, dtype = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64), torch.float32
    for block in blocks:
        total, dtype = total.to(block.device), block.dtype
        for piece in block.flatten().split(COUNTED_ENTRIES):
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

    The sum is taken in float64. Where it is smaller than the rounding of the changes, weights and sums can be, n 2^-52
    of sum_i w_i |d_i|, the sides are equal: 0.1 + 0.2 - 0.3 elects nobody.

    Args:
        deltas: d_i, n of them, one or more of one shape and dtype.
        weights: w_i, as many, above zero.

    Returns:
        0 where the weighted sum is zero: no change, or sides of equal weight. NaN where a change is NaN.

    Raises:
        ValueError: A weight is not above zero, or there are not as many as changes.

    Source: Yadav et al. 2023, "TIES-merging", section 4, there with equal weights.
    """
    if not all(weight > 0 for weight in weights):
        raise ValueError(f"expected weights above zero, got {list(weights)}")
    wide = [delta.double() for delta in deltas]
    votes, cast = weighted_sum(wide, weights), weighted_sum([delta.abs() for delta in wide], weights)
    # Below, not at: infinite votes are larger than no bound.
    equal = votes.abs() < cast.mul_(len(wide) * torch.finfo(torch.float64).eps)
    sign = votes.masked_fill_(equal, 0.0).sign_().to(deltas[0].dtype)
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


PARALLEL = 2.0**-26
"""Radians. For ``at`` in [0, 1] the weights of arc and line differ by at most angle^2 / 6 of themselves: below this
angle by less than a float64 can show."""

ANTIPARALLEL = 2.0**-12
"""Radians short of pi. The arc's weights grow as 1 / sin(angle) there, and the rounding of float32 with them: here from
2^-24 to 2^-12, which is half a unit of float16 and less than half a unit of bfloat16."""

SUMMED_ENTRIES = 1 << 18
"""Entries that are widened and summed at once: they stay in the cache."""


def angle(pairs: Iterable[tuple[Tensor, ...]]) -> float:
    """Return the angle between two flattened tensors, arccos(<a, b> / (|a| |b|)), in radians from 0 to pi.

    Sums are in float64. Near 0 and near pi the cosine resolves angles down to about 1e-8.

    Args:
        pairs: The blocks of a and of b, side by side.

    Returns:
        0 where one of the two is zero.

    Raises:
        ValueError: An entry is not finite, or the sum of the squares is beyond float64.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for a, b in pairs:
        sums = sums.to(a.device)
        pieces = zip(a.flatten().split(SUMMED_ENTRIES), b.flatten().split(SUMMED_ENTRIES), strict=True)
        for x, y in ((x.double(), y.double()) for x, y in pieces):
            sums += torch.stack((x.dot(x), y.dot(y), x.dot(y)))
    aa, bb, ab = sums.tolist()
    if not math.isfinite(aa + bb):
        raise ValueError("expected finite entries with squares that can be summed, got NaN, infinity or an overflow")
    if aa == 0 or bb == 0:
        return 0.0
    return math.acos(max(-1.0, min(1.0, ab / math.sqrt(aa) / math.sqrt(bb))))


def slerp(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], at: float, angle: float) -> Float[Tensor, "*shape"]:
    """Return sin((1 - at) angle) / sin(angle) a + sin(at angle) / sin(angle) b.

    The tensors keep their norms: with |a| = |b| the result has that norm too, otherwise it goes from one to the other.

    The line takes the arc's place in two cases. (1) Below ``PARALLEL``, zero tensors among them: the two agree to
    rounding there, and nothing jumps. (2) Within ``ANTIPARALLEL`` of pi: no one arc joins opposite tensors, so that any
    choice jumps; the line through (or near) zero is the one that amplifies no rounding.

    Args:
        a: Where the arc is at 0.
        b: Where it is at 1; shape and dtype of ``a``.
        at: Any number; outside [0, 1] the circle goes on.
        angle: Of the whole tensors, by `angle`.

    Returns:
        At exactly 0 ``a`` itself and at exactly 1 ``b`` itself, not a copy.

    Raises:
        ValueError: The angle is not in [0, pi].

    Source: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3.
    """
    if not 0 <= angle <= math.pi:
        raise ValueError(f"expected an angle from 0 to pi radians, got {angle}")
    if at in (0, 1) or angle < PARALLEL or math.pi - angle < ANTIPARALLEL:
        return interpolate(a, b, at)
    return weighted_sum((a, b), (math.sin((1 - at) * angle) / math.sin(angle), math.sin(at * angle) / math.sin(angle)))
