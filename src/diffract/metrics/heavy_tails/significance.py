"""What fitted tails are worth: laws against each other, doubts, p-values by bootstrap, and weighted exponents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from operator import attrgetter
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from diffract.errors import SelectionError, choose
from diffract.metrics.facts import Metric, built_in
from diffract.metrics.heavy_tails.exponential import EXPONENTIAL
from diffract.metrics.heavy_tails.fit import CLAUSET, ROUNDING, Fitted, Law, fit_tails, order, piece_entries
from diffract.metrics.heavy_tails.log_normal import LOG_NORMAL
from diffract.metrics.heavy_tails.power_law import POWER_LAW, PowerLaw
from diffract.metrics.heavy_tails.truncated_power_law import TRUNCATED_POWER_LAW
from diffract.metrics.single import shaped

Family = Literal["power_law", "exponential", "log_normal", "truncated_power_law"]

LAWS: dict[str, Law] = {
    "power_law": POWER_LAW,
    "exponential": EXPONENTIAL,
    "log_normal": LOG_NORMAL,
    "truncated_power_law": TRUNCATED_POWER_LAW,
}


def law_of(family: str) -> Law:
    """Return the law of that name.

    Raises:
        SelectionError: There is none.
    """
    return LAWS[choose("tail law", family, LAWS)]


PerMatrix = Float64[Tensor, "b"]

SAME = 1e-9
"""Log-likelihood per value; laws that differ by less are one law, seen through rounding."""


@dataclass(frozen=True)
class Comparison:
    """A power law against another law on the same tails; NaN where there is no tail.

    Attributes:
        ratio: Log-likelihood ratio R = sum(l_i), l_i = ln p_power(x_i) - ln p_other(x_i), over sqrt(k var(l)): positive
            where the power law is the likelier one. Zero where the two laws coincide.
        p: Two-sided probability of a ratio at least so far from zero were both equally good; 1 where they coincide.
    """

    ratio: PerMatrix
    p: PerMatrix


@dataclass(frozen=True)
class Comparisons:
    """The power law against each of the others."""

    exponential: Comparison
    truncated_power_law: Comparison
    log_normal: Comparison


def compare_laws(values: Float64[Tensor, "b n"], xmin: PerMatrix, parameters: Mapping[str, Tensor]) -> Comparisons:
    """Compare the power law with the other laws, all fitted to the power law's tail.

    Exponential and log-normal: Vuong's test, p = erfc(|R| / sqrt(2 k var(l))). The truncated power law contains the
    power law, so that R <= 0 and Vuong's normal limit does not hold: there p = P(chi^2_1 >= 2 |R|), one degree of
    freedom for the rate, as ``powerlaw`` 1.5 has it for nested laws. (The rate lies on the edge of what is allowed,
    which makes this p up to twice too large.) The log-normal contains the power law as a limit only, and is taken as
    not nested.

    Args:
        values: Eigenvalues in any order; those that are not finite or not above zero do not count.
        xmin: Where each row's tail begins.
        parameters: (b, p) of each of ``LAWS``, fitted to the values >= xmin.

    Source: Vuong (1989), Econometrica 57; Clauset, Shalizi, Newman (2009), section 5.
    """
    inside = (values >= xmin[:, None]) & values.isfinite()
    t = (values / xmin[:, None]).log().where(inside, 0.0)
    power, *others = (
        LAWS[name].log_density(parameters[name], t)
        for name in ("power_law", "exponential", "truncated_power_law", "log_normal")
    )
    nested = (False, True, False)
    return Comparisons(*(_test(power - o, inside, nested=n) for o, n in zip(others, nested, strict=True)))


def _test(differences: Float64[Tensor, "b n"], inside: Tensor, *, nested: bool) -> Comparison:
    k = inside.sum(1)
    total = differences.where(inside, 0.0).sum(1)
    spread = (differences - (total / k)[:, None]).square().where(inside, 0.0).sum(1).sqrt()  # sqrt(k var(l))
    ratio = total / spread
    # Of nested laws twice the ratio follows a chi-square of one degree (Wilks); of others Vuong's ratio is normal.
    p = torch.special.erfc(total.abs().sqrt() if nested else ratio.abs() * 0.5**0.5)
    same = torch.maximum(total.abs() / k, spread / k.sqrt()) < SAME
    return Comparison(ratio.masked_fill(same, 0.0), p.masked_fill(same, 1.0).where(k > 0, torch.nan))


def alpha_hat(alpha: PerMatrix, largest: PerMatrix) -> PerMatrix:
    """The weighted exponent, alpha log10 lambda_1; NaN without an alpha, -inf for lambda_1 = 0.

    Source: Martin, Peng, Mahoney (2021), Predicting trends in the quality of neural networks, Nature Communications 12.

    >>> alpha_hat(torch.tensor([2.5]).double(), torch.tensor([100.0]).double())
    tensor([5.], dtype=torch.float64)
    """
    return alpha * largest.log10()


def log10_alpha_norm(values: Float64[Tensor, "b n"], alpha: PerMatrix) -> PerMatrix:
    """The logarithm of the alpha-norm, log10 sum lambda_i^alpha, without over- or underflow.

    Args:
        values: Eigenvalues in any order; those that are not finite or not above zero do not count.
        alpha: The exponent.

    Returns:
        NaN without an alpha, -inf without values.

    Source: as ``alpha_hat``.

    >>> log10_alpha_norm(torch.tensor([[1e200, 0.0]], dtype=torch.float64), torch.tensor([3.0]).double())
    tensor([600.], dtype=torch.float64)
    """
    counted = (values > 0) & values.isfinite()
    powers = (alpha[:, None] * values.log()).where(counted, -torch.inf)
    total = powers.logsumexp(1) / math.log(10)
    return total.where(~alpha.isnan(), torch.nan)


RESAMPLES = 50
"""Of the bootstrap of an exponent; its standard deviation is then known to 10%."""


@built_in(
    "standard deviation of pl_alpha over 50 bootstrap resamples, xmin searched anew in each",
    range="[0, inf)",
    source="Efron & Tibshirani 1993",
    version=2,
)
def pl_alpha_stderr(tail_eigenvalues: Float64[Tensor, "b n"], drawn: Bool[Tensor, "b"]) -> PerMatrix:
    """Standard deviation of alpha over resamples of the eigenvalues, each fitted as a whole.

    With xmin taken as given, (alpha - 1) / sqrt(tail_count) is 1.2 to 3 times too small.

    Args:
        tail_eigenvalues: Zero where they do not count.
        drawn: Which matrices are resampled.

    Returns:
        NaN where nothing is resampled, or too few resamples have a fit.
    """
    found = torch.full_like(tail_eigenvalues[:, 0], torch.nan)
    counted = (tail_eigenvalues > 0).sum(1)
    for i in (drawn & (counted > 1)).nonzero()[:, 0].tolist():
        n = int(counted[i])
        picked = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0)).to(found.device)
        slopes = fit_tails(tail_eigenvalues[i].sort(descending=True).values[picked], POWER_LAW).parameters[:, 0]
        known = slopes[slopes.isfinite()]
        # Resamples of a few equal values have no fit; where most have none, the rest does not speak for them.
        found[i] = known.std() if len(known) > RESAMPLES // 2 else torch.nan
    return found


@built_in(
    "Hill's exponent over the upper half of the pooled eigenvalues of the M x M blocks that tile the matrix",
    range="[1, inf)",
    source="Hu et al. 2025",
    invariant=frozenset({"transpose"}),
)
def pl_alpha_farms(block_sigmas: Float64[Tensor, "b k M"], epsilon: float) -> PerMatrix:
    """Exponent that matrices of different aspect ratio can be compared by: Gaussian noise of every shape reads 2.1.

    alpha = 1 + k / sum ln(lambda_i / xmin) over the upper half, k, of the pooled eigenvalues of floor(N / M) square
    blocks side by side, xmin the largest value below that half. What the blocks leave over does not count.

    Args:
        block_sigmas: Of each block, descending; zero where not resolved.
        epsilon: Of the stored dtype.

    Returns:
        NaN where the values are equal up to rounding, or fewer than two count.
    """
    side = block_sigmas.shape[-1]
    pooled = block_sigmas.flatten(1).sort(descending=True).values
    values = shaped(pooled, torch.zeros_like(pooled[:, 0]), (side, side), epsilon).square()
    count = (values > 0).sum(1)
    # The largest value below the upper half is xmin, and does not count among those above it.
    half = count // 2
    xmin = values.gather(1, half[:, None].clamp(max=values.shape[1] - 1))
    upper = torch.arange(values.shape[1], device=values.device) < half[:, None]
    total = (values / xmin).log().where(upper, 0.0).sum(1)
    return (1 + half / total).where((count > 1) & (total > 0), torch.nan)


Doubts = Bool[Tensor, "b"]

FEWEST = 50
"""Values in a tail below which an exponent is known badly (Clauset et al. 2009, section 3.3)."""

SMALL_ALPHA, LARGE_ALPHA = 2.0, 6.0
"""Exponents between these are usual in trained layers (Martin & Mahoney 2021), and in Gaussian noise: of 32 to 128
columns 59 to 89% of draws lie there, so that no exponent says by itself how well a layer is trained."""


@dataclass(frozen=True)
class TailWarning:
    """Doubts about b fitted tails; all false where there is no tail.

    Attributes:
        short: Fewer than 50 values in the tail.
        small: alpha below 2.
        large: alpha above 6.
        whole: xmin is the smallest value: the tail is the whole spectrum.
        extreme: xmin is the last candidate, the second largest value seen.
    """

    short: Doubts
    small: Doubts
    large: Doubts
    whole: Doubts
    extreme: Doubts


def tail_warning(tail: PowerLaw, values: Float64[Tensor, "b n"]) -> TailWarning:
    """Return what speaks against a fit; ``values`` are those that it was made of."""
    x = values.where((values > 0) & values.isfinite(), torch.nan)
    above = x > tail.xmin[:, None]
    largest = x.nan_to_num(0.0).amax(1, keepdim=True)
    return TailWarning(
        short=tail.tail_count < FEWEST,
        small=tail.alpha < SMALL_ALPHA,
        large=tail.alpha > LARGE_ALPHA,
        whole=~tail.xmin.isnan() & ~(x < tail.xmin[:, None]).any(1),
        extreme=~tail.xmin.isnan() & (~above | (x == largest)).all(1),
    )


def describe_warning(warning: TailWarning, tail: PowerLaw) -> tuple[str, ...]:
    """Word the warnings of each row, most telling first; an empty string where there are none."""
    texts = {
        "short": "",
        "small": "alpha below 2",
        "large": "alpha above 6",
        "whole": "xmin is the smallest value",
        "extreme": "xmin is the last candidate",
    }
    flags = torch.stack([getattr(warning, field.name) for field in fields(warning)], 1).tolist()
    return tuple(
        "; ".join(text or f"tail of {count:.0f} points" for text, on in zip(texts.values(), row, strict=True) if on)
        for row, count in zip(flags, tail.tail_count.tolist(), strict=True)
    )


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
        kept = None if refit and at is None else fitted.xmin[rows]
        fit = partial(fit_tails, law=law, **options)
        p[rows] = _share_of_worse(values[rows], fitted[rows], law, fit=fit, at=kept, draws=draws, seed=seed)
    return PValue(p, (p * (1 - p) / draws).sqrt())


def _share_of_worse(
    values: Float64[Tensor, "b n"],
    fitted: Fitted,
    law: Law,
    *,
    fit: Callable[..., Fitted],
    at: PerMatrix | None,
    draws: int,
    seed: int,
) -> PerMatrix:
    """Return the share of draws that fit no better than the data."""
    b, n = values.shape
    generator = torch.Generator().manual_seed(seed)
    x = order(values).values
    worse, fits = torch.zeros(2, b, dtype=x.dtype, device=x.device)
    for first in range(0, draws, BLOCK):
        # Whole blocks are drawn and cut, so that the first draws are the same however many are asked for.
        uniform = torch.rand(BLOCK, 2, n, dtype=x.dtype, generator=generator)[: draws - first].to(x.device)
        drawn = _draw(x, fitted, law, pick=uniform[:, 0], survival=1 - uniform[:, 1]).flatten(0, 1)
        ks = fit(drawn, at=None if at is None else at.repeat_interleave(len(uniform))).ks.view(b, -1)
        worse += (ks >= fitted.ks[:, None] - ROUNDING).sum(1)
        fits += ks.isfinite().sum(1)
    return worse / fits


def _draw(
    x: Float64[Tensor, "b n"],
    fitted: Fitted,
    law: Law,
    *,
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
    # One number chooses tail or body and, scaled to what is left of it, the place in the body.
    drawn = torch.where(pick < share, fitted.xmin[:, None, None] * t.exp(), below)
    return drawn.where(torch.arange(x.shape[1], device=x.device) < counted, torch.nan)


def _against(short: str, law: str, *, version: int = 2) -> tuple[Metric, Metric]:
    """The power law against another law on the power law's tail."""
    name, called = f"pl_vs_{short}", law.replace("_", " ")
    words: dict[str, Any] = {"facts": ("tail_comparisons",), "source": "Vuong 1989", "version": version}
    ratio = f"normalised log-likelihood ratio of power law and {called}; positive: power law"
    p = f"two-sided p of {name}: large, neither is better"
    return (
        built_in(ratio, name=name, range="(-inf, inf)", **words)(attrgetter(f"{law}.ratio")),
        built_in(p, name=f"{name}_p", range="[0, 1]", **words)(attrgetter(f"{law}.p")),
    )


COMPARED = (
    *_against("exp", "exponential"),
    *_against("tpl", "truncated_power_law", version=3),
    *_against("ln", "log_normal", version=3),
)
"""The power law against the others, as metrics; versions are those of the other law's fit."""

LOG10: dict[str, Any] = {
    "unit": "log10 weight^2",
    "range": "(-inf, inf)",
    "source": "Martin, Peng & Mahoney 2021",
    "degree": None,
    "version": 2,
}

NORMS = (
    built_in("pl_alpha log10 lambda_1", name="alpha_hat", facts=("power_law", "eigenvalues"), **LOG10)(
        lambda tail, values: alpha_hat(tail.alpha, values[:, 0])
    ),
    built_in("log10 sum lambda^pl_alpha", name="log10_alpha_norm", facts=("power_law", "tail_eigenvalues"), **LOG10)(
        lambda tail, values: log10_alpha_norm(values, tail.alpha)
    ),
)
"""Weighted exponents as metrics."""


def _pvalue(name: str, law: Family, summary: str, *, refit: bool = True) -> Metric:
    declare = built_in(summary, name=name, facts=("tail_eigenvalues",), range="[0, 1]", source=CLAUSET, version=2)
    return declare(lambda values: p_value(values, law, refit=refit).p)


SHORT: dict[str, Family] = {
    "pl": "power_law",
    "tpl": "truncated_power_law",
    "exp": "exponential",
    "ln": "log_normal",
}
"""What columns of a law begin with."""

P_VALUES = (
    *(
        _pvalue(
            f"{short}_pvalue",
            law,
            f"share of 1,000 bootstrap draws that fit a {law.replace('_', ' ')} worse; small: it is none",
        )
        for short, law in SHORT.items()
    ),
    _pvalue(
        "pl_pvalue_fixed_xmin",
        "power_law",
        "pl_pvalue with xmin kept on each draw: cheaper, and too large",
        refit=False,
    ),
)
"""Goodness of fit, as metrics; each takes a thousand fits of every matrix."""
