"""Exponential tail: density proportional to exp(-rate x) for x >= xmin."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from diffract.metrics.heavy_tails.fit import Fitted, Law, OfPoints, Parameters, Tails, fit_tails, tail_metrics

PerMatrix = Float64[Tensor, "b"]


@dataclass(frozen=True)
class Exponential:
    """Exponential tails of b spectra; NaN where there is none.

    Attributes:
        rate: Of the decay, in units of 1 / x.
        xmin: Where the tail begins.
        ks: Kolmogorov-Smirnov distance of tail and fit.
        tail_count: Number of values >= xmin.
    """

    rate: PerMatrix
    xmin: PerMatrix
    ks: PerMatrix
    tail_count: PerMatrix

    @classmethod
    def of(cls, fitted: Fitted) -> Exponential:
        """Name what was fitted."""
        return cls(fitted.parameters[:, 0] / fitted.xmin, fitted.xmin, fitted.ks, fitted.count)


def exponential(
    values: Float64[Tensor, "b n"], *, at: PerMatrix | None = None, min_tail: int = 2, two_sided: bool = False
) -> Exponential:
    """Fit exp(-rate x): rate = k / sum (x - xmin) over the k values >= xmin.

    Args and choice of xmin as in ``power_law``. NaN for rows without two distinct values.

    Source: Clauset, Shalizi, Newman (2009), table 2.1.

    >>> import torch
    >>> exponential(torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64), at=torch.tensor([1.0]).double()).rate
    tensor([0.5000], dtype=torch.float64)
    """
    return Exponential.of(fit_tails(values, EXPONENTIAL, at=at, min_tail=min_tail, two_sided=two_sided))


def _fit(tails: Tails) -> Parameters:
    return 1 / tails.mean_excess[:, None]


def _survival(decay: Parameters, t: OfPoints) -> OfPoints:
    return t.expm1().mul_(-decay).exp_()


def _log_density(decay: Parameters, t: OfPoints) -> OfPoints:
    return decay.log() + t - decay * t.expm1()


def _quantile(decay: Parameters, u: OfPoints) -> OfPoints:
    return (-u.log() / decay).log1p()


EXPONENTIAL = Law(_fit, _survival, _log_density, _quantile)
"""One parameter: rate xmin."""

METRICS = tail_metrics(
    "exp",
    "exponential",
    ("rate", "rate of rho ~ exp(-rate lambda)", {"unit": "weight^-2", "range": "[0, inf)", "degree": -2}),
)
