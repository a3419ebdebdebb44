"""A choice of singular directions, stated before anything is known of a matrix; needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

Side = Literal["head", "tail", "random"]
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
        side: ``head`` keeps what the criterion picks; ``tail`` keeps the others; ``random`` takes directions in a
            random order instead of from the largest: as many as ``head`` would keep, of ``energy`` until they hold the
            share. A band has no tail, and no random one.

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


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}; got {got!r}")


def share_of(fraction: float, total: int) -> Fraction:
    """Return fraction times total, the fraction being the decimal number that it prints as."""
    # 0.29 is meant as written: as binary fraction times 100 it is a little less than 29.
    return Fraction(str(fraction)) * total


def rounded(fraction: float, total: int) -> int:
    """Return ``share_of`` to the nearest whole number, half up."""
    return math.floor(share_of(fraction, total) + Fraction(1, 2))
