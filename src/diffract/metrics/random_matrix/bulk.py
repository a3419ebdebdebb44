"""The noise part of a spectrum: the Marchenko-Pastur law fitted to it, and what sticks out.

Shapes: b matrices m x n, N = max(m, n), M = min(m, n), gamma = M / N; eigenvalues lambda_i = sigma_i^2 / N, descending.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from diffract.metrics.random_matrix.marchenko_pastur import mp_cdf, mp_edges
from diffract.metrics.random_matrix.tracy_widom import fluctuation_edge

Eigenvalues = Float64[Tensor, "b M"]
PerMatrix = Float64[Tensor, "b"]

RESOLVED = 32 * float(torch.finfo(torch.float64).eps)
"""Smallest lambda / lambda_1 that eigenvalues of a Gram matrix tell from zero; those below it count as zero."""


@dataclass(frozen=True)
class Bulk:
    """The fitted law of b matrices, (b,) each, float64.

    Attributes:
        variance: v of the noise entries, as ``noise_variance`` defines it.
        edge: l+ = v (1 + sqrt(gamma))^2.
        ks: Two-sided Kolmogorov-Smirnov distance of the eigenvalues up to l+ from the law of the noise that k =
            ``spikes`` removed directions leave, an (N - k) x (M - k) matrix; in [0, 1]. Conditioning that law on the
            same window changes nothing: its support ends at l+ or before.
        spikes: #{lambda > l+}. Of large matrices of pure noise one in six has one: the largest eigenvalue fluctuates.
        spikes_tw: #{lambda > 99% fluctuation edge}: at most one matrix of pure noise in a hundred has one.
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


def fit_bulk(eigenvalues: Eigenvalues, shape: tuple[int, int]) -> Bulk:
    """Fit the Marchenko-Pastur law to the noise part of spectra and count what lies above it.

    Args:
        eigenvalues: lambda_i = sigma_i^2 / N, all M of them, descending.
        shape: (m, n) of the matrices.

    Returns:
        NaN throughout for a matrix with a NaN or an infinity. A matrix of low rank without noise has variance, edge,
        ``soft_rank`` and ``bulk_share`` 0 and its rank in ``spikes``, unless the rank is high enough to hide (see
        ``noise_variance``); ``ks`` is NaN, there is no law. A zero matrix has variance, edge and spikes 0 and NaN
        ratios.

    Source: Marchenko & Pastur 1967; Johnstone 2001 for ``spikes_tw``; Martin & Mahoney 2021 for ``soft_rank``.

    >>> fit = fit_bulk(torch.tensor([[90.0, 2, 1, 1, 1, 1, 1, 1, 0, 0]]).double(), (10, 10))
    >>> fit.spikes.item(), round(fit.variance.item(), 4)  # 8 * 10 / (9 * 9)
    (1.0, 0.9877)
    """
    whole = eigenvalues.isfinite().all(-1)
    lambdas = eigenvalues.where(eigenvalues > RESOLVED * eigenvalues[:, :1], 0.0).where(whole[:, None], torch.nan)
    variance = noise_variance(lambdas, shape)
    edge = mp_edges(variance, min(shape) / max(shape))[1]
    beyond = lambdas > edge[:, None]
    spikes, spikes_tw = (
        (lambdas > bound[:, None]).sum(-1).double().where(whole, torch.nan)
        for bound in (edge, variance * fluctuation_edge(shape))
    )
    return Bulk(
        variance=variance,
        edge=edge,
        ks=_bulk_ks(lambdas, variance, spikes, shape),
        spikes=spikes,
        spikes_tw=spikes_tw,
        soft_rank=edge / lambdas[:, 0],
        bulk_share=lambdas.where(~beyond, 0.0).sum(-1) / lambdas.sum(-1),
    )


def noise_variance(eigenvalues: Eigenvalues, shape: tuple[int, int]) -> PerMatrix:
    """Variance of the noise entries after spikes are removed, iterated to a fixed point.

    With the k largest eigenvalues removed the estimate is

        v_k = N sum_{i > k} lambda_i / ((N - k)(M - k)),

    for k directions taken away on both sides leave noise of (N - k)(M - k) degrees of freedom, not N (M - k): the
    plain mean of the rest is too low by k / N. The iteration starts from v_0, the mean of all eigenvalues, removes
    those above the 99% fluctuation edge of a matrix of that variance, and estimates again. That edge, not l+, decides
    what is removed: of pure noise the largest eigenvalue passes l+ one time in six, and removing it lowers v by
    2 / sqrt(N M), more than its standard error sqrt(2 / (N M)). It passes the fluctuation edge one time in a hundred.

    Each removal lowers v (an eigenvalue above the edge carries more than the N + M - 2k - 1 degrees of freedom that
    leave with it), so the set only grows and the iteration ends at the smallest k with lambda_{k+1} <= edge(v_k). It
    always exists, k = M - 1 at the latest, and is read off all v_k at once.

    Signal in many directions hides itself in v_0: r equal spikes are not seen from r = M / (1 + sqrt(gamma))^2 on, a
    quarter of a square matrix. A spike weak enough to lean on the noise leaves less behind than the formula assumes:
    v is low by up to 1 / sqrt(N M) for each.

    Args:
        eigenvalues: lambda_i = sigma_i^2 / N, all M of them, descending; finite, or NaN throughout.
        shape: (m, n) of the matrices.

    Returns:
        Zero for a zero matrix, and for one of low rank without noise.
    """
    long, short = max(shape), min(shape)
    k = torch.arange(short, dtype=eigenvalues.dtype, device=eigenvalues.device)
    rest = eigenvalues.flip(-1).cumsum(-1).flip(-1)
    variances = rest * (long / ((long - k) * (short - k)))
    fixed = eigenvalues <= variances * fluctuation_edge(shape)
    removed = fixed.to(torch.uint8).argmax(-1, keepdim=True)
    return variances.gather(-1, removed)[:, 0]


def _bulk_ks(lambdas: Eigenvalues, variance: PerMatrix, spikes: PerMatrix, shape: tuple[int, int]) -> PerMatrix:
    """Largest |empirical - law|, from both sides of each step, over the eigenvalues that are no spikes."""
    long, short = (max(shape) - spikes)[:, None], (min(shape) - spikes)[:, None]
    law = mp_cdf(lambdas.flip(-1), variance[:, None] * (long / max(shape)), short / long)
    rank = torch.arange(lambdas.shape[-1], dtype=lambdas.dtype, device=lambdas.device)
    distance = torch.maximum((rank + 1) / short - law, law - rank / short)
    return distance.where(~(rank >= short), 0.0).amax(-1)
