"""The spectrum of noise with a profile: what row and column norms alone make of it, by theory.

Of independent Gaussians of variance a_i b_j the eigenvalues of X X^T / N follow, for large sizes, a law whose density
can have several modes. It is the exact form of the null ``rowcol``, without draws.

Shapes: b matrices m x n, M = min(m, n), N = max(m, n); k points at which the law is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from diffract.metrics.facts import OF_ENTRIES, built_in
from diffract.metrics.peaks import peak_count

PerMatrix = Float64[Tensor, "b"]
Points = Float64[Tensor, "k"]

GROUPS = 256
"""Most rows, or columns, that the law tells apart; more are averaged in groups of neighbours by norm."""

POINTS = 400
"""Of the law, evenly spaced in ln x."""

COARSE, FINE = 128, 24
"""Points at which the support is looked for, and its edge."""

SMALLEST = 1e-9
"""Share of the largest x that could have a density, from which on it is looked for."""

LEVELS = tuple(4.0 * 10**-step for step in torch.linspace(0, 6.6, 13).tolist())
"""Imaginary parts of z, as shares of x, from one where iteration may start anywhere to nearly the real line."""

NEWTON_STEPS = 60
"""At each of them; three to six are usual."""

TOLERANCE, ON_THE_WAY = 1e-10, 1e-3
"""Of the last Newton step, relative, at the smallest imaginary part and at those before, where the next one starts."""

MASS_ERROR = 0.02
"""By which the trapezoids over a density may exceed 1."""

NOTHING = 1e-4
"""Of x times the density at x: less is what the imaginary part left, outside of the support."""


@dataclass(frozen=True)
class Separable:
    """The law of b matrices.

    Attributes:
        x: (b, k), ascending.
        share: (b, k), of the eigenvalues at or below x; those below the first point are zero, or next to it.
        edge: (b,), where the support ends.
        failed: (b,), whether the iteration did not converge, so that there is no law.
    """

    x: Float64[Tensor, "b k"]
    share: Float64[Tensor, "b k"]
    edge: PerMatrix
    failed: Bool[Tensor, "b"]

    def share_below(self, values: Float64[Tensor, "b M"]) -> Float64[Tensor, "b M"]:
        """Return the share of the law at or below values, linear in ln x between points."""
        logs, x = values.clamp(min=1e-300).log(), self.x.log()
        right = torch.searchsorted(x, logs).clamp(1, x.shape[1] - 1)
        low, high = x.gather(1, right - 1), x.gather(1, right)
        part = ((logs - low) / (high - low)).clamp(0.0, 1.0)
        return torch.lerp(self.share.gather(1, right - 1), self.share.gather(1, right), part)


def sep_sigmas(law: Separable, shape: tuple[int, int]) -> Float64[Tensor, "b M"]:
    """Return the singular values of a spectrum that follows the law exactly: the middles of its M equal parts."""
    count = min(shape)
    share = (torch.arange(count, 0, -1, dtype=law.x.dtype, device=law.x.device) - 0.5) / count
    wanted, logs = share.expand(len(law.x), -1).contiguous(), law.x.log()
    right = torch.searchsorted(law.share, wanted).clamp(1, law.x.shape[1] - 1)
    low, high = law.share.gather(1, right - 1), law.share.gather(1, right)
    part = ((wanted - low) / (high - low)).clamp(0.0, 1.0)
    found = torch.lerp(logs.gather(1, right - 1), logs.gather(1, right), part).exp()
    return (found.where((wanted >= law.share[:, :1]) | found.isnan(), 0.0) * max(shape)).sqrt()


def separable_law(
    row_squares: Float64[Tensor, "b m"], col_squares: Float64[Tensor, "b n"], drawn: Bool[Tensor, "b"]
) -> Separable:
    """Solve for the law of Gaussians of variance R_i C_j / T.

    With a_i b_j the variances, the two unknowns d and t of

        d = (1/N) sum_i a_i / (-z (1 + t a_i)),    t = (1/N) sum_j b_j / (-z (1 + d b_j))

    give the density Im[(1/M) sum_i 1 / (-z (1 + t a_i))] / pi just above the real line. Newton's method in t, from a
    large imaginary part of z, where any start leads home, down to a small one.

    Args:
        row_squares: R, squared norms of the rows.
        col_squares: C, of the columns.
        drawn: For which matrices it is solved; a few tenths of a second each.

    Returns:
        In the unit of the eigenvalues sigma^2 / N. NaN where it is not solved, for a zero matrix, for one that is not
        finite, and where Newton's method did not converge or more than the whole is found (``failed``).

    Source: Hachem, Loubaton, Najim 2007, Annals of Applied Probability 17; Paul & Silverstein 2009.
    """
    shape = row_squares.shape[1], col_squares.shape[1]
    x = row_squares.new_full((len(row_squares), POINTS), torch.nan)
    share, edge, total = x.clone(), x[:, 0].clone(), row_squares.sum(-1)
    failed = torch.zeros_like(drawn)
    sides = (row_squares, col_squares) if shape[0] <= shape[1] else (col_squares, row_squares)
    for i in (drawn & (total > 0) & total.isfinite()).nonzero()[:, 0].tolist():
        # Sides of mean 1, so that the points suit every matrix; the unit comes back at the end.
        short, long = (_Profile.of(side[i] * (len(side[i]) / total[i])) for side in sides)
        if (found := _solve(short, long)) is None:
            failed[i] = True
        else:
            x[i], share[i], edge[i] = found
    unit = (total / (shape[0] * shape[1]))[:, None]
    return Separable(x * unit, share, edge * unit[:, 0], failed)


def separable_warnings(law: Separable) -> tuple[str, ...]:
    """Say of each matrix whose law could not be solved for that it has none; an empty string for the others."""
    return tuple("no law of row and column norms: it did not converge" if one else "" for one in law.failed.tolist())


@dataclass(frozen=True)
class _Profile:
    """Variances along one side, mean 1, in at most ``GROUPS`` groups, and how many rows each stands for."""

    value: Points
    count: Points

    @classmethod
    def of(cls, squares: Float64[Tensor, "n"]) -> _Profile:
        """Group squared norms by size; a group stands at its mean, so that the whole stays what it was."""
        parts = squares.sort().values.tensor_split(min(GROUPS, len(squares)))
        count = squares.new_tensor([len(part) for part in parts])
        return cls(torch.stack([part.mean() for part in parts]), count)


def _solve(short: _Profile, long: _Profile) -> tuple[Points, Points, Tensor] | None:
    """Return points, the share of the law at or below each, and the edge; ``None`` where that did not converge."""
    # No eigenvalue of the law exceeds this: the largest variance, as if all were.
    gamma = short.count.sum() / long.count.sum()
    top = (short.value.max() * long.value.max() * (1 + gamma.sqrt()) ** 2).item()

    def spaced(first: float, last: float, count: int) -> tuple[Points, Points]:
        span = torch.linspace(math.log(first), math.log(last), count, dtype=torch.float64, device=gamma.device).exp()
        return span, _density(short, long, span)

    x, density = spaced(top * SMALLEST, top, COARSE)
    inside = (x * density > NOTHING).nonzero()[:, 0]
    if not len(inside) or bool(density.isnan().any()):
        return None
    low = x[max(int(inside[0]) - 1, 0)].item()
    for _ in range(2):  # the edge lies between two points, and then between two of those between them
        last = int((x * density > NOTHING).nonzero()[-1])
        # A little beyond the end: the exponential of a logarithm may fall short of it.
        x, density = spaced(x[last].item(), x[min(last + 1, len(x) - 1)].item() * (1 + 1e-12), FINE)
    edge = x[(x * density > NOTHING).nonzero()[-1, 0]]
    x, density = spaced(low, edge.item(), POINTS)
    above = torch.cumulative_trapezoid(density.flip(0), -x.flip(0)).flip(0)
    # NaN at a point that did not converge, or a mass that no density has.
    if not bool(above[0] <= 1 + MASS_ERROR):
        return None
    return x, (1 - torch.nn.functional.pad(above, (0, 1))).clamp(min=0.0), edge


def _density(short: _Profile, long: _Profile, x: Points) -> Points:
    """Return the density at x, of the eigenvalues that are not zero; NaN where Newton's method did not converge."""
    M, N = short.count.sum(), long.count.sum()
    a, of_a, b, of_b = (part.to(torch.complex128) for part in (short.value, short.count, long.value, long.count))
    # Products of what is common to all points with matrices of points by groups.
    once_a, twice_a, once_b, twice_b = of_a * a, of_a * a**2, of_b * b, of_b * b**2
    z = t = settled = torch.empty(0)
    for level in LEVELS:
        z = torch.complex(x, level * x)
        Nz = N * z
        t = -1 / z if level == LEVELS[0] else t
        tolerance = TOLERANCE if level == LEVELS[-1] else ON_THE_WAY
        for _ in range(NEWTON_STEPS):
            fall = torch.outer(t, a).add_(1).reciprocal_()
            d = -(fall @ once_a) / Nz
            slope = fall.square_() @ twice_a / Nz  # dd/dt
            fall = torch.outer(d, b).add_(1).reciprocal_()
            error = -(fall @ once_b) / Nz - t
            step = error / ((fall.square_() @ twice_b) / Nz * slope - 1)
            t = t - step
            settled = step.abs() <= tolerance * t.abs()
            if bool(settled.all()):
                break
    fall = torch.outer(t, a).add_(1).reciprocal_()
    return (-(fall @ of_a).div(M * z).imag / math.pi).where(settled, torch.nan)


@built_in(
    "Kolmogorov-Smirnov distance of the eigenvalues from the law of row and column norms",
    range="[0, 1]",
    source="Hachem, Loubaton & Najim 2007",
    invariant=OF_ENTRIES,
)
def sep_ks(separable: Separable, resolved_eigenvalues: Float64[Tensor, "b M"]) -> PerMatrix:
    """Largest distance of the spectrum from the separable law, from both sides of each step; zeros are part of it."""
    values = resolved_eigenvalues.flip(-1)
    count = values.shape[1]
    law, rank = separable.share_below(values), torch.arange(count, dtype=values.dtype, device=values.device)
    up_to, below = (rank + 1) / count - law, law - rank / count
    # Below the first point the law is known as one mass only.
    return torch.maximum(up_to, below.where(values > separable.x[:, :1], 0.0)).amax(-1)


@built_in(
    "where the law of row and column norms ends",
    unit="weight^2",
    range="[0, inf)",
    source="Hachem, Loubaton & Najim 2007",
    degree=2,
    invariant=OF_ENTRIES,
)
def sep_edge(separable: Separable) -> PerMatrix:
    """Upper end of the law's support."""
    return separable.edge


@built_in(
    "eigenvalues above sep_edge", unit="count", range="[0, M]", source="Paul & Silverstein 2009", invariant=OF_ENTRIES
)
def sep_spikes(separable: Separable, resolved_eigenvalues: Float64[Tensor, "b M"]) -> PerMatrix:
    """Eigenvalues that row and column norms do not explain. Of noise of the profile the largest one may fluctuate."""
    found = (resolved_eigenvalues > separable.edge[:, None]).sum(-1).double()
    return found.where(separable.edge.isfinite(), torch.nan)


@built_in(
    "peaks, as peak_count finds them, in the M quantiles of the law of row and column norms",
    unit="count",
    range="[0, M]",
    invariant=OF_ENTRIES,
)
def sep_modes(sep_sigmas: Float64[Tensor, "b M"]) -> PerMatrix:
    """Peaks that row and column norms alone would give to a spectrum without fluctuations."""
    return peak_count(sep_sigmas)


METRICS = (sep_ks, sep_edge, sep_spikes, sep_modes)
"""In the order of the table's columns."""
