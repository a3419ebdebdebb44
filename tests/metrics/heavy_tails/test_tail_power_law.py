"""The power law: closed forms, a search over every xmin written from the definition, and what must not change it."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tail_samples import KINDS, batch, brute_power_law, sample

from diffract.metrics.heavy_tails import PowerLaw, exponential, log_normal, power_law, truncated_power_law
from diffract.metrics.heavy_tails.fit import Law, fit_tails

EXACT = 1e-11
"""Relative: sums of at most 200 logarithms in another order, and alpha times a hundred eps in an exponent."""


def row(fit: PowerLaw, i: int = 0) -> tuple[float, float, float, float]:
    return (fit.alpha[i].item(), fit.xmin[i].item(), fit.ks[i].item(), fit.tail_count[i].item())


def test_two_values_are_fitted_by_hand() -> None:
    fit = power_law(torch.tensor([[math.e, 1.0]], dtype=torch.float64))
    # mean logarithm 1/2: alpha = 3, and S(e) = e^-2 where half of the tail is
    assert row(fit) == pytest.approx((3, 1, 0.5 - math.exp(-2), 2), rel=1e-14)
    assert fit.alpha_stderr_fixed_xmin.item() == pytest.approx(2 / math.sqrt(2), rel=1e-14)


def test_a_geometric_row_at_a_given_xmin() -> None:
    x = torch.tensor([[8.0, 1.0, 4.0, 2.0]], dtype=torch.float64)
    fit = power_law(x, at=torch.tensor([0.5], dtype=torch.float64))
    slope = 4 / (math.log(2) * (1 + 2 + 3 + 4))
    survivals = [2 ** (-slope * i) for i in (1, 2, 3, 4)]
    ks = max(abs(s - share) for s, share in zip(survivals, (1, 0.75, 0.5, 0.25), strict=True))
    assert row(fit) == pytest.approx((1 + slope, 0.5, ks, 4), rel=1e-14)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("n", [3, 4, 7, 10, 60, 200])
def test_the_search_tries_every_xmin(n: int, two_sided: bool) -> None:
    rows = [sample(kind, n, seed) for kind in KINDS for seed in range(2)]
    rows = [x for x in rows if len(np.unique(x)) > 1]
    fit = power_law(batch(*rows), two_sided=two_sided)
    for i, x in enumerate(rows):
        assert row(fit, i) == pytest.approx(brute_power_law(x, two_sided=two_sided), rel=EXACT)


def test_tails_have_the_least_number_of_values() -> None:
    rows = [sample(kind, 60, 5) for kind in KINDS]
    for least in (10, 30, 60):
        fit = power_law(batch(*rows), min_tail=least)
        for i, x in enumerate(rows):
            want = brute_power_law(x, min_tail=least)
            found = row(fit, i)
            assert found == (pytest.approx(want, rel=EXACT) if want[3] else pytest.approx([math.nan] * 4, nan_ok=True))


def test_of_equal_distances_the_smallest_xmin_wins() -> None:
    # A survival of zero everywhere is off by exactly 1 at every xmin.
    law = Law(lambda tails: tails.count[:, None], lambda _, t: torch.zeros_like(t), *[lambda _, t: t] * 2)
    fit = fit_tails(batch(np.array([3.0, 1.0, 2.0, 1.0]), np.array([0.0, 5.0, 7.0, 6.0])), law)
    assert fit.ks.tolist() == [1, 1]
    assert fit.xmin.tolist() == [1, 5]
    assert fit.count.tolist() == [4, 3]


@pytest.mark.parametrize("fits", [power_law, exponential, log_normal, truncated_power_law])
def test_what_has_no_tail_is_nan_and_disturbs_no_other_row(fits: Callable[..., PowerLaw]) -> None:
    nan, inf = math.nan, math.inf
    good = sample("pareto", 6, 0)
    rows = [[nan] * 6, [0.0] * 6, [2.0] * 6, [-1.0, -2.0, -3.0, 0.0, nan, nan], [1.0, 0.0, 0.0, 0.0, nan, inf]]
    x = torch.tensor([*rows, good.tolist()], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit, alone = fits(x), fits(x[-1:])
    for name in fit.__dataclass_fields__:
        values, single = getattr(fit, name), getattr(alone, name)
        assert values.dtype == torch.float64
        assert values[:-1].isnan().all()
        # Products of matrices may add in another order where they have other shapes.
        assert values[-1].item() == pytest.approx(single[0].item(), rel=1e-9)
        assert not single.isnan().any()


@pytest.mark.parametrize("fits", [power_law, exponential, log_normal, truncated_power_law])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 1), (0, 0)])
def test_empty_input_has_no_tails(fits: Callable[..., PowerLaw], shape: tuple[int, int]) -> None:
    fit = fits(torch.ones(shape, dtype=torch.float64))
    assert fit.xmin.shape == shape[:1]
    assert fit.xmin.isnan().all()


@pytest.mark.parametrize("fits", [power_law, exponential, log_normal, truncated_power_law])
def test_a_given_xmin_without_a_tail_is_nan(fits: Callable[..., PowerLaw]) -> None:
    x = torch.tensor([[1.0, 2.0, 5.0]] * 5, dtype=torch.float64)
    fit = fits(x, at=torch.tensor([math.nan, 0.0, -1.0, 3.0, 2.0], dtype=torch.float64))
    assert fit.ks.isnan().tolist() == [True, True, True, True, False]
    assert fit.tail_count[-1] == 2


@pytest.mark.parametrize("fits", [power_law, exponential, log_normal, truncated_power_law])
@given(
    kind=st.sampled_from(sorted(KINDS)), n=st.integers(4, 40), seed=st.integers(0, 999),
    scale=st.floats(-60, 60).map(lambda power: 2.0 ** round(power)), two_sided=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_scale_order_and_padding_do_not_matter(
    fits: Callable[..., PowerLaw], kind: str, n: int, seed: int, scale: float, two_sided: bool
) -> None:
    x = sample(kind, n, seed)
    other = scale * np.random.default_rng(seed).permutation(x)
    fit = fits(batch(x), two_sided=two_sided)
    again = fits(batch(np.append(other, [0, -1, math.nan])), two_sided=two_sided)
    same = {"xmin": scale, "rate": 1 / scale}
    for name in fit.__dataclass_fields__:
        want = getattr(fit, name) * same.get(name, 1)
        want = want + math.log(scale) if name == "mu" else want
        # A scale of a power of two rounds nothing; vectors of another length take other code for their last entries.
        assert torch.allclose(getattr(again, name), want, rtol=1e-9, atol=1e-9, equal_nan=True), name


def test_a_batch_of_several_pieces_gives_what_single_rows_give() -> None:
    x = torch.from_numpy(np.stack([sample("body and tail", 700, seed) for seed in range(100)]))
    fit = power_law(x)
    for i in (0, 44, 45, 46, 90, 99):
        assert row(fit, i) == pytest.approx(row(power_law(x[i : i + 1])), rel=1e-12)


@pytest.mark.parametrize(("alpha", "k"), [(1.7, 40), (2.5, 120), (5.0, 300)])
def test_alpha_lies_within_its_standard_error_as_often_as_it_should(alpha: float, k: int) -> None:
    runs = 600
    rng = np.random.default_rng(11)
    x = torch.from_numpy((1 - rng.random((runs, k))) ** (-1 / (alpha - 1)))
    fit = power_law(x, at=torch.ones(runs, dtype=torch.float64))
    off = (fit.alpha - alpha).abs() / fit.alpha_stderr_fixed_xmin
    # alpha - 1 is biased upward by 1 / k of itself, which costs at most a hundredth of the coverage at k = 40.
    for width, share in ((1.0, 0.6827), (1.96, 0.95)):
        allowance = 3.5 * math.sqrt(share * (1 - share) / runs) + 0.4 / k
        assert (off <= width).double().mean().item() == pytest.approx(share, abs=allowance)


def test_the_search_finds_where_a_power_law_begins() -> None:
    rng = np.random.default_rng(2)
    runs, k = 60, 600
    body = np.exp(-np.abs(rng.normal(size=(runs, k)))) * 2  # below 2, with most of its mass near there
    tail = 2 * (1 - rng.random((runs, k))) ** (-1 / 1.5)
    fit = power_law(torch.from_numpy(np.concatenate([body, tail], 1)))
    # The search may stop short of 2 or go beyond it: alpha's spread is then that of the tail left, not of all of it.
    assert fit.alpha.median().item() == pytest.approx(2.5, abs=0.1)
    assert ((fit.alpha - 2.5).abs() <= 3 * fit.alpha_stderr_fixed_xmin).double().mean() >= 0.85
    assert fit.xmin.median().item() == pytest.approx(2, rel=0.25)


def test_noise_without_a_power_law_is_not_given_a_small_distance() -> None:
    rng = np.random.default_rng(4)
    pareto, normal = 1 + rng.pareto(1.5, (20, 400)), np.abs(5 + rng.normal(size=(20, 400)))
    start = torch.ones(20, dtype=torch.float64)
    good, bad = power_law(torch.from_numpy(pareto), at=start), power_law(torch.from_numpy(normal), at=start)
    assert bad.ks.min() > 3 * good.ks.max()
