"""Which singular directions of a matrix an edit keeps.

Directions are numbered 0 .. M - 1 in the order of descending singular values, M = min(m, n), so that every choice here
is a contiguous range of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from jaxtyping import Float64
from torch import Tensor

from diffract.metrics.random_matrix import fit_bulk, rank_above_threshold

Side = Literal["head", "tail"]
NoiseRule = Literal["donoho-gavish", "mp-edge"]

CRITERIA = ("drop", "rank", "energy", "above", "rule", "band")


@dataclass(frozen=True)
class Rule:
    """A choice of singular directions, by exactly one criterion.

    Attributes:
        drop: Fraction of the M directions that is dropped, 0 to 1: M - round(drop M) are kept.
        rank: How many are kept, at least 1; all of a matrix that has fewer.
        energy: Smallest k whose first k directions hold at least this share of sum sigma^2, in (0, 1]. For 1, all
            sigma > 0.
        above: Those of sigma > above, in the unit of the weights, at least 0.
        rule: ``donoho-gavish``: those above the hard threshold for unknown noise. ``mp-edge``: those above the upper
            edge of the Marchenko-Pastur law that is fitted to the bulk.
        band: (from, to), fractions of the directions counted from the largest sigma, 0 <= from < to <= 1: directions
            round(from M) up to, not including, round(to M) are kept. None where both round to the same.
        side: ``head`` keeps what the criterion picks; ``tail`` keeps the others. A band has no tail.

    A fraction means the decimal number that it prints as, and round() is half up: drop = 0.145 of M = 100 is 15, though
    the product of the two floats is below 14.5.

    Raises:
        ValueError: If a value is out of range, or not exactly one criterion is given.
    """

    drop: float | None = None
    rank: int | None = None
    energy: float | None = None
    above: float | None = None
    rule: NoiseRule | None = None
    band: tuple[float, float] | None = None
    side: Side = "head"

    def __post_init__(self) -> None:
        given = [name for name in CRITERIA if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(CRITERIA)}; got {' and '.join(given) or 'none'}")
        if self.drop is not None:
            _require(0 <= self.drop <= 1, "drop", "a fraction from 0 to 1", self.drop)
        if self.rank is not None:
            whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
            _require(whole and self.rank >= 1, "rank", "a whole number from 1", self.rank)
        if self.energy is not None:
            _require(0 < self.energy <= 1, "energy", "a share above 0, up to 1", self.energy)
        if self.above is not None:
            _require(0 <= self.above < math.inf, "above", "a finite number from 0", self.above)
        if self.rule is not None:
            _require(self.rule in get_args(NoiseRule), "rule", " or ".join(get_args(NoiseRule)), self.rule)
        if self.band is not None:
            paired = len(self.band) == 2 and 0 <= self.band[0] < self.band[1] <= 1
            _require(paired, "band", "two fractions, 0 <= from < to <= 1", self.band)
            _require(self.side == "head", "side", "head with a band, whose complement is in two parts", self.side)
        _require(self.side in get_args(Side), "side", " or ".join(get_args(Side)), self.side)


def kept(S: Float64[Tensor, " M"], shape: tuple[int, int], rule: Rule) -> slice:
    """Return the range of directions that a rule keeps.

    A zero matrix has no directions: nothing is kept, whatever the rule. The two noise rules compare singular values
    with each other, which says nothing about a matrix of one (M = 1): it is kept, for dropping needs evidence. Of a
    matrix of low rank without noise they keep all sigma > 0 as long as the zeros outnumber these (``donoho-gavish``)
    or the signal does not hide itself (``mp-edge``, see ``noise_variance``).

    Args:
        S: All M singular values, descending; zero those that cannot be told from zero.
        shape: (m, n) of the matrix.
        rule: Which to keep.

    Returns:
        With start and stop in 0 .. M. The ranges of ``head`` and ``tail`` meet without overlap.

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
    count = _head_count(S, shape, rule)
    return slice(0, count) if rule.side == "head" else slice(count, total)


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
        return int(rank_above_threshold(S[None], shape))
    return int(fit_bulk(S[None].square() / max(shape), shape).spikes)


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}; got {got!r}")
