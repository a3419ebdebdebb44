"""Where a tail begins: the xmin whose fitted law is nearest to the data by the Kolmogorov-Smirnov distance.

All tails of all rows are one flat list, largest first, that is worked off in pieces which fit the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from diffract.metrics.heavy_tails.law import Law, Parameters
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
            tails = nearest(ordered, law, min_tail, two_sided)
        else:
            tails = ordered.tails_from(at[start : start + rows].to(values), min_tail)
        parameters = law.fit(tails)
        ks = distances(ordered, tails, parameters, law, two_sided)
        found = ks.isfinite()
        columns = (parameters.where(found[:, None], torch.nan), tails.xmin, ks, tails.count)
        parts.append((columns[0], *(column.where(found, torch.nan) for column in columns[1:])))
    return Fitted(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def scan_distances(
    values: Float64[Tensor, "b n"], law: Law, *, min_tail: int = 2, two_sided: bool = False
) -> Float64[Tensor, "b n"]:
    """Return the distance that each value would have as xmin, values descending; NaN where it is no candidate."""
    ordered = order(values)
    last, row = ordered.candidates(min_tail).mT.nonzero().flip(0).unbind(1)
    tails = ordered.tails(row, last)
    table = torch.full_like(ordered.values, torch.nan)
    table[row, last] = distances(ordered, tails, law.fit(tails), law, two_sided)
    return table


def nearest(ordered: Ordered, law: Law, min_tail: int, two_sided: bool) -> Tails:
    """Return the tail of least distance of each row, the longest of equals; NaN statistics for rows without any.

    Candidates that a lower bound of their distance rules out are dropped before the distances are computed in full; the
    result is the full search's. Of long rows the bound looks at some of the values only. For laws whose survival is
    dear, it then looks at a lower bound of the survival.
    """
    last, row = ordered.candidates(min_tail).mT.nonzero().flip(0).unbind(1)
    tails = ordered.tails(row, last)
    parameters = law.fit(tails)
    if ordered.values.shape[1] > LONG:
        tails, parameters = _contenders(ordered, ordered.thinned(DENSE, GROWTH), tails, parameters, law, two_sided)
    if law.lower is not None:
        tails, parameters = _contenders(ordered, ordered, tails, parameters, law, two_sided)
    ks = distances(ordered, tails, parameters, law, two_sided)
    return _first_least(ordered, tails, ks.nan_to_num(torch.inf))


def _contenders(
    ordered: Ordered, seen: Ordered, tails: Tails, parameters: Parameters, law: Law, two_sided: bool
) -> tuple[Tails, Float64[Tensor, "c p"]]:
    """Return the candidates whose distance, as far as it is seen, does not exceed that of their row's leader."""
    bound = _lower_bound(seen, tails, parameters, law, two_sided).nan_to_num(torch.inf)
    row, none = tails.row, torch.full_like(ordered.values[:, 0], torch.inf)
    lead = (bound <= none.scatter_reduce(0, row, bound, "amin")[row]).nonzero()[:, 0]
    reached = distances(ordered, tails[lead], parameters[lead], law, two_sided).nan_to_num(torch.inf)
    least = none.scatter_reduce(0, row[lead], reached, "amin")
    open_ = (bound <= least[row] + ROUNDING).nonzero()[:, 0]
    return tails[open_], parameters[open_]


def distances(
    ordered: Ordered, tails: Tails, parameters: Parameters, law: Law, two_sided: bool = False
) -> Float64[Tensor, "t"]:
    """Return max_j |S(x_j) - #{tail >= x_j} / k|, in other words |i/k - F| with the left-continuous empirical function.

    ``two_sided`` also compares with #{tail > x_j} / k.
    """
    ks = torch.empty_like(tails.xmin)
    for piece, width in _pieces(ordered, tails):
        part = tails[piece]
        survival = law.survival(parameters[piece], _points(ordered, part, width))
        ks[piece] = _deviation(ordered, part, survival, two_sided)
    return ks


def _lower_bound(
    seen: Ordered, tails: Tails, parameters: Parameters, law: Law, two_sided: bool
) -> Float64[Tensor, "t"]:
    """Return what the distance of each tail is at least, from the values seen.

    Where the law has a lower bound of its survival, that lacks most at xmin; there the survival is known to be 1.
    """
    if law.lower is None:
        return distances(seen, tails, parameters, law, two_sided)
    bound = torch.empty_like(tails.xmin)
    for piece, width in _pieces(seen, tails):
        part = tails[piece]
        lower = law.lower(parameters[piece], _points(seen, part, width))
        bound[piece] = _deviation(seen, part, lower, two_sided) - (1 - lower[:, -1]).clamp(min=0.0)
    return bound


def _pieces(seen: Ordered, tails: Tails) -> Iterator[tuple[Tensor, int]]:
    """Yield indices of tails, longest first, and how many columns reach to the end of the longest of them."""
    longest = tails.last.argsort(descending=True, stable=True)
    widths = (torch.searchsorted(seen.position, tails.last[longest]) + 1).cpu()
    start, entries = 0, piece_entries(tails.row.device)
    while start < len(longest):
        width = int(widths[start])
        stop = start + max(1, entries // width)
        yield longest[start:stop], width
        start = stop


def _points(ordered: Ordered, tails: Tails, width: int) -> Float64[Tensor, "t w"]:
    """Return ln(x_j / xmin) for the largest values of each tail's row, zero for those below xmin."""
    logs = ordered.logs[:, :width].index_select(0, tails.row)
    return logs.sub_(tails.origin[:, None]).clamp_(min=0.0)


def _deviation(ordered: Ordered, tails: Tails, survival: Tensor, two_sided: bool) -> Float64[Tensor, "t"]:
    """Return the largest distance of survivals from the empirical one; below xmin both are 1."""
    sides = (ordered.at_least, ordered.above) if two_sided else (ordered.at_least,)
    found = []
    for ranks in sides:
        level = ranks[:, : survival.shape[1]].index_select(0, tails.row).div_(tails.count[:, None]).clamp_(max=1.0)
        found.append(level.sub_(survival).abs_().amax(1))
    return found[0] if len(found) == 1 else torch.maximum(*found)


def _first_least(ordered: Ordered, tails: Tails, ks: Float64[Tensor, "t"]) -> Tails:
    """Return each row's tail of least distance."""
    table = torch.full_like(ordered.values, torch.inf)
    table[tails.row, tails.last] = ks
    least = table.amin(1, keepdim=True)
    position = torch.arange(table.shape[1], device=table.device)
    last = position.where(table == least, 0).amax(1)
    row = torch.arange(len(table), device=table.device)
    return ordered.tails(row, last).valid(least[:, 0].isfinite())
