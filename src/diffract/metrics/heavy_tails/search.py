"""Where a tail begins: the xmin whose fitted law is nearest to the data by the Kolmogorov-Smirnov distance.

All tails of all rows are one flat list, largest first, that is worked off in pieces which fit the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from diffract.metrics.heavy_tails.law import Law
from diffract.metrics.heavy_tails.order import Ordered, Tails, order
from diffract.metrics.heavy_tails.pieces import piece_entries

LONG = 512
"""Rows of more values are looked at in part before they are looked at in full."""

DENSE, GROWTH = 64, 1.03
"""The largest values are all looked at, then ever fewer of them: about 200 of 4,096."""

ROUNDING = 1e-9
"""Room between a bound and a distance that are compared: more than quadrature and rounding err by."""


@dataclass(frozen=True)
class Fitted:
    """A law fitted to one tail of each of b rows; NaN where there is none."""

    parameters: Float64[Tensor, "b p"]
    xmin: Float64[Tensor, "b"]
    ks: Float64[Tensor, "b"]
    count: Float64[Tensor, "b"]

    def __getitem__(self, rows: Tensor) -> Fitted:
        return Fitted(self.parameters[rows], self.xmin[rows], self.ks[rows], self.count[rows])


@dataclass(frozen=True)
class Candidates:
    """A law fitted to tails that a search chooses from.

    Attributes:
        law: The family.
        ordered: The b rows that they are tails of.
        tails: The t tails, longest first.
        parameters: (t, p), of the law.
    """

    law: Law
    ordered: Ordered
    tails: Tails
    parameters: Float64[Tensor, "t p"]

    def __getitem__(self, index: slice | Tensor) -> Candidates:
        return Candidates(self.law, self.ordered, self.tails[index], self.parameters[index])

    def parameters_at(self, count: Float64[Tensor, "b"]) -> Float64[Tensor, "b p"]:
        """Return those of each row's tail of ``count`` values; NaN where it is no candidate."""
        return _or_nan(self.parameters, self._first(self.tails.count == count[self.tails.row]))

    def nearest(self, ks: Float64[Tensor, "t"]) -> Fitted:
        """Return the tail of least distance of each row, the longest of equals; NaN where no distance is finite."""
        least = _least(self, ks)
        best = self._first((ks == least[self.tails.row]) & ks.isfinite())
        return Fitted(*(_or_nan(column, best) for column in (self.parameters, self.tails.xmin, ks, self.tails.count)))

    def _first(self, mask: Bool[Tensor, "t"]) -> Int64[Tensor, "b"]:
        """Return the first candidate of each row inside the mask, or their number where there is none."""
        chosen = mask.nonzero()[:, 0]
        none = chosen.new_full((len(self.ordered.values),), len(mask))
        return none.scatter_reduce_(0, self.tails.row[chosen], chosen, "amin")


def _or_nan(column: Tensor, index: Int64[Tensor, "b"]) -> Tensor:
    """Return entries of a column; NaN for the place beyond its end."""
    return torch.cat([column, column.new_full((1, *column.shape[1:]), torch.nan)])[index]


def _least(candidates: Candidates, ks: Float64[Tensor, "t"]) -> Float64[Tensor, "b"]:
    """Return the least distance of each row, infinite where there is none."""
    none = torch.full_like(candidates.ordered.values[:, 0], torch.inf)
    return none.scatter_reduce_(0, candidates.tails.row, ks.nan_to_num(torch.inf), "amin")


def fit_tails(
    values: Float64[Tensor, "b n"],
    law: Law,
    *,
    at: Float64[Tensor, "b"] | None = None,
    min_tail: int = 2,
    two_sided: bool = False,
) -> Fitted:
    """Fit a law to the tail of each row.

    Args:
        values: Any order; entries that are not finite or not above zero do not count.
        law: The family.
        at: Fixed xmin for each row; by default the one of least distance, over all values seen but the largest. Of
            equal distances the smallest xmin wins.
        min_tail: Fewest values in a tail.
        two_sided: Whether the distance looks at the empirical distribution function from both sides.
    """
    rows = max(1, piece_entries(values.device) // max(1, values.shape[1]))
    parts = []
    for start in range(0, max(1, len(values)), rows):
        ordered = order(values[start : start + rows])
        if at is None:
            parts.append(search(fit_candidates(ordered, law, min_tail=min_tail), two_sided=two_sided))
            continue
        tails = ordered.tails_from(at[start : start + rows].to(values), min_tail)
        tails = tails[tails.last.argsort(descending=True)]
        given = Candidates(law, ordered, tails, law.fit(tails))
        parts.append(given.nearest(distances(given, two_sided=two_sided)))
    return Fitted(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Fitted)))


def fit_candidates(ordered: Ordered, law: Law, *, min_tail: int = 2) -> Candidates:
    """Fit a law to every tail that begins at a value seen, but for the largest."""
    last, row = ordered.candidates(min_tail).mT.nonzero().flip(0).unbind(1)
    tails = ordered.tails(row, last)
    return Candidates(law, ordered, tails, law.fit(tails))


def search(candidates: Candidates, *, two_sided: bool = False) -> Fitted:
    """Return the tail of least distance of each row, the longest of equals; NaN for rows without any.

    Candidates that a lower bound of their distance rules out are dropped before the distances are computed in full; the
    result is the full search's. Of long rows the bound looks at some of the values only. For laws whose survival is
    dear, it then looks at a lower bound of the survival.
    """
    ks = torch.full_like(candidates.tails.xmin, torch.inf)
    open_ = torch.arange(len(ks), device=ks.device)

    def measure(index: Tensor) -> None:
        unknown = index[ks[index] == torch.inf]
        ks[unknown] = distances(candidates[unknown], two_sided=two_sided)

    for seen in _views(candidates):
        part = candidates[open_]
        bound = _lower_bound(replace(part, ordered=seen), two_sided).nan_to_num(torch.inf)
        measure(open_[bound <= _least(part, bound)[part.tails.row]])  # the leaders
        open_ = open_[bound <= _least(candidates, ks)[part.tails.row] + ROUNDING]
    measure(open_)
    return candidates.nearest(ks)


def _views(candidates: Candidates) -> list[Ordered]:
    """Return what bounds look at, the cheapest first."""
    ordered = candidates.ordered
    some = [ordered.thinned(DENSE, GROWTH)] if ordered.values.shape[1] > LONG else []
    return some if candidates.law.lower is None else [*some, ordered]


def scan_distances(candidates: Candidates, *, two_sided: bool = False) -> Float64[Tensor, "b n"]:
    """Return the distance that each value has as xmin, values descending; NaN where it is no candidate."""
    table = torch.full_like(candidates.ordered.values, torch.nan)
    table[candidates.tails.row, candidates.tails.last] = distances(candidates, two_sided=two_sided)
    return table


def distances(candidates: Candidates, *, two_sided: bool = False) -> Float64[Tensor, "t"]:
    """Return max_j |S(x_j) - #{tail >= x_j} / k|, in other words |i/k - F| with the left-continuous empirical function.

    ``two_sided`` also compares with #{tail > x_j} / k.
    """
    found = [torch.empty_like(candidates.tails.xmin[:0])]
    for part, points in _pieces(candidates):
        found.append(_deviation(part, part.law.survival(part.parameters, points), two_sided))
    return torch.cat(found)


def _lower_bound(seen: Candidates, two_sided: bool) -> Float64[Tensor, "t"]:
    """Return what the distance of each tail is at least, from the values seen.

    Where the law has a lower bound of its survival, that lacks most at xmin; there the survival is known to be 1.
    """
    if seen.law.lower is None:
        return distances(seen, two_sided=two_sided)
    found = [torch.empty_like(seen.tails.xmin[:0])]
    for part, points in _pieces(seen):
        lower = seen.law.lower(part.parameters, points)
        found.append(_deviation(part, lower, two_sided) - (1 - lower[:, -1]).clamp(min=0.0))
    return torch.cat(found)


def _pieces(seen: Candidates) -> Iterator[tuple[Candidates, Float64[Tensor, "t w"]]]:
    """Yield a few candidates at a time, and ln(x_j / xmin) down to the end of the longest of them, zero below xmin."""
    widths = (torch.searchsorted(seen.ordered.position, seen.tails.last) + 1).cpu()
    start, entries = 0, piece_entries(seen.tails.row.device)
    while start < len(widths):
        width = int(widths[start])
        stop = start + max(1, entries // width)
        part = seen[start:stop]
        logs = seen.ordered.logs[:, :width].index_select(0, part.tails.row)
        yield part, logs.sub_(part.tails.origin[:, None]).clamp_(min=0.0)
        start = stop


def _deviation(part: Candidates, survival: Float64[Tensor, "t w"], two_sided: bool) -> Float64[Tensor, "t"]:
    """Return the largest distance of survivals from the empirical one; below xmin both are 1."""
    ordered, tails = part.ordered, part.tails
    sides = (ordered.at_least, ordered.above) if two_sided else (ordered.at_least,)
    found = []
    for ranks in sides:
        level = ranks[:, : survival.shape[1]].index_select(0, tails.row).div_(tails.count[:, None]).clamp_(max=1.0)
        found.append(level.sub_(survival).abs_().amax(1))
    return found[0] if len(found) == 1 else torch.maximum(*found)
