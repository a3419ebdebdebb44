"""Intervals and p-values: closed forms, other people's code, and coverage."""

from __future__ import annotations

from itertools import product

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from diffract.errors import RunError
from diffract.evaluate import Task, holm, paired, summarise
from diffract.evaluate.statistics import bootstrap, mcnemar, sign_flip
from diffract.tables import ITEM_SCORES

BITS = Task("text", "bits", "held-out", "k", "lower", "bits per byte")
GSM = Task("gsm", "exact", "held-out", "k", "higher", "accuracy")


def table(name: str, values: list[float], weights: list[float] | None = None) -> pl.DataFrame:
    weights = weights or [1.0] * len(values)
    rows = [(name, str(i), v, w, None) for i, (v, w) in enumerate(zip(values, weights, strict=True))]
    return pl.DataFrame(rows, schema=ITEM_SCORES, orient="row")


def test_summary_by_hand() -> None:
    items = pl.concat([table("text", [8.0, 4.0], [2.0, 4.0]), table("gsm", [1.0, 0.0, 0.0, 0.0])])
    found = summarise(items, [GSM, BITS])
    assert found["task"].to_list() == ["gsm", "text"]
    assert found["quality"].to_list() == [0.25, 2.0]  # 12 bits by 6 bytes
    assert found["items"].to_list() == [4, 2]
    # of two items, draws are (a, a), (a, b), (b, b): ratios 4, 2, 1, the outer ones a quarter of the time each
    assert found.select("low", "high").row(1) == (1.0, 4.0)


def test_interval_of_an_accuracy_is_the_binomials() -> None:
    """Drawn sums of 0/1 items are binomial(n, k / n)."""
    n, k, resamples = 200, 60, 20_000
    low, high = bootstrap(np.repeat([1.0, 0.0], [k, n - k]), np.ones(n), resamples=resamples)
    # quantiles of 20,000 draws have a standard error of about sqrt(.025 * .975 / 20,000) / density = 0.0023 * 6.5 / n,
    # less than the step 1 / n between possible values
    assert abs(low - binom.ppf(0.025, n, k / n) / n) <= 1 / n + 1e-12
    assert abs(high - binom.ppf(0.975, n, k / n) / n) <= 1 / n + 1e-12


def test_draws_in_chunks_are_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    value, weight = np.random.default_rng(1).random((2, 50))
    whole = bootstrap(value, weight)
    monkeypatch.setattr("diffract.evaluate.statistics.DRAWS_AT_ONCE", 50 * 7)
    assert bootstrap(value, weight) == whole


def test_interval_covers_as_often_as_it_says() -> None:
    """Bits per byte of 80 items of different lengths, 400 times."""
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        weight = draw.integers(1000, 6000, size=80).astype(float)
        value = weight * draw.normal(2.0, 0.3, size=80)
        low, high = bootstrap(value, weight, resamples=400, seed=int(draw.integers(1 << 31)))
        covered += low <= 2.0 <= high
    # a 95% interval covers 380 of 400 with a standard error of sqrt(400 * .95 * .05) = 4.4; the percentile interval of
    # 80 items is about 1% too narrow, 4 of 400: 380 - 4 +- 3 * 4.4
    assert 362 <= covered <= 394


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


def test_paired_by_hand() -> None:
    a = table("gsm", [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    b = table("gsm", [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]).sample(fraction=1.0, shuffle=True, seed=0)
    row = paired(a, b, [GSM]).row(0, named=True)
    assert row["difference"] == row["gain"] == pytest.approx(4 / 7, abs=1e-15)
    assert row["p"] == pytest.approx(2 * (1 + 6) / 2**6, abs=1e-15)  # 1 of 6 discordant items is a's
    assert row["low"] <= row["difference"] <= row["high"]


def test_less_bits_are_a_gain_and_pairing_narrows_the_interval() -> None:
    draw = np.random.default_rng(0)
    weights = draw.integers(1000, 6000, size=100).astype(float)
    bits = weights * draw.normal(2.0, 0.4, size=100)
    a, b = (
        table("text", bits.tolist(), weights.tolist()),
        table("text", (bits - 0.05 * weights).tolist(), weights.tolist()),
    )
    row = paired(a, b, [BITS]).row(0, named=True)
    for name in ("difference", "low", "high"):
        assert row[name] == pytest.approx(-0.05, abs=1e-9)  # every item gains alike; sums of 1e5 in float64
    assert row["gain"] == -row["difference"]
    assert row["p"] == 1 / 2001
    own = summarise(a, [BITS]).row(0, named=True)
    assert own["high"] - own["low"] > 0.05


def test_a_comparison_needs_the_same_items() -> None:
    a = table("gsm", [1.0, 0.0])
    with pytest.raises(RunError, match="2 and 1 items, 1 of them the same"):
        paired(a, a.head(1), [GSM])
    with pytest.raises(RunError, match="no scores of task 'text'"):
        summarise(a, [BITS])
    with pytest.raises(RunError, match="0 of them the same"):
        paired(a, a.with_columns(weight=pl.lit(2.0)), [GSM])
