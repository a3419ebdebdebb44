"""Where along the spectrum of the base the change sits: energies by direction, and whether peaks hold more of them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from diffract.metrics.facts import OF_VECTORS, built_in

PerMatrix = Float64[Tensor, "b"]
Energies = Float64[Tensor, "b M"]
InPeak = Bool[Tensor, "b M"]

PERMUTATIONS = 999
TIE = 1e-12
"""Share of the whole energy within which two sums are equal: the same terms, added in another order."""


@built_in("mean ||u0_i^T D||^2 inside the base's spectral peaks over outside", range="[0, inf)", invariant=OF_VECTORS)
def peak_enrichment(delta_energy: Energies, in_base_peak: InPeak) -> PerMatrix:
    """Mean of e_i inside spectral peaks over its mean outside.

    Args:
        delta_energy: e_i for each base singular direction.
        in_base_peak: Whether sigma_i lies in a peak (``find_peaks(...).membership >= 0``).

    Returns:
        In [0, inf], 1 by chance. Infinite where all energy is inside. NaN where all or no sigmas are inside, and where
        nothing changed.
    """
    count = in_base_peak.sum(-1)
    outside = delta_energy.where(~in_base_peak, 0.0).sum(-1) / (in_base_peak.shape[-1] - count)
    return delta_energy.where(in_base_peak, 0.0).sum(-1) / count / outside


def peak_enrichment_pvalue(
    energy: Energies, in_peak: InPeak, *, draws: int = PERMUTATIONS, generator: torch.Generator
) -> PerMatrix:
    """Permutation p-value of ``peak_enrichment``, one-sided: (1 + #{permuted >= observed}) / (1 + draws).

    Labels are permuted over positions. As the whole energy is fixed, the ratio grows with the energy inside alone,
    which is compared. The same permutations serve all rows: a row with k sigmas inside takes the k positions that come
    first in each. So a row's value does not depend on its batch, but those of one batch share their sampling error.

    Peaks are runs of neighbouring sigmas, and the energies of neighbours resemble each other. Permuted labels are
    scattered, so under a smooth trend of e_i the p-value is too small: it says that energy and peaks go together, not
    that peaks as such draw the change.

    Args:
        energy: As for ``peak_enrichment``.
        in_peak: As for ``peak_enrichment``.
        draws: Number of permutations.
        generator: Source of the permutations; of any device.

    Returns:
        In [1 / (1 + draws), 1]. NaN where ``peak_enrichment`` is.

    Source: Phipson & Smyth 2010, Permutation p-values should never be zero.
    """
    uniform = torch.rand(draws, energy.shape[1], generator=generator, device=generator.device)
    places = uniform.argsort(-1).to(energy.device)
    observed = energy.where(in_peak, 0.0).sum(-1)
    least = observed - TIE * energy.sum(-1)
    counts = in_peak.sum(-1)
    reached = torch.zeros_like(observed)
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero().flatten()
        permuted = energy[rows] @ (places < count).double().mT
        reached[rows] = (permuted >= least[rows, None]).sum(-1).double()
    return ((1 + reached) / (1 + draws)).where(~peak_enrichment(energy, in_peak).isnan(), torch.nan)


@built_in(
    "share of 999 permutations of the labels with an enrichment as large",
    range="(0, 1]",
    source="Phipson & Smyth 2010",
    invariant=OF_VECTORS,
    name="peak_enrichment_pvalue",
)
def seeded_enrichment_pvalue(delta_energy: Energies, in_base_peak: InPeak) -> PerMatrix:
    """``peak_enrichment_pvalue`` with ``PERMUTATIONS`` draws of seed 0."""
    return peak_enrichment_pvalue(delta_energy, in_base_peak, generator=torch.Generator().manual_seed(0))
