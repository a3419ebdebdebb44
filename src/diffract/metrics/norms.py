"""Norms of a matrix."""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

Sigmas = Float64[Tensor, "b M"]
PerMatrix = Float64[Tensor, "b"]


def frobenius_norm(squares: PerMatrix) -> PerMatrix:
    """sqrt(sum w_ij^2) = sqrt(sum sigma_i^2). Zero for a zero matrix."""
    return squares.sqrt()


def spectral_norm(sigma_max: PerMatrix) -> PerMatrix:
    """sigma_1, the largest factor by which W stretches a vector."""
    return sigma_max


def nuclear_norm(sigmas: Sigmas) -> PerMatrix:
    """Sum of sigma_i (trace norm)."""
    return sigmas.sum(-1)
