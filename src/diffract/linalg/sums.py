"""What can be summed over pieces of a matrix: powers of its entries, and products of its short side with itself.

Everything that follows (norms, moments, spectra, agreement) is computed from these sums, so that a matrix of any
length needs float64 memory for one piece and its short side squared only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffract.linalg.blas import (
    Buffer,
    add_grams,
    add_products,
    blocks,
    changed_count,
    dots,
    pieces,
    power_sums,
    rounding_squares,
    short_first,
    short_side,
)
from diffract.linalg.exact import LowRank, mirrored


@dataclass(frozen=True)
class Moments:
    """Sums of powers of the entries of b matrices, about a value near their mean.

    Entries that lie far from zero, close together, have central moments that raw sums cannot tell from their rounding.

    Attributes:
        count: Entries of each.
        squares: (b,), float64, of the entries themselves.
        centre: (b,), c; zero unless four powers were asked for.
        first, second, third, fourth: (b,), float64, of w - c; the third and fourth are NaN unless they were asked for.
    """

    count: int
    squares: Tensor
    centre: Tensor
    first: Tensor
    second: Tensor
    third: Tensor
    fourth: Tensor


class _Powers:
    """Sums of powers over the blocks of a stack; the first block of a matrix tells its centre."""

    def __init__(self, count: int, highest: int, device: torch.device) -> None:
        self.highest, self.begun = highest, set[int]()
        self.sums = torch.zeros(5, count, dtype=torch.float64, device=device)
        self.centre = torch.zeros(count, dtype=torch.float64, device=device)

    def add(self, batch: slice, entries: Tensor, scratch: Buffer) -> None:
        """Add a block of the entries of some matrices."""
        if self.highest == 0:
            return
        central = self.highest > 2
        if central and batch.start not in self.begun:
            self.begun.add(batch.start)
            mean = entries.mean(1)
            self.centre[batch] = mean.where(mean.isfinite(), 0.0)
        found = power_sums(entries, scratch, self.centre[batch] if central else None)
        self.sums[: len(found), batch] += found

    def moments(self, shape: tuple[int, ...]) -> Moments:
        """Return the sums as a record; those that were not summed become NaN."""
        squares, *powers = self.sums
        known = [power if i < self.highest else torch.full_like(power, torch.nan) for i, power in enumerate(powers)]
        return Moments(shape[0] * shape[1], squares if self.highest else known[0], self.centre, *known)


class Sums:
    """Sums over one stack of same-shaped matrices, fed in pieces along the long axis.

    Args:
        count: Matrices in the stack.
        shape: Of each matrix.
        powers: Highest power of the entries that is summed: 0, 2 or 4.
        products: Whether the Gram matrix of the short side is summed.
        device: Where the sums are computed.
    """

    def __init__(
        self, count: int, shape: tuple[int, ...], *, powers: int, products: bool, device: torch.device
    ) -> None:
        self.side, self.shape, self.device = short_side(shape), shape, device
        self.powers = _Powers(count, powers, device)
        short = min(shape)
        self.gram = torch.zeros(count if products else 0, short, short, dtype=torch.float64, device=device)
        """Gram matrices after the last piece: their upper triangles."""
        self._cast, self._scratch = Buffer(device), Buffer(device)

    def add(self, stack: Tensor) -> None:
        """Add a stack (b, m, n) of any float dtype and stride; m or n, the longer of the matrix, may be a part."""
        for index in pieces(tuple(stack.shape), self.side, self.device):
            x = self._cast.fill(stack[index])
            for entries in blocks(x):
                self.powers.add(index[0], entries, self._scratch)
            if self.gram.shape[0]:
                add_grams(self.gram[index[0]], short_first(x, self.side))

    @property
    def moments(self) -> Moments:
        """Return the sums of powers."""
        return self.powers.moments(self.shape)


class PairSums:
    """Sums over a stack of bases W0 and their tuned matrices W1 = W0 + D, fed in pieces along the long axis.

    Args:
        count: Pairs in the stack.
        shape: Of each matrix.
        powers: Highest power of the entries of W1 and W0 that is summed: 2 or 4.
        delta: Whether the Gram matrix of D is summed.
        vectors: Whether the Gram matrices of W0 and W0 with D are summed, from which that of W1 follows.
        row_energy: Whether what tells sum_r u0_ri^2 ||D_r||^2 is summed, D_r the rows of D.
        rounding: Stored bits of the significand of W1's dtype, and the exponent of its smallest normal number.
        device: Where the sums are computed.
    """

    def __init__(
        self,
        count: int,
        shape: tuple[int, int],
        *,
        powers: int,
        delta: bool,
        vectors: bool,
        row_energy: bool = False,
        rounding: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.side, self.shape, self.device = short_side(shape), shape, device
        self.rounding = rounding
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.base, self.tuned = _Powers(count, powers, device), _Powers(count, powers, device)
        self.delta_squares, self.changed, self.rounding_squares = zeros(count), zeros(count), zeros(count)
        self.along = zeros(count)
        """<D, W0>."""
        short = min(shape)
        self._delta_gram = zeros(count if delta else 0, short, short)
        self.base_gram = zeros(count if vectors else 0, short, short)
        """Gram matrices of W0 after the last piece: their upper triangles."""
        self.cross = zeros(count if vectors else 0, short, short)
        # Left vectors of a matrix with short rows are at hand, those of one with short columns are W0 v / sigma.
        weighed = row_energy and self.side == "cols"
        self.weighed_gram = zeros(count if weighed else 0, short, short)
        """sum_r ||D_r||^2 w_r w_r^T over the rows w_r of W0, where columns are short: upper triangles."""
        self._base, self._tuned, self._scratch = Buffer(device), Buffer(device), Buffer(device)

    def add(self, base: Tensor, tuned: Tensor | LowRank) -> None:
        """Add stacks (b, m, n) of W0 and of W1; or of D, as factors."""
        for index in pieces(tuple(base.shape), self.side, self.device):
            x0, x1 = self._base.fill(base[index]), self._tuned.fill(tuned[index])
            if isinstance(tuned, LowRank):
                # Factors hold D; what is summed over entries is of W1, and D is taken from it as for every other pair.
                x1 += x0
            self._add_entries(index[0], x0, x1)
            d = short_first(x1, self.side)
            if self._delta_gram.shape[0]:
                add_grams(self._delta_gram[index[0]], d)
            if self.base_gram.shape[0]:
                add_grams(self.base_gram[index[0]], short_first(x0, self.side))
                add_products(self.cross[index[0]], short_first(x0, self.side), d)
            if self.weighed_gram.shape[0]:
                weighed = self._scratch.like(tuple(x0.shape))
                torch.mul(x0, torch.linalg.vector_norm(x1, dim=2, keepdim=True), out=weighed)
                add_grams(self.weighed_gram[index[0]], weighed.mT)

    def _add_entries(self, batch: slice, base: Tensor, tuned: Tensor) -> None:
        """Add the sums over entries, and turn ``tuned`` into D."""
        for x0, x1 in zip(blocks(base), blocks(tuned), strict=True):
            self.base.add(batch, x0, self._scratch)
            self.tuned.add(batch, x1, self._scratch)
            self.rounding_squares[batch] += rounding_squares(x1, *self.rounding, self._scratch)
            x1.sub_(x0)  # in place, as W1 is not needed any more and memory is the limit
            self.changed[batch] += changed_count(x1)
            self.delta_squares[batch] += dots(x1, x1)
            self.along[batch] += dots(x1, x0)

    @cached_property
    def delta_gram(self) -> Float64[Tensor, "b M M"]:
        """Return the Gram matrices of D, after the last piece."""
        return mirrored(self._delta_gram)

    @property
    def tuned_gram(self) -> Float64[Tensor, "b M M"]:
        """Return the Gram matrices of W1 = W0 + D from those of its parts: their upper triangles."""
        return self.base_gram + self.cross + self.cross.mT + self.delta_gram

    @property
    def base_moments(self) -> Moments:
        """Return the sums of powers of W0."""
        return self.base.moments(self.shape)

    @property
    def tuned_moments(self) -> Moments:
        """Return the sums of powers of W1."""
        return self.tuned.moments(self.shape)


def change_grams(base: Float[Tensor, "b m n"], tuned: Sequence[Tensor | LowRank]) -> Float64[Tensor, "b k k"]:
    """Return the inner products <X_i, X_j> of X_0 = W0 and of the changes X_a = W_a - W0, k = 1 + a of them.

    <X, Y> is the sum of x * y over all entries, so that the diagonal holds squared Frobenius norms. Memory is k pieces
    in float64, whatever the size of the matrices.

    Args:
        base: W0.
        tuned: Each the W_a, of any float dtype and stride; or the change itself, as factors.

    Returns:
        Symmetric. A change that is not finite spoils its own row and column, a base that is not finite all of them.
    """
    count, rows, cols = base.shape
    device = base.device
    grams = torch.zeros(count, 1 + len(tuned), 1 + len(tuned), dtype=torch.float64, device=device)
    buffer = Buffer(device)
    for index in pieces((count, rows, cols), short_side((rows, cols)), device):
        part = base[index]
        x = buffer.like((len(part), 1 + len(tuned), *part.shape[1:]))
        x[:, 0].copy_(part)
        for place, one in enumerate(tuned, start=1):
            x[:, place].copy_(one[index])
            if not isinstance(one, LowRank):
                x[:, place].sub_(x[:, 0])
        _add_grams(grams[index[0]], x.flatten(2))
    return mirrored(grams)


def _add_grams(total: Float64[Tensor, "b k k"], x: Float64[Tensor, "b k n"]) -> None:
    """Add x x^T to the upper triangles; k is small and n large, where products by vectors are the fastest on a CPU."""
    if x.device.type != "cpu":
        total += x @ x.mT
        return
    for one, rows in zip(total, x, strict=True):
        for i, row in enumerate(rows):
            one[i, i:] += torch.mv(rows[i:], row)
