"""How often a law that holds fits as badly as the one found: the semi-parametric bootstrap of Clauset et al."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from diffract.errors import SelectionError
from diffract.metrics.heavy_tails.families import Family, law_of
from diffract.metrics.heavy_tails.law import Law
from diffract.metrics.heavy_tails.order import order
from diffract.metrics.heavy_tails.pieces import piece_entries
from diffract.metrics.heavy_tails.search import ROUNDING, Fitted, fit_tails

PerMatrix = Float64[Tensor, "b"]

BLOCK = 64
"""Draws made at once; the random numbers depend on it, so that they do not depend on memory or device."""


@dataclass(frozen=True)
class PValue:
    """Goodness of fit of b tails; NaN where there is none.

    Attributes:
        p: Share of the draws whose distance is not below the one found; small means that the law is a bad one.
        stderr: Monte-Carlo standard error, sqrt(p (1 - p) / draws).
    """

    p: PerMatrix
    stderr: PerMatrix


def p_value(
    values: Float64[Tensor, "b n"],
    family: Family,
    *,
    at: PerMatrix | None = None,
    draws: int = 1000,
    seed: int = 0,
    refit: bool = True,
    min_tail: int = 2,
    two_sided: bool = False,
) -> PValue:
    """Bootstrap the Kolmogorov-Smirnov distance of a tail.

    Each draw has as many values as the row: each with probability k / n from the fitted tail, otherwise one of the
    values below xmin. The fit with its search for xmin is repeated on it. All rows share the same random numbers, so
    that a row's result does not depend on the rows beside it.

    Args:
        values: Eigenvalues in any order; those that are not finite or not above zero do not count.
        family: The tail's law.
        at: A given xmin for each row; the draws keep to it as well. By default xmin is searched.
        draws: Their number; p is known to about 1 / (2 sqrt(draws)).
        seed: Of the random numbers.
        refit: Whether xmin is searched anew on each draw. If not, only the parameters are estimated anew, at the xmin
            found: cheaper, but p comes out too large, as only the data had the choice of their best xmin.
        min_tail: As in ``power_law``.
        two_sided: As in ``power_law``.

    Raises:
        SelectionError: An unknown family, or no draws.

    Source: Clauset, Shalizi, Newman (2009), section 4.1.
    """
    if draws < 1:
        raise SelectionError(f"draws = {draws}: a bootstrap takes at least one.")
    law, options = law_of(family), {"min_tail": min_tail, "two_sided": two_sided}
    fitted = fit_tails(values, law, at=at, **options)
    p = torch.full_like(fitted.ks, torch.nan)
    fits = fitted.ks.isfinite().nonzero()[:, 0]
    entries = piece_entries(values.device)
    for rows in fits.split(max(1, entries // (BLOCK * max(1, values.shape[1])))):
        if not len(rows):
            break
        generator = torch.Generator().manual_seed(seed)
        p[rows] = _share_of_worse(values[rows], fitted[rows], law, draws, generator, refit and at is None, options)
    return PValue(p, (p * (1 - p) / draws).sqrt())


def _share_of_worse(
    values: Float64[Tensor, "b n"],
    fitted: Fitted,
    law: Law,
    draws: int,
    generator: torch.Generator,
    refit: bool,
    options: dict[str, Any],
) -> PerMatrix:
    """Return the share of draws that fit no better than the data."""
    b, n = values.shape
    x = order(values).values
    worse, fits = torch.zeros(2, b, dtype=x.dtype, device=x.device)
    for first in range(0, draws, BLOCK):
        uniform = torch.rand(BLOCK, 2, n, dtype=x.dtype, generator=generator)[: draws - first].to(x.device)
        drawn = _draw(x, fitted, law, uniform[:, 0], 1 - uniform[:, 1]).flatten(0, 1)
        at = None if refit else fitted.xmin.repeat_interleave(len(uniform))
        ks = fit_tails(drawn, law, at=at, **options).ks.view(b, -1)
        worse += (ks >= fitted.ks[:, None] - ROUNDING).sum(1)
        fits += ks.isfinite().sum(1)
    return worse / fits


def _draw(
    x: Float64[Tensor, "b n"],
    fitted: Fitted,
    law: Law,
    pick: Float64[Tensor, "d n"],
    survival: Float64[Tensor, "d n"],
) -> Float64[Tensor, "b d n"]:
    """Return draws of rows in descending order: ``pick`` chooses tail or body, ``survival`` the place in the tail."""
    counted, tail = (x > 0).sum(1)[:, None, None], fitted.count[:, None, None]
    share = tail / counted
    body = tail + ((pick - share) / (1 - share) * (counted - tail)).floor()
    body = torch.minimum(body.nan_to_num(0.0).clamp(min=0.0), counted - 1.0).long()
    below = x[:, None, :].expand(-1, len(pick), -1).gather(2, body)
    t = law.quantile(fitted.parameters, survival.flatten().expand(len(x), -1)).view(len(x), *pick.shape)
    drawn = torch.where(pick < share, fitted.xmin[:, None, None] * t.exp(), below)
    return drawn.where(torch.arange(x.shape[1], device=x.device) < counted, torch.nan)
