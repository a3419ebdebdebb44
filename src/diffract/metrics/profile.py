"""Where along the spectrum of the base the change sits: energies by direction, beside what noise and turns would give.

The energy of D = W1 - W0 along a base singular direction, e_i = ||u0_i^T D||^2, follows the rows of the matrix and the
size of sigma_i before it follows anything of interest. So it is held against its expectation, and the profile of the
spectrum, by tenth or by peak, is sum e / sum expected.

Shapes: b matrices, M = min(m, n) directions of each, sigmas descending; k peaks at most.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from diffract.metrics.facts import Metric, built_in
from diffract.metrics.peaks import Peaks

PerMatrix = Float64[Tensor, "b"]
Energies = Float64[Tensor, "b M"]
Chosen = Bool[Tensor, "b M"]

OF_ROWS = frozenset({"permutation"})
"""What leaves a number as it is that knows which rows a change has."""

REWEIGHTINGS = 20
LEAST = 1e-3
"""Share of the median energy below which no expectation lies."""

TENTHS = 10
"""Parts of the spectrum; a matrix with fewer resolved directions has no profile."""

FEWEST_OUTSIDE = 5
"""Sigmas outside of the peaks from which on inside and outside are compared."""

PERMUTATIONS = 999
TIE = 1e-12
"""Share of the whole within which two sums are equal: the same terms, added in another order."""


def expected_energy(energy: Energies, row_energy: Energies, sigmas: Energies, directions: Chosen) -> Energies:
    """Energies that a change without a preference for directions would have: a fit to those that it has.

    Noise with equal entries has the same energy everywhere; noise with rows of unequal size has sum_r u_ri^2 ||D_r||^2;
    a rescaling or a turn of the right vectors has energies that grow with sigma_i^2, a turn of the left ones energies
    that fall with it. The sum of these three is fitted by least squares, each energy weighted by 1 / fitted^2, as
    energies scatter like their means.

    Args:
        energy: e_i = ||u0_i^T D||^2.
        row_energy: sum_r u0_ri^2 ||D_r||^2.
        sigmas: Of the base.
        directions: Which are resolved; the others take no part.

    Returns:
        At least a thousandth of the median energy. NaN for directions that are not resolved, and throughout where
        fewer than ten are, where nothing changed, and where energies are not known.

    >>> flat = torch.full((1, 12), 3.0, dtype=torch.float64)
    >>> expected_energy(flat, flat, torch.arange(12.0, 0, -1).double()[None], flat > 0)[0, :2].round(decimals=6)
    tensor([3., 3.], dtype=torch.float64)
    """
    count = directions.sum(-1, keepdim=True)
    median = energy.where(directions, torch.nan).nanmedian(-1, keepdim=True).values
    known = (count >= TENTHS) & (median > 0)
    mask = directions & known
    # Columns and energies of size one, so that no unit decides which of them counts as zero.
    terms = torch.stack([torch.ones_like(energy), sigmas.square(), row_energy], -1).where(mask[..., None], 0.0)
    terms = (terms / terms.amax(1, keepdim=True).clamp(min=1e-300)).nan_to_num()
    wanted = (energy / median).where(mask, 0.0).nan_to_num()
    fitted = torch.ones_like(energy)
    for _ in range(REWEIGHTINGS):
        # Energies scatter in proportion to their expectation (chi-square): least squares weigh by its inverse.
        weighted = terms / fitted[..., None]
        # Terms may be proportional to each other (rows of equal size, equal sigmas): the least solution serves.
        solution = torch.linalg.pinv(weighted, rtol=1e-9) @ (wanted / fitted)[..., None]
        fitted = (terms @ solution)[..., 0].clamp(min=LEAST)
    return (fitted * median).where(mask, torch.nan)


def energy_ratio(energy: Energies, expected: Energies) -> Energies:
    """Return e_i over its expectation; NaN where there is none."""
    return energy / expected


def share_of_expected(energy: Energies, expected: Energies, part: Chosen) -> PerMatrix:
    """Return sum e / sum expected over a part of the spectrum, as far as there are expectations; NaN without any."""
    part = part & expected.isfinite()
    return energy.where(part, 0.0).sum(-1) / expected.where(part, 0.0).sum(-1)


def _in_tenth(delta_energy: Energies, energy_expected: Energies, tenth: int) -> PerMatrix:
    known = energy_expected.isfinite()
    rank, count = known.cumsum(-1) - 1, known.sum(-1, keepdim=True)
    return share_of_expected(delta_energy, energy_expected, rank * TENTHS // count.clamp(min=1) == tenth)


def _tenth(tenth: int) -> Metric:
    where = {0: ", the largest sigmas", TENTHS - 1: ", the smallest"}.get(tenth, "")
    return built_in(
        f"sum ||u0_i^T D||^2 over its expectation, tenth {tenth + 1} of the base's resolved directions{where}",
        name=f"energy_tenth_{tenth + 1}",
        facts=("delta_energy", "energy_expected"),
        range="[0, inf)",
        invariant=OF_ROWS,
    )(partial(_in_tenth, tenth=tenth))


PROFILE = tuple(_tenth(tenth) for tenth in range(TENTHS))
"""The profile of the change along the spectrum; 1 throughout is noise, scaling or a turn."""


def by_peak(delta_energy: Energies, energy_expected: Energies, base_peaks: Peaks) -> Float64[Tensor, "b k"]:
    """Return sum e / sum expected for each peak of the base, by ascending sigma; NaN beyond the last."""
    count, most = len(delta_energy), base_peaks.positions.shape[1]
    found = [share_of_expected(delta_energy, energy_expected, base_peaks.membership == k) for k in range(most)]
    return torch.stack(found, 1) if found else delta_energy.new_empty(count, 0)


def _compared(ratio: Energies, peaks: Peaks) -> tuple[Energies, Chosen, Chosen]:
    """Return ratios, 0 where unknown, and which lie inside and outside of peaks where that can be compared."""
    known = ratio.isfinite()
    inside, outside = known & (peaks.membership >= 0), known & (peaks.membership < 0)
    enough = ((peaks.count >= 2) & (outside.sum(-1) >= FEWEST_OUTSIDE))[:, None]
    return ratio.where(known, 0.0), inside & enough, outside & enough


@built_in(
    "mean ||u0_i^T D||^2 / expected inside the base's spectral peaks over outside; two peaks at least",
    range="[0, inf)",
    invariant=OF_ROWS,
    version=2,
)
def peak_enrichment(energy_ratio: Energies, base_peaks: Peaks) -> PerMatrix:
    """Mean of e_i / expected inside spectral peaks over its mean outside.

    Args:
        energy_ratio: e_i over its expectation for each base singular direction.
        base_peaks: Peaks of the base.

    Returns:
        In [0, inf], 1 by chance. Infinite where all energy is inside. NaN where the base has fewer than two peaks (one
        peak is the bulk, and outside of it are the two ends of the spectrum), where fewer than five resolved directions
        lie outside, and where nothing changed.
    """
    ratio, inside, outside = _compared(energy_ratio, base_peaks)
    means = [ratio.where(part, 0.0).sum(-1) / part.sum(-1) for part in (inside, outside)]
    return means[0] / means[1]


def peak_enrichment_pvalue(
    ratio: Energies, peaks: Peaks, *, draws: int = PERMUTATIONS, generator: torch.Generator
) -> PerMatrix:
    """Permutation p-value of ``peak_enrichment``, one-sided: (1 + #{permuted >= observed}) / (1 + draws).

    Labels are permuted over the resolved directions. As the whole is fixed, the enrichment grows with the sum inside
    alone, which is compared. The same random numbers serve all rows, so that a row's value does not depend on its
    batch, but those of one batch share their sampling error.

    Peaks are runs of neighbouring sigmas, and the ratios of neighbours may resemble each other. Permuted labels are
    scattered, so under a trend that the expectation does not catch (a left turn of a spiky base) the p-value is too
    small.

    Args:
        ratio: As for ``peak_enrichment``.
        peaks: As for ``peak_enrichment``.
        draws: Number of permutations.
        generator: Source of the permutations; of any device.

    Returns:
        In [1 / (1 + draws), 1]. NaN where ``peak_enrichment`` is.

    Source: Phipson & Smyth 2010, Permutation p-values should never be zero.
    """
    uniform = torch.rand(draws, ratio.shape[1], generator=generator, device=generator.device).to(ratio.device)
    whole, inside, outside = _compared(ratio, peaks)
    observed = whole.where(inside, 0.0).sum(-1)
    least = observed - TIE * whole.sum(-1)
    sizes = torch.stack([(inside | outside).sum(-1), inside.sum(-1)], -1)
    reached = torch.zeros_like(observed)
    for size in sizes.unique(dim=0):
        rows = (sizes == size).all(-1).nonzero().flatten()
        known, count = size.tolist()
        # Those that are known, in order, at the front: the labels of a row with k inside are the k least numbers.
        values = whole[rows][(inside | outside)[rows]].view(len(rows), known)
        labels = (uniform[:, :known].argsort(-1) < count).double()
        reached[rows] = (values @ labels.mT >= least[rows, None]).sum(-1).double()
    return ((1 + reached) / (1 + draws)).where(~peak_enrichment(ratio, peaks).isnan(), torch.nan)


@built_in(
    "share of 999 permutations of the labels with an enrichment as large",
    range="(0, 1]",
    source="Phipson & Smyth 2010",
    invariant=OF_ROWS,
    version=2,
    name="peak_enrichment_pvalue",
)
def seeded_enrichment_pvalue(energy_ratio: Energies, base_peaks: Peaks) -> PerMatrix:
    """``peak_enrichment_pvalue`` with ``PERMUTATIONS`` draws of seed 0."""
    return peak_enrichment_pvalue(energy_ratio, base_peaks, generator=torch.Generator().manual_seed(0))
