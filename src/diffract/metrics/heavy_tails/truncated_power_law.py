"""Power law with exponential cut-off: density proportional to x^-alpha exp(-rate x) for x >= xmin.

In t = ln(x / xmin) the density is exp(-a t - z (e^t - 1)) / R(a, z), a = alpha - 1 and z = rate xmin: an exponential
family, whose log-likelihood is concave in (a, z) and sees the data through A = mean(t) and B = mean(e^t - 1) only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float64
from torch import Tensor

from diffract.metrics.heavy_tails.fit import Fitted, Law, OfPoints, Parameters, Tails, fit_tails, tail_metrics
from diffract.metrics.heavy_tails.special import FALL, mills, moments

PerMatrix = Float64[Tensor, "b"]
PerTail = Float64[Tensor, "t"]

STEPS = 60
"""One is usual on the bound alpha = 1, four to six elsewhere."""

LOG_Z = (9.0, -90.0)
POINTS = 800
"""Of ln z, where the laws with alpha = 1 are tabled; a start from the table is good to 1e-7."""

LEAST_LEFT = 1e-4
"""Of the way from alpha = 1 to the pure power law, in a start."""

TOLERANCE = 1e-7
"""Of the last Newton step, relative: the error after it is its square."""

NOISE = 1e-13
"""What rounding may add to the mean log-likelihood, relative."""

GAIN = 1e-18
"""Of the mean log-likelihood: where less is left, as on the way to z = 0, the law no longer changes."""

DEGENERATE = 1e-12
"""Least 1 - correlation^2 of the two statistics that a Newton step takes at its word."""

FARTHEST = 0.9
"""Of z, how far a Newton step goes: the quadratic model knows little of what lies farther."""

LARGEST = 1e300
"""Where z e^t stops; the survival beyond is zero."""


@dataclass(frozen=True)
class TruncatedPowerLaw:
    """Power-law tails with exponential cut-off of b spectra; NaN where there is none.

    Attributes:
        alpha: Exponent, at least 1.
        rate: Of the cut-off, in units of 1 / x, at least 0.
        xmin: Where the tail begins.
        ks: Kolmogorov-Smirnov distance of tail and fit.
        tail_count: Number of values >= xmin.
    """

    alpha: PerMatrix
    rate: PerMatrix
    xmin: PerMatrix
    ks: PerMatrix
    tail_count: PerMatrix

    @classmethod
    def of(cls, fitted: Fitted) -> TruncatedPowerLaw:
        """Name what was fitted."""
        a, z = fitted.parameters.unbind(1)
        return cls(1 + a, z / fitted.xmin, xmin=fitted.xmin, ks=fitted.ks, tail_count=fitted.count)


def truncated_power_law(
    values: Float64[Tensor, "b n"], *, at: PerMatrix | None = None, min_tail: int = 2, two_sided: bool = False
) -> TruncatedPowerLaw:
    """Fit x^-alpha exp(-rate x) with alpha >= 1 and rate >= 0, by maximum likelihood.

    The bounds are those of ``powerlaw`` 1.5; a tail at one of them has alpha = 1, or is a pure power law with
    rate = 0. The latter is the case exactly where the power law's alpha exceeds 2 and its mean does not exceed the
    tail's: B >= A / (1 - A).

    Args and choice of xmin as in ``power_law``. NaN for rows without two distinct values.

    Source: Clauset, Shalizi, Newman (2009), table 2.1, "power law with cutoff".
    """
    return TruncatedPowerLaw.of(fit_tails(values, TRUNCATED_POWER_LAW, at=at, min_tail=min_tail, two_sided=two_sided))


def _fit(tails: Tails) -> Parameters:
    A, B = tails.mean_log, tails.mean_excess
    # With this the likelihood falls from rate 0 on: the best cut-off is none.
    pure = (A < 1) & (B * (1 - A) >= A)
    found = torch.stack([1 / A, torch.zeros_like(A)], 1).where(pure[:, None], torch.nan)
    open_ = (~pure & (A > 0) & B.isfinite()).nonzero()[:, 0]
    found[open_] = _solve(A[open_], B[open_])
    return found


def _solve(A: PerTail, B: PerTail) -> Parameters:
    """Minimise a A + z B + ln R over a >= 0 and ln z by Newton's method; a step that leads uphill is halved."""
    base = _start(A, B)
    found, step = torch.empty_like(base), torch.zeros_like(base)
    index = torch.arange(len(A), device=A.device)
    # The start is taken whatever its value.
    least = torch.full_like(A, torch.inf)
    for _ in range(STEPS):
        value, newton, gain = _newton(A, B, base + step)
        downhill = ~(value > least + NOISE * (1 + least.abs()))
        base, least = (base + step).where(downhill[:, None], base), value.where(downhill, least)
        step = newton.where(downhill[:, None], step / 2)
        end = base + step
        found[index] = torch.stack([end[:, 0], end[:, 1].exp()], 1)
        moving = (step.abs() > TOLERANCE * torch.stack([1 + end[:, 0], torch.ones_like(A)], 1)).any(1)
        going = (moving & (gain > GAIN)).nonzero()[:, 0]
        if not len(going):
            break
        index, A, B, least, base, step = (column[going] for column in (index, A, B, least, base, step))
    return found


def _start(A: PerTail, B: PerTail) -> Parameters:
    """Return (a, ln z) near the minimum: exact to 1e-7 on the bound a = 0, where most spectra have it, close elsewhere.

    For given B, A runs from the law's with a = 0 down to B / (1 + B), the pure power law's. What is left of this way
    has z fall as one power of it, and 1 - a A as another.
    """
    log_B, columns = _on_bound(A.device)
    x = B.log()
    right = torch.searchsorted(log_B, x).clamp_(1, POINTS - 1)
    step = log_B[right] - log_B[right - 1]
    u = (x - log_B[right - 1]) / step  # beyond [0, 1] past the table's ends
    low, high = columns[right - 1], columns[right]
    log_w, log_way, of_a, of_z, _ = low.lerp(high, u[:, None]).unbind(1)
    rise = high[:, 0] - low[:, 0]  # a cubic through values and slopes
    bend = torch.lerp(step * low[:, 4] - rise, rise - step * high[:, 4], u)
    log_w = log_w + (u * (1 - u)).clamp_(min=0.0) * bend
    log_left = ((A - B / (1 + B)) / log_way.exp()).clamp_(LEAST_LEFT, 1.0).log_()
    return torch.stack([-(of_a * log_left).expm1() / A, log_w - x + of_z * log_left], 1)


@lru_cache(maxsize=2)
def _on_bound(device: torch.device) -> tuple[Float64[Tensor, "n"], Float64[Tensor, "n 5"]]:
    """Return ln B of laws with a = 0, ascending; and ln z B, the logarithm of the way, both powers, d ln z B / d ln B.

    The powers are those of the derivatives: with B held, d ln z = -cov / var_w da and dA = -(var_s - cov^2 / var_w) da.
    """
    z = torch.linspace(*LOG_Z, POINTS, dtype=torch.float64, device=device).exp()
    m = moments(torch.zeros_like(z), z)
    B = m.w / z
    way = m.s - B / (1 + B)
    rise = way / (m.var_s - m.cov**2 / m.var_w)
    powers = (m.s * rise, m.cov / m.var_w * rise)
    return B.log(), torch.stack([m.w.log(), way.log(), *powers, 1 - m.w / m.var_w], 1)


def _newton(A: PerTail, B: PerTail, point: Parameters) -> tuple[PerTail, Parameters, PerTail]:
    """Return the objective at (a, ln z), the step that minimises its quadratic model over a >= 0, twice its gain."""
    a, z = point[:, 0], point[:, 1].exp()
    m = moments(a, z)
    slope_a, slope_z = A - m.s, z * B - m.w
    det = torch.maximum(m.var_s * m.var_w - m.cov**2, DEGENERATE * m.var_s * m.var_w)
    step_z = ((m.cov * slope_a - m.var_s * slope_z) / det).clamp(-FARTHEST, FARTHEST)  # relative to z
    step_a = -(slope_a + m.cov * step_z) / m.var_s
    bound = step_a < -a
    # A step that leaves alpha >= 1 ends on the bound; the best z is then another.
    step_z = torch.where(bound, (m.cov * a - slope_z) / m.var_w, step_z).clamp(-FARTHEST, FARTHEST)
    step_a = torch.where(bound, -a, step_a)
    gain = -(slope_a * step_a + slope_z * step_z)
    return a * A + z * B + m.R.log(), torch.stack([step_a, step_z.log1p()], 1), gain


def _survival(parameters: Parameters, t: OfPoints) -> OfPoints:
    a, z = parameters[:, :1], parameters[:, 1:]
    return _exponent(a, z, t).neg_().exp_() * mills(a, _beyond(z, t)) / mills(a, z)


def _lower(parameters: Parameters, t: OfPoints) -> OfPoints:
    """Sum the density's integrals between neighbouring values, with its logarithm replaced by chords.

    The logarithm of the density is concave, so that chords lie below it. Over a step of t in which it falls by d, the
    exponential in between integrates to the step times the upper density times (1 - e^-d) / d. What lies above the
    largest value is exact.
    """
    a, z = parameters[:, :1], parameters[:, 1:]
    exponent = _exponent(a, z, t)
    density = exponent.neg().exp_()
    fall = (exponent[:, 1:] - exponent[:, :-1]).clamp_(max=-torch.finfo(t.dtype).tiny)
    between = fall.expm1().div_(fall).mul_(density[:, 1:]).mul_(t[:, :-1] - t[:, 1:])
    above, whole = mills(a, torch.cat([_beyond(z, t[:, :1]), z], 1)).split(1, dim=1)
    return torch.cat([density[:, :1] * above, between], 1).cumsum_(1).div_(whole)


def _log_density(parameters: Parameters, t: OfPoints) -> OfPoints:
    a, z = parameters[:, :1], parameters[:, 1:]
    return -_exponent(a, z, t) - mills(a, z).log()


def _quantile(parameters: Parameters, u: OfPoints) -> OfPoints:
    """Newton's method on ln S, which is concave: after one step it converges from above."""
    a, z = parameters[:, :1], parameters[:, 1:]
    whole = mills(a, z)
    t = torch.minimum(-u.log() * whole, (FALL / z).log1p())
    for _ in range(STEPS):
        here = mills(a, _beyond(z, t))
        step = ((here / whole).log() - _exponent(a, z, t) - u.log()) * here
        t = (t + step).clamp(min=0.0)
        if not bool((step.abs() > TOLERANCE * t).any()):
            break
    return t


def _exponent(a: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """The exponent of the density, a t + z (e^t - 1)."""
    return t.expm1().mul_(z).addcmul_(a, t)


def _beyond(z: Tensor, t: Tensor) -> Tensor:
    """Return the z of the same law cut at t."""
    return (z * t.exp()).clamp(max=LARGEST)


TRUNCATED_POWER_LAW = Law(_fit, _survival, _log_density, _quantile, lower=_lower)
"""Two parameters: alpha - 1 and rate xmin."""

METRICS = tail_metrics(
    "tpl",
    "truncated_power_law",
    ("alpha", "alpha of rho ~ lambda^-alpha exp(-rate lambda), at least 1", {"range": "[1, inf)"}),
    ("rate", "rate of the same", {"unit": "weight^-2", "range": "[0, inf)", "degree": -2}),
    version=3,
)
