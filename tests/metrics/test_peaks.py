"""Densities of ln sigma and their peaks: planted ones, SciPy's on the same density, and those of noise."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.signal
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffract.metrics.peaks import Density, find_peaks, log_density, peak_count

ALL: dict[str, Any] = {"mass": 0.0, "fewest": 0}
"""Every peak of a density, however few sigmas it holds."""

SUMS = 1e-10
"""Relative: sixteen products and a sum of hundreds of kernels, whose exponents are eps times some hundreds."""


def lognormal(count: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.exp(np.random.default_rng(seed).standard_normal((count, n))))


def planted(centres: list[float], spread: float, n: int, seed: int = 0) -> torch.Tensor:
    """One row with n normal values of ln sigma around each centre."""
    noise = np.random.default_rng(seed).normal(0.0, spread, (len(centres), n))
    return torch.from_numpy(np.exp((np.array(centres)[:, None] + noise).ravel()))[None]


def gaussian_sigmas(count: int, m: int, n: int, seed: int = 0) -> torch.Tensor:
    w = torch.randn(count, m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.svdvals(w)


def density_of(values: np.ndarray) -> Density:
    """A density made up by hand; its unit is the distance of two points."""
    values = np.atleast_2d(values)
    grid = torch.arange(values.shape[1], dtype=torch.float64).expand(values.shape)
    return Density(grid, torch.from_numpy(values), torch.ones(len(values), dtype=torch.float64))


# Density


@pytest.mark.parametrize("points", [100, 256, 512])
@pytest.mark.parametrize("n", [3, 10, 128, 700])
def test_density_is_scipys(n: int, points: int) -> None:
    sigmas = lognormal(5, n)
    found = log_density(sigmas, points=points)
    assert found.grid.shape == found.values.shape == (5, points)
    for i, x in enumerate(sigmas.log().numpy()):
        kernel = scipy.stats.gaussian_kde(x)
        h = math.sqrt(kernel.covariance[0, 0])
        step = (x.max() - x.min() + 6 * h) / (points - 1)
        assert step < h  # so that the bandwidth is not raised
        assert found.bandwidth[i].item() == pytest.approx(h, rel=1e-13)
        assert found.bandwidth[i].item() == pytest.approx(n**-0.2 * x.std(ddof=1), rel=1e-13)
        want = np.linspace(x.min() - 3 * h, x.max() + 3 * h, points)
        assert np.abs(found.grid[i].numpy() - want).max() <= 1e-13 * np.abs(want).max()
        # SciPy's tails underflow together with ours; what is far below the highest value counts for nothing.
        assert np.allclose(found.values[i].numpy(), kernel(want), rtol=SUMS, atol=1e-15)


def test_density_integrates_to_one() -> None:
    found = log_density(lognormal(4, 50), points=512)
    step = found.grid[:, 1] - found.grid[:, 0]
    # Beyond three bandwidths lies 0.00135 of a kernel, and less of those that are not outermost.
    assert (found.values.sum(-1) * step).numpy() == pytest.approx(1.0, abs=2 * 0.00135)


def test_bandwidth_may_be_told() -> None:
    sigmas = lognormal(2, 40)
    found = log_density(sigmas, bandwidth=0.3)
    assert found.bandwidth.tolist() == [0.3, 0.3]
    x, at = sigmas.log().numpy(), found.grid.numpy()
    kernels = np.exp(-(((at[:, :, None] - x[:, None, :]) / 0.3) ** 2) / 2) / (0.3 * math.sqrt(2 * math.pi))
    assert np.allclose(found.values.numpy(), kernels.mean(-1), rtol=SUMS, atol=0)


def test_bandwidth_is_no_less_than_the_distance_of_two_points() -> None:
    sigmas = torch.tensor([[1.0, math.e**10, math.e**1000**0.5]], dtype=torch.float64)
    found = log_density(sigmas, bandwidth=1e-3)
    step = (found.grid[0, 1] - found.grid[0, 0]).item()
    assert found.bandwidth.item() == pytest.approx(step, rel=1e-12)
    assert find_peaks(found, sigmas, **ALL).count.item() == 3  # none falls between two points


def test_outliers_at_any_distance_do_no_harm() -> None:
    sigmas = torch.cat([lognormal(1, 4000), torch.tensor([[1e-300, 1e300]], dtype=torch.float64)], 1)
    found = log_density(sigmas, points=4096)
    x = sigmas.log().numpy()
    h = found.bandwidth.item()
    kernels = np.exp(-(((found.grid.numpy()[0, ::64, None] - x) / h) ** 2) / 2).mean(-1) / (h * math.sqrt(2 * math.pi))
    assert np.allclose(found.values[0, ::64].numpy(), kernels, rtol=SUMS, atol=1e-15)


def test_zeros_do_not_count() -> None:
    bare = lognormal(3, 40)
    padded = torch.cat([torch.zeros(3, 7, dtype=torch.float64), bare], 1)
    padded[:, 0], padded[:, 1] = torch.nan, torch.inf
    found, want = log_density(padded), log_density(bare)
    # Sums of the same terms in another order.
    assert torch.allclose(found.values, want.values, rtol=1e-12, atol=1e-15)
    assert torch.allclose(found.grid, want.grid, rtol=1e-13, atol=0)
    peaks = find_peaks(found, padded)
    assert torch.equal(peaks.count, find_peaks(want, bare).count)
    assert bool((peaks.membership[:, :7] == -1).all())


def test_a_bad_row_is_nan_and_spares_its_neighbours() -> None:
    good = lognormal(2, 20)
    bad = torch.zeros(6, 20, dtype=torch.float64)
    bad[1, :2] = torch.tensor([1.0, 2.0])  # two values
    bad[2] = 3.0  # all equal
    bad[3] = 3.0 + 4e-15 * torch.arange(20) / 20  # equal but for rounding
    bad[4] = torch.nan
    bad[5, 0] = 1.0
    sigmas = torch.cat([good[:1], bad, good[1:]])
    density = log_density(sigmas)
    found, want = find_peaks(density, sigmas), find_peaks(log_density(good), good)
    assert bool(density.values[1:-1].isnan().all())
    assert bool(found.count[1:-1].isnan().all())
    assert bool(found.positions[1:-1].isnan().all())
    assert bool((found.membership[1:-1] == -1).all())
    for row, i in ((0, 0), (-1, 1)):
        assert torch.equal(density.values[row], log_density(good).values[i])
        assert found.count[row] == want.count[i]
        assert torch.equal(found.membership[row], want.membership[i])


def test_nothing_at_all() -> None:
    for rows in (0, 2):
        sigmas = torch.zeros(rows, 5, dtype=torch.float64)
        found = find_peaks(log_density(sigmas), sigmas)
        assert found.positions.shape == (rows, 0)
        assert found.membership.shape == (rows, 5)
        assert bool(found.count.isnan().all())


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 16 points"):
        log_density(lognormal(1, 20), points=8)


# Peaks


@pytest.mark.parametrize("centres", [[0.0], [-3.0, 0.0], [-4.0, 0.0, 4.0], [-6.0, -2.0, 2.0, 6.0]], ids=len)
@pytest.mark.parametrize("spread", [0.05, 0.3])
def test_planted_peaks_are_found(centres: list[float], spread: float) -> None:
    sigmas = planted(centres, spread, 128)
    density = log_density(sigmas)
    found = find_peaks(density, sigmas)
    assert found.count.item() == len(centres)
    # The centre of 128 draws is off by a tenth of their spread, the mode by more; neighbours draw a peak towards them.
    error = (found.positions[0] - torch.tensor(centres, dtype=torch.float64)).abs().max().item()
    assert error <= (spread + density.bandwidth.item()) / 2
    member = found.membership[0].reshape(len(centres), 128)
    for peak in range(len(centres)):
        assert bool(((member[peak] == peak) | (member[peak] == -1)).all())
        assert (member[peak] == peak).double().mean().item() > 0.6


@pytest.mark.parametrize("centres", [[0.0], [-3.0, 0.0, 3.0]], ids=len)
def test_width_of_a_peak_that_stands_alone(centres: list[float]) -> None:
    sigmas = planted(centres, 0.2, 2000)
    found = find_peaks(log_density(sigmas, bandwidth=0.1, points=512), sigmas)
    # Normal of variance 0.2^2 + 0.1^2; its full width at half maximum is 2.355 standard deviations. 2,000 draws know
    # a standard deviation to 1.6%.
    width = 2 * math.sqrt(2 * math.log(2)) * math.hypot(0.2, 0.1)
    assert found.widths[0].numpy() == pytest.approx(width, rel=0.06)


@pytest.mark.parametrize(("n", "most"), [(128, 4), (2048, 6)])
def test_how_many_even_peaks_scotts_bandwidth_tells_apart(n: int, most: int) -> None:
    for count in range(1, 10):
        each = torch.linspace(-1, 1, count, dtype=torch.float64) if count > 1 else torch.zeros(1, dtype=torch.float64)
        jitter = 1e-3 * torch.from_numpy(np.random.default_rng(0).standard_normal(n // count))
        sigmas = (each[:, None] + jitter).exp().flatten()[None]
        assert (peak_count(sigmas).item() == count) == (count <= most)
        narrow = log_density(sigmas, bandwidth=0.05)
        assert find_peaks(narrow, sigmas).count.item() == count


def extent(values: np.ndarray, before: int, at: int, after: int) -> tuple[float, float]:
    """Where the density falls half-way to its lowest value on the way to the peaks before and after, one by one."""
    ends = []
    for path in (range(at, before - 1, -1), range(at, after + 1)):
        level = (values[at] + min(values[i] for i in path[1:])) / 2
        far = next(i for i in path if values[i] <= level)
        near = far + (1 if far < at else -1)
        ends.append(far + (near - far) * (level - values[far]) / (values[near] - values[far]))
    return ends[0], ends[1]


@pytest.mark.parametrize("threshold", [0.001, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("bandwidth", [None, 0.1])
def test_peaks_are_scipys(bandwidth: float | None, threshold: float) -> None:
    sigmas = torch.cat([lognormal(60, 100), torch.cat([gaussian_sigmas(60, 32, 32), lognormal(60, 68)], 1)])
    density = log_density(sigmas, bandwidth=bandwidth)
    found = find_peaks(density, sigmas, prominence=threshold, **ALL)
    counts = []
    for i in range(len(sigmas)):
        values, grid = density.values[i].numpy(), density.grid[i].numpy()
        at, about = scipy.signal.find_peaks(values, prominence=threshold * values.max())
        k = len(at)
        counts.append(k)
        assert found.count[i].item() == k
        assert bool(found.positions[i, k:].isnan().all())
        assert np.array_equal(found.positions[i, :k].numpy(), grid[at])
        # Relative to the highest value, so rounded once more, and a difference.
        assert np.allclose(found.prominences[i, :k], about["prominences"] / values.max(), rtol=0, atol=1e-14)
        ends = np.array([extent(values, *three) for three in zip([0, *at], at, [*at[1:], len(values) - 1])])  # noqa: B905
        step = grid[1] - grid[0]
        assert np.allclose(found.widths[i, :k], (ends[:, 1] - ends[:, 0]) * step, rtol=1e-9, atol=0)
        member = found.membership[i].numpy()
        for sigma, peak in zip(sigmas[i].log().numpy(), member, strict=True):
            column = (sigma - grid[0]) / step
            holding = [j for j, (low, high) in enumerate(ends) if low - 1e-9 <= column <= high + 1e-9]
            assert [peak] == (holding or [-1])
    assert bandwidth is None or np.mean(counts) > 1.2  # the comparison means little unless many have several


def test_prominence_extent_and_membership_by_hand() -> None:
    #                  0  1  a  3   b  5  6  c  8  9
    values = np.array([0, 2, 4, 3, 10, 1, 0, 5, 2, 1, 0, 0, 0, 0, 0, 0.0])
    sigmas = torch.tensor([[0.9, 1.1, 2.4, 2.6, 3.4, 3.6, 5.0, 6.6, 7.7, 7.9]], dtype=torch.float64).exp()
    found = find_peaks(density_of(values), sigmas, **ALL)
    assert found.positions[0].tolist() == [2.0, 4.0, 7.0]
    assert found.prominences[0].tolist() == pytest.approx([0.1, 1.0, 0.5], rel=1e-15)
    # a: half-way to 0 is 2, at 1; to 3 it is 3.5, at 2.5. b: half-way to 3 is 6.5, at 3.5; to 0 it is 5, at 4 5/9.
    # c: half-way to 0 is 2.5, at 6.5 and at 7 5/6.
    assert found.widths[0].tolist() == pytest.approx([1.5, 4 + 5 / 9 - 3.5, 7 + 5 / 6 - 6.5], rel=1e-14)
    assert found.membership[0].tolist() == [-1, 0, 0, -1, -1, 1, -1, 2, 2, -1]


def test_a_peak_too_low_to_count_does_not_part_others() -> None:
    values = np.array([0, 10, 6, 6.2, 6, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    found = find_peaks(density_of(values), torch.full((1, 1), math.exp(5.0), dtype=torch.float64), **ALL)
    assert found.count.item() == 1
    assert found.widths[0].tolist() == [5 - 0.5]  # from half-way up at 0.5 to the height of 5 at 5
    assert found.membership[0].tolist() == [0]


def test_a_plateau_is_one_peak_at_its_left_end() -> None:
    found = find_peaks(density_of(np.array([0, 1.0, 1, 1, 0, 0.5, 0.5, 0.6, 0, 0])), torch.ones(1, 1).double(), **ALL)
    assert found.positions[0].tolist() == [1.0, 7.0]


def test_a_shallow_dip_between_equal_peaks_counts_as_between_unequal_ones() -> None:
    shallow, deep = np.array([0, 1.0, 0.97, 1, 0]), np.array([0, 1.0, 0.9, 1, 0])
    for right in (1.0, 1 - 1e-12, 1 + 1e-12):
        shallow[3] = deep[3] = right
        found = find_peaks(density_of(np.stack([shallow, deep])), torch.ones(2, 1).double(), **ALL)
        assert found.count.tolist() == [1.0, 2.0]


def test_a_peak_on_a_slope_has_its_own_sigmas() -> None:
    sigmas = torch.cat([planted([0.0], 0.5, 400), planted([0.55], 0.01, 60)], 1)
    found = find_peaks(log_density(sigmas, bandwidth=0.05), sigmas, prominence=0.3)
    top = int(found.prominences[0].nan_to_num().argmax())
    assert found.positions[0, top].item() == pytest.approx(0.55, abs=0.02)
    assert bool((found.membership[0, 400:] == top).all())  # its spread is a fifth of the bandwidth
    assert (found.membership[0, :400] == top).sum().item() < 60


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_scaling_shifts_the_peaks(seed: int, scale: float) -> None:
    sigmas = lognormal(2, 60, seed)
    density, scaled = log_density(sigmas), log_density(scale * sigmas)
    # The grid is rounded at the size of ln sigma, which the kernels then feel as eps times the distance.
    assert torch.allclose(scaled.values, density.values, rtol=1e-8, atol=1e-12)
    assert torch.allclose(scaled.grid, density.grid + math.log(scale), rtol=0, atol=1e-12)


@given(st.permutations(range(30)))
def test_order_does_not_matter(order: list[int]) -> None:
    sigmas = torch.cat([planted([0.0, 3.0], 0.2, 15), planted([0.0, 1.0], 0.2, 15)])
    found = find_peaks(log_density(sigmas), sigmas)
    mixed = find_peaks(log_density(sigmas[:, order]), sigmas[:, order])
    assert torch.equal(found.count, mixed.count)
    assert torch.equal(found.membership[:, order], mixed.membership)


def test_pooled_heads_are_the_union() -> None:
    heads = gaussian_sigmas(6, 20, 50).reshape(2, 60)
    pooled = log_density(heads)
    for i in range(2):
        kernel = scipy.stats.gaussian_kde(heads[i].log().numpy())
        assert np.allclose(pooled.values[i], kernel(pooled.grid[i].numpy()), rtol=SUMS, atol=1e-15)


def test_a_peak_holds_five_in_a_hundred_and_three_sigmas() -> None:
    for few, count in ((2, 1), (3, 2), (6, 2)):  # 3 of 53 are 5.7%
        sigmas = torch.cat([planted([0.0], 0.1, 50), planted([4.0], 0.01, few)], 1)
        found = find_peaks(log_density(sigmas), sigmas)
        assert found.count.item() == count
        assert bool((found.membership[0, 50:] == (1 if count == 2 else -1)).all())
        inside = [(found.membership[0] == peak).double().mean().item() for peak in range(count)]
        assert found.masses[0].tolist() == pytest.approx(inside, rel=1e-14)
    # 6 of 156 are 3.8%.
    sigmas = torch.cat([planted([0.0], 0.1, 150), planted([4.0], 0.01, 6)], 1)
    for mass, count in ((0.05, 1), (0.03, 2)):
        assert find_peaks(log_density(sigmas), sigmas, prominence=0.01, mass=mass).count.item() == count


@pytest.mark.parametrize(
    ("m", "n", "rate"),
    [(128, 2048, 0.0), (160, 128, 0.0), (64, 64, 0.0), (32, 32, 0.0), (16, 512, 0.0015), (16, 16, 0.0)],
    ids=str,
)
def test_noise_has_a_second_peak_at_the_stated_rate(m: int, n: int, rate: float) -> None:
    draws = 40 if max(m, n) > 1000 else 300
    found = peak_count(gaussian_sigmas(draws, m, n, seed=1))
    several = int((found > 1).sum())
    # Within what 99.99% of binomial counts of the stated rate are.
    low, high = scipy.stats.binom.ppf([5e-5, 1 - 5e-5], draws, rate)
    assert low <= several <= high
    assert int((found < 1).sum()) == 0
