"""What row and column norms alone make of spectra and of agreement, by draws: Gaussians with a matrix's own norms.

Noise whose rows differ in size has spikes, and several peaks, without a direction of its own. So counts stand beside
their means over draws from the null ``rowcol``: independent Gaussians of variance R_i C_j / T, with R, C and T the
squared norms of rows, columns and the whole, scaled so that each draw has these norms itself. Without that a draw's
norms would scatter about the matrix's own, which are scattered already: its groups would be blurred, its edge frayed,
and noise would look more structured than its null. Given its row norms, noise of any row sizes is exactly such a draw.
The null ``row`` has the norms of the rows alone.

Shapes: b matrices m x n, M = min(m, n), d draws of each.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from scipy.optimize import isotonic_regression
from torch import Tensor

from diffract.linalg import spectrum
from diffract.metrics import heavy_tails
from diffract.metrics.agreement import AGREEMENT, ANGLES
from diffract.metrics.facts import OF_THE_ORDER, Metric, built_in
from diffract.metrics.peaks import peak_count
from diffract.metrics.random_matrix import fit_bulk

PerMatrix = Float64[Tensor, "b"]
PerDraw = Float64[Tensor, "b d"]
Sigmas = Float64[Tensor, "b M"]
DrawnSigmas = Float64[Tensor, "b d M"]

DRAWS = 39
"""The smallest p-value is then 1 / 40."""

PAIR_DRAWS = 4
"""Of two unrelated matrices, which give a mean over all directions and no p-value."""

ROUNDING = 1e-12
"""By which distribution functions may err that are compared."""

ROUNDS = 3
"""In which draws are scaled to column and row norms; after them columns are off by less than 1 part in 1,000."""

TINY = float(torch.finfo(torch.float32).tiny)

PIECE_ENTRIES = 1 << 22
"""Entries drawn at once."""

CACHED_ENTRIES = 1 << 18
"""Of these, entries scaled at once."""


Scale = Callable[[Tensor], Tensor]
"""What gives Gaussians the norms of a matrix, in place."""


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
    return _drawn_sigmas(row_squares, shape, drawn, draws, lambda i: _to_norms(row_squares[i], col_squares[i]))


def row_sigmas(
    row_squares: Float64[Tensor, "b m"], shape: tuple[int, int], drawn: Bool[Tensor, "b"], *, draws: int = DRAWS
) -> DrawnSigmas:
    """Draw Gaussian matrices with the norms of the rows alone; the rest is like ``rowcol_sigmas``.

    Columns are equal but for chance, so that peaks which column norms make are not explained.
    """
    return _drawn_sigmas(row_squares, shape, drawn, draws, lambda i: _to_norms(row_squares[i]))


def _drawn_sigmas(
    row_squares: Float64[Tensor, "b m"],
    shape: tuple[int, int],
    drawn: Bool[Tensor, "b"],
    draws: int,
    scale: Callable[[int], Scale],
) -> DrawnSigmas:
    """Return the singular values of Gaussians that are scaled as ``scale`` says of each matrix."""
    found = row_squares.new_full((len(row_squares), draws, min(shape)), torch.nan)
    total = row_squares.sum(-1)
    for i in (drawn & (total > 0) & total.isfinite()).nonzero()[:, 0].tolist():
        places = iter(torch.arange(draws).split(_at_once(shape)))
        for w in _gaussians(shape, scale(i), draws=draws, seed=_seed(row_squares[i])):
            # Draws are made in float32; Gram matrices tell as much of them as LAPACK, at a fraction of the time.
            one = spectrum(w, method="gram")
            found[i, next(places)] = one.S.where(one.resolved[:, None] < one.S, 0.0) * total[i].sqrt()
    return found


def _seed(row_squares: Float64[Tensor, "m"], salt: int = 0) -> int:
    return zlib.crc32((row_squares / row_squares.sum()).float().cpu().numpy().tobytes(), salt)


def _at_once(shape: tuple[int, int]) -> int:
    return max(1, PIECE_ENTRIES // (shape[0] * shape[1]))


def _gaussians(shape: tuple[int, int], scale: Scale, *, draws: int, seed: int) -> Iterator[Float[Tensor, "d m n"]]:
    """Yield scaled Gaussians of squared norm 1, several at once."""
    generator = torch.Generator().manual_seed(seed)
    for places in torch.arange(draws).split(_at_once(shape)):
        yield scale(torch.randn(len(places), *shape, generator=generator))


def _to_norms(row_squares: Float64[Tensor, "m"], col_squares: Float64[Tensor, "n"] | None = None) -> Scale:
    """Return what scales Gaussians to shares of the whole that rows, and columns where these are given, have."""
    # Shares of the whole, as float32 holds them whatever the unit of the entries.
    total = row_squares.sum()
    rows = (row_squares / total).float()
    cols = None if col_squares is None else (col_squares / total).float()

    def scale(w: Float[Tensor, "d m n"]) -> Float[Tensor, "d m n"]:
        w = w.to(rows.device)
        if cols is None:
            return w.mul_((rows.sqrt() / w.norm(dim=2).clamp(min=TINY))[:, :, None])
        # As many draws at once as stay in the cache. What each row and column is multiplied with is found from squares,
        # so that the draws themselves are touched once and not in every round.
        for part in w.split(max(1, CACHED_ENTRIES // (w.shape[1] * w.shape[2]))):
            squares, by_row, by_col = part.square(), rows.expand(len(part), -1), cols
            for _ in range(ROUNDS):
                by_col = cols / torch.bmm(by_row[:, None], squares)[:, 0].clamp(min=TINY)
                by_row = rows / torch.bmm(squares, by_col[:, :, None])[:, :, 0].clamp(min=TINY)
            part.mul_(by_row.sqrt()[:, :, None]).mul_(by_col.sqrt()[:, None, :])
        return w

    return scale


@dataclass(frozen=True)
class Own:
    """What draws keep of b matrices of one model.

    Attributes:
        row_squares: (b, m), squared norms of the rows.
        col_squares: (b, n), of the columns.
        sigmas: (b, M), singular values.
        directions: (b, M), which of them are resolved.
    """

    row_squares: Tensor
    col_squares: Tensor
    sigmas: Tensor
    directions: Tensor


def unrelated_pairs(
    base: Own,
    tuned: Own,
    drawn: Bool[Tensor, "b"],
    *,
    measure: Callable[[dict[str, Tensor]], dict[str, PerMatrix]],
    draws: int = PAIR_DRAWS,
) -> dict[str, PerMatrix]:
    """Measure pairs of Gaussians that have nothing in common but how large their rows and columns are.

    Where the same rows are large in both, leading left vectors lie in these rows in both, and agree more than random
    directions do. Vectors are the draws', ordered like the matrices' own singular values, on which windows depend.

    Args:
        base: What is kept of W0.
        tuned: Of W1.
        drawn: Which pairs are drawn for.
        measure: Takes what is known of ``draws`` pairs, by the names of ``FACTS``; returns numbers of each.
        draws: Of each pair.

    Returns:
        The mean of each number over the draws; NaN for a pair that is not drawn for, is not finite, or has a zero
        matrix.
    """
    totals = torch.stack([one.row_squares.sum(-1) for one in (base, tuned)])
    shape = base.row_squares.shape[1], base.col_squares.shape[1]
    found: dict[str, PerMatrix] = defaultdict(lambda: torch.full_like(totals[0], torch.nan))
    for i in (drawn & (totals > 0).all(0) & totals.isfinite().all(0)).nonzero()[:, 0].tolist():
        # Other seeds for W0 and W1, or a matrix that did not change would be drawn twice.
        both = (
            _gaussians(
                shape,
                _to_norms(one.row_squares[i], one.col_squares[i]),
                draws=draws,
                seed=_seed(one.row_squares[i], salt),
            )
            for salt, one in enumerate((base, tuned))
        )
        parts = [measure(_agreeing(pair, (base, tuned), i)) for pair in zip(*both, strict=True)]
        for name in parts[0]:
            found[name][i] = torch.cat([part[name] for part in parts]).nanmean()
    return found


def _agreeing(pair: Sequence[Float[Tensor, "d m n"]], own: Sequence[Own], i: int) -> dict[str, Tensor]:
    """Return the facts about drawn pairs that agreement is computed from."""
    first, second = (spectrum(w, vectors=True, method="gram") for w in pair)
    assert first.U is not None and first.Vh is not None and second.U is not None and second.Vh is not None
    facts = {"left_cosines": first.U.mT @ second.U, "right_cosines": first.Vh @ second.Vh.mT}
    for start, one, kept in (("base_", first, own[0]), ("", second, own[1])):
        facts[f"{start}sigmas"] = kept.sigmas[i].expand_as(one.S)
        facts[f"{start}directions"] = kept.directions[i] & (one.resolved[:, None] < one.S)
    return facts


def drawn_peaks(sigmas: DrawnSigmas) -> PerDraw:
    """Number of peaks in each draw."""
    return peak_count(sigmas.flatten(0, 1)).view(sigmas.shape[:2])


def reached(own: PerMatrix, draws: PerDraw) -> PerMatrix:
    """The p-value (1 + draws that reach the matrix's own value) / (1 + draws); NaN where either is missing."""
    known = draws.isfinite()
    p = (1 + (draws >= own[:, None]).sum(-1).double()) / (1 + known.sum(-1))
    return p.where(own.isfinite() & known.any(-1), torch.nan)


def _beside_peaks(null: str, norms: str, *, version: int) -> tuple[Metric, Metric]:
    """The metrics that say how many peaks a null has, and how often it has as many as the matrix."""
    words: dict[str, Any] = {"invariant": OF_THE_ORDER, "version": version}
    mean = built_in(
        f"mean peak_count over 39 Gaussians with the matrix's {norms}",
        unit="count",
        range="[0, M]",
        name=f"peak_count_{null}",
        facts=(f"{null}_peaks",),
        **words,
    )
    share = built_in(
        f"(1 + draws of peak_count_{null} with as many peaks) / 40: large, {norms} explain the peaks",
        range="[0.025, 1]",
        name=f"peak_count_{null}_pvalue",
        facts=("peaks", f"{null}_peaks"),
        **words,
    )
    return mean(partial(torch.nanmean, dim=-1)), share(lambda peaks, draws: reached(peaks.count, draws))


ROWCOL_PEAKS = _beside_peaks("rowcol", "row and column norms", version=3)
"""What draws with all norms say of ``peak_count``; NaN where nothing was drawn."""

ROW_PEAKS = _beside_peaks("row", "row norms", version=2)
"""Likewise with the norms of the rows alone."""


@built_in(
    "(1 + draws with the matrix's row and column norms whose dip is as large) / 40: small, several modes "
    "(no evidence where rows have two sizes or few directions are large)",
    range="[0.025, 1]",
    source="Hartigan & Hartigan 1985",
    invariant=OF_THE_ORDER,
    version=3,
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
    "mean mp_spikes_tw over 39 Gaussians with the matrix's row and column norms; an excess means little with 16 values",
    unit="count",
    range="[0, M]",
    invariant=OF_THE_ORDER,
    version=3,
)
def mp_spikes_tw_rowcol(rowcol_sigmas: DrawnSigmas, shape: tuple[int, int]) -> PerMatrix:
    """Spikes that row and column norms alone give; draws without an edge do not count. NaN where nothing was drawn."""
    found = fit_bulk(rowcol_sigmas.flatten(0, 1).square() / max(shape), shape)
    return found.spikes_tw.view(rowcol_sigmas.shape[:2]).nanmean(-1)


def drawn_alphas(sigmas: DrawnSigmas, shape: tuple[int, int]) -> PerDraw:
    """Exponent of the power law of each draw, xmin searched; NaN for draws that were not made."""
    values = sigmas.flatten(0, 1).square() / max(shape)
    return heavy_tails.power_law(values.nan_to_num()).alpha.view(sigmas.shape[:2])


@built_in(
    "mean pl_alpha over 39 Gaussians with the matrix's row and column norms",
    range="(1, inf)",
    invariant=OF_THE_ORDER,
    version=2,
)
def pl_alpha_rowcol(rowcol_alphas: PerDraw) -> PerMatrix:
    """Exponent that noise of the matrix's norms and shape reads; NaN where nothing was drawn."""
    return rowcol_alphas.nanmean(-1)


@built_in(
    "(1 + draws of pl_alpha_rowcol whose exponent is as small) / 40: large, noise has as heavy a tail",
    range="[0.025, 1]",
    invariant=OF_THE_ORDER,
    version=2,
)
def pl_alpha_rowcol_pvalue(power_law: heavy_tails.PowerLaw, rowcol_alphas: PerDraw) -> PerMatrix:
    """Share of the draws that have at most the matrix's exponent: an exponent says something only beside it."""
    return reached(-power_law.alpha, -rowcol_alphas)


def agreements(facts: Mapping[str, Any]) -> dict[str, PerMatrix]:
    """Return every number of agreement of pairs whose facts are known."""
    return {m.name: m(*(facts[fact] for fact in m.facts)) for m in MEASURES}


MEASURES = tuple(m for m in (*AGREEMENT, *ANGLES) if not m.name.endswith("_chance"))

AGREEMENT_LEVELS = tuple(
    built_in(
        f"level: mean {m.name} of 4 pairs of unrelated Gaussians with the row and column norms of W0 and W1",
        range=m.range,
        unit=m.unit,
        name=f"{m.name.removesuffix('_mean')}_rowcol",
        facts=("rowcol_agreement",),
        invariant=OF_THE_ORDER,
        version=2,
    )(itemgetter(m.name))
    for m in MEASURES
)
"""Levels of agreement that know how large each row and column is in both models."""


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
