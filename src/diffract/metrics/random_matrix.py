"""The noise part of a spectrum: the Marchenko-Pastur law fitted to it, and what sticks out.

Shapes: b matrices m x n, N = max(m, n), M = min(m, n), gamma = M / N; eigenvalues lambda_i = sigma_i^2 / N, descending.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from diffract.densities import (
    aspect,
    marchenko_pastur_cdf,
    marchenko_pastur_quantile,
)
from diffract.metrics.facts import OF_THE_ORDER, Metric, built_in

QUANTILE_99 = 2.02344928138
"""99% quantile of the Tracy-Widom law F_1, which the largest eigenvalue of noise follows once it is standardised."""


def fluctuation_edge(shape: tuple[int, int], removed: Tensor | int = 0) -> Tensor:
    """Return what the largest eigenvalue of noise of variance 1 stays below with probability 99%.

    Of an m x n noise matrix it is (mu + 2.0234 s) / N with mu = (sqrt(N - 1) + sqrt(M))^2 and s = (sqrt(N - 1) +
    sqrt(M)) (1 / sqrt(N - 1) + 1 / sqrt(M))^(1/3) (Johnstone 2001, theorem 1.1), for eigenvalues sigma^2 / N. It scales
    with the variance of the entries. After k directions are removed, N - k and M - k stand for N and M, but for the
    divisor. For a 1 x 1 matrix, where the formula has no value, N - 1 is taken as 1.

    Args:
        shape: (m, n) of the whole matrix.
        removed: k, less than M; any shape.
    """
    k = torch.as_tensor(removed, dtype=torch.float64)
    long, short = (max(shape) - k - 1).clamp(min=1.0).sqrt(), (min(shape) - k).sqrt()
    scale = (long + short) * (1 / long + 1 / short) ** (1 / 3)
    return ((long + short) ** 2 + QUANTILE_99 * scale) / max(shape)


def noise_edge(shape: tuple[int, int], removed: Tensor | int = 0) -> Tensor:
    """Return (sqrt(N - k) + sqrt(M - k))^2 / N, where noise of variance 1 ends once k directions are removed.

    >>> noise_edge((4, 16)).item()
    2.25
    """
    k = torch.as_tensor(removed, dtype=torch.float64)
    return ((max(shape) - k).sqrt() + (min(shape) - k).sqrt()) ** 2 / max(shape)


Eigenvalues = Float64[Tensor, "b M"]
PerMatrix = Float64[Tensor, "b"]

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def entry_order(shape: tuple[int, int], *, seed: int, device: torch.device | str = "cpu") -> Int64[Tensor, "mn"]:
    """Return the random order of the m n entries that this seed and shape mean, uniform over all orders.

    Drawn on the CPU whatever the device, so that it is the same everywhere. It takes longer than using it: draw it
    once for all matrices of a shape.

    >>> entry_order((1, 3), seed=0).sort().values
    tensor([0, 1, 2])
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(shape[0] * shape[1], generator=generator).to(device)


def permuted(matrices: Float[Tensor, "b m n"], order: Int64[Tensor, "mn"]) -> Float[Tensor, "b m n"]:
    """Return the same entries in another order: entry i, counted along the rows, is entry order[i] of the matrix.

    One order serves all matrices of a shape, so a matrix has the same null alone and in a batch. Each null is by
    itself a uniform draw; two of them are not independent of each other.

    Args:
        matrices: In their stored dtype, which stays.
        order: From ``entry_order``, on the same device.
    """
    words = matrices.flatten(1).view(WORDS[matrices.element_size()])  # moved as integers, half again as fast as bf16
    return words.gather(1, order.expand(len(words), -1)).view(matrices.dtype).view(matrices.shape)


def wasserstein(a: Eigenvalues, b: Eigenvalues) -> PerMatrix:
    """Wasserstein-1 distance of two samples of one size: mean |a_(i) - b_(i)| over their sorted values.

    Zero if and only if the samples are equal; in the unit of the values. NaN where a value is NaN.
    """
    return (a.sort(-1).values - b.sort(-1).values).abs().mean(-1)


@built_in(
    "Wasserstein-1 distance of the eigenvalues from those of the permuted entries, over mean lambda",
    range="[0, 2)",
    invariant=OF_THE_ORDER,
)
def null_w1(eigenvalues: Eigenvalues, null_eigenvalues: Eigenvalues) -> PerMatrix:
    """Wasserstein-1 distance of a spectrum from that of its permuted matrix, over the mean eigenvalue.

    Both have the same mean, ||W||_F^2 / (N M), so the value lies in [0, 2): near 0 where the entries' distribution
    explains the spectrum, 2 (1 - 1 / M) at most, for all weight on one eigenvalue against equal ones. NaN for a zero
    matrix.
    """
    return wasserstein(eigenvalues, null_eigenvalues) / eigenvalues.mean(-1)


@built_in(
    "sigma_1 of the same entries in a random order", unit="weight", range="[0, inf)", degree=1, invariant=OF_THE_ORDER
)
def null_spectral_norm(null_sigmas: Float64[Tensor, "b M"]) -> PerMatrix:
    """The largest singular value that these entries have without their order."""
    return null_sigmas[:, 0]


@dataclass(frozen=True)
class Bulk:
    """The fitted law of b matrices, (b,) each, float64.

    One law serves them all: that of the (N - k) x (M - k) matrix of noise which k removed directions leave.

    Attributes:
        variance: v of the noise entries, as ``noise_variance`` defines it.
        edge: l+ = v (sqrt(N - k) + sqrt(M - k))^2 / N.
        ks: Two-sided Kolmogorov-Smirnov distance of the eigenvalues up to l+ from the law, in [0, 1]. Conditioning
            the law on the same window changes nothing: its support ends at l+.
        spikes: #{lambda > l+}. Of large matrices of pure noise one in six has one: the largest eigenvalue fluctuates.
        spikes_tw: #{lambda > 99% fluctuation edge}, which is k: at most one matrix of pure noise in a hundred has one.
        soft_rank: l+ / lambda_1, in [0, (1 + sqrt(gamma))^2]; about 1 for noise, near 0 for a dominant spike.
        bulk_share: Sum of lambda <= l+ over the sum of all, in [0, 1].
    """

    variance: PerMatrix
    edge: PerMatrix
    ks: PerMatrix
    spikes: PerMatrix
    spikes_tw: PerMatrix
    soft_rank: PerMatrix
    bulk_share: PerMatrix


def _of_bulk(name: str, summary: str, **words: Any) -> Metric:
    return built_in(summary, name=f"mp_{name}", facts=("bulk",), version=2, **words)(attrgetter(name))


BULK = (
    _of_bulk(
        "variance",
        "v of the noise: mean lambda of what remains after spikes are removed",
        unit="weight^2",
        range="[0, inf)",
        source="Marchenko & Pastur 1967",
        degree=2,
    ),
    _of_bulk(
        "edge",
        "l+ = v (sqrt(N - k) + sqrt(M - k))^2 / N, where the noise ends once k = mp_spikes_tw directions are removed",
        unit="weight^2",
        range="[0, inf)",
        source="Marchenko & Pastur 1967",
        degree=2,
    ),
    _of_bulk("ks", "Kolmogorov-Smirnov distance of the eigenvalues up to l+ from the law", range="[0, 1]"),
    _of_bulk("spikes", "eigenvalues above l+", unit="count", range="[0, M]", source="Martin & Mahoney 2021"),
    _of_bulk(
        "spikes_tw",
        "eigenvalues above the 99% Tracy-Widom edge: noise of equal variance has one in 1% of matrices",
        unit="count",
        range="[0, M]",
        source="Johnstone 2001",
    ),
    _of_bulk("soft_rank", "l+ / lambda_1: about 1 for noise", range="[0, 4]", source="Martin & Mahoney 2021"),
    _of_bulk("bulk_share", "what eigenvalues up to l+ hold of sum lambda", range="[0, 1]"),
)
"""The fields of ``Bulk`` as metrics."""


def fit_bulk(eigenvalues: Eigenvalues, shape: tuple[int, int]) -> Bulk:
    """Fit the Marchenko-Pastur law to the noise part of spectra and count what lies above it.

    Args:
        eigenvalues: lambda_i = sigma_i^2 / N, all M of them, descending; zero where they cannot be told from it.
        shape: (m, n) of the matrices.

    Returns:
        NaN throughout for a matrix with a NaN or an infinity, and where fewer than half of the eigenvalues lie below
        l+: what is then called noise is the minority, and "beyond the edge" means nothing. A matrix of low rank without
        noise has variance, edge, ``soft_rank`` and ``bulk_share`` 0 and its rank in ``spikes``, unless the rank is high
        enough to hide (see ``noise_variance``); ``ks`` is NaN, there is no law. A zero matrix has variance, edge and
        spikes 0 and NaN ratios.

    Source: Marchenko & Pastur 1967; Johnstone 2001 for ``spikes_tw``; Martin & Mahoney 2021 for ``soft_rank``.

    >>> fit = fit_bulk(torch.tensor([[90.0, 2, 1, 1, 1, 1, 1, 1, 0, 0]]).double(), (10, 10))
    >>> fit.spikes.item(), round(fit.variance.item(), 4)  # 8 * 10 / (9 * 9)
    (1.0, 0.9877)
    """
    whole = eigenvalues.isfinite().all(-1, keepdim=True)
    lambdas = eigenvalues.where(whole, torch.nan)
    variance, removed = noise_variance(lambdas, shape)
    edge = variance * noise_edge(shape, removed)
    inside = lambdas <= edge[:, None]
    count = inside.sum(-1)
    long, short = max(shape) - removed, min(shape) - removed
    law = marchenko_pastur_cdf(
        lambdas.flip(-1), (variance * (long / max(shape)))[:, None], (short / long)[:, None], xp=torch
    )
    rank, total = torch.arange(lambdas.shape[-1], dtype=lambdas.dtype, device=lambdas.device), count[:, None]
    distance = torch.maximum((rank + 1) / total - law, law - rank / total).where(rank < total, 0.0)
    found = Bulk(
        variance=variance,
        edge=edge,
        ks=distance.amax(-1),
        spikes=(lambdas.shape[-1] - count).double(),
        spikes_tw=(lambdas > (variance * fluctuation_edge(shape, removed))[:, None]).sum(-1).double(),
        soft_rank=edge / lambdas[:, 0],
        bulk_share=lambdas.where(inside, 0.0).sum(-1) / lambdas.sum(-1),
    )
    # Spikes in the majority leave no bulk that they could stand out from.
    majority = 2 * count >= lambdas.shape[-1]
    return Bulk(**{name: value.where(majority, torch.nan) for name, value in vars(found).items()})


def bulk_warnings(bulk: Bulk, eigenvalues: Eigenvalues) -> tuple[str, ...]:
    """Say of each matrix why there is no law of its noise; an empty string where there is one, or no matrix."""
    missing = (bulk.variance.isnan() & eigenvalues.isfinite().all(-1)).tolist()
    return tuple("no noise edge: under half of the eigenvalues would lie below it" if one else "" for one in missing)


def noise_variance(eigenvalues: Eigenvalues, shape: tuple[int, int]) -> tuple[PerMatrix, PerMatrix]:
    """Variance of the noise entries after spikes are removed, iterated to a fixed point, and how many were removed.

    With the k largest eigenvalues removed the estimate is

        v_k = N sum_{i > k} lambda_i / ((N - k)(M - k)),

    for k directions taken away on both sides leave noise of (N - k)(M - k) degrees of freedom, not N (M - k): the
    plain mean of the rest is too low by k / N. The iteration starts from v_0, the mean of all eigenvalues, removes
    those above the 99% fluctuation edge of noise of that variance, and estimates again. That edge, not l+, decides
    what is removed: of pure noise the largest eigenvalue passes l+ one time in six, and removing it lowers v by
    2 / sqrt(N M), more than its standard error sqrt(2 / (N M)). It passes the fluctuation edge one time in a hundred.

    Each removal lowers v (an eigenvalue above the edge carries more than the N + M - 2k - 1 degrees of freedom that
    leave with it) and the edge, so the set only grows and the iteration ends at the smallest k with lambda_{k+1} <=
    edge(v_k). It always exists, k = M - 1 at the latest, and is read off all v_k at once.

    Signal in many directions hides itself in v_0: r equal spikes are not seen from r = M / (1 + sqrt(gamma))^2 on, a
    quarter of a square matrix. A spike weak enough to lean on the noise leaves less behind than the formula assumes:
    v is low by up to 1 / sqrt(N M) for each.

    Args:
        eigenvalues: lambda_i = sigma_i^2 / N, all M of them, descending; finite, or NaN throughout.
        shape: (m, n) of the matrices.

    Returns:
        v, zero for a zero matrix and for one of low rank without noise; and k.
    """
    long, short = max(shape), min(shape)
    k = torch.arange(short, dtype=eigenvalues.dtype, device=eigenvalues.device)
    rest = eigenvalues.flip(-1).cumsum(-1).flip(-1)
    variances = rest * (long / ((long - k) * (short - k)))
    fixed = eigenvalues <= variances * fluctuation_edge(shape, k)
    # The first k that leaves no spike; argmax takes the first of equals, and has no kernel for bool.
    removed = fixed.to(torch.uint8).argmax(-1, keepdim=True)
    return variances.gather(-1, removed)[:, 0], removed[:, 0].double()


Sigmas = Float64[Tensor, "b M"]


def known_noise_factor(beta: float) -> float:
    """lambda_*(beta) = sqrt(2 (beta + 1) + 8 beta / (beta + 1 + sqrt(beta^2 + 14 beta + 1))).

    >>> round(known_noise_factor(1.0), 12) == round(4 / math.sqrt(3), 12)
    True
    """
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))


@cache
def unknown_noise_factor(beta: float) -> float:
    """omega(beta) = lambda_*(beta) / sqrt(mu_beta), mu_beta the median of the Marchenko-Pastur law of variance 1.

    >>> round(unknown_noise_factor(1.0), 4)
    2.8584
    """
    median = marchenko_pastur_quantile(0.5, torch.ones((), dtype=torch.float64), beta, xp=torch)
    return known_noise_factor(beta) / math.sqrt(median.item())


@built_in(
    "omega(M / N) median sigma: below it a singular value is better dropped",
    unit="weight",
    range="[0, inf)",
    source="Gavish & Donoho 2014",
    degree=1,
)
def donoho_gavish_threshold(resolved_sigmas: Sigmas, shape: tuple[int, int]) -> PerMatrix:
    """omega(beta) times the median singular value: the threshold where the noise level is not known.

    Args:
        resolved_sigmas: Singular values, descending, all M of them.
        shape: (m, n) of the matrices.

    Returns:
        In the unit of the sigmas. Zero where half of them are zero, as for a rank-one matrix: all others are kept.
        NaN where the median is NaN.
    """
    last = resolved_sigmas.shape[-1] - 1
    median = (resolved_sigmas[:, last // 2] + resolved_sigmas[:, last - last // 2]) / 2
    return unknown_noise_factor(aspect(*shape)) * median


@built_in("singular values above donoho_gavish_threshold", unit="count", range="[0, M]", source="Gavish & Donoho 2014")
def donoho_gavish_rank(resolved_sigmas: Sigmas, shape: tuple[int, int]) -> PerMatrix:
    """Number of singular values above ``donoho_gavish_threshold``. NaN where that is."""
    threshold = donoho_gavish_threshold(resolved_sigmas, shape)
    return (resolved_sigmas > threshold[:, None]).sum(-1).double().where(threshold.isfinite(), torch.nan)
