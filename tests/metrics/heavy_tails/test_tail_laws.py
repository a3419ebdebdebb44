"""Each law: its fit is the likelihood's maximum, its functions belong together, its search is the full one."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from tail_samples import KINDS, batch, brute_power_law, distance, sample

from diffract.metrics.heavy_tails import exponential, log_normal, power_law, truncated_power_law
from diffract.metrics.heavy_tails.fit import fit_candidates, fit_tails, order, search
from diffract.metrics.heavy_tails.significance import LAWS
from diffract.metrics.heavy_tails.special import excess, moments
from diffract.metrics.heavy_tails.truncated_power_law import _start


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_normaliser(alpha: float, rate: float, xmin: float) -> float:
    """ln int_xmin^inf x^-alpha exp(-rate x) dx, by quadrature in ln x."""
    if rate == 0:
        return (1 - alpha) * math.log(xmin) - math.log(alpha - 1)
    top = math.log(xmin + 60 / rate)
    exponent = lambda s: (1 - alpha) * s - rate * (math.exp(s) - xmin)  # noqa: E731
    largest = exponent(math.log(xmin))  # decreasing for alpha >= 1
    parts = np.linspace(math.log(xmin), top, 40)
    mass = sum(
        integrate.quad(lambda s: math.exp(exponent(s) - largest), a, b, epsabs=0, epsrel=1e-12)[0]
        for a, b in itertools.pairwise(parts)
    )
    return math.log(mass) + largest - rate * xmin


def log_likelihood(family: str, x: np.ndarray, xmin: float, first: float, second: float = 0.0) -> float:
    """Of values >= xmin, in the parameters that are reported; written with SciPy's functions."""
    if family == "exponential":
        return float(np.sum(math.log(first) - first * (x - xmin)))
    if family == "power_law":
        return float(np.sum(math.log((first - 1) / xmin) - first * np.log(x / xmin)))
    if family == "log_normal":
        z = (math.log(xmin) - first) / second
        return float(np.sum(stats.norm.logpdf(np.log(x), first, second) - np.log(x)) - len(x) * special.log_ndtr(-z))
    return float(np.sum(-first * np.log(x) - second * x)) - len(x) * log_normaliser(first, second, xmin)


def survival(family: str, x: np.ndarray, xmin: float, first: float, second: float = 0.0) -> np.ndarray:
    if family == "exponential":
        return np.exp(-first * (x - xmin))
    if family == "power_law":
        return (x / xmin) ** (1 - first)
    if family == "log_normal":
        return np.exp(
            special.log_ndtr((first - np.log(x)) / second) - special.log_ndtr((first - math.log(xmin)) / second)
        )
    whole = log_normaliser(first, second, xmin)
    return np.array([math.exp(log_normaliser(first, second, value) - whole) for value in x])


FITS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "power_law": (power_law, ("alpha",)),
    "exponential": (exponential, ("rate",)),
    "log_normal": (log_normal, ("mu", "sigma")),
    "truncated_power_law": (truncated_power_law, ("alpha", "rate")),
}

CASES = ["pareto", "exponential", "log-normal", "body and tail", "tied", "random matrix"]


@pytest.mark.parametrize("n", [6, 80])
@pytest.mark.parametrize("family", FITS)
@pytest.mark.parametrize("kind", CASES)
def test_fits_maximise_the_likelihood(kind: str, family: str, n: int) -> None:
    fit_family, names = FITS[family]
    x = sample(kind, n, 3)
    for share in (0, 0.3):
        xmin = float(np.quantile(x, share) * 0.97)
        tail = x[x >= xmin]
        fit = fit_family(batch(x), at=tensor(xmin))
        found = [getattr(fit, name).item() for name in names]
        assert fit.tail_count.item() == len(tail)
        if not all(math.isfinite(value) for value in found):
            # the log-normal's limit: mean and mean square of logarithms as no truncated normal has them
            t = np.log(tail / xmin)
            assert found == [-math.inf, math.inf]
            assert (t**2).mean() >= (2 - 1e-11) * t.mean() ** 2
            continue
        best = log_likelihood(family, tail, xmin, *found)
        for other in neighbours(family, found):
            # The likelihood is flat at its maximum; its own rounding is 1e-10 of a few hundred logarithms.
            assert log_likelihood(family, tail, xmin, *other) <= best + 1e-9
        want = distance(np.sort(tail), 1 - survival(family, np.sort(tail), xmin, *found))
        # Parameters of the order of a hundred, printed and read back, and quadrature to 2e-11.
        assert fit.ks.item() == pytest.approx(want, abs=1e-9)


def neighbours(family: str, found: list[float]) -> list[tuple[float, ...]]:
    """Parameters a little and farther off that are allowed."""
    steps = (1e-4, 1e-3, 0.02, 0.3)
    moves = [(s * i, s * j) for s in steps for i in (-1, 0, 1) for j in (-1, 0, 1)]
    scale = [max(abs(value), 1e-3) for value in found]
    around = [tuple(v + m * s for v, m, s in zip(found, move, scale, strict=False)) for move in moves]
    if family == "truncated_power_law":
        return [(a, r) for a, r in around if a >= 1 and r >= 0 and (r > 0 or a > 1)]
    return [other for other in around if other[-1] > (1 if family == "power_law" else 0)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate_solves_its_likelihood_equations(kind: str) -> None:
    ordered = order(batch(*(sample(kind, n, seed) for n in (4, 10, 60, 300) for seed in range(5))))
    tails = ordered.tails(*ordered.candidates(2).nonzero().unbind(1))
    a, z = LAWS["truncated_power_law"].fit(tails).unbind(1)
    cut = z > 0
    m = moments(a[cut], z[cut])
    # In standard deviations of the two statistics. Where they nearly coincide, or the cut-off nearly vanishes, the
    # likelihood is flat to rounding before its slope is.
    slope_a = (m.s - tails.mean_log[cut]) / m.var_s.sqrt()
    slope_z = (m.w - z[cut] * tails.mean_excess[cut]) / m.var_w.sqrt()
    inner = a[cut] > 0
    assert slope_a[inner].abs().max() < 1e-8
    assert slope_z.abs().max() < 1e-8
    assert (slope_a[~inner] <= 0).all()  # a smaller alpha would be likelier still
    D, q = excess(LAWS["log_normal"].fit(tails)[:, 0])
    wanted = (tails.mean_square_log / tails.mean_log.square()).clamp(max=2)
    assert (q - wanted).abs().max() < 2e-11  # q itself loses 1e-12 near z = 8; the limit is 2e-12 below 2
    assert torch.allclose(D / LAWS["log_normal"].fit(tails)[:, 1], tails.mean_log, rtol=1e-13)


def test_the_iteration_starts_close_to_where_it_ends() -> None:
    for slope, least, room in ((0.0, -30, 1e-7), (0.01, -4, 3e-3), (0.1, -4, 0.01)):
        z = torch.logspace(least, 3, 200, dtype=torch.float64)
        m = moments(torch.full_like(z, slope), z)
        a, log_z = _start(m.s, m.w / z).unbind(1)
        # On the bound from a table; off it by powers that are exact to first order of the distance.
        assert ((a - slope).abs() * m.s).max() < room
        assert (log_z - z.log()).abs().max() < room


def test_a_truncated_power_law_may_lie_on_either_bound() -> None:
    heavy = np.exp(np.array([0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 3.5]))
    light = 1 + np.linspace(0, 1, 9)
    fit = truncated_power_law(batch(heavy, light), at=tensor(1.0, 1.0))
    assert fit.rate[0] == 0
    assert fit.alpha[0] == power_law(batch(heavy), at=tensor(1.0)).alpha[0]
    assert fit.ks[0].item() == pytest.approx(power_law(batch(heavy), at=tensor(1.0)).ks.item(), rel=1e-12)
    assert fit.alpha[1] == 1
    assert fit.rate[1] > 0


def test_a_log_normal_without_a_maximum_is_the_power_law() -> None:
    heavy = batch(np.exp(np.array([0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 3.5])))
    fit, limit = log_normal(heavy, at=tensor(1.0)), power_law(heavy, at=tensor(1.0))
    assert (fit.mu.item(), fit.sigma.item()) == (-math.inf, math.inf)
    assert fit.ks.item() == pytest.approx(limit.ks.item(), abs=1e-11)  # they differ by the square of 1e-6


def test_a_log_normal_close_to_its_limit_is_continuous() -> None:
    # The last value grows until the logarithms' mean square is twice the squared mean: mu falls without bound, while
    # the law, and with it the distance, goes over into the power law's.
    def tail(last: float) -> torch.Tensor:
        return batch(np.exp(np.array([0.0, 0.1, 0.2, 0.3, 0.5, last])))

    low, high = 0.6, 5.0
    for _ in range(60):
        middle = (low + high) / 2
        inside = bool(log_normal(tail(middle), at=tensor(1.0)).mu.isfinite())
        low, high = (middle, high) if inside else (low, middle)
    for step in (1e-9, 1e-6, 1e-4, 1e-3):
        x = tail(low - step)
        fit, limit = log_normal(x, at=tensor(1.0)), power_law(x, at=tensor(1.0))
        z = -fit.mu / fit.sigma
        assert math.isfinite(fit.mu.item())
        assert fit.ks.item() == pytest.approx(limit.ks.item(), abs=3 / z.item() ** 2 + 1e-11)
        # the mean of the logarithms is the law's
        mean = fit.sigma * (1 / z - 2 / z**3 + 10 / z**5 - 74 / z**7)
        assert mean.item() == pytest.approx((x.log().mean()).item(), rel=1000 / z.item() ** 8 + 1e-7)


PARAMETERS = {
    "power_law": [[0.2], [1.5], [40.0]],
    "exponential": [[1e-4], [0.7], [30.0]],
    "log_normal": [[-12.0, 0.5], [0.3, 2.0], [4.9, 1.0], [5.1, 1.0], [60.0, 30.0], [1e6, 5e5]],
    "truncated_power_law": [[0.0, 1e-6], [0.0, 3.0], [1.5, 0.0], [0.4, 1e-3], [7.0, 50.0], [2.5, 1e-9]],
}


@pytest.mark.parametrize("family", PARAMETERS)
def test_density_survival_and_quantile_belong_together(family: str) -> None:
    law = LAWS[family]
    parameters = torch.tensor(PARAMETERS[family], dtype=torch.float64)
    u = tensor(1.0, 1 - 1e-9, 0.99, 0.6, 0.2, 1e-3, 1e-9, 2.0**-53).expand(len(parameters), -1)
    t = law.quantile(parameters, u)
    assert t[:, 0].abs().max() < 1e-15
    assert (t.diff(dim=1) > 0).all()
    # Relative to 1 - S where t is small, and to S where it is large: eps over either, and Newton's last step squared.
    assert torch.allclose(law.survival(parameters, t), u, rtol=1e-8, atol=1e-14)
    x, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(60))
    for low, high in ((0, 2), (2, 4), (4, 5), (5, 6)):
        width = (t[:, high] - t[:, low])[:, None] / 2
        points = t[:, low, None] + width * (1 + x)
        mass = (law.log_density(parameters, points).exp() * weights * width).sum(1)
        # Sixty nodes over at most fifteen decades of survival.
        assert torch.allclose(mass, u[:, low] - u[:, high], rtol=1e-6, atol=1e-12)


def test_chords_bound_the_survival_from_below() -> None:
    law = LAWS["truncated_power_law"]
    assert law.lower is not None
    rows = batch(*(sample(kind, n, 1) for kind in KINDS for n in (50, 30)))
    ordered = order(rows)
    last, row = ordered.candidates(2).mT.nonzero().unbind(1)
    tails = ordered.tails(row, last)
    parameters = law.fit(tails)
    t = (ordered.logs[row] - tails.origin[:, None]).clamp(min=0.0)
    lower = law.lower(parameters, t)
    missing = law.survival(parameters, t) - lower
    inside = torch.arange(rows.shape[1]) <= last[:, None]
    room = 1e-10  # quadrature
    assert missing[inside].min() >= -room
    assert (missing.where(inside, 0.0).amax(1) <= 1 - lower[:, -1] + room).all()
    assert missing.max() > 1e-4  # there is something to bound


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("n", [3, 5, 20, 128])
def test_ruling_candidates_out_by_chords_changes_no_result(n: int, two_sided: bool) -> None:
    law = LAWS["truncated_power_law"]
    ordered = order(batch(*(sample(kind, n, seed) for kind in KINDS for seed in range(8))))
    candidates = fit_candidates(ordered, law)
    found = search(candidates, two_sided=two_sided)
    plain = dataclasses.replace(candidates, law=dataclasses.replace(law, lower=None))
    full = search(plain, two_sided=two_sided)
    assert found.xmin.isfinite().double().mean() > 0.9
    assert torch.equal(found.xmin.nan_to_num(0.0), full.xmin.nan_to_num(0.0))


@pytest.mark.parametrize("family", FITS)
@pytest.mark.parametrize("two_sided", [False, True])
def test_looking_at_long_rows_in_part_first_changes_no_result(
    family: str, two_sided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = LAWS[family]
    rows = [sample(kind, n, seed) for kind in KINDS for n, seed in ((520, 1), (900, 2))]
    ordered = order(batch(*rows, np.ones(700)))
    assert ordered.thinned(64, 1.03).values.shape[1] < 200
    candidates = fit_candidates(ordered, law)
    found = search(candidates, two_sided=two_sided)
    monkeypatch.setattr("diffract.metrics.heavy_tails.fit.LONG", 10**9)
    full = search(candidates, two_sided=two_sided)
    assert found.xmin.isfinite().tolist() == [True] * len(rows) + [False]
    assert torch.equal(found.xmin[:-1], full.xmin[:-1])
    if family == "power_law":
        for i, x in enumerate(rows):
            assert found.xmin[i].item() == brute_power_law(x, two_sided=two_sided)[1]


@pytest.mark.parametrize("family", FITS)
def test_the_search_takes_the_least_of_all_distances(family: str) -> None:
    fit_family, names = FITS[family]
    for kind in KINDS:
        x = sample(kind, 24, 7)
        candidates = np.unique(x)[:-1]
        single = fit_family(batch(*[x] * len(candidates)), at=torch.from_numpy(candidates))
        fit = fit_family(batch(x))
        best = int(single.ks.argmin())
        # By way of ``at`` sums are made anew: rounding only.
        assert fit.ks.item() == pytest.approx(single.ks[best].item(), abs=1e-9)
        assert fit.xmin.item() == single.xmin[best].item()
        for name in names:
            # A rate or a mu at the limit of a flat likelihood keeps fewer digits than the distance.
            assert getattr(fit, name).item() == pytest.approx(getattr(single, name)[best].item(), rel=1e-4, abs=1e-9)


def test_exponential_by_hand() -> None:
    fit = exponential(tensor(3.0, 1.0, 2.0)[None], at=tensor(1.0))
    assert fit.rate.item() == pytest.approx(1, rel=1e-15)
    survivals = (1, math.exp(-1), math.exp(-2))
    want = max(abs(s - share) for s, share in zip(survivals, (1, 2 / 3, 1 / 3), strict=True))
    assert fit.ks.item() == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize(
    ("family", "draw", "want"),
    [
        ("exponential", lambda rng, n: 1 + rng.exponential(1 / 0.7, n), (0.7,)),
        (
            "log_normal",
            lambda rng, n: np.exp(stats.truncnorm.rvs(-0.5, np.inf, 0.4, 0.8, n, random_state=rng)),
            (0.4, 0.8),
        ),
        ("truncated_power_law", lambda rng, n: rejected(rng, n, 1.6, 0.3), (1.6, 0.3)),
    ],
)
def test_parameters_of_large_samples_are_recovered(family: str, draw: Callable, want: tuple[float, ...]) -> None:
    fit_family, names = FITS[family]
    rng = np.random.default_rng(8)
    x = torch.from_numpy(np.stack([draw(rng, 3000) for _ in range(40)]))
    fit = fit_family(x, at=torch.ones(40, dtype=torch.float64))
    for name, value in zip(names, want, strict=True):
        found = getattr(fit, name)
        # Within four standard errors of the mean of 40, as their own spread gives it.
        assert found.mean().item() == pytest.approx(value, abs=4 * found.std().item() / math.sqrt(40))
        assert found.std() < 0.3


def rejected(rng: np.random.Generator, n: int, alpha: float, rate: float) -> np.ndarray:
    """x^-alpha exp(-rate x) on [1, inf), from a Pareto distribution by rejection."""
    x = (1 - rng.random(50 * n)) ** (-1 / (alpha - 1))
    return x[rng.random(50 * n) < np.exp(-rate * (x - 1))][:n]


def test_many_rows_and_one_give_the_same() -> None:
    values = batch(*(sample(kind, 60, seed) for kind in KINDS for seed in range(3)))
    for law in LAWS.values():
        whole = fit_tails(values, law)
        for i in range(0, len(values), 7):
            one = fit_tails(values[i : i + 1], law)
            assert one.xmin[0] == whole.xmin[i]
            assert one.ks[0].item() == pytest.approx(whole.ks[i].item(), abs=1e-12)
