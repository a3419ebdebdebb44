"""Likelihood-ratio tests, written out in NumPy, and the warnings and summaries that stand beside a fit."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from tail_samples import KINDS, batch, compare_tails, sample

from diffract.metrics.heavy_tails import (
    alpha_hat,
    describe_warning,
    exponential,
    log10_alpha_norm,
    log_normal,
    power_law,
    tail_warning,
    truncated_power_law,
)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def vuong(differences: np.ndarray, *, nested: bool) -> tuple[float, float]:
    total, k = differences.sum(), len(differences)
    deviation = math.sqrt(k * differences.var())
    if nested:
        return total / deviation, float(stats.chi2.sf(2 * abs(total), 1))
    return total / deviation, float(2 * stats.norm.sf(abs(total) / deviation))


def densities(family: str, x: np.ndarray, xmin: float) -> np.ndarray:
    """Logarithms of the fitted densities, by SciPy."""
    values, at = batch(x), tensor(xmin)
    if family == "power_law":
        return stats.pareto.logpdf(x, power_law(values, at=at).alpha.item() - 1, scale=xmin)
    if family == "exponential":
        return stats.expon.logpdf(x, xmin, 1 / exponential(values, at=at).rate.item())
    if family == "log_normal":
        fit = log_normal(values, at=at)
        mu, sigma = fit.mu.item(), fit.sigma.item()
        start = (math.log(xmin) - mu) / sigma
        return stats.truncnorm.logpdf(np.log(x), start, np.inf, mu, sigma) - np.log(x)
    fit = truncated_power_law(values, at=at)
    alpha, rate = fit.alpha.item(), fit.rate.item()
    grid = np.linspace(math.log(xmin), math.log(xmin + 80 / rate), 400_001)  # Simpson's rule in ln x
    height = np.exp((1 - alpha) * grid - rate * np.exp(grid))
    mass = (height[0] + height[-1] + 4 * height[1::2].sum() + 2 * height[2:-1:2].sum()) * (grid[1] - grid[0]) / 3
    return -alpha * np.log(x) - rate * x - math.log(mass)


@pytest.mark.parametrize("kind", ["exponential", "log-normal", "random matrix"])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_ratios_by_the_book(kind: str, share: float) -> None:
    x = sample(kind, 150, 12)
    xmin = float(np.quantile(x, share) * 0.99)
    tail = x[x >= xmin]
    found = compare_tails(batch(np.append(x, [0, -1, np.nan])), at=tensor(xmin))
    power = densities("power_law", tail, xmin)
    for family in ("exponential", "log_normal", "truncated_power_law"):
        want = vuong(power - densities(family, tail, xmin), nested=family == "truncated_power_law")
        one = getattr(found, family)
        # Simpson's rule and parameters within 1e-8.
        assert (one.ratio.item(), one.p.item()) == pytest.approx(want, rel=1e-6, abs=1e-9), family


def test_the_tail_compared_is_the_power_laws_own() -> None:
    values = batch(*(sample(kind, 70, 3) for kind in KINDS))
    own, given = compare_tails(values), compare_tails(values, at=power_law(values).xmin)
    for family in ("exponential", "log_normal", "truncated_power_law"):
        for name in ("ratio", "p"):
            a, b = getattr(getattr(own, family), name), getattr(getattr(given, family), name)
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), family


def test_the_right_law_is_preferred() -> None:
    rng = np.random.default_rng(6)
    start = torch.ones(30, dtype=torch.float64)
    heavy = torch.from_numpy((1 - rng.random((30, 400))) ** (-1 / 1.5))
    light = torch.from_numpy(1 + rng.exponential(size=(30, 400)))
    on_heavy, on_light = compare_tails(heavy, at=start), compare_tails(light, at=start)
    for one, sign in ((on_heavy.exponential, 1), (on_light.exponential, -1)):
        assert (sign * one.ratio).min() > 0
        assert one.p.median() < 0.01
    assert on_light.truncated_power_law.p.max() < 1e-6
    # Where the power law holds, a cut-off is called significant no more often than 5%: the test is conservative.
    assert (on_heavy.truncated_power_law.p < 0.05).double().mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 30)
    assert (on_heavy.truncated_power_law.ratio <= 0).all()


def test_laws_that_coincide_are_not_told_apart() -> None:
    # Mean above the power law's and logarithms spread as no truncated normal's are: both fits are the power law.
    heavy = batch(np.exp(np.array([0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 3.5])))
    found = compare_tails(heavy, at=tensor(1.0))
    for one in (found.truncated_power_law, found.log_normal):
        assert (one.ratio.item(), one.p.item()) == (0, 1)
    assert found.exponential.ratio.item() != 0


def test_rows_without_a_tail_compare_as_nan() -> None:
    found = compare_tails(batch(np.full(5, np.nan), np.ones(5), np.array([1.0, 2, 3, 5, 9])))
    for family in ("exponential", "log_normal", "truncated_power_law"):
        one = getattr(found, family)
        assert one.ratio.isnan().tolist() == one.p.isnan().tolist() == [True, True, False]


def test_summaries_by_hand() -> None:
    assert alpha_hat(tensor(3.0, 2.0, math.nan), tensor(100.0, 0.1, 5.0)).tolist() == pytest.approx(
        [6, -2, math.nan], nan_ok=True
    )
    values = torch.tensor([[1.0, 10.0, 100.0], [2.0, 0.0, math.nan], [0.0, -1.0, math.nan], [1.0, 1.0, 1.0]])
    found = log10_alpha_norm(values.double(), tensor(2.0, 3.0, 2.0, math.nan))
    want = [math.log10(1 + 100 + 10_000), math.log10(8), -math.inf, math.nan]
    assert found.tolist() == pytest.approx(want, nan_ok=True, rel=1e-14)


@pytest.mark.parametrize("exponent", [-280, 250])
def test_norms_do_not_overflow(exponent: int) -> None:
    values = 10.0 ** torch.tensor([[exponent, exponent + 1.0]], dtype=torch.float64)
    want = 8 * exponent + math.log10(1 + 1e8)
    assert log10_alpha_norm(values, tensor(8.0)).item() == pytest.approx(want, rel=1e-13)


def test_warnings_say_what_is_doubtful() -> None:
    rng = np.random.default_rng(3)
    rows = [
        (1 - rng.random(200)) ** (-1 / 2.5),  # from 1 on, alpha 3.5: nothing to say but that it is the whole
        np.append(np.full(30, 1.0), (1 - rng.random(31)) ** (-1 / 9.0) * 1.5),
        np.array([1.0, 2.0]),
        np.full(4, np.nan),
        (1 - rng.random(400)) ** (-1 / 0.6),
    ]
    values = batch(*rows)
    starts = tensor(rows[0].min(), 1.5, 1.0, 1.0, np.sort(rows[4])[7])
    tail = power_law(values, at=starts)
    warning = tail_warning(tail, values)
    assert warning.short.tolist() == [False, True, True, False, False]
    assert warning.small.tolist() == [False, False, False, False, True]
    assert warning.large.tolist() == [False, True, False, False, False]
    assert warning.whole.tolist() == [True, False, True, False, False]
    assert warning.extreme.tolist() == [False, False, True, False, False]
    assert describe_warning(warning, tail) == (
        "xmin is the smallest value",
        "tail of 31 points; alpha above 6",
        "tail of 2 points; xmin is the smallest value; xmin is the last candidate",
        "",
        "alpha below 2",
    )


def test_ties_at_the_top_are_one_last_candidate() -> None:
    values = batch(np.array([1.0, 2, 3, 7, 7, 7]), np.array([1.0, 2, 3, 3, 7, 7]), np.array([1.0, 2, 3, 7, 8, 9]))
    tail = power_law(values, at=tensor(3.0, 3.0, 3.0))
    assert tail_warning(tail, values).extreme.tolist() == [True, True, False]
