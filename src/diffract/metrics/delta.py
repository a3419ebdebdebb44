"""Size and ranks of the change D = W1 - W0."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from diffract.metrics.ranks import effective_rank, stable_rank_of_sigmas

PerMatrix = Float64[Tensor, "b"]


def delta_frobenius(delta_squares: PerMatrix) -> PerMatrix:
    """||D||_F."""
    return delta_squares.sqrt()


def delta_relative(delta_squares: PerMatrix, base_squares: PerMatrix) -> PerMatrix:
    """||D||_F / ||W0||_F. NaN for a zero base."""
    return torch.where(base_squares > 0, delta_squares / base_squares, torch.nan).sqrt()


def delta_spectral(delta_sigmas: Float64[Tensor, "b M"]) -> PerMatrix:
    """||D||_2."""
    return delta_sigmas[:, 0]


def delta_stable_rank(delta_sigmas: Float64[Tensor, "b M"]) -> PerMatrix:
    """||D||_F^2 / ||D||_2^2. NaN when nothing changed."""
    return stable_rank_of_sigmas(delta_sigmas)


def delta_effective_rank(delta_sigmas: Float64[Tensor, "b M"]) -> PerMatrix:
    """Exp of the entropy (nats) of D's normalised singular values. NaN when nothing changed."""
    return effective_rank(delta_sigmas)


def delta_changed_share(changed: PerMatrix, shape: tuple[int, int]) -> PerMatrix:
    """Share of the entries that differ."""
    return changed / (shape[0] * shape[1])


def delta_rounding_floor(rounding_squares: PerMatrix) -> PerMatrix:
    """Norm that rounding W1 to its stored dtype alone causes: sqrt(sum ulp_ij^2 / 12).

    Errors are uniform within half an ulp. A ``delta_frobenius`` near it is rounding, not training.
    """
    return rounding_squares.sqrt()
