"""Which singular directions of a matrix an edit keeps.

Directions are numbered 0 .. M - 1 in the order of descending singular values, M = min(m, n), so that every choice here
is a contiguous range of them.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from diffract.edits.operations.rule import NoiseRule, Rule
from diffract.metrics.random_matrix import donoho_gavish_rank, fit_bulk


def kept(
    S: Float64[Tensor, " M"], shape: tuple[int, int], rule: Rule, order: Int64[Tensor, " M"] | None = None
) -> slice:
    """Return the range of directions that a rule keeps.

    A zero matrix has no directions: nothing is kept, whatever the rule. The two noise rules compare singular values
    with each other, which says nothing about a matrix of one (M = 1): it is kept, for dropping needs evidence. Of a
    matrix of low rank without noise they keep all sigma > 0 as long as the zeros outnumber these (``donoho-gavish``)
    or the signal does not hide itself (``mp-edge``, see ``noise_variance``).

    Args:
        S: All M singular values, descending; zero those that cannot be told from zero.
        shape: (m, n) of the matrix.
        rule: Which to keep.
        order: Of side ``random``, in which order directions are taken.

    Returns:
        With start and stop in 0 .. M, of the directions as they are taken. The ranges of ``head`` and ``tail`` meet
        without overlap.

    Source: Gavish & Donoho 2014 (``donoho-gavish``); Marchenko & Pastur 1967 (``mp-edge``).

    >>> import torch
    >>> kept(torch.tensor([4.0, 2.0, 1.0]).double(), (3, 3), Rule(energy=0.9))  # 16 + 4 of 21
    slice(0, 2, None)
    """
    total = len(S)
    assert total == min(shape)
    if total == 0 or not bool(S[0] > 0):
        return slice(0, 0)
    if rule.band is not None:
        return slice(*(rounded(edge, total) for edge in rule.band))
    if order is not None and rule.energy is not None:
        count = _energy_count(S[order], rule.energy)
    else:
        count = _head_count(S, shape, rule)
    return slice(count, total) if rule.side == "tail" else slice(0, count)


def random_order(S: Float64[Tensor, " M"], generator: torch.Generator) -> Int64[Tensor, " M"]:
    """Return the directions in a random order; those of sigma = 0, which hold nothing, come last.

    Args:
        S: All singular values, descending.
        generator: On the CPU, so that every device gets the same order.
    """
    positive = int((S > 0).sum())
    shuffled = torch.randperm(positive, generator=generator).to(S.device)
    return torch.cat([shuffled, torch.arange(positive, len(S), device=S.device)])


def share_of(fraction: float, total: int) -> Fraction:
    """Return fraction times total, the fraction being the decimal number that it prints as."""
    return Fraction(str(fraction)) * total


def rounded(fraction: float, total: int) -> int:
    """Return ``share_of`` to the nearest whole number, half up."""
    return math.floor(share_of(fraction, total) + Fraction(1, 2))


def _head_count(S: Tensor, shape: tuple[int, int], rule: Rule) -> int:
    """How many directions the criterion picks, the largest first."""
    total = len(S)
    if rule.drop is not None:
        return total - rounded(rule.drop, total)
    if rule.rank is not None:
        return min(rule.rank, total)
    if rule.above is not None:
        return int((rule.above < S).sum())
    if rule.energy is not None:
        return _energy_count(S, rule.energy)
    return 1 if total == 1 else _signal_count(S, shape, rule.rule)


def _energy_count(S: Tensor, share: float) -> int:
    if share == 1:
        return int((S > 0).sum())  # in a running sum the smallest would be lost
    energy = S.square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1


def _signal_count(S: Tensor, shape: tuple[int, int], rule: NoiseRule | None) -> int:
    if rule == "donoho-gavish":
        return int(donoho_gavish_rank(S[None], shape))
    return int(fit_bulk(S[None].square() / max(shape), shape).spikes)
