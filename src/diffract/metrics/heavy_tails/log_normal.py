"""Log-normal tail: ln x is normal, given that x >= xmin."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float64
from torch import Tensor

from diffract.metrics.heavy_tails.fit import Fitted, Law, OfPoints, Parameters, Tails, fit_tails, tail_metrics
from diffract.metrics.heavy_tails.special import excess, log_hazard, survival_ratio

PerMatrix = Float64[Tensor, "b"]

POWER_LIKE = 1e6
"""Largest z = (ln xmin - mu) / sigma that is told from the limit z = inf, a power law: they differ by 1 / z^2."""

STEPS = 30
"""Two are usual."""

REACH, POINTS = 40.0, 1600
"""How far z, the unknown of the fit, is tabled, and at how many points; a start from the table is good to 1e-4."""

TOLERANCE = 1e-7
"""Of the last Newton step, relative: the error after it is its square."""

NEWTON_ENDS = 5.0
"""From here on quantiles come from Newton's method: there it starts close, and Q(z) u is left to ``ndtri`` before."""


@dataclass(frozen=True)
class LogNormal:
    """Log-normal tails of b spectra; NaN where there is none.

    Attributes:
        mu, sigma: Mean and standard deviation of ln x before truncation; -inf and inf where the likelihood has no
            maximum and approaches that of a power law.
        xmin: Where the tail begins.
        ks: Kolmogorov-Smirnov distance of tail and fit.
        tail_count: Number of values >= xmin.
    """

    mu: PerMatrix
    sigma: PerMatrix
    xmin: PerMatrix
    ks: PerMatrix
    tail_count: PerMatrix

    @classmethod
    def of(cls, fitted: Fitted) -> LogNormal:
        """Name what was fitted."""
        z, sigma = fitted.parameters[:, 0], 1 / fitted.parameters[:, 1]
        # There the law is a power law, which no finite mu and sigma describe.
        limit = z >= POWER_LIKE
        mu = (fitted.xmin.log() - z * sigma).masked_fill(limit, -torch.inf)
        sigma = sigma.masked_fill(limit, torch.inf)
        return cls(mu, sigma, xmin=fitted.xmin, ks=fitted.ks, tail_count=fitted.count)


def log_normal(
    values: Float64[Tensor, "b n"], *, at: PerMatrix | None = None, min_tail: int = 2, two_sided: bool = False
) -> LogNormal:
    """Fit a normal distribution of ln x truncated at ln xmin, by conditional maximum likelihood.

    The likelihood equations match mean and mean square of t = ln(x / xmin). Their ratio fixes z = (ln xmin - mu) /
    sigma alone, and the mean then sigma (Cohen 1950). For mean(t^2) >= 2 mean(t)^2 no finite z solves them: the
    supremum of the likelihood is the power law's, which is the limit mu -> -inf with sigma^2 / -mu constant. Such tails
    are candidates for xmin, too.

    Args and choice of xmin as in ``power_law``. NaN for rows without two distinct values.

    Source: Clauset, Shalizi, Newman (2009), table 2.1.
    """
    return LogNormal.of(fit_tails(values, LOG_NORMAL, at=at, min_tail=min_tail, two_sided=two_sided))


def _fit(tails: Tails) -> Parameters:
    q = tails.mean_square_log / tails.mean_log.square()
    # q = 1 needs all values of a tail to be equal, where no law has a largest likelihood.
    z = _solve(torch.where(q > 1, q, torch.nan))
    return torch.stack([z, excess(z)[0] / tails.mean_log], 1)


def _solve(q: Float64[Tensor, "t"]) -> Float64[Tensor, "t"]:
    """Return z with q(z) = q, by Newton's method on w(q(z)), which is nearly z + constant for all z.

    dq/dz = q D (q - 1) - (2 - q) / D.
    """
    target = _straightened(q)
    z = _start(target)
    for _ in range(STEPS):
        D, now = excess(z)
        bend = 0.5 * ((2 / (2 - now)).sqrt() / (2 - now) + (now - 1) ** -1.5)  # dw/dq
        slope = bend * (now * D * (now - 1) - (2 - now) / D)
        step = ((target - _straightened(now)) / slope).where(z < POWER_LIKE, 0.0)
        z = (z + step).clamp(max=POWER_LIKE)
        if not bool((step.abs() > TOLERANCE * (1 + z.abs())).any()):
            break
    return z


def _start(target: Float64[Tensor, "t"]) -> Float64[Tensor, "t"]:
    """Return z with w(q(z)) close to the target: their difference from a table, constant beyond it."""
    w, difference = _table(target.device)
    right = torch.searchsorted(w, target).clamp_(1, POINTS - 1)
    left = right - 1
    share = ((target - w[left]) / (w[right] - w[left])).clamp_(0.0, 1.0)
    return (target + torch.lerp(difference[left], difference[right], share)).clamp_(max=POWER_LIKE)


@lru_cache(maxsize=2)
def _table(device: torch.device) -> tuple[Float64[Tensor, "n"], Float64[Tensor, "n"]]:
    """Return w(q(z)), ascending, and z - w."""
    z = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64, device=device)
    w = _straightened(excess(z)[1])
    return w, z - w


def _straightened(q: Tensor) -> Tensor:
    """w(q) = sqrt(2 / (2 - q)) - 1 / sqrt(q - 1); the first term is z for z -> inf, the second for z -> -inf."""
    return (2 / (2 - q).clamp(min=0.0)).sqrt() - (q - 1).rsqrt()


def _survival(parameters: Parameters, t: OfPoints) -> OfPoints:
    return survival_ratio(parameters[:, :1], t * parameters[:, 1:])


def _log_density(parameters: Parameters, t: OfPoints) -> OfPoints:
    z, scale = parameters[:, :1], parameters[:, 1:]
    v = t * scale
    return scale.log() + log_hazard(z) - v * (z + 0.5 * v)


def _quantile(parameters: Parameters, u: OfPoints) -> OfPoints:
    """Invert Q directly where it is not small; elsewhere Newton on ln S, which is concave: it converges from above."""
    z, scale = parameters[:, :1], parameters[:, 1:]
    direct = -torch.special.ndtri(u * torch.special.ndtr(-z)) - z
    far = z.clamp(min=NEWTON_ENDS)
    v, start = torch.zeros_like(u), log_hazard(far)
    for _ in range(STEPS):
        here = log_hazard(far + v)
        log_survival = start - here - v * (far + 0.5 * v)
        step = (log_survival - u.log()) / here.exp()
        v = v + step
        if not bool((step.abs() > TOLERANCE * v).any()):
            break
    return torch.where(z < NEWTON_ENDS, direct, v).clamp(min=0.0) / scale


LOG_NORMAL = Law(_fit, _survival, _log_density, _quantile)
"""Two parameters: z = (ln xmin - mu) / sigma, and 1 / sigma."""

METRICS = tail_metrics(
    "ln",
    "log_normal",
    (
        "mu",
        "mean of ln lambda before truncation at xmin",
        {"unit": "ln weight^2", "range": "(-inf, inf)", "degree": None},
    ),
    ("sigma", "standard deviation of ln lambda, likewise", {"range": "[0, inf)"}),
    version=3,
)
