"""Edits of one matrix by singular directions: some kept of its change or of itself, scaled, or made two thin factors.

A change of up to 32 stored bits goes by the Gram matrix of its short side, everything else by LAPACK.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffract.edits.directions import (
    Decompositions,
    Directions,
    decomposed,
    energy_share,
    exact,
    fewer,
    kept,
    known_or_new,
    matmul,
    random_order,
    require_same_shape,
    widened,
    wider,
    work_dtype,
)
from diffract.edits.rule import Rule, share_of
from diffract.linalg import takes_gram
from diffract.linalg.blas import Buffer, add_grams, pieces, product, short_first, short_side
from diffract.linalg.spectrum import GRAM_RESOLVES, gram_eigen


@dataclass(frozen=True)
class Truncated:
    """An edited matrix, and what of the change it holds.

    Attributes:
        values: W0 plus the kept directions of D, in ``work_dtype`` of the wider input.
        kept: How many directions that is.
        total: M = min(m, n).
        energy_share: Their share of ||D||_F^2, in [0, 1]; 1 if nothing changed.
    """

    values: Float[Tensor, "m n"]
    kept: int
    total: int
    energy_share: float


def truncate(
    tuned: Float[Tensor, "m n"],
    base: Float[Tensor, "m n"],
    rule: Rule,
    generator: torch.Generator | None = None,
    *,
    known: Decompositions | None = None,
) -> Truncated:
    """Return W0 + sum over the kept i of sigma_i u_i v_i^T, the singular directions of D = W1 - W0.

    Input of up to 32 bits goes by the Gram matrix of D's short side and never holds D as a whole: float64 memory is a
    few times M^2 and a few pieces of 32 MB (512 MB on CUDA), beside the result. With P_k the kept short-side vectors
    the kept part is P_k P_k^T D (or D P_k P_k^T for a tall D), or D less the same of the dropped ones if these are
    fewer. It errs as follows, eps = 2.2e-16:

    - sigma_i, by which the rule decides, is off by about eps sigma_1^2 / sigma_i. Those below 8e-8 sigma_1 cannot be
      told from zero or from each other, and count as zero for the rule.
    - The result is off by about eps sigma_1^2 / (sigma_k - sigma_{k+1}), the gap at the cut, in the spectral norm; by
      no more than sigma_k where there is no gap: then directions are exchanged for others that are just as large.
      All that is far below the rounding of 16-bit weights.

    Float64 input goes by LAPACK on D: eps sigma_1 in sigma, eps sigma_1 sigma_k / (sigma_k - sigma_{k+1}) in the
    result.

    Args:
        tuned: W1, any float dtype, device and stride.
        base: W0, of the same shape.
        rule: Which directions to keep.
        generator: Of side ``random``; on the CPU.
        known: Decompositions that were made before; that of D is kept there.

    Returns:
        The tuned matrix to the last bit if everything is kept, or if nothing changed (then ``kept`` is 0); the base to
        the last bit if nothing is kept.

    Raises:
        ValueError: If the shapes differ or are empty, or a value is not finite.

    >>> D = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    >>> truncate(1 + D, torch.ones(3, 3), Rule(rank=1)).values.diagonal()
    tensor([5., 1., 1.], dtype=torch.float64)
    """
    require_same_shape(tuned, base)
    stored = wider(tuned.dtype, base.dtype)
    if tuned.numel() == 0:
        raise ValueError(f"expected matrices with entries, got shape {tuple(tuned.shape)}")
    change = _Change(tuned.detach(), base.detach(), work_dtype(stored), known)
    way = _by_gram if takes_gram(stored, "auto") else _by_lapack
    return way(change, _Choice(rule, generator))


def change_sigmas(
    tuned: Float[Tensor, "m n"], base: Float[Tensor, "m n"], *, known: Decompositions | None = None
) -> Float64[Tensor, " M"]:
    """Return the singular values of D, descending, as ``truncate`` decides by them: zero where they cannot be told.

    Args:
        tuned: W1, any float dtype, device and stride.
        base: W0, of the same shape.
        known: Decompositions that were made before; that of D is kept there, for ``truncate``.

    Raises:
        ValueError: If the shapes differ, or a value is not finite.
    """
    require_same_shape(tuned, base)
    change = _Change(tuned.detach(), base.detach(), known=known)
    if takes_gram(wider(tuned.dtype, base.dtype), "auto"):
        return _told(change.eigen()[0])
    return change.directions(exact(exact(change.tuned) - exact(change.base))).told


@dataclass(frozen=True)
class _Choice:
    """A rule, and what decides where it is by chance."""

    rule: Rule
    generator: torch.Generator | None

    def __call__(self, told: Tensor, tuned: Tensor) -> tuple[Tensor | None, slice]:
        """Return the order in which directions are taken, ``None`` for the descending one, and which of them stay."""
        order = None
        if self.rule.side == "random":
            assert self.generator is not None
            order = random_order(told, self.generator)
        return order, kept(told, (tuned.shape[0], tuned.shape[1]), self.rule, order)


def _told(S: Tensor) -> Tensor:
    """Singular values by a Gram matrix; zero those that it cannot tell from zero."""
    return S.where(S[0] * GRAM_RESOLVES < S, 0.0)


@dataclass(frozen=True)
class _Change:
    """D = W1 - W0, which is never held as a whole: it is formed anew in pieces along its long side.

    Attributes:
        tuned: W1.
        base: W0.
        dtype: Of what is made of them.
        known: Decompositions that were made before.
    """

    tuned: Tensor
    base: Tensor
    dtype: torch.dtype = torch.float64
    known: Decompositions | None = None

    def eigen(self) -> tuple[Float64[Tensor, " M"], Float64[Tensor, "M M"]]:
        """Return D's singular values, descending, and its short-side vectors as columns, by the Gram matrix."""
        S, P = known_or_new(self.known, "gram", (self.tuned, self.base), lambda: gram_eigen(self.gram())[:2])
        return S[0], P[0]

    def directions(self, delta: Float64[Tensor, "m n"]) -> Directions:
        """Return D's singular directions by LAPACK."""
        return _directions(self.known, (self.tuned, self.base), delta, gram=False)

    def gram(self) -> Float64[Tensor, "1 M M"]:
        """Return the Gram matrix of D's short side: its upper triangle."""
        shape, device = tuple(self.tuned.shape), self.tuned.device
        gram = torch.zeros(1, min(shape), min(shape), dtype=torch.float64, device=device)
        for _, _, delta in self._pieces():
            add_grams(gram, short_first(delta, short_side(shape)))
        if not bool(gram.diagonal(dim1=-2, dim2=-1).isfinite().all()):  # sums of squares cannot cancel
            raise ValueError("expected finite values, got NaN or an infinity in the tuned or the base matrix")
        return gram

    def untouched(self, S: Tensor, chosen: slice) -> Tensor | None:
        """Return the matrix that the result equals to the last bit; ``None`` if it is neither."""
        count = chosen.stop - chosen.start
        # The sum of all directions is the matrix but for rounding, so it is not summed.
        if count == len(S) or not bool(S[0] > 0):
            return widened(self.tuned, self.dtype)
        return widened(self.base, self.dtype) if count == 0 else None

    def projected(self, P: Tensor, chosen: slice) -> Tensor:
        """Return W0 + P_k P_k^T D, the short side first; of the dropped ones W0 + D - P_d P_d^T D if they are fewer."""
        side = short_side(tuple(self.tuned.shape))
        # Whichever directions are fewer are multiplied: D less the dropped ones is D projected on the kept ones.
        few, keeps = fewer(chosen, len(P), P.device)
        basis, room = P[None, :, few], Buffer(P.device)
        values = torch.empty(self.tuned.shape, dtype=self.dtype, device=self.tuned.device)
        for index, x0, delta in self._pieces():
            part = room.like(tuple(delta.shape))
            along = product(basis.mT, short_first(delta, side))
            product(basis, along, out=short_first(part, side))
            values[index[1:]] = x0.add_(part if keeps else delta.sub_(part))[0]
        return values

    def _pieces(self) -> Iterator[tuple[tuple[slice, slice, slice], Tensor, Tensor]]:
        """Yield pieces: where, W0 there and D there, as stacks of one; both may be overwritten."""
        starts, changes = Buffer(self.tuned.device), Buffer(self.tuned.device)
        for index in pieces((1, *self.tuned.shape), short_side(tuple(self.tuned.shape)), self.tuned.device):
            x0 = starts.fill(self.base[index[1:]][None])
            yield index, x0, changes.fill(self.tuned[index[1:]][None]).sub_(x0)


def _by_gram(change: _Change, choose: _Choice) -> Truncated:
    S, P = change.eigen()
    told = _told(S)
    order, chosen = choose(told, change.tuned)
    if order is not None:
        S, P, told = S[order], P[:, order], told[order]
    values = change.untouched(told, chosen)
    if values is None:
        values = change.projected(P, chosen)
    return Truncated(values, chosen.stop - chosen.start, len(told), energy_share(S, chosen))


def _by_lapack(change: _Change, choose: _Choice) -> Truncated:
    start = exact(change.base)
    delta = exact(exact(change.tuned) - start)
    found = change.directions(delta)
    order, chosen = choose(found.told, change.tuned)
    if order is not None:
        found = Directions(found.U[:, order], found.S[order], found.Vh[order], found.resolved)
    values = change.untouched(found.told, chosen)
    if values is None:
        few, keeps = fewer(chosen, len(found.S), delta.device)
        part = found.added(few)
        values = start + (part if keeps else delta.sub_(part))
    return Truncated(values, chosen.stop - chosen.start, len(found.S), energy_share(found.S, chosen))


@dataclass(frozen=True)
class LowRankDelta:
    """Factors of the kept directions of D = W1 - W0, and what they miss.

    Attributes:
        B: U_k sqrt(S_k), values of the factor dtype.
        A: sqrt(S_k) Vh_k, likewise.
        kept: k.
        total: M = min(m, n).
        change: ||D||_F.
        error: ||D - B A||_F, from the factors themselves.
    """

    B: Float64[Tensor, "m k"]
    A: Float64[Tensor, "k n"]
    kept: int
    total: int
    change: float
    error: float

    @property
    def error_relative(self) -> float:
        """Error / ||D||_F; 0 if nothing changed."""
        return self.error / self.change if self.change > 0 else 0.0


def low_rank(
    tuned: Float[Tensor, "m n"],
    base: Float[Tensor, "m n"],
    rule: Rule,
    *,
    factor_dtype: torch.dtype = torch.float64,
) -> LowRankDelta:
    """Return B = U_k sqrt(S_k) and A = sqrt(S_k) Vh_k of the kept singular directions of D = W1 - W0.

    The factors are balanced, B^T B = A A^T = diag(S_k). D is formed in float64. Input of up to 32 bits goes by D's Gram
    matrix where sigma_M > 1e-5 sigma_1, everything else by LAPACK (see ``decomposed``); either way B A of all
    directions is D to float64 rounding. Directions that the method cannot tell from zero count as zero for the rule;
    a rule that keeps them all the same, as ``rank`` does, gets them as they are.

    Args:
        tuned: W1, any float dtype, device and stride.
        base: W0, of the same shape.
        rule: Which directions to keep.
        factor_dtype: What A and B will be stored in; the error is that of their values then.

    Returns:
        Factors of k = 0 if nothing is kept, or nothing changed.

    Raises:
        ValueError: If the shapes differ or are empty, a value is not finite, or a factor overflows its dtype.

    >>> found = low_rank(torch.tensor([[9.0, 0.0], [0.0, 4.0]]), torch.zeros(2, 2), Rule(rank=1))
    >>> (found.B @ found.A).tolist(), found.error
    ([[9.0, 0.0], [0.0, 0.0]], 4.0)
    """
    require_same_shape(tuned, base)
    delta = exact(exact(tuned) - exact(base))
    found = decomposed(delta, gram=takes_gram(wider(tuned.dtype, base.dtype), "auto"))
    chosen = kept(found.told, (delta.shape[0], delta.shape[1]), rule)
    B, A = found.factors(chosen, factor_dtype)
    whole = float(delta.norm())
    # Of the factors as they are stored: dropped directions and rounding together.
    error = float(delta.sub_(matmul(B, A)).norm()) if B.shape[1] else whole
    return LowRankDelta(B, A, kept=B.shape[1], total=len(found.S), change=whole, error=error)


@dataclass(frozen=True)
class PrincipalSplit:
    """W = residual + B A.

    Attributes:
        A: sqrt(S_r) Vh_r, values of the factor dtype.
        B: U_r sqrt(S_r), likewise.
        residual: W - B A.
    """

    A: Float64[Tensor, "r n"]
    B: Float64[Tensor, "m r"]
    residual: Float64[Tensor, "m n"]


def pissa(w: Float[Tensor, "m n"], rank: int, *, factor_dtype: torch.dtype = torch.float32) -> PrincipalSplit:
    """Split W into the adapter B A of its top singular directions and the residual W - B A.

    B = U_r sqrt(S_r) and A = sqrt(S_r) Vh_r, by LAPACK in float64, are rounded to the dtype that they are stored in
    before the residual is taken, so that the residual holds their rounding too and the sum is W. To go back: residual
    + B A.

    Args:
        w: Any float dtype, device and stride.
        rank: r, from 1 to min(m, n).
        factor_dtype: What A and B will be stored in.

    Returns:
        All in float64. A zero matrix gives zero factors.

    Raises:
        ValueError: If the rank is out of range, W is empty or not finite, or a factor overflows its dtype.

    Source: Meng, Wang & Zhang 2024, "PiSSA".

    >>> pissa(torch.diag(torch.tensor([9.0, 2.0])), 1).residual.diagonal()
    tensor([0., 2.], dtype=torch.float64)
    """
    x = exact(w)
    if not 1 <= rank <= min(x.shape):
        raise ValueError(f"rank: expected 1 to {min(x.shape)} for a matrix of shape {tuple(x.shape)}; got {rank!r}")
    B, A = decomposed(x, gram=False).factors(slice(0, rank), factor_dtype)
    return PrincipalSplit(A, B, x - matmul(B, A))


def svf(
    w: Float[Tensor, "m n"], z: float | Float[Tensor, " k"], *, known: Decompositions | None = None
) -> Float[Tensor, "m n"]:
    """Return U diag(S z) Vh, by LAPACK in float64 whatever the dtype.

    Args:
        w: Any float dtype, device and stride.
        z: One factor for all, or one for each of the M = min(m, n) singular values in descending order; any sign.
        known: Decompositions that were made before; that of W is kept there.

    Returns:
        In ``work_dtype`` of the input. W to rounding for z = 1, zero for z = 0 or a zero matrix. Where singular values
        are equal and their z are not, the result depends on which vectors LAPACK takes.

    Raises:
        ValueError: If z has another length or is not finite, or W is empty or not finite.

    Source: Sun, Cetin & Tang 2025, "Transformer-squared", singular value fine-tuning.

    >>> svf(torch.diag(torch.tensor([3.0, 2.0])), torch.tensor([2.0, -1.0])).diagonal()
    tensor([ 6., -2.], dtype=torch.float64)
    """
    x = exact(w)
    factors = torch.as_tensor(z, dtype=torch.float64, device=x.device).detach()
    if factors.ndim > 0 and factors.shape != (min(x.shape),):
        raise ValueError(f"z: expected a number or {min(x.shape)} of them; got shape {tuple(factors.shape)}")
    if not bool(factors.isfinite().all()):
        raise ValueError("z: expected finite factors, got NaN or an infinity")
    found = weight_directions(w, known=known)
    return found.added(slice(None), found.S * factors).to(work_dtype(w.dtype))


def weight_directions(w: Float[Tensor, "m n"], *, known: Decompositions | None = None) -> Directions:
    """Return the singular directions of W, as ``svf`` counts them.

    Args:
        w: Any float dtype, device and stride.
        known: Decompositions that were made before; that of W is kept there.

    Raises:
        ValueError: W is empty or not finite.
    """
    return _directions(known, (w,), exact(w), gram=False)


def _directions(
    known: Decompositions | None, matrices: tuple[Tensor, ...], x: Float64[Tensor, "m n"], *, gram: bool
) -> Directions:
    """Return the singular directions of x, which is made of some matrices."""

    def make() -> tuple[Tensor, ...]:
        found = decomposed(x, gram=gram)
        return found.U, found.S, found.Vh, torch.tensor(found.resolved, dtype=torch.float64)

    U, S, Vh, resolved = known_or_new(known, "directions" if gram else "lapack", matrices, make)
    return Directions(U, S, Vh, float(resolved))


def scale_change(
    tuned: Float[Tensor, "m n"],
    base: Float[Tensor, "m n"],
    factors: Float[Tensor, " M"],
    *,
    known: Decompositions | None = None,
) -> Float[Tensor, "m n"]:
    """Return W0 + sum_i f_i sigma_i u_i v_i^T, the singular directions of D = W1 - W0 with a factor each.

    It is computed as W1 + sum_i (f_i - 1) sigma_i u_i v_i^T, so that what is not scaled keeps the tuned values.

    Args:
        tuned: W1, any float dtype, device and stride.
        base: W0, of the same shape.
        factors: f_i of the M = min(m, n) directions in descending order of sigma; any sign.
        known: Decompositions that were made before; that of D is kept there.

    Returns:
        In ``work_dtype`` of the wider input. W1 to the last bit where all factors are 1, W0 where all are 0. Where
        singular values are equal and their factors are not, the result depends on which vectors the method takes.

    Raises:
        ValueError: The shapes differ or are empty, a value is not finite, or there is another number of factors.

    >>> D = torch.diag(torch.tensor([4.0, 2.0]))
    >>> scale_change(1 + D, torch.ones(2, 2), torch.tensor([0.5, 1.5])).diagonal()
    tensor([3., 4.], dtype=torch.float64)
    """
    require_same_shape(tuned, base)
    stored = wider(tuned.dtype, base.dtype)
    end, f = exact(tuned), factors.detach().to(tuned.device, torch.float64)
    if f.shape != (min(end.shape),) or not bool(f.isfinite().all()):
        raise ValueError(f"factors: expected {min(end.shape)} finite numbers; got shape {tuple(f.shape)}")
    if bool((f == 1).all()):
        return widened(tuned, work_dtype(stored))
    if bool((f == 0).all()):
        return widened(base, work_dtype(stored))
    found = change_directions(tuned, base, known=known)
    return (end + found.added(slice(None), found.S * (f - 1))).to(work_dtype(stored))


def change_directions(
    tuned: Float[Tensor, "m n"], base: Float[Tensor, "m n"], *, known: Decompositions | None = None
) -> Directions:
    """Return the singular directions of D = W1 - W0, as ``scale_change`` counts them.

    Args:
        tuned: W1, any float dtype, device and stride.
        base: W0, of the same shape.
        known: Decompositions that were made before; that of D is kept there.

    Raises:
        ValueError: The shapes differ or are empty, or a value is not finite.
    """
    require_same_shape(tuned, base)
    gram = takes_gram(wider(tuned.dtype, base.dtype), "auto")
    return _directions(known, (tuned, base), exact(exact(tuned) - exact(base)), gram=gram)


def laser(w: Float[Tensor, "m n"], rho: float) -> Truncated:
    """Return the top floor(rho M) singular directions of W, at least 1: its best approximation of that rank.

    Floor is the source's choice. rho means the decimal number that it prints as: 0.29 of 100 is 29, though the product
    of the floats is below. By LAPACK in float64 whatever the dtype.

    Args:
        w: Any float dtype, device and stride.
        rho: Fraction of the rank that remains, 0 to 1.

    Returns:
        The values in ``work_dtype`` of the input, and what of ||W||_F^2 they hold. W itself for rho = 1. A zero matrix
        stays, with nothing kept.

    Raises:
        ValueError: If rho is out of range, or W is empty or not finite.

    Source: Sharma, Ash & Misra 2024, "The truth is in there".

    >>> import torch
    >>> laser(torch.diag(torch.tensor([1.0, 5.0, 3.0])), 0.67).values.diagonal()
    tensor([0., 5., 3.], dtype=torch.float64)
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho: expected a fraction from 0 to 1; got {rho!r}")
    x = exact(w)
    # The change against nothing is the matrix; one zero stands for all of them.
    nothing = x.new_zeros(()).expand(x.shape)
    found = truncate(x, nothing, Rule(rank=max(1, math.floor(share_of(rho, min(x.shape))))))
    return replace(found, values=found.values.to(work_dtype(w.dtype)))
