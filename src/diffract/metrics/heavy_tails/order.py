"""Values in descending order, and the sums over every tail that the fits need.

A tail of k values is the first k of a row; t = ln(x / xmin) is the coordinate in which all laws are written. Sums over
tails grow from one tail to the next by terms that are never negative, so that nothing cancels however close the values
lie to each other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

PerTail = Float64[Tensor, "t"]


@dataclass(frozen=True)
class Tails:
    """t tails of rows of an ``Ordered``, and what the likelihoods see of them.

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
        return Tails(*(getattr(self, field.name)[index] for field in fields(self)))

    def valid(self, mask: Bool[Tensor, "t"]) -> Tails:
        """Return the tails with every statistic of those outside the mask NaN, so that their fits are."""
        floats = (self.count, self.xmin, self.origin, self.mean_log, self.mean_square_log, self.mean_excess)
        return Tails(self.row, self.last, *(value.where(mask, torch.nan) for value in floats))


@dataclass(frozen=True)
class Ordered:
    """b rows of n values in descending order, those that do not count as zeros at the end.

    Attributes:
        values: x_1 >= x_2 >= ...
        logs: ln(x_j / x_1), -inf for what does not count.
        at_least: Number of values >= x_j: k S(x_j) of a tail of k by its left-continuous distribution function.
        above: Number of values > x_j.
        chords: (x_j - x_(j+1)) / ln(x_j / x_(j+1)), x_j where they are equal, above zero; (b, n - 1).
        sum_log, sum_square_log, sum_excess: Sums over the tail that ends at x_j, of ln(x / x_j), its square, x - x_j.
    """

    values: Float64[Tensor, "b n"]
    logs: Float64[Tensor, "b n"]
    at_least: Float64[Tensor, "b n"]
    above: Float64[Tensor, "b n"]
    chords: Float64[Tensor, "b m"]
    sum_log: Float64[Tensor, "b n"]
    sum_square_log: Float64[Tensor, "b n"]
    sum_excess: Float64[Tensor, "b n"]

    def candidates(self, min_tail: int) -> Bool[Tensor, "b n"]:
        """Whether x_j may be xmin: a value seen, below the largest, with at least ``min_tail`` values from it on."""
        ends = torch.arange(1, self.values.shape[1] + 1, device=self.values.device) == self.at_least
        return ends & (self.values > 0) & (self.values < self.values[:, :1]) & (self.at_least >= min_tail)

    def tails(self, row: Int64[Tensor, "t"], last: Int64[Tensor, "t"]) -> Tails:
        """Return the tails that begin at x_last of each row."""
        xmin, k = self.values[row, last], (last + 1).to(self.values.dtype)
        return Tails(
            row, last, k, xmin, self.logs[row, last],
            self.sum_log[row, last] / k, self.sum_square_log[row, last] / k, self.sum_excess[row, last] / k / xmin,
        )  # fmt: skip

    def tails_from(self, xmin: Float64[Tensor, "b"], min_tail: int) -> Tails:
        """Return each row's tail of values >= xmin; NaN with fewer than ``min_tail`` of them, or none above xmin."""
        count = (self.values >= xmin[:, None]).sum(1)
        row, last = torch.arange(len(xmin), device=xmin.device), (count - 1).clamp(min=0)
        inner = self.tails(row, last)
        k, step = inner.count, ((inner.xmin - xmin) / xmin).log1p()  # from xmin to the smallest value of the tail
        mean_log = inner.mean_log + step
        found = Tails(
            row, last, k, xmin, inner.origin - step, mean_log,
            inner.mean_square_log + step * (2 * inner.mean_log + step),
            (inner.mean_excess * inner.xmin + inner.xmin - xmin) / xmin,
        )  # fmt: skip
        return found.valid((count >= max(min_tail, 1)) & (xmin > 0) & xmin.isfinite() & (mean_log > 0))


def order(values: Float64[Tensor, "b n"]) -> Ordered:
    """Sort rows and sum over all their tails; entries that are not finite or not above zero do not count."""
    if not values.shape[1]:
        values = values.new_zeros(len(values), 1)
    x = values.where(values.isfinite() & (values > 0), 0.0).sort(dim=1, descending=True).values
    upper, lower = x[:, :-1], x[:, 1:]
    gap = ((upper - lower) / lower).log1p().where(lower > 0, 0.0)
    k = torch.arange(1, x.shape[1], dtype=x.dtype, device=x.device)
    sum_log = _running(k * gap)
    at_least, above = _ranks(x)
    return Ordered(
        values=x,
        logs=(-_running(gap)).where(x > 0, -torch.inf),
        at_least=at_least,
        above=above,
        chords=((upper - lower) / gap).where(gap > 0, upper).clamp(min=torch.finfo(x.dtype).tiny),
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
