"""The Marchenko-Pastur law against quadrature, its moments, and large Gaussian matrices."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from diffract.metrics.random_matrix import mp_cdf, mp_density, mp_edges, mp_quantile

CLOSED = 1e-11
"""Absolute: eps / sqrt(gamma) of the closed form, gamma down to 1e-4, and what quadrature promises."""

GAMMAS = [1.0, 0.999, 0.5, 0.1, 1e-4]


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
    low, high = (edge.item() for edge in mp_edges(scalar(v), gamma))
    assert (low, high) == pytest.approx((v * (1 - math.sqrt(gamma)) ** 2, v * (1 + math.sqrt(gamma)) ** 2), rel=1e-14)
    x = low + (high - low) * torch.tensor([1e-6, 0.01, 0.2, 0.5, 0.77, 0.99, 1 - 1e-6], dtype=torch.float64)
    density = [reference_density(one, v, gamma) for one in x.tolist()]
    # Near an edge of a narrow law x - l- keeps few digits, in the reference as well.
    np.testing.assert_allclose(mp_density(x, scalar(v), gamma), density, rtol=1e-6)
    np.testing.assert_allclose(mp_density(x[1:-1], scalar(v), gamma), density[1:-1], rtol=1e-10)
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
    for function in (mp_cdf, mp_density):
        rows = [function(x[i], v[i], gamma[i].item()) for i in range(2)]
        assert torch.equal(function(x, v, gamma), torch.stack(rows))


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
    np.testing.assert_equal(mp_density(x, scalar(1.0), 1.0).numpy(), [0, math.inf, 0, nan])
    np.testing.assert_equal(mp_density(x, scalar(1.0), 0.25).numpy(), [0, 0, 0, nan])
    for v in (0.0, nan):
        assert mp_cdf(x, scalar(v), 0.5).isnan().all()
        assert mp_density(x, scalar(v), 0.5).isnan().all()
    shares = torch.tensor([0.0, 1.0, -0.1, 1.1, nan]).double()
    np.testing.assert_equal(mp_quantile(shares, scalar(4.0), 0.25).numpy(), [1, 9, nan, nan, nan])
    assert mp_quantile(0.5, scalar(0.0), 0.5).item() == 0
    assert mp_quantile(0.5, scalar(nan), 0.5).isnan()
