"""Tables of scores: quality, differences, intervals and p-values by hand."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from diffract.errors import RunError
from diffract.evaluate import Task, paired, summarise
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
