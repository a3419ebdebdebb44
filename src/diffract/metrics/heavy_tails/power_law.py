"""Power-law tail: density proportional to x^-alpha for x >= xmin."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from diffract.metrics.heavy_tails.fit import Fitted, Law, OfPoints, Parameters, Tails, fit_tails, tail_metrics

PerMatrix = Float64[Tensor, "b"]


@dataclass(frozen=True)
class PowerLaw:
    """Power-law tails of b spectra; NaN where there is none.

    Attributes:
        alpha: Exponent of the density, above 1.
        xmin: Where the tail begins.
        ks: Kolmogorov-Smirnov distance of tail and fit.
        tail_count: Number of values >= xmin.
        alpha_stderr_fixed_xmin: (alpha - 1) / sqrt(tail_count), what it would be were xmin given.
    """

    alpha: PerMatrix
    xmin: PerMatrix
    ks: PerMatrix
    tail_count: PerMatrix
    alpha_stderr_fixed_xmin: PerMatrix

    @classmethod
    def of(cls, fitted: Fitted) -> PowerLaw:
        """Name what was fitted."""
        slope = fitted.parameters[:, 0]
        stderr = slope / fitted.count.sqrt()
        return cls(1 + slope, fitted.xmin, fitted.ks, tail_count=fitted.count, alpha_stderr_fixed_xmin=stderr)


def power_law(
    values: Float64[Tensor, "b n"], *, at: PerMatrix | None = None, min_tail: int = 2, two_sided: bool = False
) -> PowerLaw:
    """Fit x^-alpha: alpha = 1 + k / sum ln(x / xmin) over the k values >= xmin (Clauset et al. 2009, eq. 3.1).

    xmin minimises the distance over all values seen but the largest, as ``powerlaw`` 1.5 does: the empirical
    distribution function is taken from its left side at each distinct value, max |i/k - F|; of equal distances the
    smallest xmin wins.

    Args:
        values: Eigenvalues in any order; those that are not finite or not above zero do not count.
        at: A given xmin for each row instead of the search.
        min_tail: Fewest values in a tail.
        two_sided: Whether the distance looks at the empirical function from both sides (Clauset et al., eq. 3.9).

    Returns:
        NaN for rows without two distinct values.

    Source: Clauset, Shalizi, Newman (2009), Power-law distributions in empirical data, SIAM Review 51.

    >>> import torch
    >>> fit = power_law(torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64), at=torch.tensor([1.0]).double())
    >>> round(fit.alpha.item(), 4)  # 1 + 4 / (6 ln 2)
    1.9618
    """
    return PowerLaw.of(fit_tails(values, POWER_LAW, at=at, min_tail=min_tail, two_sided=two_sided))


def _fit(tails: Tails) -> Parameters:
    return 1 / tails.mean_log[:, None]


def _survival(slope: Parameters, t: OfPoints) -> OfPoints:
    return (t * -slope).exp_()


def _log_density(slope: Parameters, t: OfPoints) -> OfPoints:
    return slope.log() - slope * t


def _quantile(slope: Parameters, u: OfPoints) -> OfPoints:
    return -u.log() / slope


POWER_LAW = Law(_fit, _survival, _log_density, _quantile)
"""One parameter: alpha - 1."""

METRICS = tail_metrics(
    "pl",
    "power_law",
    ("alpha", "exponent of rho ~ lambda^-alpha above xmin", {"range": "[1, inf)"}),
    ("alpha_stderr_fixed_xmin", "(alpha - 1) / sqrt(values in the tail), as if xmin were given", {"range": "[0, inf)"}),
)
