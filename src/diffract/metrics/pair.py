"""What tells a matrix from its base: the change D = W1 - W0 in values and in vectors; what changes of several share.

The last part takes NumPy Gram matrices <D_a, D_b> of a few domains; the deltas themselves are not needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from diffract.metrics.facts import OF_ENTRIES, built_in
from diffract.metrics.single import effective_rank

PerMatrix = Float64[Tensor, "b"]
Sigmas = Float64[Tensor, "b M"]

ROUNDING = 1e-12
"""Share of a squared norm below which what is left of it is the rounding of its parts."""


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
    "norm that rounding W1 to the coarser of both dtypes alone causes: sqrt(sum ulp^2 / 12)",
    unit="weight",
    range="[0, inf)",
    source="Higham 2002, 2.1",
    degree=None,
    invariant=OF_ENTRIES,
    version=2,
)
def delta_rounding_floor(rounding_squares: PerMatrix) -> PerMatrix:
    """Norm that rounding W1 to the coarser of the two stored dtypes alone causes: sqrt(sum ulp_ij^2 / 12).

    Errors are uniform within half an ulp. A ``delta_frobenius`` near it is rounding, not training.
    """
    return rounding_squares.sqrt()


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


@built_in("||sigma(W1) - sigma(W0)|| / ||sigma(W0)||", range="[0, inf)")
def sigma_change_relative(base_sigmas: Sigmas, sigmas: Sigmas) -> PerMatrix:
    """||sigma(W1) - sigma(W0)|| / ||sigma(W0)||; noise moves sigmas too. NaN for a zero base."""
    size = base_sigmas.norm(dim=-1)
    return ((sigmas - base_sigmas).norm(dim=-1) / size).where(size > 0, torch.nan)


@built_in("value_share of U1 S0 V1^T - W0, directions assigned first: what turning alone gives", range="[0, inf)")
def value_share_turned(
    left_cosines: Float64[Tensor, "b M M"],
    right_cosines: Float64[Tensor, "b M M"],
    base_resolved_sigmas: Sigmas,
    delta_squares: PerMatrix,
) -> PerMatrix:
    """Diagonal of U0^T (U1 S0 V1^T - W0) V0, squared and summed, over ||D||_F^2: what turning alone gives.

    A turn of relative size r that leaves every sigma as it is has a ``value_share`` of about r^2 / 4, two unrelated
    matrices one of 0.5. So ``value_share`` is read beside this one. Tuned directions are assigned one to one to base
    directions first, so as to maximise sum |u0_i . u1_j| |v0_i . v1_j|: without it a change of values alone that
    exchanges two of them would look like a turn.

    Returns:
        0 where nothing turned. NaN when nothing changed, and where one of the matrices has no vectors.
    """
    both = left_cosines * right_cosines  # its sign does not depend on how the signs of vectors fall
    found = torch.full_like(delta_squares, torch.nan)
    for i, (pair, S) in enumerate(zip(both, base_resolved_sigmas, strict=True)):
        if bool(pair.isfinite().all()):
            weights = pair.abs()
            base_of = weights.argmax(0)
            # where no two choose the same, each one's best is the best for all, and no search is needed
            if len(base_of.unique()) < len(base_of):
                base_of = torch.from_numpy(linear_sum_assignment(weights.mT.cpu().numpy(), maximize=True)[1])
            found[i] = (pair @ S[base_of.to(S.device)] - S).square().sum()
    return found / delta_squares


# The scale-free change: D less its part along W0


@built_in("<D, W0> / ||W0||_F^2: the part of D along W0, as weight decay and rescaling give", range="(-inf, inf)")
def scale_change(delta_along: PerMatrix, base_squares: PerMatrix) -> PerMatrix:
    """How much of W0 the change adds: W1 = (1 + c) W0 + D_free, D_free orthogonal to W0. NaN for a zero base."""
    return torch.where(base_squares > 0, delta_along / base_squares, torch.nan)


def free_squares(delta_squares: PerMatrix, delta_along: PerMatrix, base_squares: PerMatrix) -> PerMatrix:
    """||D_free||_F^2 = ||D||_F^2 - <D, W0>^2 / ||W0||_F^2; zero where no more is left of it than rounding."""
    left = delta_squares - delta_along.square() / base_squares
    return left.where(left > ROUNDING * delta_squares, left * 0)


@built_in("||D_free||_F / ||W0||_F, D_free = D - scale_change W0", range="[0, inf)")
def delta_free_relative(free_squares: PerMatrix, base_squares: PerMatrix) -> PerMatrix:
    """How far W1 is from the nearest multiple of W0. NaN for a zero base."""
    return torch.where(base_squares > 0, free_squares / base_squares, torch.nan).sqrt()


@built_in("value_share of D_free, the change without its part along W0", range="[0, 1]")
def value_share_free(
    diagonal: Sigmas, base_resolved_sigmas: Sigmas, scale_change: PerMatrix, free_squares: PerMatrix
) -> PerMatrix:
    """Share sum (C_ii - c sigma_i)^2 / ||D_free||_F^2. NaN where W1 is a multiple of W0."""
    values = diagonal - scale_change[:, None] * base_resolved_sigmas
    return values.square().sum(-1) / positive(free_squares)


@built_in("spectral_shift_share of D_free: sigmas of W1 against those of (1 + scale_change) W0", range="[0, 1]")
def spectral_shift_share_free(
    base_sigmas: Sigmas, sigmas: Sigmas, scale_change: PerMatrix, free_squares: PerMatrix
) -> PerMatrix:
    """Share sum (sigma_i(W1) - |1 + c| sigma_i(W0))^2 / ||D_free||_F^2, at most 1 (Mirsky 1960). NaN likewise."""
    scaled = (1 + scale_change[:, None]).abs() * base_sigmas
    return (sigmas - scaled).square().sum(-1) / positive(free_squares)


def positive(squares: PerMatrix) -> PerMatrix:
    """Return squares, NaN where they are zero."""
    return squares.where(squares > 0, torch.nan)


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
    # A domain is not compared with a mean that it is part of.
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
