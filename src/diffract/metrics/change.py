"""How much of a change lies in singular values, the rest being in singular vectors."""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

Sigmas = Float64[Tensor, "b M"]
PerMatrix = Float64[Tensor, "b"]


def value_share(diagonal: Sigmas, delta_squares: PerMatrix) -> PerMatrix:
    """sum_i C_ii^2 / ||D||_F^2 with C = U0^T D V0, in [0, 1]; chance level 1 / max(m, n). NaN when nothing changed."""
    return diagonal.square().sum(-1) / delta_squares


def spectral_shift_share(base_sigmas: Sigmas, sigmas: Sigmas, delta_squares: PerMatrix) -> PerMatrix:
    """sum_i (sigma_i(W1) - sigma_i(W0))^2 / ||D||_F^2, in [0, 1] (Mirsky 1960). NaN when nothing changed."""
    return (sigmas - base_sigmas).square().sum(-1) / delta_squares
