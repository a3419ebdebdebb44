"""A tuned matrix of which only some singular directions of the change are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffract.edits.operations.directions import Directions, decomposed, energy_share, fewer
from diffract.edits.operations.precision import exact, require_same_shape, widened, wider, work_dtype
from diffract.edits.operations.rules import Rule, kept, random_order
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
    way = _by_gram if takes_gram(stored, "auto") else _by_lapack
    return way(tuned.detach(), base.detach(), _Choice(rule, generator), work_dtype(stored))


def change_sigmas(tuned: Float[Tensor, "m n"], base: Float[Tensor, "m n"]) -> Float64[Tensor, " M"]:
    """Return the singular values of D, descending, as ``truncate`` decides by them: zero where they cannot be told.

    Args:
        tuned: W1, any float dtype, device and stride.
        base: W0, of the same shape.

    Raises:
        ValueError: If the shapes differ, or a value is not finite.
    """
    require_same_shape(tuned, base)
    if takes_gram(wider(tuned.dtype, base.dtype), "auto"):
        return _told(gram_eigen(_delta_gram(tuned.detach(), base.detach()))[0][0])
    return decomposed(exact(exact(tuned.detach()) - exact(base.detach())), gram=False).told


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


def _by_gram(tuned: Tensor, base: Tensor, choose: _Choice, dtype: torch.dtype) -> Truncated:
    found = gram_eigen(_delta_gram(tuned, base))
    S, P = found[0][0], found[1][0]
    told = _told(S)
    order, chosen = choose(told, tuned)
    if order is not None:
        S, P, told = S[order], P[:, order], told[order]
    values = _untouched(tuned, base, told, chosen, dtype)
    if values is None:
        values = _projected(tuned, base, P, chosen, dtype)
    return Truncated(values, chosen.stop - chosen.start, len(told), energy_share(S, chosen))


def _by_lapack(tuned: Tensor, base: Tensor, choose: _Choice, dtype: torch.dtype) -> Truncated:
    start = exact(base)
    delta = exact(exact(tuned) - start)
    found = decomposed(delta, gram=False)
    order, chosen = choose(found.told, tuned)
    if order is not None:
        found = Directions(found.U[:, order], found.S[order], found.Vh[order], found.resolved)
    values = _untouched(tuned, base, found.told, chosen, dtype)
    if values is None:
        few, keeps = fewer(chosen, len(found.S), delta.device)
        part = found.added(few)
        values = start + (part if keeps else delta.sub_(part))
    return Truncated(values, chosen.stop - chosen.start, len(found.S), energy_share(found.S, chosen))


def _untouched(tuned: Tensor, base: Tensor, S: Tensor, chosen: slice, dtype: torch.dtype) -> Tensor | None:
    """Return the matrix that the result equals to the last bit; ``None`` if it is neither."""
    count = chosen.stop - chosen.start
    if count == len(S) or not bool(S[0] > 0):
        return widened(tuned, dtype)
    return widened(base, dtype) if count == 0 else None


def _changes(tuned: Tensor, base: Tensor) -> Iterator[tuple[tuple[slice, slice, slice], Tensor, Tensor]]:
    """Yield pieces along the long side: where, W0 there and D there, as stacks of one; both may be overwritten."""
    starts, changes = Buffer(tuned.device), Buffer(tuned.device)
    for index in pieces((1, *tuned.shape), short_side(tuple(tuned.shape)), tuned.device):
        x0 = starts.fill(base[index[1:]][None])
        yield index, x0, changes.fill(tuned[index[1:]][None]).sub_(x0)


def _delta_gram(tuned: Tensor, base: Tensor) -> Float64[Tensor, "1 M M"]:
    """Return the Gram matrix of D's short side: its upper triangle."""
    side, short = short_side(tuple(tuned.shape)), min(tuned.shape)
    gram = torch.zeros(1, short, short, dtype=torch.float64, device=tuned.device)
    for _, _, delta in _changes(tuned, base):
        add_grams(gram, short_first(delta, side))
    if not bool(gram.diagonal(dim1=-2, dim2=-1).isfinite().all()):  # sums of squares cannot cancel
        raise ValueError("expected finite values, got NaN or an infinity in the tuned or the base matrix")
    return gram


def _projected(tuned: Tensor, base: Tensor, P: Tensor, chosen: slice, dtype: torch.dtype) -> Tensor:
    """Return W0 + P_k P_k^T D, the short side first; or W0 + D - P_d P_d^T D of the dropped ones if these are fewer."""
    side = short_side(tuple(tuned.shape))
    few, keeps = fewer(chosen, len(P), P.device)
    basis, room = P[None, :, few], Buffer(P.device)
    values = torch.empty(tuned.shape, dtype=dtype, device=tuned.device)
    for index, x0, delta in _changes(tuned, base):
        part = room.like(tuple(delta.shape))
        along = product(basis.mT, short_first(delta, side))
        product(basis, along, out=short_first(part, side))
        values[index[1:]] = x0.add_(part if keeps else delta.sub_(part))[0]
    return values
