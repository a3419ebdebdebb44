"""What the deltas of several domains have in common."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffract.metrics.pair import delta_cosine, delta_cosine_chance, split_domains


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
