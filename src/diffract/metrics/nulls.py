"""What row and column norms alone make of a spectrum, by draws: Gaussians with a matrix's own profile of norms.

Noise whose rows differ in size has spikes, and several peaks, without a direction of its own. So counts stand beside
their means over draws from the null ``rowcol``: independent Gaussians of variance R_i C_j / T, with R, C and T the
squared norms of rows, columns and the whole, scaled so that each draw has these norms itself. Without that a draw's
norms would scatter about the matrix's own, which are scattered already: its groups would be blurred, its edge frayed,
and noise would look more structured than its null. Given its row norms, noise of any row sizes is exactly such a draw.

Shapes: b matrices m x n, M = min(m, n), d draws of each.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from jaxtyping import Bool, Float64
from scipy.optimize import isotonic_regression
from torch import Tensor

from diffract.linalg import spectrum
from diffract.metrics.facts import OF_THE_ORDER, built_in
from diffract.metrics.peaks import Peaks, peak_count
from diffract.metrics.random_matrix import fit_bulk

PerMatrix = Float64[Tensor, "b"]
PerDraw = Float64[Tensor, "b d"]
Sigmas = Float64[Tensor, "b M"]
DrawnSigmas = Float64[Tensor, "b d M"]

DRAWS = 39
"""The smallest p-value is then 1 / 40."""

ROUNDING = 1e-12
"""By which distribution functions may err that are compared."""

ROUNDS = 3
"""In which draws are scaled to column and row norms; after them columns are off by less than 1 part in 1,000."""

TINY = float(torch.finfo(torch.float32).tiny)

PIECE_ENTRIES = 1 << 22
"""Entries drawn at once."""


def rowcol_sigmas(
    row_squares: Float64[Tensor, "b m"],
    col_squares: Float64[Tensor, "b n"],
    drawn: Bool[Tensor, "b"],
    *,
    draws: int = DRAWS,
) -> DrawnSigmas:
    """Draw Gaussian matrices of variance R_i C_j / T, scaled to the norms R and C, and return their singular values.

    The seed of a matrix is a digest of its rows' shares of the whole (as float32, which summing in another order leaves
    as they are): a matrix has the same draws alone, in a batch and in another unit, and two matrices have draws
    independent of each other.

    Args:
        row_squares: R, squared norms of the rows.
        col_squares: C, of the columns.
        drawn: Which matrices are drawn for.
        draws: Of each.

    Returns:
        Descending, in the unit of the entries; zero what cannot be told from it. NaN for a matrix that is not drawn
        for, is not finite, or is zero.
    """
    shape = row_squares.shape[1], col_squares.shape[1]
    found = row_squares.new_full((len(row_squares), draws, min(shape)), torch.nan)
    total = row_squares.sum(-1)
    for i in (drawn & (total > 0) & total.isfinite()).nonzero()[:, 0].tolist():
        generator = torch.Generator().manual_seed(
            zlib.crc32((row_squares[i] / total[i]).float().cpu().numpy().tobytes())
        )
        # Shares of the whole, as float32 holds them whatever the unit of the entries.
        rows, cols = ((squares[i] / total[i]).sqrt().float() for squares in (row_squares, col_squares))
        for places in torch.arange(draws).split(max(1, PIECE_ENTRIES // (shape[0] * shape[1]))):
            w = torch.randn(len(places), *shape, generator=generator).to(rows.device)
            w.mul_(rows[:, None]).mul_(cols)
            for _ in range(ROUNDS):
                w.mul_((cols / w.norm(dim=1).clamp(min=TINY))[:, None, :])
                w.mul_((rows / w.norm(dim=2).clamp(min=TINY))[:, :, None])
            # Draws are made in float32; Gram matrices tell as much of them as LAPACK, at a fraction of the time.
            one = spectrum(w, method="gram")
            found[i, places] = one.S.where(one.resolved[:, None] < one.S, 0.0) * total[i].sqrt()
    return found


def rowcol_peaks(sigmas: DrawnSigmas) -> PerDraw:
    """Number of peaks in each draw."""
    return peak_count(sigmas.flatten(0, 1)).view(sigmas.shape[:2])


def reached(own: PerMatrix, draws: PerDraw) -> PerMatrix:
    """The p-value (1 + draws that reach the matrix's own value) / (1 + draws); NaN where either is missing."""
    known = draws.isfinite()
    p = (1 + (draws >= own[:, None]).sum(-1).double()) / (1 + known.sum(-1))
    return p.where(own.isfinite() & known.any(-1), torch.nan)


@built_in(
    "mean peak_count over 39 Gaussians with the matrix's row and column norms",
    unit="count",
    range="[0, M]",
    invariant=OF_THE_ORDER,
    version=2,
)
def peak_count_rowcol(rowcol_peaks: PerDraw) -> PerMatrix:
    """Peaks that row and column norms alone give. NaN where nothing was drawn."""
    return rowcol_peaks.nanmean(-1)


@built_in(
    "(1 + draws of peak_count_rowcol with as many peaks) / 40: large, norms explain the peaks",
    range="[0.025, 1]",
    invariant=OF_THE_ORDER,
    version=2,
)
def peak_count_rowcol_pvalue(peaks: Peaks, rowcol_peaks: PerDraw) -> PerMatrix:
    """Share of the draws that have at least as many peaks as the matrix."""
    return reached(peaks.count, rowcol_peaks)


@built_in(
    "(1 + draws with the matrix's row and column norms whose dip is as large) / 40: small, several modes "
    "(no evidence where rows differ 1:3)",
    range="[0.025, 1]",
    source="Hartigan & Hartigan 1985",
    invariant=OF_THE_ORDER,
    version=2,
)
def dip_pvalue(shaped_sigmas: Sigmas, rowcol_sigmas: DrawnSigmas) -> PerMatrix:
    """Share of the draws whose dip, of ln sigma, is at least the matrix's own.

    Against the uniform distribution, the dip's usual null, noise with rows of unequal size is called multimodal in 17
    to 100% of draws.
    """
    drawn = dips(rowcol_sigmas.flatten(0, 1)).view(rowcol_sigmas.shape[:2])
    # Samples without a second mode all have the least dip, 1 / 2n, but for rounding.
    return reached(dips(shaped_sigmas) - ROUNDING, drawn)


@built_in(
    "mean mp_spikes_tw over 39 Gaussians with the matrix's row and column norms",
    unit="count",
    range="[0, M]",
    invariant=OF_THE_ORDER,
    version=2,
)
def mp_spikes_tw_rowcol(rowcol_sigmas: DrawnSigmas, shape: tuple[int, int]) -> PerMatrix:
    """Spikes that row and column norms alone give; draws without an edge do not count. NaN where nothing was drawn."""
    found = fit_bulk(rowcol_sigmas.flatten(0, 1).square() / max(shape), shape)
    return found.spikes_tw.view(rowcol_sigmas.shape[:2]).nanmean(-1)


def dips(sigmas: Sigmas) -> PerMatrix:
    """Hartigan's dip of ln sigma, one sample a row; those that are zero or not finite do not count.

    Returns:
        In [1 / 2n, 1 / 4]; NaN for a row with fewer than two values that differ.
    """
    rows = sigmas.cpu().numpy()
    found = [dip(np.log(row[(row > 0) & np.isfinite(row)])) for row in rows]
    return torch.tensor(found, dtype=torch.float64, device=sigmas.device)


def dip(values: np.ndarray) -> float:
    """Largest distance of the empirical distribution F from the nearest unimodal one.

    A unimodal distribution function is convex up to its mode and concave beyond. Between the greatest convex minorant
    of F from below and the least concave majorant of F from above the gap is widest somewhere. The mode lies between
    the points of contact on either side of it, and outside of them minorant and majorant are the best fit, half of
    whose excess is the distance. The same is done inside, until the gap left is no larger than the excess found.

    Args:
        values: n of them, any order.

    Returns:
        At least 1 / 2n, at most 1 / 4; NaN unless two values differ.

    Source: Hartigan & Hartigan 1985, The Dip Test of Unimodality, Annals of Statistics 13, section 4.

    >>> float(dip(np.array([0.0, 0.0, 1.0, 1.0]))), float(dip(np.arange(5.0)))
    (0.25, 0.1)
    """
    x, counts = np.unique(values, return_counts=True)
    if len(x) < 2:
        return math.nan
    above = counts.cumsum() / len(values)
    below = above - counts / len(values)
    excess = 1 / len(values)
    while True:
        lower, upper = _minorant(x, below), -_minorant(x, -above)
        touches, reaches = (np.flatnonzero(np.abs(a - b) < ROUNDING) for a, b in ((lower, below), (upper, above)))
        widest = max(*touches, *reaches, key=(upper - lower).__getitem__)
        if upper[widest] - lower[widest] <= excess + ROUNDING:
            return excess / 2
        left = touches[touches <= widest][-1]
        right = reaches[reaches >= widest][0]
        # Not at the ends themselves: the distribution may have an atom at its mode.
        excess = max(excess, *(above - lower)[:left], *(upper - below)[right + 1 :])
        if right - left == len(x) - 1 or right <= left:
            return excess / 2
        x, above, below = (part[left : right + 1] for part in (x, above, below))


def _minorant(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Greatest convex minorant: its slopes are the isotonic regression of the slopes between neighbours."""
    steps = np.diff(x)
    slopes = isotonic_regression(np.diff(y) / steps, weights=steps).x
    return y[0] + np.concatenate([[0.0], np.cumsum(slopes * steps)])
