"""Ranks of a matrix, most of them not whole numbers."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

Sigmas = Float64[Tensor, "b M"]
PerMatrix = Float64[Tensor, "b"]

LARGEST_RTOL = 1e-3


def stable_rank(squares: PerMatrix, sigma_max: PerMatrix) -> PerMatrix:
    """||W||_F^2 / ||W||_2^2, between 1 and M (Rudelson & Vershynin 2007). NaN for a zero matrix."""
    return squares / sigma_max.square()


def stable_rank_of_sigmas(sigmas: Sigmas) -> PerMatrix:
    """Stable rank from all singular values, for matrices whose entries were not summed."""
    return sigmas.square().sum(-1) / sigmas[:, 0].square()


def effective_rank(sigmas: Sigmas) -> PerMatrix:
    """exp(-sum p_i ln p_i), p_i = sigma_i / sum_j sigma_j, between 1 and M (Roy & Vetterli 2007). NaN for zero."""
    p = sigmas / sigmas.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()


def participation_ratio(sigmas: Sigmas) -> PerMatrix:
    """(sum lambda)^2 / sum lambda^2 with lambda = sigma^2, between 1 and M. NaN for a zero matrix."""
    energy = (sigmas / sigmas[:, :1]).square()
    return energy.sum(-1).square() / energy.square().sum(-1)


def numerical_rank(sigmas: Sigmas, shape: tuple[int, int], epsilon: float) -> PerMatrix:
    """Number of sigma_i > rtol sigma_1. Zero for a zero matrix.

    rtol = max(m, n) eps of the stored dtype, and no more than max(eps, 0.001): the plain product, made for float64,
    exceeds 1 for bf16, while rounding a matrix to bf16 moves its sigmas by less than about eps sigma_1.
    """
    rtol = min(max(shape) * epsilon, max(epsilon, LARGEST_RTOL))
    return (sigmas > rtol * sigmas[:, :1]).sum(-1).double()


def energy_rank_90(sigmas: Sigmas) -> PerMatrix:
    """Smallest k whose first k sigmas hold at least 0.9 of sum sigma^2. NaN for a zero matrix."""
    energy = sigmas.square().cumsum(-1)
    enough = energy >= 0.9 * energy[:, -1:]
    k = sigmas.shape[-1] - enough.sum(-1) + 1.0
    return k.double().where(energy[:, -1] > 0, torch.nan)
