"""A base matrix W0 and its tuned W1 = W0 + D: spectra of all three, and how their singular vectors lie to each other.

From products of the short side alone, P0 and P1 being the short-side vectors of W0 and W1:

    short overlap   |P0^T P1|                       long overlap   |S0^-1 P0^T (W0 W1^T) P1 S1^-1|
    C_ii = (P0^T (W0 D^T) P0)_ii / s0_i             energies of D along each base singular direction, likewise

so neither the long-side vectors nor D's are ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffract.linalg.blas import product
from diffract.linalg.exact import Spectrum, lapack, mirrored
from diffract.linalg.spectrum import GRAM_RESOLVES, GRAM_VECTORS, gram_eigen, gram_values, inverse
from diffract.linalg.sums import PairSums

SMALL_TUNED = 1e-2
"""Ratio of the largest sigmas of W1 and W0 below which W1 is decomposed by itself."""


@dataclass(frozen=True)
class PairSpectrum:
    """What two stacks of b matrices have to do with each other.

    Attributes:
        base, tuned: Spectra of W0 and W1, without vectors.
        left_overlap: (b, M, M), U0^T U1, signs as they fall; rows are base vectors. ``None``, as what follows, if only
            spectra are known.
        right_overlap: (b, M, M), V0^T V1.
        diagonal: (b, M), C_ii = u0_i^T D v0_i.
        energy: (b, M), ||u0_i^T D||^2.
        row_energy: (b, M), sum_r u0_ri^2 ||D_r||^2, D_r the rows of D: the energy that independent entries of their
            rows' sizes would have there. ``None`` if it was not asked for.
    """

    base: Spectrum
    tuned: Spectrum
    left_overlap: Tensor | None = None
    right_overlap: Tensor | None = None
    diagonal: Tensor | None = None
    energy: Tensor | None = None
    row_energy: Tensor | None = None


def pair_from_sums(sums: PairSums) -> PairSpectrum:
    """Return the pair's spectra and overlaps from summed products; see ``weak_pairs`` for where that is too coarse."""
    S0, P0 = gram_eigen(sums.base_gram)
    S1, P1 = gram_eigen(sums.tuned_gram)
    inverse0, inverse1 = inverse(S0), inverse(S1)
    short, mixed = product(P0.mT, P1), product(P0.mT, sums.cross)
    across = product(mixed, P1).addcmul_(S0.square()[:, :, None], short)  # P0^T (W0 W0^T) = S0^2 P0^T
    long = across.mul_(inverse0[:, :, None]).mul_(inverse1[:, None, :])
    diagonal = (mixed * P0.mT).sum(-1) * inverse0
    # vectors of the short side are at hand as they are; those of the long side only through the cross product
    if sums.side == "rows":
        energy = (product(P0.mT, sums.delta_gram) * P0.mT).sum(-1)
        row_energy = (P0.mT.square() @ sums.delta_gram.diagonal(dim1=1, dim2=2)[:, :, None])[:, :, 0]
        left, right = short, long
    else:
        energy = mixed.square().sum(-1) * inverse0.square()
        weighed = mirrored(sums.weighed_gram)
        row_energy = (product(P0.mT, weighed) * P0.mT).sum(-1) * inverse0.square() if len(weighed) else None
        left, right = long, short
    base, tuned = _spectra(S0, S1)
    found = PairSpectrum(base, tuned, left_overlap=left, right_overlap=right)
    return replace(found, diagonal=diagonal, energy=energy, row_energy=row_energy)


def pair_values(sums: PairSums) -> PairSpectrum:
    """Return the pair's spectra from summed products, without overlaps."""
    return PairSpectrum(*_spectra(gram_values(sums.base_gram).S, gram_values(sums.tuned_gram).S))


def weak_pairs(pair: PairSpectrum) -> list[int]:
    """Return the pairs for which summed products are too coarse, and LAPACK is wanted.

    W1's products are a sum of W0's and D's, so a W1 that is far smaller drowns in their rounding; and vectors need
    last sigmas that stand out.
    """
    S0, S1 = pair.base.S, pair.tuned.S
    weak = S1[:, 0] < SMALL_TUNED * S0[:, 0]
    if pair.left_overlap is not None:
        # Without overlaps only values count, and those are resolved as far as they say.
        weak |= (S0[:, -1] <= GRAM_VECTORS * S0[:, 0]) | (S1[:, -1] <= GRAM_VECTORS * S1[:, 0])
    return (weak & (S0[:, 0] > 0) & (S1[:, 0] > 0)).nonzero().flatten().tolist()


def _spectra(S0: Tensor, S1: Tensor) -> tuple[Spectrum, Spectrum]:
    # Products of W1 are sums with those of W0: its small values drown in the rounding of the larger of both.
    largest = torch.maximum(S0[:, 0], S1[:, 0])
    names = ("gram",) * len(S0)
    return Spectrum(S0, names, GRAM_RESOLVES * S0[:, 0]), Spectrum(S1, names, GRAM_RESOLVES * largest)


def pair_from_matrices(base: Float[Tensor, "b m n"], tuned: Float[Tensor, "b m n"]) -> PairSpectrum:
    """Return the pair's spectra and overlaps by LAPACK on the matrices themselves."""
    first, second = lapack(base, vectors=True), lapack(tuned, vectors=True)
    delta = tuned.double() - base.double()
    found = pair_from_spectra(first, second, delta)
    assert first.U is not None
    return replace(found, row_energy=(first.U.mT.square() @ delta.square().sum(-1, keepdim=True))[:, :, 0])


def pair_from_spectra(first: Spectrum, second: Spectrum, delta: Float[Tensor, "b m n"]) -> PairSpectrum:
    """Return the overlaps of two decompositions with vectors, and what of the change D lies along the first's."""
    assert first.U is not None and first.Vh is not None and second.U is not None and second.Vh is not None
    along = product(first.U.mT.contiguous(), delta)
    return PairSpectrum(
        base=replace(first, U=None, Vh=None),
        tuned=replace(second, U=None, Vh=None),
        left_overlap=product(first.U.mT, second.U),
        right_overlap=product(first.Vh, second.Vh.mT),
        diagonal=(along * first.Vh).sum(-1),
        energy=along.square().sum(-1),
    )


def replace_pairs(pair: PairSpectrum, places: list[int], found: PairSpectrum) -> PairSpectrum:
    """Return a pair record with those at ``places`` exchanged; ``found`` holds overlaps."""
    at = torch.tensor(places, device=pair.base.S.device)

    def put(old: Any, new: Any) -> Any:
        if isinstance(old, Spectrum | PairSpectrum):
            return replace(old, **{f.name: put(getattr(old, f.name), getattr(new, f.name)) for f in fields(old)})
        if isinstance(old, tuple):  # names of methods
            exchanged = dict(zip(places, new, strict=True))
            return tuple(exchanged.get(i, name) for i, name in enumerate(old))
        return None if old is None else old.index_copy(0, at, new)

    return put(pair, found)
