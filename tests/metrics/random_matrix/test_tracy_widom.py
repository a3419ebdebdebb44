"""The Tracy-Widom law against its Painleve representation, published numbers, and Gaussian matrices."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad, simpson, solve_ivp
from scipy.optimize import brentq
from scipy.special import airy
from scipy.stats import binom

from diffract.metrics.random_matrix import QUANTILE_99, fluctuation_edge

NODES = 40
"""Of the quadrature below; more of them change nothing."""

REACH = 14.0
"""Argument at which the kernel is cut off: Ai(14) = 1e-16."""

LOWEST = -10.0
"""Below it F_1 is less than 1e-21, and the nodes do not resolve the kernel."""


def tracy_widom_cdf(s: torch.Tensor) -> torch.Tensor:
    """F_1(s) = det(1 - V_s), V_s(x, y) = Ai(s + (x + y) / 2) / 2 on x, y > 0 (Ferrari & Spohn 2005).

    The determinant is taken at Gauss-Legendre nodes, as in Bornemann 2010. Ai is SciPy's, computed on the CPU: that
    of PyTorch 2.13 is off by 3e-6 between -4 and -1.

    Args:
        s: Standardised largest eigenvalues.

    Returns:
        In [0, 1], to an absolute error of 1e-13. NaN for NaN.
    """
    origin = s.detach().clamp(min=LOWEST).cpu().numpy()[..., None]
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    half = np.maximum(REACH - origin, 1.0)
    x, root = half * (nodes + 1), np.sqrt(half * weights)
    kernel = airy(origin[..., None] + (x[..., :, None] + x[..., None, :]) / 2)[0] / 2
    system = torch.from_numpy(np.eye(NODES) - root[..., :, None] * kernel * root[..., None, :])
    return torch.linalg.det(system.to(s.device)).clamp(0.0, 1.0)


def cdf(s: float) -> float:
    return tracy_widom_cdf(torch.tensor(s, dtype=torch.float64)).item()


def painleve(points: np.ndarray) -> np.ndarray:
    """F_1 = exp(-(int_s u + int_s (x - s) u^2) / 2), u'' = s u + 2 u^3, u ~ Ai (Tracy & Widom 1996).

    Integrated down from s = 8, where u is Ai up to a relative Ai^2 = 2e-15. State: u, u', the integrals from s to
    infinity of u^2, of (x - s) u^2 and of u.
    """
    start = 8.0
    ai, slope, _, _ = airy(start)
    squares = slope**2 - start * ai**2
    ramp = (2 * start**2 * ai**2 - 2 * start * slope**2 - ai * slope) / 3
    tail = quad(lambda s: airy(s)[0], start, 20, epsabs=0, epsrel=1e-12)[0]

    def change(s: float, y: np.ndarray) -> list[float]:
        u, du, u2, _, _ = y
        return [du, s * u + 2 * u**3, -(u**2), -u2, -u]

    path = solve_ivp(
        change, (start, points.min()), [ai, slope, squares, ramp, tail], "DOP853", points[::-1], rtol=1e-13, atol=1e-20
    )
    return np.exp(-(path.y[4] + path.y[3]) / 2)[::-1]


def test_cdf_agrees_with_the_painleve_representation() -> None:
    points = np.linspace(-6, 6, 49)
    # Errors of the integration grow tenfold per unit below -2; at -6 F_1 itself is 3e-6.
    np.testing.assert_allclose(tracy_widom_cdf(torch.tensor(points)), painleve(points), atol=1e-9)


@pytest.mark.parametrize(("share", "s"), [(0.5, -1.2686), (0.9, 0.4501), (0.95, 0.9793), (0.99, 2.0234)])
def test_published_quantiles(share: float, s: float) -> None:
    assert brentq(lambda x: cdf(x) - share, -5, 5) == pytest.approx(s, abs=6e-5)  # four published digits


def test_the_quantile_in_use() -> None:
    assert cdf(QUANTILE_99) == pytest.approx(0.99, abs=1e-12)
    assert brentq(lambda s: painleve(np.array([s]))[0] - 0.99, 1, 3) == pytest.approx(QUANTILE_99, abs=1e-8)


def test_published_moments() -> None:
    s = np.linspace(-9, 9, 361)
    f = tracy_widom_cdf(torch.tensor(s)).numpy()
    mean = 9 - simpson(f, x=s)
    variance = 81 - simpson(2 * s * f, x=s) - mean**2
    assert (mean, variance) == pytest.approx((-1.2065, 1.6078), abs=6e-5)  # four published digits


def test_cdf_rises_from_zero_to_one_and_passes_nan_on() -> None:
    s = torch.tensor([[-40.0, -6, -3], [0, 6, 40]]).double()
    found = tracy_widom_cdf(s)
    assert found.shape == s.shape
    assert bool((found.flatten().diff() >= 0).all())
    assert found[0, 0] == pytest.approx(0, abs=1e-13)
    assert found[1, 2] == pytest.approx(1, abs=1e-13)
    assert math.isnan(cdf(math.nan))


def test_edge_by_hand() -> None:
    # 4 x 5: sqrt(N - 1) = sqrt(M) = 2, so mu = 16 and s = 4 (1/2 + 1/2)^(1/3) = 4.
    assert fluctuation_edge((4, 5)).item() == pytest.approx((16 + 4 * 2.0234493) / 5, abs=1e-7)
    assert fluctuation_edge((5, 4)) == fluctuation_edge((4, 5))
    assert fluctuation_edge((1, 1)).item() == pytest.approx(4 + 2 ** (4 / 3) * 2.0234493, abs=1e-6)


@pytest.mark.parametrize("shape", [(16, 16), (16, 48)])
def test_one_gaussian_matrix_in_a_hundred_passes_the_edge(shape: tuple[int, int]) -> None:
    count = 4000
    w = torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    largest = torch.linalg.matrix_norm(w, 2).square() / max(shape)
    beyond = int((largest > fluctuation_edge(shape)).sum())
    low, high = binom.interval(0.999, count, 0.01)
    assert low <= beyond <= high
