"""The drawn laws are densities, and the laws that they are called after."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import expon, lognorm, pareto

from diffract import densities as laws

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
    low, high = laws.marchenko_pastur_edges(variance, rows, cols)
    middle, half = (high + low) / 2, (high - low) / 2
    # lambda = middle - half cos(theta) takes the square roots away at both ends.
    theta, step = np.linspace(0, math.pi, 20_001, retstep=True)
    inner = theta[1:-1]
    x = middle - half * np.cos(inner)
    weights = laws.marchenko_pastur(x, variance, rows, cols) * half * np.sin(inner) * step
    assert weights.sum() == pytest.approx(1, abs=2e-3)  # the trapezoid's, for square matrices with a pole at zero
    assert (weights * x).sum() == pytest.approx(variance, rel=1e-6)
    assert laws.marchenko_pastur(np.array([high * 1.01]), variance, rows, cols)[0] == 0


def test_parameters_that_are_missing_or_no_numbers_draw_nothing() -> None:
    assert laws.tail_parameters({"pl_alpha": 2.0, "pl_xmin": 1.0}, "pl") == (2.0, 1.0)
    assert laws.tail_parameters({"pl_alpha": 2.0}, "pl") is None
    assert laws.tail_parameters({"pl_alpha": math.nan, "pl_xmin": 1.0}, "pl") is None
    assert laws.tail_parameters({"pl_alpha": None, "pl_xmin": 1.0}, "pl") is None
