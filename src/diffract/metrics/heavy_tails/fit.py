"""Tails of spectra and the laws that are fitted to them: sums over tails, every candidate for xmin, the nearest.

Values are ordered once, and what a likelihood needs of every tail is a running sum over that order. So a fit to all n
candidates costs little more than one fit, and rows share one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from diffract.metrics.facts import Metric, built_in

ENTRIES = {"cpu": 1 << 15, "cuda": 1 << 22}
"""How much is computed at once. On the CPU a few temporaries stay in a core's cache. They are too small to share among
threads: workers of one thread each, on rows of their own, use several cores."""


def piece_entries(device: torch.device) -> int:
    """Return how many float64 entries a temporary may have: values, points of tails, or nodes of an integral."""
    return ENTRIES["cpu" if device.type == "cpu" else "cuda"]


PerTail = Float64[Tensor, "t"]


@dataclass(frozen=True)
class Tails:
    """t tails of rows of an ``OrderedValues``, and what the likelihoods see of them.

    Attributes:
        row: (t,), int64, whose tail it is.
        last: (t,), int64, position of the smallest value in the tail.
        count: k, float64.
        xmin: Where the tail begins.
        origin: ln(xmin / x_1), x_1 the largest value of the row.
        mean_log: Mean of ln(x / xmin).
        mean_square_log: Mean of its square.
        mean_excess: Mean of x / xmin - 1.
    """

    row: Tensor
    last: Tensor
    count: PerTail
    xmin: PerTail
    origin: PerTail
    mean_log: PerTail
    mean_square_log: PerTail
    mean_excess: PerTail

    def __getitem__(self, index: slice | Tensor) -> Tails:
        return Tails(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def valid(self, mask: Bool[Tensor, "t"]) -> Tails:
        """Return the tails with every statistic of those outside the mask NaN, so that their fits are."""
        floats = [field.name for field in fields(self) if field.name not in ("row", "last")]
        return replace(self, **{name: getattr(self, name).where(mask, torch.nan) for name in floats})


@dataclass(frozen=True)
class OrderedValues:
    """b rows of n values in descending order, those that do not count as zeros at the end.

    Attributes:
        position: (n,), int64, of the columns: 0, 1, ... unless the rows are thinned.
        values: x_1 >= x_2 >= ...
        logs: ln(x_j / x_1), -inf for what does not count.
        at_least: Number of values >= x_j: k S(x_j) of a tail of k by its left-continuous distribution function.
        above: Number of values > x_j.
        sum_log, sum_square_log, sum_excess: Sums over the tail that ends at x_j, of ln(x / x_j), its square, x - x_j.
    """

    position: Int64[Tensor, "n"]
    values: Float64[Tensor, "b n"]
    logs: Float64[Tensor, "b n"]
    at_least: Float64[Tensor, "b n"]
    above: Float64[Tensor, "b n"]
    sum_log: Float64[Tensor, "b n"]
    sum_square_log: Float64[Tensor, "b n"]
    sum_excess: Float64[Tensor, "b n"]

    def candidates(self, min_tail: int) -> Bool[Tensor, "b n"]:
        """Whether x_j may be xmin: a value seen, below the largest, with at least ``min_tail`` values from it on."""
        ends = self.position + 1 == self.at_least
        return ends & (self.values > 0) & (self.values < self.values[:, :1]) & (self.at_least >= min_tail)

    def thinned(self, dense: int, growth: float) -> OrderedValues:
        """Return some of the columns: the first ``dense`` ones, the last, and between them ever wider steps."""
        n = self.values.shape[1]
        steps = [min(n - 1, round(dense * growth**i)) for i in range(math.ceil(math.log(n / dense, growth)) + 1)]
        position = torch.tensor(sorted({*range(dense), *steps}), device=self.values.device)
        columns = (getattr(self, field.name) for field in fields(self)[1:])
        return OrderedValues(self.position[position], *(column[:, position] for column in columns))

    def tails(self, row: Int64[Tensor, "t"], last: Int64[Tensor, "t"]) -> Tails:
        """Return the tails that begin at x_last of each row."""
        xmin, k = self.values[row, last], (last + 1).to(self.values.dtype)
        return Tails(
            row=row,
            last=last,
            count=k,
            xmin=xmin,
            origin=self.logs[row, last],
            mean_log=self.sum_log[row, last] / k,
            mean_square_log=self.sum_square_log[row, last] / k,
            mean_excess=self.sum_excess[row, last] / k / xmin,
        )

    def tails_from(self, xmin: Float64[Tensor, "b"], min_tail: int) -> Tails:
        """Return each row's tail of values >= xmin; NaN with fewer than ``min_tail`` of them, or none above xmin."""
        count = (self.values >= xmin[:, None]).sum(1)
        inner = self.tails(torch.arange(len(xmin), device=xmin.device), (count - 1).clamp(min=0))
        # A given xmin lies below the smallest value of its tail: the sums from that value on are moved down by a step.
        step = ((inner.xmin - xmin) / xmin).log1p()
        found = replace(
            inner,
            xmin=xmin,
            origin=inner.origin - step,
            mean_log=inner.mean_log + step,
            mean_square_log=inner.mean_square_log + step * (2 * inner.mean_log + step),
            mean_excess=(inner.mean_excess * inner.xmin + inner.xmin - xmin) / xmin,
        )
        return found.valid((count >= max(min_tail, 1)) & (xmin > 0) & xmin.isfinite() & (found.mean_log > 0))


def order(values: Float64[Tensor, "b n"]) -> OrderedValues:
    """Sort rows and sum over all their tails; entries that are not finite or not above zero do not count."""
    if not values.shape[1]:
        values = values.new_zeros(len(values), 1)
    x = values.where(values.isfinite() & (values > 0), 0.0).sort(dim=1, descending=True).values
    upper, lower = x[:, :-1], x[:, 1:]
    # By neighbours: differences of logarithms of nearly equal values would lose digits.
    gap = ((upper - lower) / lower).log1p().where(lower > 0, 0.0)
    k = torch.arange(1, x.shape[1], dtype=x.dtype, device=x.device)
    sum_log = _running(k * gap)
    at_least, above = _ranks(x)
    return OrderedValues(
        position=torch.arange(x.shape[1], device=x.device),
        values=x,
        logs=(-_running(gap)).where(x > 0, -torch.inf),
        at_least=at_least,
        above=above,
        sum_log=sum_log,
        sum_square_log=_running(gap * (2 * sum_log[:, :-1] + k * gap)),
        sum_excess=_running(k * (upper - lower)),
    )


def _running(steps: Float64[Tensor, "b m"]) -> Float64[Tensor, "b n"]:
    """Return 0 and the sums of the first 1, 2, ... steps."""
    return torch.nn.functional.pad(steps, (1, 0)).cumsum(1)


def _ranks(x: Float64[Tensor, "b n"]) -> tuple[Tensor, Tensor]:
    """Return how many values of the row are >= and > each value of descending rows."""
    n = x.shape[1]
    position = torch.arange(n, dtype=x.dtype, device=x.device)
    falls = x[:, :-1] > x[:, 1:]
    begins, ends = (
        torch.nn.functional.pad(falls, (1, 0), value=True),
        torch.nn.functional.pad(falls, (0, 1), value=True),
    )
    above = position.where(begins, 0.0).cummax(1).values
    at_least = (position + 1).where(ends, float(n)).flip(1).cummin(1).values.flip(1)
    return at_least, above


Parameters = Float64[Tensor, "t p"]
OfPoints = Float64[Tensor, "t m"]


@dataclass(frozen=True)
class Law:
    """A family of laws of t = ln(x / xmin) >= 0, its p parameters free of scale.

    Attributes:
        fit: Maximum-likelihood parameters of tails, NaN where there are none.
        survival: P(T >= t) at points of each tail.
        log_density: ln of the density of T at points of each tail.
        quantile: The t with survival u, for u in (0, 1].
        lower: Lower bound of the survival at all values of each tail, largest first; what it lacks never shrinks on
            the way to xmin, where the survival is 1. For laws whose survival is dear, ``None`` for the others.
    """

    fit: Callable[[Tails], Parameters]
    survival: Callable[[Parameters, OfPoints], OfPoints]
    log_density: Callable[[Parameters, OfPoints], OfPoints]
    quantile: Callable[[Parameters, OfPoints], OfPoints]
    lower: Callable[[Parameters, OfPoints], OfPoints] | None = None


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
    ordered: OrderedValues
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


def fit_candidates(ordered: OrderedValues, law: Law, *, min_tail: int = 2) -> Candidates:
    """Fit a law to every tail that begins at a value seen, but for the largest."""
    # Longest tails first: neighbours in a piece are then of like width, and the first is the widest.
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
        # Bounds of later views name candidates again whose distance is known.
        unknown = index[ks[index] == torch.inf]
        ks[unknown] = distances(candidates[unknown], two_sided=two_sided)

    ordered = candidates.ordered
    views = [ordered.thinned(DENSE, GROWTH)] if ordered.values.shape[1] > LONG else []
    for seen in views if candidates.law.lower is None else [*views, ordered]:  # what bounds look at, the cheapest first
        part = candidates[open_]
        bound = _lower_bound(replace(part, ordered=seen), two_sided).nan_to_num(torch.inf)
        measure(open_[bound <= _least(part, bound)[part.tails.row]])  # the leaders
        open_ = open_[bound <= _least(candidates, ks)[part.tails.row] + ROUNDING]
    measure(open_)
    return candidates.nearest(ks)


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
        # A lower survival may fall short of 1 at xmin; by as much any of its distances may be too large.
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


CLAUSET = "Clauset, Shalizi & Newman 2009"


def tail_metrics(
    short: str, law: str, *parameters: tuple[str, str, dict[str, Any]], version: int = 2
) -> tuple[Metric, ...]:
    """Return the metrics of one fitted law: its parameters, then what every law has.

    Args:
        short: What their names begin with.
        law: The fact that is the fit.
        parameters: Field of the fit, summary, and further words of ``built_in``.
        version: Of the numbers.
    """
    called = law.replace("_", " ")
    common: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("xmin", f"where the {called}'s tail begins", {"unit": "weight^2", "range": "[0, inf)", "degree": 2}),
        ("ks", f"Kolmogorov-Smirnov distance of the {called}'s tail", {"range": "[0, 1]"}),
        ("tail_count", f"eigenvalues in the {called}'s tail", {"unit": "count", "range": "[0, M]"}),
    )
    return tuple(
        built_in(summary, name=f"{short}_{field}", facts=(law,), source=CLAUSET, version=version, **words)(
            attrgetter(field)
        )
        for field, summary, words in (*parameters, *common)
    )
