"""Tables of scores: quality, differences, intervals and p-values by hand."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from diffract.errors import RunError
from diffract.evaluate import Task, paired, summarise
from diffract.schemas import ITEM_SCORES

BITS = Task("text", "bits", "held-out", "k", "lower", "bits per byte")
GSM = Task("gsm", "exact", "held-out", "k", "higher", "accuracy")


def table(name: str, values: list[float], weights: list[float] | None = None) -> pl.DataFrame:
    weights = weights or [1.0] * len(values)
    rows = [(name, str(i), v, w, None) for i, (v, w) in enumerate(zip(values, weights, strict=True))]
    return pl.DataFrame(rows, schema=ITEM_SCORES, orient="row")


def test_summary_by_hand() -> None:
    bits = table("text", [8.0, 4.0, 6.0, 2.0, 4.0], [2.0, 4.0, 2.0, 1.0, 3.0])
    items = pl.concat([bits, table("gsm", [1.0, 0.0, 0.0, 0.0])])
    found = summarise(items, [GSM, BITS])
    assert found["task"].to_list() == ["gsm", "text"]
    assert found["quality"].to_list() == [0.25, 2.0]  # 24 bits by 12 bytes
    assert found["items"].to_list() == [4, 5]
    # Wilson's interval of 1 of 4, by its formula; Student's t of five ratios about 2, 2.776 of four degrees of freedom:
    # squared residuals value - 2 weight are 16, 16, 4, 0, 4, and 2.776 sqrt(5 / 4 * 40) / 12 = 1.636
    assert found.select("low", "high").row(0) == pytest.approx((0.04559, 0.69936), abs=1e-5)
    assert found.select("low", "high").row(1) == pytest.approx((2 - 1.6360, 2 + 1.6360), abs=1e-3)


def test_pieces_of_one_document_are_one_observation() -> None:
    """Each piece five times over says nothing new; four documents are too few for an interval."""
    alone = table("text", [8.0, 4.0, 6.0, 2.0, 4.0, 5.0])
    names = [f"{document}:{piece}" for document in range(6) for piece in range(5)]
    pieces = pl.concat([alone] * 5).sort("item").with_columns(item=pl.Series(names))
    ends = [summarise(items, [BITS]).select("quality", "low", "high").row(0) for items in (alone, pieces)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-12)
    tests = [paired(items, items.with_columns(pl.col("value") + 1), [BITS])["p"][0] for items in (alone, pieces)]
    assert tests[0] == tests[1]
    few = summarise(pieces.head(20), [BITS]).row(0, named=True)
    assert (few["low"], few["high"], few["items"]) == (None, None, 20)
    row = paired(pieces.head(20), pieces.head(20), [BITS]).row(0, named=True)
    assert (row["difference"], row["low"], row["high"], row["p"]) == (0.0, None, None, 1.0)


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
