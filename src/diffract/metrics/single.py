"""Metrics of one matrix: its norms, its ranks, its shape."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from diffract.linalg import Moments
from diffract.metrics.facts import OF_ENTRIES, built_in

Sigmas = Float64[Tensor, "b M"]
PerMatrix = Float64[Tensor, "b"]


@built_in("sqrt(sum w^2)", unit="weight", range="[0, inf)", source="Golub & Van Loan 2013, 2.3", degree=1)
def frobenius_norm(squares: PerMatrix) -> PerMatrix:
    """sqrt(sum w_ij^2) = sqrt(sum sigma_i^2). Zero for a zero matrix."""
    return squares.sqrt()


@built_in("sigma_1", unit="weight", range="[0, inf)", source="Golub & Van Loan 2013, 2.3", degree=1)
def spectral_norm(sigma_max: PerMatrix) -> PerMatrix:
    """sigma_1, the largest factor by which W stretches a vector."""
    return sigma_max


def shaped(sigmas: Sigmas, resolved: PerMatrix, shape: tuple[int, int], epsilon: float) -> Sigmas:
    """Return singular values whose distribution has a shape: zero where not resolved, or where all are equal.

    Values are equal up to rounding if sigma_1 - sigma_M <= eps ||W||_F (1 / sqrt(m) + 1 / sqrt(n)) + sqrt(N) e sigma_1:
    the first term is what storing entries with eps does to them, the second the arithmetic that made them, in float32
    at best (e is the smaller of eps and float32's). An orthogonal matrix, the usual initialisation, is such a one: it
    has no tail and no peaks, and any exponent fitted to it is that of its rounding.

    Args:
        sigmas: Descending.
        resolved: The smallest that the method tells from zero.
        shape: (m, n).
        epsilon: Of the stored dtype.
    """
    found = sigmas.where(sigmas > resolved[:, None], 0.0)
    stored = epsilon * sigmas.square().sum(-1).sqrt() * (shape[0] ** -0.5 + shape[1] ** -0.5)
    made = max(shape) ** 0.5 * min(epsilon, float(torch.finfo(torch.float32).eps)) * sigmas[:, 0]
    spread = sigmas[:, 0] - found.where(found > 0, torch.inf).amin(-1)
    return found.where((spread > stored + made)[:, None], 0.0)


@built_in("sum of sigma", unit="weight", range="[0, inf)", source="Horn & Johnson 2013, 5.6", degree=1)
def nuclear_norm(sigmas: Sigmas) -> PerMatrix:
    """Sum of sigma_i (trace norm)."""
    return sigmas.sum(-1)


LARGEST_RTOL = 1e-3
"""Of ``numerical_rank``, whatever the shape: bf16 tells no more."""


@built_in("||W||_F^2 / ||W||_2^2", range="[1, M]", source="Rudelson & Vershynin 2007")
def stable_rank(squares: PerMatrix, sigma_max: PerMatrix) -> PerMatrix:
    """||W||_F^2 / ||W||_2^2, between 1 and M (Rudelson & Vershynin 2007). NaN for a zero matrix."""
    return squares / sigma_max.square()


@built_in("exp of the entropy (nats) of sigma / sum sigma", range="[1, M]", source="Roy & Vetterli 2007")
def effective_rank(sigmas: Sigmas) -> PerMatrix:
    """exp(-sum p_i ln p_i), p_i = sigma_i / sum_j sigma_j, between 1 and M (Roy & Vetterli 2007). NaN for zero."""
    p = sigmas / sigmas.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()


@built_in("(sum lambda)^2 / sum lambda^2, lambda = sigma^2", range="[1, M]", source="Bell & Dean 1970")
def participation_ratio(sigmas: Sigmas) -> PerMatrix:
    """(sum lambda)^2 / sum lambda^2 with lambda = sigma^2, between 1 and M. NaN for a zero matrix."""
    # Scaled first: fourth powers of very small weights would underflow.
    energy = (sigmas / sigmas[:, :1]).square()
    return energy.sum(-1).square() / energy.square().sum(-1)


@built_in(
    "sigmas above rtol sigma_1, rtol = min(max(m, n) eps, max(eps, 0.001))",
    unit="count",
    range="[0, M]",
    source="Golub & Van Loan 2013, 5.4",
)
def numerical_rank(sigmas: Sigmas, shape: tuple[int, int], epsilon: float) -> PerMatrix:
    """Number of sigma_i > rtol sigma_1. Zero for a zero matrix.

    rtol = max(m, n) eps of the stored dtype, and no more than max(eps, 0.001): the plain product, made for float64,
    exceeds 1 for bf16, while rounding a matrix to bf16 moves its sigmas by less than about eps sigma_1.
    """
    rtol = min(max(shape) * epsilon, max(epsilon, LARGEST_RTOL))
    return (sigmas > rtol * sigmas[:, :1]).sum(-1).double()


@built_in("smallest k whose sigmas hold 90% of sum sigma^2", unit="count", range="[1, M]", source="Jolliffe 2002, 6.1")
def energy_rank_90(sigmas: Sigmas) -> PerMatrix:
    """Smallest k whose first k sigmas hold at least 0.9 of sum sigma^2. NaN for a zero matrix."""
    energy = sigmas.square().cumsum(-1)
    enough = energy >= 0.9 * energy[:, -1:]
    k = sigmas.shape[-1] - enough.sum(-1) + 1.0
    return k.double().where(energy[:, -1] > 0, torch.nan)


EPSILON = float(torch.finfo(torch.float64).eps)


@built_in("Q = max(m, n) / min(m, n)", range="[1, inf)", source="Martin & Mahoney 2021")
def aspect_ratio(shape: tuple[int, int], squares: PerMatrix) -> PerMatrix:
    """Q = max(m, n) / min(m, n), at least 1."""
    return torch.full_like(squares, max(shape) / min(shape))


@built_in("sigma_1 / sigma_M, where resolved", range="[1, inf)", source="Golub & Van Loan 2013, 2.6")
def condition_number(sigmas: Sigmas, resolved: PerMatrix) -> PerMatrix:
    """sigma_1 / sigma_M, at least 1. NaN where the method cannot tell sigma_M from zero."""
    return torch.where(sigmas[:, -1] > resolved, sigmas[:, 0] / sigmas[:, -1], torch.nan)


@built_in(
    "standard deviation of the entries", unit="weight", range="[0, inf)", degree=1, invariant=OF_ENTRIES, version=2
)
def entry_std(moments: Moments) -> PerMatrix:
    """Standard deviation of the entries, normalised by their number. Zero for a constant matrix."""
    return _central(moments)[0].sqrt()


@built_in("excess kurtosis of the entries; 0 for a Gaussian", range="[-2, inf)", invariant=OF_ENTRIES, version=2)
def entry_kurtosis(moments: Moments) -> PerMatrix:
    """E(w - mean)^4 / (E(w - mean)^2)^2 - 3: zero for a Gaussian. NaN for a constant matrix."""
    variance, fourth = _central(moments)
    return torch.where(variance > 0, fourth / variance.square() - 3, torch.nan)


def _central(moments: Moments) -> tuple[Tensor, Tensor]:
    """Variance and fourth central moment; a variance that is rounding of the mean counts as zero."""
    n = moments.count
    mean, second, third, fourth = (s / n for s in (moments.first, moments.second, moments.third, moments.fourth))
    variance = second - mean.square()
    rounding = (8 * EPSILON * (moments.centre + mean).abs()).square()
    central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    return variance.where(variance > torch.maximum(rounding, 8 * EPSILON * second), 0.0), central
