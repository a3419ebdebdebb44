"""Verdicts follow from intervals, by one rule."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from diffract.stats import spearman_pvalue
from diffract.studies.finding import Number, better, median, rank_correlation
from diffract.studies.findings.changes import vectors
from diffract.studies.study import write_noise

SAMPLES = Path(__file__).parents[2] / "samples" / "tiny-olmo2"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.3, "holds"), (-0.3, -0.1, "does not hold"), (-0.1, 0.3, "cannot tell"), (0.0, 0.3, "cannot tell")],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(low: float, high: float, verdict: str) -> None:
    assert better(Number("gain", (low + high) / 2, low=low, high=high), "it is better")[0] == verdict


def test_a_number_without_an_interval_cannot_tell() -> None:
    verdict, because = better(Number("gain", 5.0), "it is better")
    assert verdict == "cannot tell"
    assert "no interval" in because


def test_the_median_and_its_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 101)
    found = median("m", [*values, None])
    assert found.value == np.median(values)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 3.0 < found.high
    # the asymptotic interval of a normal sample's median has half width 1.96 * 1.2533 / sqrt(n) = 0.244
    assert 0.2 < found.high - found.low < 0.9
    assert median("m", [None]).value is None
    assert median("m", [2.0, 2.0]).low == 2.0


def test_a_rank_correlation_covers_its_true_value() -> None:
    """In nine tenths of normal samples and more: 0.9 is four standard errors below 0.95 at 200 samples, 0.0154 each."""
    draw, truth, hits = np.random.default_rng(0), 6 / np.pi * np.arcsin(0.5 / 2), 0
    for _ in range(200):
        a, b = draw.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 30).T
        found = rank_correlation("r", a, b)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= truth <= found.high
        assert found.value == pytest.approx(stats.spearmanr(a, b).statistic)
    assert hits / 200 >= 0.89


def test_p_values_of_rank_correlations_are_uniform_without_correlation() -> None:
    """A tenth of 500 is below 0.1: 50 with a standard deviation of 6.7, and four of them are allowed."""
    draw = np.random.default_rng(1)
    ps = [spearman_pvalue(float(np.asarray(stats.spearmanr(*draw.normal(size=(2, 20))))[0]), 20) for _ in range(500)]
    assert abs(sum(p < 0.1 for p in ps) - 50) < 27


def test_what_was_taken_out_widens_the_interval() -> None:
    a, b = np.arange(12.0), np.array([0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10.0])
    plain, partial = rank_correlation("r", a, b), rank_correlation("r", a, b, given=3)
    assert plain.value == partial.value
    assert plain.low is not None
    assert partial.low is not None
    assert partial.low < plain.low


def test_few_points_have_no_interval() -> None:
    assert rank_correlation("r", [1, 2, 3, 4], [1, 3, 2, 4]).low is None
    assert rank_correlation("r", [1, 1, 1, 1, 1], [1, 3, 2, 4, 5]).value is None


def test_values_are_held_against_noise_of_the_same_norm(tmp_path: Path) -> None:
    """Continued training moves singular values less than noise does; other noise does not, though 99% turns vectors."""
    tuned = str(SAMPLES / "math")
    write_noise(str(SAMPLES / "base"), tuned, tmp_path / "noise")
    write_noise(str(SAMPLES / "base"), tuned, tmp_path / "other", seed=1)

    def study(model: str) -> Any:
        return SimpleNamespace(
            base=str(SAMPLES / "base"), tuned={"math": model}, noise=lambda _: str(tmp_path / "noise"),
            recipe=SimpleNamespace(target="math"), say=lambda _: None,
        )  # fmt: skip

    found = vectors.test(study(tuned))
    assert found.verdict == "holds"
    less, moved, of_noise = (number.value for number in found.numbers[:3])
    assert less is not None
    assert moved is not None
    assert of_noise is not None
    assert moved < 0.8 * of_noise
    assert vectors.test(study(str(tmp_path / "other"))).verdict == "cannot tell"
