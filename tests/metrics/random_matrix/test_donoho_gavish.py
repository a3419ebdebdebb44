"""The Donoho-Gavish threshold against its defining property and published numbers."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from diffract.metrics.random_matrix import (
    donoho_gavish_threshold,
    known_noise_factor,
    unknown_noise_factor,
)

BETAS = [1.0, 0.7, 0.3, 0.05, 1e-3]


@pytest.mark.parametrize("beta", BETAS)
def test_at_the_threshold_keeping_costs_what_dropping_costs(beta: float) -> None:
    # A direction of strength x is seen as y = sqrt((x + 1/x)(x + beta/x)), turned by angles of cosines c and d.
    # Dropping it costs x^2, keeping it x^2 + y^2 - 2 x y c d: equal where y = 2 x c d.
    def gain(x: float) -> float:
        y = math.sqrt((x + 1 / x) * (x + beta / x))
        c = math.sqrt((x**4 - beta) / (x**4 + beta * x**2))
        d = math.sqrt((x**4 - beta) / (x**4 + x**2))
        return 2 * x * c * d - y

    x = float(brentq(gain, beta**0.25 * (1 + 1e-9), 10, xtol=1e-14))  # type: ignore[arg-type]
    assert known_noise_factor(beta) == pytest.approx(math.sqrt((x + 1 / x) * (x + beta / x)), rel=1e-10)


def test_published_numbers() -> None:
    assert known_noise_factor(1.0) == pytest.approx(4 / math.sqrt(3), rel=1e-15)
    assert unknown_noise_factor(1.0) == pytest.approx(2.858, abs=5e-4)
    for beta in np.linspace(0.05, 1, 20):  # the paper's cubic, said to be within 0.02
        cubic = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
        assert unknown_noise_factor(float(beta)) == pytest.approx(cubic, abs=0.02)


@pytest.mark.parametrize("short", [1, 2, 7, 8])
def test_threshold_is_the_factor_times_the_median(short: int) -> None:
    sigmas = torch.rand(5, short, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(-1, True).values
    want = unknown_noise_factor(short / 9) * np.median(sigmas.numpy(), axis=1)
    for shape in ((short, 9), (9, short)):
        np.testing.assert_allclose(donoho_gavish_threshold(sigmas, shape), want, rtol=1e-14)


@pytest.mark.parametrize("shape", [(100, 100), (60, 240)])
def test_both_forms_keep_the_planted_directions(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    noise = torch.tensor(rng.standard_normal((20, *shape)))
    U, V = (torch.linalg.qr(torch.tensor(rng.standard_normal((20, d, 3)))).Q for d in shape)
    sigmas = torch.linalg.svdvals(0.1 * noise + 0.5 * math.sqrt(max(shape)) * U @ V.mT)
    known = torch.full((20,), 0.1 * known_noise_factor(min(shape) / max(shape)) * math.sqrt(max(shape))).double()
    unknown = donoho_gavish_threshold(sigmas, shape)
    for threshold in (known, unknown):
        assert ((sigmas > threshold[:, None]).sum(-1) == 3).all()
    # Three directions out of sixty shift the median to the quantile 0.525 of the noise, 6% higher at most.
    np.testing.assert_allclose(unknown, known, rtol=0.08)


def test_degenerate_input() -> None:
    rows = torch.tensor([[0.0, 0, 0], [5, 0, 0], [math.nan] * 3, [2, 2, 2]]).double()
    want = [0, 0, math.nan, 2 * unknown_noise_factor(3 / 4)]
    np.testing.assert_allclose(donoho_gavish_threshold(rows, (3, 4)), want)
