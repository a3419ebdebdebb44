"""Densities are densities, and the laws that they are called after."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import expon, gaussian_kde, lognorm, pareto

from diffract import densities as laws
from diffract.metrics import heavy_tails
from diffract.metrics.heavy_tails.fit import fit_tails
from diffract.metrics.heavy_tails.significance import LAWS

XMIN = 0.7
TO_INFINITY = 1e-6
"""What the quadrature reaches over an infinite range."""

TAILS = [
    ("pl", (2.5, XMIN)),
    ("tpl", (1.5, 0.3, XMIN)),
    ("tpl", (0.2, 1e-3, XMIN)),
    ("tpl", (-2.0, 5.0, XMIN)),
    ("tpl", (2.5, 0.0, XMIN)),
    ("exp", (2.0, XMIN)),
    ("ln", (-1.0, 0.5, XMIN)),
    ("ln", (-40.0, 5.0, XMIN)),
]


def one_value(density: Callable, *parameters: float) -> Callable[[float], float]:
    """The density in ln x, where no tail is too long for a quadrature."""
    return lambda t: float(density(np.array([math.exp(t)]), *parameters)[0] * math.exp(t))


@pytest.mark.parametrize(("prefix", "parameters"), TAILS)
def test_tails_integrate_to_one(prefix: str, parameters: tuple[float, ...]) -> None:
    density = one_value(laws.TAILS[prefix][1], *parameters)
    start = math.log(XMIN)
    total = sum(quad(density, start + a, start + b, limit=200)[0] for a, b in ((0, 1), (1, 5), (5, 15), (15, 60)))
    assert total == pytest.approx(1, abs=TO_INFINITY)


def test_tails_are_their_laws_cut_off() -> None:
    x = np.array([XMIN, 1.0, 3.0])
    rounding = 1e-12
    np.testing.assert_allclose(laws.power_law(x, 2.5, XMIN), pareto.pdf(x, 1.5, scale=XMIN), rtol=rounding)
    np.testing.assert_allclose(laws.exponential(x, 2, XMIN), expon.pdf(x, XMIN, 0.5), rtol=rounding)
    whole = lognorm(0.5, scale=math.exp(-1))
    np.testing.assert_allclose(laws.log_normal(x, -1, 0.5, XMIN), whole.pdf(x) / whole.sf(XMIN), rtol=1e-10)
    by_hand = x**-1.5 * np.exp(-0.3 * x) / quad(lambda s: s**-1.5 * math.exp(-0.3 * s), XMIN, np.inf)[0]
    np.testing.assert_allclose(laws.truncated_power_law(x, 1.5, 0.3, XMIN), by_hand, rtol=1e-7)  # the quadrature's


def test_a_power_law_is_the_limit_of_a_truncated_one() -> None:
    x = np.array([XMIN, 2.0, 50.0])
    # exp(-rate x) differs from 1 by 5e-11 at the last point.
    np.testing.assert_allclose(laws.truncated_power_law(x, 3, 1e-12, XMIN), laws.power_law(x, 3, XMIN), rtol=1e-9)
    np.testing.assert_allclose(laws.truncated_power_law(x, 3, 0, XMIN), laws.power_law(x, 3, XMIN), rtol=1e-12)


def test_far_tails_stay_finite() -> None:
    x = np.array([XMIN, 1.0])
    # Log-normals far below xmin, and cut-offs whose integrand passes the largest float, are near-power laws.
    assert np.isfinite(laws.log_normal(x, -1e6, 1e3, XMIN)).all()
    assert np.isfinite(laws.truncated_power_law(x, -50, 1e-6, XMIN)).all()
    assert np.isnan(laws.truncated_power_law(x, 0.5, 0, XMIN)).all()


@given(
    rows=st.integers(1, 300),
    cols=st.integers(1, 300),
    variance=st.floats(1e-6, 1e3),
)
def test_marchenko_pastur_has_mass_and_mean(rows: int, cols: int, variance: float) -> None:
    gamma = laws.aspect(rows, cols)
    low, high = laws.marchenko_pastur_edges(variance, gamma)
    middle, half = (high + low) / 2, (high - low) / 2
    # lambda = middle - half cos(theta) takes the square roots away at both ends.
    theta, step = np.linspace(0, math.pi, 20_001, retstep=True)
    inner = theta[1:-1]
    x = middle - half * np.cos(inner)
    weights = laws.marchenko_pastur(x, variance, gamma) * half * np.sin(inner) * step
    assert weights.sum() == pytest.approx(1, abs=2e-3)  # the trapezoid's, for square matrices with a pole at zero
    assert (weights * x).sum() == pytest.approx(variance, rel=1e-6)
    assert laws.marchenko_pastur(np.array([high * 1.01]), variance, gamma)[0] == 0


def test_parameters_that_are_missing_or_no_numbers_draw_nothing() -> None:
    assert laws.tail_parameters({"pl_alpha": 2.0, "pl_xmin": 1.0}, "pl") == (2.0, 1.0)
    assert laws.tail_parameters({"pl_alpha": 2.0}, "pl") is None
    assert laws.tail_parameters({"pl_alpha": math.nan, "pl_xmin": 1.0}, "pl") is None
    assert laws.tail_parameters({"pl_alpha": None, "pl_xmin": 1.0}, "pl") is None


@pytest.mark.parametrize(
    ("prefix", "law"),
    [("pl", "power_law"), ("exp", "exponential"), ("tpl", "truncated_power_law"), ("ln", "log_normal")],
)
def test_drawn_tails_are_those_that_are_fitted(prefix: str, law: str) -> None:
    """The fits have kernels of their own, for thousands of tails at once and in other parameters."""
    values = torch.from_numpy(np.random.default_rng(0).pareto(1.5, (1, 60)) + XMIN)
    at = torch.full((1,), XMIN, dtype=torch.float64)
    fitted, record = fit_tails(values, LAWS[law], at=at), getattr(heavy_tails, law)(values, at=at)
    parameters = [float(getattr(record, name)) for name in laws.TAILS[prefix][2]]
    t = torch.linspace(0, 5, 11).double()[None]
    x = XMIN * np.exp(t.numpy()[0])
    want = LAWS[law].log_density(fitted.parameters, t).exp().numpy()[0] / x
    np.testing.assert_allclose(laws.TAILS[prefix][1](x, *parameters), want, rtol=1e-8)  # the quadrature's


# Kernel densities


def test_kernel_density_is_scotts() -> None:
    values = np.random.default_rng(0).standard_normal(50)
    grid = np.linspace(-5, 5, 101)
    np.testing.assert_allclose(laws.kernel_density(values, grid), gaussian_kde(values, "scott")(grid), rtol=1e-10)
    assert np.trapezoid(laws.kernel_density(np.ones(3), grid), grid) == pytest.approx(1, abs=1e-6)  # width of a step


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=40), st.integers(2, 300))
def test_kernel_sums_are_sums_of_kernels(values: list[float], points: int) -> None:
    grid = np.linspace(-4, 4, points)
    x = np.array(values)
    width = max(x.std(ddof=1) * len(x) ** -0.2, grid[1] - grid[0])
    want = np.exp(-0.5 * ((grid[:, None] - x) / width) ** 2).sum(1) / (len(x) * width * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(laws.kernel_density(x, grid), want, rtol=1e-9, atol=1e-15)  # powers up to the sixteenth


# The Marchenko-Pastur law, in both libraries


CLOSED = 1e-11
"""Absolute: eps / sqrt(gamma) of the closed form, gamma down to 1e-4, and what quadrature promises."""

GAMMAS = [1.0, 0.999, 0.5, 0.1, 1e-4]


mp_cdf = partial(laws.marchenko_pastur_cdf, xp=torch)
mp_quantile = partial(laws.marchenko_pastur_quantile, xp=torch)


def scalar(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def reference_density(x: float, v: float, gamma: float) -> float:
    low, high = v * (1 - math.sqrt(gamma)) ** 2, v * (1 + math.sqrt(gamma)) ** 2
    return math.sqrt((high - x) * (x - low)) / (2 * math.pi * gamma * v * x) if low < x < high else 0.0


def reference_integral(power: int, upto: float, v: float, gamma: float) -> float:
    """Integral of x^power density up to x, with x = l- + t^2: that takes the root at l-, and the pole for gamma = 1."""
    low, high = v * (1 - math.sqrt(gamma)) ** 2, v * (1 + math.sqrt(gamma)) ** 2

    def integrand(t: float) -> float:
        x = low + t * t
        over_x = 1.0 if low == 0 else t * t / x
        return 2 * over_x * math.sqrt(max(high - x, 0.0)) * x**power / (2 * math.pi * gamma * v)

    return quad(integrand, 0, math.sqrt(upto - low), epsabs=1e-13, epsrel=1e-13, limit=500)[0]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("v", [1.0, 2.5e-3])
def test_density_and_cdf_agree_with_quadrature(gamma: float, v: float) -> None:
    low, high = laws.marchenko_pastur_edges(v, gamma)
    assert (low, high) == pytest.approx((v * (1 - math.sqrt(gamma)) ** 2, v * (1 + math.sqrt(gamma)) ** 2), rel=1e-14)
    x = low + (high - low) * torch.tensor([1e-6, 0.01, 0.2, 0.5, 0.77, 0.99, 1 - 1e-6], dtype=torch.float64)
    density = [reference_density(one, v, gamma) for one in x.tolist()]
    # Near an edge of a narrow law x - l- keeps few digits, in the reference as well.
    np.testing.assert_allclose(laws.marchenko_pastur(x.numpy(), v, gamma), density, rtol=1e-6)
    np.testing.assert_allclose(laws.marchenko_pastur(x[1:-1].numpy(), v, gamma), density[1:-1], rtol=1e-10)
    cdf = [reference_integral(0, one, v, gamma) for one in x.tolist()]
    np.testing.assert_allclose(mp_cdf(x, scalar(v), gamma), cdf, atol=CLOSED)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_moments_are_those_of_the_law(gamma: float) -> None:
    # E x = v and E x^2 = v^2 (1 + gamma), from the quantiles: the mean of x over shares at Gauss-Legendre nodes.
    nodes, weights = np.polynomial.legendre.leggauss(400)
    x = mp_quantile(torch.tensor((nodes + 1) / 2), scalar(3.0), gamma).numpy()
    moments = [(weights / 2 * x**power).sum() for power in (1, 2)]
    assert moments == pytest.approx([3, 9 * (1 + gamma)], rel=1e-6)  # the quantile's ends are rough: (1 - p)^(2/3)


def test_square_matrices_in_closed_form() -> None:
    # x = 2 v is theta = pi / 2; the median solves theta + sin(theta) = pi / 2.
    assert mp_cdf(scalar(2.0), scalar(1.0), 1.0).item() == pytest.approx((math.pi / 2 + 1) / math.pi, rel=1e-15)
    theta = 1.0
    for _ in range(20):
        theta -= (theta + math.sin(theta) - math.pi / 2) / (1 + math.cos(theta))
    median = mp_quantile(0.5, scalar(1.0), 1.0).item()
    assert median == pytest.approx(2 * (1 - math.cos(theta)), rel=1e-14)


@given(
    st.lists(st.tuples(st.floats(1e-6, 1 - 1e-6), st.floats(1e-3, 1e3), st.floats(1e-4, 1.0)), min_size=1, max_size=8)
)
@settings(deadline=None)
def test_quantile_inverts_the_cdf_for_every_element(cases: list[tuple[float, float, float]]) -> None:
    share, v, gamma = torch.tensor(cases, dtype=torch.float64).T
    x = mp_quantile(share, v, gamma)
    np.testing.assert_allclose(mp_cdf(x, v, gamma), share, atol=CLOSED)
    low, high = v * (1 - gamma.sqrt()) ** 2, v * (1 + gamma.sqrt()) ** 2
    assert bool(((low <= x) & (x <= high)).all())
    alone = torch.stack([mp_quantile(s, scalar(a), g) for s, a, g in cases])
    assert torch.equal(alone, x)


def test_cdf_broadcasts_a_variance_and_a_ratio_per_row() -> None:
    x = torch.linspace(0, 5, 11, dtype=torch.float64).expand(2, -1)
    v, gamma = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[0.25], [1.0]]).double()
    rows = [mp_cdf(x[i], v[i], gamma[i].item()) for i in range(2)]
    assert torch.equal(mp_cdf(x, v, gamma), torch.stack(rows))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_numpy_gives_what_torch_gives(gamma: float) -> None:
    x, v = torch.linspace(-1, 9, 41).double(), torch.tensor([[1.0], [2.0], [0.0]]).double()
    plain = laws.marchenko_pastur_cdf(x.numpy(), v.numpy(), gamma)
    np.testing.assert_allclose(plain, mp_cdf(x, v, gamma), rtol=1e-13, atol=CLOSED)
    shares = torch.linspace(0, 1, 11).double()
    plain = laws.marchenko_pastur_quantile(shares.numpy(), v.numpy(), gamma)
    np.testing.assert_allclose(plain, mp_quantile(shares, v, gamma), rtol=1e-9, atol=1e-12)
    sums = laws.kernel_sums(x.numpy()[None], np.ones((1, 41), bool), np.array([0.3]), 40)
    again = laws.kernel_sums(
        x[None], torch.ones(1, 41, dtype=torch.bool), torch.full((1,), 0.3, dtype=torch.float64), 40, xp=torch
    )
    np.testing.assert_allclose(sums, again, rtol=1e-12)


@pytest.mark.parametrize("shape", [(400, 400), (200, 800)])
def test_eigenvalues_of_a_large_gaussian_matrix_follow_it(shape: tuple[int, int]) -> None:
    w = 3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = (torch.linalg.svdvals(w).square() / max(shape)).flip(0)
    law = mp_cdf(found, scalar(9.0), shape[0] / shape[1])
    # Eigenvalues repel: of M of them, a few and not sqrt(M) are out of place.
    assert (law - (torch.arange(shape[0]) + 0.5) / shape[0]).abs().max() < 4 / shape[0]


def test_outside_the_law_and_degenerate_input() -> None:
    nan = math.nan
    x = torch.tensor([-1.0, 0.0, 5.0, nan]).double()
    np.testing.assert_equal(mp_cdf(x, scalar(1.0), 1.0).numpy(), [0, 0, 1, nan])
    np.testing.assert_equal(laws.marchenko_pastur(np.array([0.1, 5.0, nan]), 1.0, 0.25), [0, 0, nan])
    for v in (0.0, nan):
        assert mp_cdf(x, scalar(v), 0.5).isnan().all()
    shares = torch.tensor([0.0, 1.0, -0.1, 1.1, nan]).double()
    np.testing.assert_equal(mp_quantile(shares, scalar(4.0), 0.25).numpy(), [1, 9, nan, nan, nan])
    assert mp_quantile(0.5, scalar(0.0), 0.5).item() == 0
    assert mp_quantile(0.5, scalar(nan), 0.5).isnan()
