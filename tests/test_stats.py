"""Concentration, ranks, scores, intervals and p-values: closed forms, other people's code, and coverage."""

import math
from itertools import product

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binom, binomtest

from diffract.stats import (
    bootstrap,
    difference_interval,
    document_interval,
    gini,
    holm,
    lorenz,
    mcnemar,
    newcombe,
    quality_interval,
    ratio_of_sums,
    reference_score,
    scale01,
    sign_flip,
    spearman,
    top_count,
    top_share,
    wilson,
)

VALUES = arrays(np.float64, st.integers(3, 30), elements=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 7.0, 11.0]))


# Concentration


def test_lorenz_by_hand() -> None:
    share, held = lorenz(np.array([4.0, 1.0, 3.0, 2.0]))
    assert share.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert held.tolist() == [0.0, 0.1, 0.3, 0.6, 1.0]


@given(VALUES)
def test_gini_is_twice_the_area_above_the_lorenz_curve(values: np.ndarray) -> None:
    share, held = lorenz(values)
    if values.sum() == 0:
        assert math.isnan(gini(values))
        assert np.isnan(held).all()
        return
    area = scipy.integrate.trapezoid(held, share)
    assert gini(values) == pytest.approx(1 - 2 * area, abs=1e-13)  # sums of thirty terms
    k = math.ceil(0.1 * len(values))
    assert top_share(values) == pytest.approx(1 - held[-1 - k], abs=1e-13)
    assert (np.diff(held, 2) >= -1e-13).all()  # convex


def test_gini() -> None:
    assert gini(np.array([1.0, 3.0])) == pytest.approx(0.25, rel=1e-15)
    assert gini(np.array([3.0, 1.0])) == gini(np.array([1.0, 3.0]))
    assert gini(np.full(7, 2.0)) == pytest.approx(0.0, abs=1e-15)
    assert gini(np.eye(10)[3]) == pytest.approx(0.9, rel=1e-12)
    values = np.random.default_rng(0).random(20)
    pairs = np.abs(values[:, None] - values).sum() / (2 * 20 * values.sum())
    assert gini(values) == pytest.approx(pairs, rel=1e-12)
    assert math.isnan(gini(np.zeros(3)))
    assert math.isnan(gini(np.array([])))


def test_top_share() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert (top_share(values, 0.5), top_count(4, 0.5)) == (0.7, 2)
    assert (top_share(values, 0.1), top_count(4)) == (0.4, 1)  # one, as it is rounded up
    assert top_share(values, 1.0) == 1.0
    assert math.isnan(top_share(np.zeros(4)))
    assert [top_count(n) for n in (30, 31, 32)] == [3, 4, 4]
    rows = np.random.default_rng(0).random((5, 33))
    assert top_share(rows).tolist() == [float(top_share(row)) for row in rows]


def test_lorenz_of_nothing() -> None:
    share, held = lorenz(np.array([]))
    assert share.tolist() == [0.0]
    assert np.isnan(held).all()


# Ranks and scores


@given(VALUES, st.integers(0, 2**32 - 1))
def test_spearman_is_scipys(first: np.ndarray, seed: int) -> None:
    second = np.random.default_rng(seed).choice(first, len(first)) + 0.5 * first
    found = spearman(first, second)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        assert math.isnan(found)
        return
    assert found == pytest.approx(scipy.stats.spearmanr(first, second).statistic, abs=1e-13)  # sums of thirty terms


def test_spearman_by_hand() -> None:
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 8, 27, 64])) == pytest.approx(1.0, rel=1e-15)
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1])) == pytest.approx(-1.0, rel=1e-15)
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: centred products 2.25 - .0 + .0 + 2.25 = 4.5; sizes 4.5 and 5
    assert spearman(np.array([0.0, 5, 5, 9]), np.array([1.0, 2, 3, 4])) == pytest.approx(4.5 / math.sqrt(22.5))


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0], [3.0, 3.0, 3.0], [1.0, math.nan, 2.0]])
def test_spearman_of_too_little(values: list[float]) -> None:
    other = np.arange(float(len(values)))
    assert math.isnan(spearman(np.array(values), other))
    assert math.isnan(spearman(other, np.array(values)))


def test_scale01() -> None:
    assert scale01(np.array([[5.0, 1.0], [2.0, 3.0]])).tolist() == [[1.0, 0.0], [0.25, 0.5]]
    found = scale01(np.array([5.0, math.nan, 1.0, math.inf, 2.0]))
    assert found[[0, 2, 4]].tolist() == [1.0, 0.0, 0.25]
    assert np.isnan(found[[1, 3]]).all()
    for values in ([2.0, 2.0], [], [1.0], [math.nan, math.nan]):
        assert np.isnan(scale01(np.array(values))).all()
        assert scale01(np.array(values)).shape == (len(values),)


def test_reference_score() -> None:
    domain, reference = np.array([3.0, 1.0, 2.0, 1.0]), np.array([0.1, 0.1, 0.3, 0.2])
    assert reference_score(domain, reference) == pytest.approx([1.0, 0.0, -0.5, -0.5], abs=1e-15)
    # Units do not matter, nor what both share.
    assert reference_score(7 * domain + 3, reference) == pytest.approx([1.0, 0.0, -0.5, -0.5], abs=1e-14)


def test_spearman_of_rows_is_that_of_each() -> None:
    first, second = np.random.default_rng(0).random((2, 7, 12))
    first[3], second[4, 2] = 1.0, math.nan
    want = [float(spearman(a, b)) for a, b in zip(first, second, strict=True)]
    np.testing.assert_equal(spearman(first, second), want)
    assert [i for i, rho in enumerate(want) if math.isnan(rho)] == [3, 4]


# Sampled numbers


@pytest.mark.parametrize("statistic", ["median", "spearman"])
def test_bootstrap_is_scipys(statistic: str) -> None:
    samples = np.random.default_rng(0).random((2, 32))[: 1 if statistic == "median" else 2]
    own = (lambda v: np.median(v, axis=-1)) if statistic == "median" else spearman
    theirs = np.median if statistic == "median" else lambda a, b: scipy.stats.spearmanr(a, b).statistic
    found = scipy.stats.bootstrap(
        tuple(samples), theirs, paired=True, n_resamples=300, method="percentile", rng=0, vectorized=False
    )
    assert bootstrap(own, *samples, resamples=300) == pytest.approx(tuple(found.confidence_interval), rel=1e-14)


def test_interval_of_an_accuracy_is_the_binomials() -> None:
    """Drawn sums of 0/1 items are binomial(n, k / n)."""
    n, k, resamples = 200, 60, 20_000
    low, high = bootstrap(ratio_of_sums, np.repeat([1.0, 0.0], [k, n - k]), np.ones(n), resamples=resamples)
    # quantiles of 20,000 draws have a standard error of about sqrt(.025 * .975 / 20,000) / density = 0.0023 * 6.5 / n,
    # less than the step 1 / n between possible values
    assert abs(low - binom.ppf(0.025, n, k / n) / n) <= 1 / n + 1e-12
    assert abs(high - binom.ppf(0.975, n, k / n) / n) <= 1 / n + 1e-12


def test_draws_in_chunks_are_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    value, weight = np.random.default_rng(1).random((2, 50))
    whole = bootstrap(ratio_of_sums, value, weight)
    monkeypatch.setattr("diffract.stats.DRAWS_AT_ONCE", 50 * 7)
    assert bootstrap(ratio_of_sums, value, weight) == whole


def test_interval_covers_as_often_as_it_says() -> None:
    """Bits per byte of 80 items of different lengths, 400 times."""
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        weight = draw.integers(1000, 6000, size=80).astype(float)
        value = weight * draw.normal(2.0, 0.3, size=80)
        low, high = bootstrap(ratio_of_sums, value, weight, resamples=400, seed=int(draw.integers(1 << 31)))
        covered += low <= 2.0 <= high
    # a 95% interval covers 380 of 400 with a standard error of sqrt(400 * .95 * .05) = 4.4; the percentile interval of
    # 80 items is about 1% too narrow, 4 of 400: 380 - 4 +- 3 * 4.4
    assert 362 <= covered <= 394


@pytest.mark.parametrize(("right", "count"), [(0, 80), (1, 80), (40, 80), (80, 80), (1, 1)])
def test_wilson_is_scipys(right: int, count: int) -> None:
    known = binomtest(right, count).proportion_ci(method="wilson")
    assert wilson(right, count) == pytest.approx((known.low, known.high), abs=1e-12)


@pytest.mark.parametrize(
    ("both", "first", "second", "neither", "ends"),
    [
        (36, 12, 2, 0, (0.0569, 0.3404)),  # table II of Newcombe 1998
        (30, 0, 0, 50, None),
        (0, 0, 0, 80, None),
        (0, 80, 0, 0, None),
    ],
)
def test_newcombe(both: int, first: int, second: int, neither: int, ends: tuple[float, float] | None) -> None:
    a = np.repeat([1.0, 1.0, 0.0, 0.0], [both, first, second, neither])
    b = np.repeat([1.0, 0.0, 1.0, 0.0], [both, first, second, neither])
    low, high = newcombe(b, a)
    assert -1 <= low <= a.mean() - b.mean() <= high <= 1
    assert high > low  # where the two never differ too
    assert newcombe(a, b) == pytest.approx((-high, -low))
    if ends is not None:
        assert (low, high) == pytest.approx(ends, abs=1e-4)


def test_newcombe_covers_as_often_as_it_says() -> None:
    """Pairs of shares 0.1 and 0.25 that go together; 0.92 is 2.8 standard errors below 0.95 of 400 draws."""
    draw, hits = np.random.default_rng(0), 0
    for _ in range(400):
        hard = draw.random(60)
        before, after = (hard + 0.2 * (draw.random((2, 60)) - 0.5) < np.array([[0.1], [0.25]])).astype(float)
        low, high = newcombe(before, after)
        hits += low <= 0.15 <= high  # uniform noise of 0.2 leaves the share of a cut of 0.1 and more as it is
    assert hits / 400 >= 0.92


@pytest.mark.parametrize("documents", [5, 8, 19, 30])
def test_intervals_cover_where_pieces_of_a_document_are_alike(documents: int) -> None:
    """Documents of 1 to 12 pieces; 0.91 is three standard errors below 0.95 of 300 draws. Pieces as items: two thirds.

    The percentile bootstrap itself covers 0.93 with thirty documents, which leaves two standard errors.
    """
    draw, hits, naive = np.random.default_rng(1), 0, 0
    for _ in range(300):
        document = np.repeat(np.arange(documents), draw.integers(1, 13, documents))
        own = draw.normal(2.0, 0.5, documents)[document] + draw.normal(0.0, 0.2, len(document))
        weight = draw.uniform(1500, 2048, len(document))
        low, high = document_interval(own * weight, weight, document, resamples=400)
        hits += low <= 2.0 <= high
        low, high = bootstrap(ratio_of_sums, own * weight, weight, resamples=200)
        naive += low <= 2.0 <= high
    assert hits / 300 >= 0.9
    assert naive / 300 < 0.75


def test_items_of_their_own_are_judged_by_kind() -> None:
    right, one = (np.arange(30) < 4).astype(float), np.ones(30)
    alone, shared = np.arange(30), np.arange(30) // 3
    assert quality_interval(right, one, alone) == wilson(4, 30)
    assert quality_interval(right, one, shared) == document_interval(right, one, shared)
    assert quality_interval(right / 2, one, alone) == document_interval(right / 2, one, alone)
    assert difference_interval(right, one, one, alone) == newcombe(right, one)
    assert difference_interval(right, one, one, shared) == document_interval(one - right, one, shared)
    assert np.isnan(quality_interval(right, one, np.arange(30) % 4)).all()


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_scipys_binomial_test(pairs: list[tuple[bool, bool]]) -> None:
    a, b = np.array(pairs, dtype=float).T
    only_a, only_b = int((a > b).sum()), int((a < b).sum())
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)  # two ways of summing binomial terms in float64


def test_sign_flip_is_the_share_of_all_sign_vectors() -> None:
    difference = np.array([0.3, -0.1, 0.7, 0.2, -0.05, 0.4])
    sums = [abs(np.dot(signs, difference)) for signs in product([-1, 1], repeat=6)]
    exact = np.mean(np.array(sums) >= difference.sum() - 1e-12)
    # the standard error of 20,000 draws is sqrt(p (1 - p) / 20,000) < 0.0036; three of them
    assert sign_flip(difference, resamples=20_000) == pytest.approx(exact, abs=0.011)
    assert sign_flip(np.zeros(5)) == 1.0
    assert sign_flip(np.full(100, 0.1)) == 1 / 2001  # none of 2,000 draws has all signs alike


def test_sign_flip_rejects_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    p = [sign_flip(draw.standard_t(3, size=30), resamples=199, seed=i) for i in range(400)]
    # 5% of 400 are 20, standard error 4.4; three of them
    assert 7 <= sum(x <= 0.05 for x in p) <= 33


def straightforward_holm(p: list[float]) -> list[float]:
    """From the definition: reject in order while p_(i) <= alpha / (n - i + 1); the least alpha that rejects each."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    found, highest = {}, 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, p[i] * (len(p) - rank)))
        found[i] = highest
    return [found[i] for i in range(len(p))]


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm(p: list[float]) -> None:
    assert holm(p) == straightforward_holm(p)
