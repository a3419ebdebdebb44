"""Concentration over heads, and what the deltas of several domains share."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diffract.metrics.concentration import (
    delta_cosine,
    delta_cosine_chance,
    gini,
    lorenz,
    reference_score,
    scale01,
    spearman,
    split_domains,
    top_share,
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
    assert top_share(values)[0] == pytest.approx(1 - held[-1 - k], abs=1e-13)
    assert (np.diff(held, 2) >= -1e-13).all()  # convex


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


# Domains


def gram_of(deltas: np.ndarray) -> np.ndarray:
    """Inner products of (*heads, D, entries)."""
    return deltas @ deltas.swapaxes(-1, -2)


def test_cosine_of_deltas() -> None:
    deltas = np.random.default_rng(0).standard_normal((5, 3, 40))
    found = delta_cosine(gram_of(deltas))
    for head in range(5):
        for a in range(3):
            for b in range(3):
                x, y = deltas[head, a], deltas[head, b]
                want = x @ y / (np.linalg.norm(x) * np.linalg.norm(y))
                assert found[head, a, b] == pytest.approx(want, abs=1e-14)
    deltas[2, 1] = 0.0
    found = delta_cosine(gram_of(deltas))
    assert np.isnan(found[2, 1]).all()
    assert int(np.isnan(found).sum()) == 5


def test_chance_of_the_cosine() -> None:
    entries = 50
    deltas = np.random.default_rng(0).standard_normal((4000, 2, entries))
    squares = delta_cosine(gram_of(deltas))[:, 0, 1] ** 2
    # cos^2 is Beta(1/2, (n-1)/2): mean 1/n, variance below 2/n^2; five standard errors.
    assert squares.mean() == pytest.approx(delta_cosine_chance(entries) ** 2, abs=5 * math.sqrt(2 / 4000) / entries)
    share = split_domains(gram_of(np.random.default_rng(1).standard_normal((4000, 5, entries)))).share
    assert share[:, 0].mean() == pytest.approx(1 / entries, abs=5 * math.sqrt(2 / 4000) / entries)


def test_split_by_hand() -> None:
    # D_1 = (2, 0), D_2 = (2, 2), D_3 = (0, 1): means of the others (1, 1.5), (1, 0.5), (2, 1)
    found = split_domains(gram_of(np.array([[2.0, 0], [2, 2], [0, 1]])))
    assert found.mean_squares == pytest.approx((4**2 + 3**2) / 9, rel=1e-15)
    assert found.shared_squares == pytest.approx((4 + 0 + 2) / 3, rel=1e-15)
    cosine = [2 / math.sqrt(4 * 3.25), 3 / math.sqrt(8 * 1.25), 1 / math.sqrt(5)]
    assert found.cosine == pytest.approx(cosine, rel=1e-14)
    assert found.share == pytest.approx([c * c for c in cosine], rel=1e-14)
    assert found.specific_squares == pytest.approx([4 * (1 - 4 / 13), 8 * (1 - 0.9), 0.8], rel=1e-14)


@pytest.mark.parametrize("domains", [2, 3, 8, 40])
def test_planted_shared_and_specific_parts(domains: int) -> None:
    # Orthogonal parts exactly: ||S||^2 = s, ||N_a||^2 = v.
    s, v = 3.0, 5.0
    deltas = np.concatenate([np.full((domains, 1), math.sqrt(s)), math.sqrt(v) * np.eye(domains)], 1)
    found = split_domains(gram_of(deltas))
    assert found.shared_squares == pytest.approx(s, rel=1e-13)
    assert found.mean_squares == pytest.approx(s + v / domains, rel=1e-13)
    assert found.share == pytest.approx(s / (s + v) * s / (s + v / (domains - 1)), rel=1e-13)
    assert found.share + found.specific_squares / (s + v) == pytest.approx(1.0, rel=1e-13)


def test_noise_alone_is_not_shared() -> None:
    found = split_domains(gram_of(math.sqrt(5) * np.eye(4)))
    assert found.shared_squares == 0
    assert found.share.tolist() == [0.0] * 4
    assert found.mean_squares == pytest.approx(5 / 4)  # while the plain mean would say otherwise


def test_a_domain_against_the_others_has_a_negative_cosine() -> None:
    found = split_domains(gram_of(np.array([[1.0, 0], [1, 0], [-1, 0]])))
    assert found.cosine[2] == pytest.approx(-1.0, rel=1e-15)
    assert found.share[2] == pytest.approx(1.0, rel=1e-15)


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_share_is_that_of_the_deltas_themselves(seed: int, domains: int) -> None:
    deltas = np.random.default_rng(seed).standard_normal((2, domains, 15))
    deltas *= 10.0 ** np.random.default_rng(seed).integers(-4, 4, (2, domains, 1))
    found = split_domains(gram_of(deltas))
    assert found.share.shape == (2, domains)
    for head in range(2):
        assert found.mean_squares[head] == pytest.approx((deltas[head].mean(0) ** 2).sum(), rel=1e-10)
        for a in range(domains):
            own, others = deltas[head, a], np.delete(deltas[head], a, 0).mean(0)
            rest = own - others * (own @ others) / (others @ others)
            assert found.specific_squares[head, a] == pytest.approx(rest @ rest, rel=1e-10)
            assert 1 - found.share[head, a] == pytest.approx(rest @ rest / (own @ own), rel=1e-10)


def test_domains_that_did_not_change() -> None:
    deltas = np.random.default_rng(0).standard_normal((3, 3, 10))
    want = split_domains(gram_of(deltas))
    deltas[1, 0], deltas[2, 1:] = 0.0, 0.0
    found = split_domains(gram_of(deltas))
    assert np.isnan(found.share[1]).tolist() == [True, False, False]
    assert np.isnan(found.share[2]).all()
    assert np.array_equal(found.share[0], want.share[0])
    alone = split_domains(np.array([[2.0]]))
    assert math.isnan(float(alone.shared_squares))
    assert np.isnan(alone.share).all()
    assert alone.mean_squares == 2.0
