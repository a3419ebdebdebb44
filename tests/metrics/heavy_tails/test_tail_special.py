"""The two special functions against mpmath in forty digits, over all that fits may ask for."""

import itertools
from collections.abc import Callable

import mpmath as mp
import pytest
import torch

from diffract.metrics.heavy_tails.special import excess, log_hazard, mills, moments, survival_ratio

mp.mp.dps = 40

SLOPES = (0, 1e-3, 0.1, 0.5, 1, 2.5, 9, 1e3, 1e7)
CUTOFFS = (1e-40, 1e-20, 9e-9, 1.1e-8, 1e-5, 9e-3, 1.1e-2, 0.5, 1, 7, 300, 1e6)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def by_mpmath(a: float, z: float) -> mp.mpf:
    return mp.exp(mp.mpf(z)) * mp.expint(mp.mpf(a) + 1, mp.mpf(z))


def test_the_normaliser_is_the_generalised_exponential_integral() -> None:
    pairs = list(itertools.product(SLOPES, CUTOFFS))
    found = mills(tensor(*(a for a, _ in pairs)), tensor(*(z for _, z in pairs)))
    for (a, z), value in zip(pairs, found.tolist(), strict=True):
        # The rule's own error, largest at the smallest z that a number of nodes is used for.
        assert value == pytest.approx(float(by_mpmath(a, z)), rel=1e-12), (a, z)


def test_the_normaliser_without_a_cut_off() -> None:
    assert mills(tensor(1.5), tensor(1e-200)).item() == pytest.approx(1 / 1.5, rel=1e-12)
    assert mills(tensor(2.0, 0.01), tensor(0.0, 0.0)).tolist() == [0.5, 100]


def test_the_normaliser_keeps_shapes_and_broadcasts() -> None:
    a, z = tensor(0.5, 1.5)[:, None], tensor(0.1, 1e-6, 3.0)[None]
    found = mills(a, z)
    assert found.shape == (2, 3)
    single = [[mills(one, other).item() for other in z[0]] for one in a[:, 0]]
    assert found.flatten().tolist() == pytest.approx([*single[0], *single[1]], rel=1e-14)


@pytest.mark.parametrize("a", [0.0, 0.3, 1.7, 20.0])
@pytest.mark.parametrize("z", [1e-6, 0.05, 1.0, 30.0])
def test_moments_are_those_of_the_integrand(a: float, z: float) -> None:
    def integral(g: Callable[[mp.mpf], mp.mpf]) -> mp.mpf:
        end = min(200 / (a + z), float(mp.log1p(200 / mp.mpf(z))))
        density = lambda s: mp.exp(-a * s - z * mp.expm1(s))  # noqa: E731
        return mp.quad(lambda s: g(s) * density(s), mp.linspace(0, end, 9))

    mass = integral(lambda s: 1)
    w = lambda s: z * mp.expm1(s)  # noqa: E731
    s1, w1 = integral(lambda s: s) / mass, integral(w) / mass
    want = {
        "R": mass, "s": s1, "w": w1,
        "var_s": integral(lambda s: s * s) / mass - s1**2,
        "cov": integral(lambda s: s * w(s)) / mass - s1 * w1,
        "var_w": integral(lambda s: w(s) ** 2) / mass - w1**2,
    }  # fmt: skip
    found = moments(tensor(a), tensor(z))
    for name, value in want.items():
        # Second moments less squared first ones: some digits of 1e-12 are lost, and more where w hardly varies.
        assert getattr(found, name).item() == pytest.approx(float(value), rel=1e-8), name


HAZARD_POINTS = (-60.0, -30.0, -5.0, -1.0, 0.0, 0.5, 3.0, 7.99, 8.0, 8.01, 24.9, 25.0, 30.0, 1e3, 1e6)


def survival(z: float) -> mp.mpf:
    return mp.erfc(mp.mpf(z) / mp.sqrt(2)) / 2


def test_the_normal_hazard_and_moments_beyond_a_point() -> None:
    z = tensor(*HAZARD_POINTS)
    D, q = excess(z)
    for i, point in enumerate(HAZARD_POINTS):
        with mp.workdps(80):  # the plain differences need it
            h = mp.npdf(point) / survival(point)
            mean = h - mp.mpf(point)
            ratio = (1 - point * mean) / mean**2
            want = [float(mean), float(ratio), float(mp.log(h))]
        found = [D[i].item(), q[i].item(), log_hazard(z)[i].item()]
        # Differences lose up to z^2 eps just below 8, where continued fractions take over.
        assert found == pytest.approx(want, rel=2e-12, abs=1e-13), point


def test_normal_survival_beyond_a_point() -> None:
    v = tensor(0.0, 1e-6, 0.03, 0.4, 1.5, 6.0)
    z = tensor(*HAZARD_POINTS)
    steps = v / z.clamp(min=1.0)[:, None]
    found = survival_ratio(z[:, None], steps)
    for i, point in enumerate(HAZARD_POINTS):
        want = [float(survival(mp.mpf(point) + mp.mpf(step)) / survival(point)) for step in steps[i].tolist()]
        # The exponent of a few units carries eps (z + v)^2 where z + v was rounded, at most 1e-13 up to z = 25.
        assert found[i].tolist() == pytest.approx(want, rel=3e-12, abs=1e-300), point
