"""Whether another law describes a power law's tail better: likelihood-ratio tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from diffract.metrics.heavy_tails.exponential import EXPONENTIAL
from diffract.metrics.heavy_tails.law import Law, Parameters
from diffract.metrics.heavy_tails.log_normal import LOG_NORMAL
from diffract.metrics.heavy_tails.power_law import POWER_LAW
from diffract.metrics.heavy_tails.search import fit_tails
from diffract.metrics.heavy_tails.truncated_power_law import TRUNCATED_POWER_LAW

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


def compare_tails(values: Float64[Tensor, "b n"], *, at: PerMatrix | None = None, min_tail: int = 2) -> Comparisons:
    """Compare the power law with the other laws, all fitted to the power law's tail.

    Exponential and log-normal: Vuong's test, p = erfc(|R| / sqrt(2 k var(l))). The truncated power law contains the
    power law, so that R <= 0 and Vuong's normal limit does not hold: there p = P(chi^2_1 >= 2 |R|), one degree of
    freedom for the rate, as ``powerlaw`` 1.5 has it for nested laws. (The rate lies on the edge of what is allowed,
    which makes this p up to twice too large.) The log-normal contains the power law as a limit only, and is taken as
    not nested.

    Args:
        values: Eigenvalues in any order; those that are not finite or not above zero do not count.
        at: A given xmin for each row; the power law's own by default.
        min_tail: As in ``power_law``.

    Source: Vuong (1989), Econometrica 57; Clauset, Shalizi, Newman (2009), section 5.
    """
    tail = fit_tails(values, POWER_LAW, at=at, min_tail=min_tail)
    others = (
        fit_tails(values, law, at=tail.xmin, min_tail=min_tail).parameters
        for law in (EXPONENTIAL, LOG_NORMAL, TRUNCATED_POWER_LAW)
    )
    return compare_laws(values, tail.xmin, tail.parameters, *others)


def compare_laws(
    values: Float64[Tensor, "b n"],
    xmin: PerMatrix,
    power_law: Float64[Tensor, "b 1"],
    exponential: Float64[Tensor, "b 1"],
    log_normal: Float64[Tensor, "b 2"],
    truncated_power_law: Float64[Tensor, "b 2"],
) -> Comparisons:
    """Compare as ``compare_tails`` does, with the parameters of each law for the values >= xmin known already."""
    inside = (values >= xmin[:, None]) & values.isfinite()
    t = (values / xmin[:, None]).log().where(inside, 0.0)
    power = POWER_LAW.log_density(power_law, t)

    def against(law: Law, parameters: Parameters, *, nested: bool = False) -> Comparison:
        return _test(power - law.log_density(parameters, t), inside, nested=nested)

    return Comparisons(
        against(EXPONENTIAL, exponential),
        against(TRUNCATED_POWER_LAW, truncated_power_law, nested=True),
        against(LOG_NORMAL, log_normal),
    )


def _test(differences: Float64[Tensor, "b n"], inside: Tensor, *, nested: bool) -> Comparison:
    k = inside.sum(1)
    total = differences.where(inside, 0.0).sum(1)
    spread = (differences - (total / k)[:, None]).square().where(inside, 0.0).sum(1).sqrt()  # sqrt(k var(l))
    ratio = total / spread
    p = torch.special.erfc(total.abs().sqrt() if nested else ratio.abs() * 0.5**0.5)
    same = torch.maximum(total.abs() / k, spread / k.sqrt()) < SAME
    return Comparison(ratio.masked_fill(same, 0.0), p.masked_fill(same, 1.0).where(k > 0, torch.nan))
