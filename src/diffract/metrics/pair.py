"""What tells a matrix from its base: the change D = W1 - W0, how vectors agree, what changes of several have in common.

The last part takes NumPy Gram matrices <D_a, D_b> of a few domains; the deltas themselves are not needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from diffract.metrics.facts import OF_ENTRIES, OF_VECTORS, Metric, built_in
from diffract.metrics.single import effective_rank

PerMatrix = Float64[Tensor, "b"]


@built_in("||D||_F, D = W1 - W0", unit="weight", range="[0, inf)", degree=1)
def delta_frobenius(delta_squares: PerMatrix) -> PerMatrix:
    """||D||_F."""
    return delta_squares.sqrt()


@built_in("||D||_F / ||W0||_F", range="[0, inf)")
def delta_relative(delta_squares: PerMatrix, base_squares: PerMatrix) -> PerMatrix:
    """||D||_F / ||W0||_F. NaN for a zero base."""
    return torch.where(base_squares > 0, delta_squares / base_squares, torch.nan).sqrt()


@built_in("||D||_2", unit="weight", range="[0, inf)", degree=1)
def delta_spectral(delta_sigmas: Float64[Tensor, "b M"]) -> PerMatrix:
    """||D||_2."""
    return delta_sigmas[:, 0]


@built_in("||D||_F^2 / ||D||_2^2", range="[1, M]", source="Rudelson & Vershynin 2007")
def delta_stable_rank(delta_sigmas: Float64[Tensor, "b M"]) -> PerMatrix:
    """||D||_F^2 / ||D||_2^2. NaN when nothing changed."""
    return delta_sigmas.square().sum(-1) / delta_sigmas[:, 0].square()


@built_in("exp of the entropy (nats) of D's sigma / sum sigma", range="[1, M]", source="Roy & Vetterli 2007")
def delta_effective_rank(delta_sigmas: Float64[Tensor, "b M"]) -> PerMatrix:
    """Exp of the entropy (nats) of D's normalised singular values. NaN when nothing changed."""
    return effective_rank(delta_sigmas)


@built_in("share of entries that differ", range="[0, 1]", invariant=OF_ENTRIES)
def delta_changed_share(changed: PerMatrix, shape: tuple[int, int]) -> PerMatrix:
    """Share of the entries that differ."""
    return changed / (shape[0] * shape[1])


@built_in(
    "norm that rounding W1 to its dtype alone causes: sqrt(sum ulp^2 / 12)",
    unit="weight",
    range="[0, inf)",
    source="Higham 2002, 2.1",
    degree=None,
    invariant=OF_ENTRIES,
)
def delta_rounding_floor(rounding_squares: PerMatrix) -> PerMatrix:
    """Norm that rounding W1 to its stored dtype alone causes: sqrt(sum ulp_ij^2 / 12).

    Errors are uniform within half an ulp. A ``delta_frobenius`` near it is rounding, not training.
    """
    return rounding_squares.sqrt()


Overlap = Float64[Tensor, "b M M"]
Sigmas = Float64[Tensor, "b M"]

WINDOW = 0.05
"""Base vectors whose sigma is within 5% of a tuned vector's belong to its window."""

INTRUDERS = 10
INTRUDER_MATCH = 0.5


def overlap(cosines: Float64[Tensor, "b M M"]) -> Overlap:
    """|u0_i . u1_j|: the sign of a singular vector is arbitrary."""
    return cosines.abs()


def agreement(overlap: Overlap) -> Sigmas:
    """|u0_i . u1_i| for each i, in [0, 1]."""
    return overlap.diagonal(dim1=-2, dim2=-1)


def best_match(overlap: Overlap) -> Sigmas:
    """max_j |u0_i . u1_j| for each base vector i, in [0, 1]."""
    return overlap.amax(-1)


def window(base_sigmas: Sigmas, sigmas: Sigmas) -> Bool[Tensor, "b M M"]:
    """Whether base sigma i lies within 5% of tuned sigma j."""
    return (base_sigmas[:, :, None] - sigmas[:, None, :]).abs_() <= WINDOW * sigmas[:, None, :]


def agreement_window(overlap: Overlap, window: Bool[Tensor, "b M M"]) -> Sigmas:
    """Norm of u1_i projected on the base vectors whose sigma lies within 5% of its own, in [0, 1].

    Where sigmas nearly coincide single vectors mean nothing, the space they span does. Zero where the window is empty.
    """
    return (overlap * window).square_().sum(-2).sqrt_()


def agreement_window_chance(window: Bool[Tensor, "b M M"], dimension: int) -> PerMatrix:
    """Mean of sqrt(k_i / d), k_i being the number of base vectors in the window of i."""
    return (window.sum(-2).double() / dimension).sqrt().mean(-1)


def subspace(overlap: Overlap, k: int) -> PerMatrix:
    """||U0_k^T U1_k||_F^2 / k: the share that the top k subspaces have in common. NaN for k > M."""
    if k > overlap.shape[-1]:
        return torch.full_like(overlap[:, 0, 0], torch.nan)
    return overlap[:, :k, :k].square().sum((-2, -1)) / k


@built_in(
    "top 10 left vectors of W1 whose best match in W0 is below 0.5",
    unit="count",
    range="[0, 10]",
    source="Shuttleworth et al. 2024",
    invariant=OF_VECTORS,
)
def intruders(left_overlap: Overlap) -> PerMatrix:
    """How many of the top 10 left vectors of W1 have a best match below 0.5 in W0 (Shuttleworth et al. 2024).

    NaN where one of the matrices has no vectors.
    """
    matches = left_overlap[:, :, :INTRUDERS].amax(-2)
    return torch.where(matches.isnan().any(-1), torch.nan, (matches < INTRUDER_MATCH).sum(-1).double())


def cosine_chance(dimension: int) -> float:
    """Mean |cos| of random unit vectors: Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)), about sqrt(2 / (pi d)).

    >>> round(cosine_chance(2), 4)  # 2 / pi
    0.6366
    """
    return math.exp(math.lgamma(dimension / 2) - math.lgamma((dimension + 1) / 2)) / math.sqrt(math.pi)


def best_match_chance(dimension: int, count: int) -> float:
    """Best |cos| of a random unit vector with k = ``count`` others: about sqrt(2 ln k / d), at most 1.

    >>> best_match_chance(1, 1)
    1.0
    """
    return min(1.0, max(cosine_chance(dimension), math.sqrt(2 * math.log(count) / dimension)))


@built_in("sum C_ii^2 / ||D||_F^2, C = U0^T D V0: what of the change lies in singular values", range="[0, 1]")
def value_share(diagonal: Sigmas, delta_squares: PerMatrix) -> PerMatrix:
    """sum_i C_ii^2 / ||D||_F^2 with C = U0^T D V0, in [0, 1]; chance level 1 / max(m, n). NaN when nothing changed."""
    return diagonal.square().sum(-1) / delta_squares


@built_in("chance level of value_share: 1 / max(m, n)", range="(0, 1]")
def value_share_chance(shape: tuple[int, int], delta_squares: PerMatrix) -> PerMatrix:
    """Return what a small change in no particular direction has in singular values, the same for every pair."""
    return torch.full_like(delta_squares, 1 / max(shape))


@built_in("sum (sigma_i(W1) - sigma_i(W0))^2 / ||D||_F^2", range="[0, 1]", source="Mirsky 1960")
def spectral_shift_share(base_sigmas: Sigmas, sigmas: Sigmas, delta_squares: PerMatrix) -> PerMatrix:
    """sum_i (sigma_i(W1) - sigma_i(W0))^2 / ||D||_F^2, in [0, 1] (Mirsky 1960). NaN when nothing changed."""
    return (sigmas - base_sigmas).square().sum(-1) / delta_squares


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


SignedOverlap = Float64[Tensor, "b M M"]

CHANCE_DRAWS = 4000
FEWEST_DRAWS = 8


def principal_angles(overlap: SignedOverlap, k: int) -> Float64[Tensor, "b k"]:
    """Arc cosines of the singular values of U0_k^T U1_k, in radians, ascending (Bjorck & Golub 1973).

    Angles below about sqrt(2 e) cannot be told from zero, e being the error of the overlap: 2e-8 for vectors that are
    orthonormal to rounding. The mean of their cos^2 is ``agreement.subspace``.

    Args:
        overlap: U0^T U1, signed.
        k: Vectors of either matrix that count.

    Returns:
        In [0, pi / 2]. NaN for k > M, and where the overlap holds NaN.
    """
    if k > overlap.shape[-1]:
        return torch.full((len(overlap), k), torch.nan, dtype=overlap.dtype, device=overlap.device)
    block = overlap[:, :k, :k]
    finite = block.isfinite().flatten(1).all(1)
    cosines = torch.linalg.svdvals(block.where(finite[:, None, None], 0.0)).clamp(max=1.0)
    return cosines.arccos().where(finite[:, None], torch.nan)


def mean_principal_angle(overlap: SignedOverlap, k: int) -> PerMatrix:
    """Mean of ``principal_angles``."""
    return principal_angles(overlap, k).mean(-1)


@cache
def principal_angle_chance(dimension: int, k: int, *, seed: int = 0) -> tuple[float, float]:
    """Mean largest and mean mean angle between random k-dimensional spaces in d dimensions, by seeded simulation.

    The overlap is distributed as the first k rows of an orthonormal basis of the columns of k + (d - k) Gaussian rows.
    The QR factor of the latter has independent entries (Bartlett 1933), sqrt(chi^2_(d-k-i)) on its diagonal and
    Gaussian above, so that a draw costs k^3 whatever d is. For 2k > d spaces meet in at least 2k - d dimensions; the
    other angles are those of their complements.

    4,000 / k pairs of spaces are drawn, at least 8; the standard error of either mean is at most 0.008. The largest
    angle is near pi / 2 for any k well below d, and tells little there.

    Args:
        dimension: d.
        k: Of both spaces.
        seed: Of the simulation.

    Returns:
        Radians; NaN for k > d.

    >>> principal_angle_chance(5, 5)
    (0.0, 0.0)
    """
    if k > dimension:
        return math.nan, math.nan
    free = min(k, dimension - k)
    if free == 0:
        return 0.0, 0.0
    random, draws = np.random.default_rng(seed), max(CHANCE_DRAWS // free, FEWEST_DRAWS)
    rest = np.triu(random.standard_normal((draws, free, free)), 1)
    diagonal = np.arange(free)
    rest[:, diagonal, diagonal] = np.sqrt(random.chisquare(dimension - free - diagonal, (draws, free)))
    rows = np.concatenate([random.standard_normal((draws, free, free)), rest], axis=1)
    cosines = np.linalg.svd(np.linalg.qr(rows).Q[:, :free], compute_uv=False)
    angles = np.arccos(cosines.clip(max=1.0))
    return float(angles[:, -1].mean()), float(angles.sum(-1).mean() / k)


def agreement_metrics(side: str) -> tuple[Metric, ...]:
    """Return the metrics of one side's overlaps, each beside what chance gives.

    Args:
        side: ``left`` or ``right``.
    """
    overlap, who = f"{side}_overlap", f"{side} singular vectors"

    def row(name: str, summary: str, *facts: str) -> Callable[[Callable[..., Tensor]], Metric]:
        words: dict[str, Any] = {"range": "[0, 1]", "invariant": OF_VECTORS}
        return built_in(summary, name=f"{side}_{name}", facts=facts, **words)

    def chance(name: str, level: Callable[[int, int], float], summary: str) -> Metric:
        return row(name, f"chance level: {summary}", overlap, "shape")(partial(_chance, side, level))

    mean = partial(torch.mean, dim=-1)
    shared = [
        both
        for k in (8, 32)
        for both in (
            row(f"subspace_{k}", f"||{side} top-{k} overlap||_F^2 / {k}", overlap)(partial(subspace, k=k)),
            chance(f"subspace_{k}_chance", lambda d, count, k=k: k / d if k <= count else torch.nan, f"{k} / d"),
        )
    ]
    in_window = f"mean norm of tuned {who} in the span of base ones with sigma within 5%"
    by_chance = "chance level: mean sqrt(vectors in the window / d)"
    return (
        row("agreement_mean", f"mean |cos| of matching {who}", f"{side}_agreement")(mean),
        chance("agreement_chance", lambda d, count: cosine_chance(d), "mean |cos| of random unit vectors"),
        row("best_match_mean", f"mean over base {who} of the largest |cos|", f"{side}_best_match")(mean),
        chance("best_match_chance", best_match_chance, "sqrt(2 ln M / d)"),
        *shared,
        row("agreement_window_mean", in_window, f"{side}_agreement_window")(mean),
        row("agreement_window_chance", by_chance, "window", "shape")(
            lambda window, size: agreement_window_chance(window, _dimension(side, size))
        ),
    )


def angle_metrics(side: str) -> tuple[Metric, ...]:
    """Return the metrics of angles between one side's top spaces, each beside what chance gives.

    Args:
        side: ``left`` or ``right``.
    """
    cosines = f"{side}_cosines"
    words: dict[str, Any] = {
        "unit": "rad",
        "range": "[0, pi/2]",
        "source": "Bjorck & Golub 1973",
        "invariant": OF_VECTORS,
    }
    found = []
    for k in (8, 32):
        mean = f"mean principal angle between the {side} top-{k} spaces"
        level = f"chance level: random spaces of {k} dimensions"
        angles = partial(mean_principal_angle, k=k)
        chance = partial(_chance, side, partial(_angle_chance, k=k))
        found += [
            built_in(mean, name=f"{side}_angle_{k}", facts=(cosines,), **words)(angles),
            built_in(level, name=f"{side}_angle_{k}_chance", facts=(cosines, "shape"), **words)(chance),
        ]
    return tuple(found)


def _dimension(side: str, shape: tuple[int, int]) -> int:
    return shape[0] if side == "left" else shape[1]


def _chance(side: str, level: Callable[[int, int], float], overlap: Tensor, size: tuple[int, int]) -> Tensor:
    """A chance level that depends on dimension and number of vectors alone, as a metric of an overlap."""
    return overlap.new_full((len(overlap),), level(_dimension(side, size), overlap.shape[-1]))


def _angle_chance(d: int, count: int, *, k: int) -> float:
    return principal_angle_chance(d, k)[1] if k <= count else torch.nan


DomainGrams = Float64[np.ndarray, "*heads domains domains"]


@dataclass(frozen=True)
class DomainSplit:
    """What the deltas of several domains share, and the specific rest.

    Attributes:
        mean_squares: (*heads,), ||mean_a D_a||^2; with D domains of unrelated deltas 1/D of their mean square, not 0.
        shared_squares: (*heads,), mean of <D_a, D_b> over a != b: the squared norm of a part common to all domains,
            clear of what is specific; 0 by chance, and it may be negative.
        cosine: (*heads, D), of D_a and the mean of the others; its sign tells along from against.
        share: (*heads, D), cosine^2: of ||D_a||^2 what projection on the mean of the others explains.
        specific_squares: (*heads, D), (1 - share) ||D_a||^2.
    """

    mean_squares: np.ndarray
    shared_squares: np.ndarray
    cosine: np.ndarray
    share: np.ndarray
    specific_squares: np.ndarray


def delta_cosine(gram: DomainGrams) -> np.ndarray:
    """Cosines <D_a, D_b> / (||D_a|| ||D_b||) of domains' deltas, (*heads, D, D). NaN for a domain that did not change.

    Beside it stands ``delta_cosine_chance``.
    """
    size = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return gram / size[..., :, None] / size[..., None, :]


def delta_cosine_chance(entries: int) -> float:
    """Root mean square of the cosine of random directions: 1 / sqrt(entries)."""
    return 1 / math.sqrt(entries)


def split_domains(gram: DomainGrams) -> DomainSplit:
    """Split the deltas of D domains into the domain-agnostic part, their mean direction, and the specific rest.

    A domain is projected on the mean of the others, so that its own noise does not count as shared. If D_a = S + N_a,
    the N_a orthogonal to S and each other with squared norm v, and s = ||S||^2, then ``shared_squares`` is s, and

        cosine^2 = s / (s + v) * s / (s + v / (D - 1))

    which is below the true share s / (s + v) as the others' mean is noisy too; with many domains the difference goes.
    Chance gives a share of 1 / entries, a cosine of 1 / sqrt(entries) in the root mean square.

    Args:
        gram: Inner products <D_a, D_b>; a head's over its slices together.

    Returns:
        NaN for a domain that did not change or whose others did not, and for a single domain.
    """
    squares = np.diagonal(gram, axis1=-2, axis2=-1)
    count = gram.shape[-1]
    others = 1.0 - np.eye(count)
    along = (gram * others).sum(-1)
    # Summed over the others alone; the whole sum less the domain's own would cancel where its delta is the largest.
    others_squares = np.einsum("ab,...bc,ac->...a", others, gram, others)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = along / np.sqrt(squares * others_squares)
        shared = along.sum(-1) / np.float64(count * (count - 1))
    share = cosine**2
    mean = np.asarray(gram.sum((-2, -1)) / count**2)  # of a single Gram matrix NumPy makes scalars
    return DomainSplit(
        mean_squares=mean,
        shared_squares=np.asarray(shared),
        cosine=cosine,
        share=share,
        specific_squares=(1 - share) * squares,
    )
