"""Final numbers, and OpenAI's own grading of model solutions.

``gsm8k_solutions.jsonl`` is an extract of openai/grade-school-math@3101c7d507,
grade_school_math/data/example_model_solutions.jsonl (MIT, see gsm8k_solutions.licence.txt): every way in which an
answer is written there, right and wrong.
"""

from __future__ import annotations

import gzip
import json
import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffract.evaluate.grading import final_number, is_right

SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
DATA = os.environ.get("DIFFRACT_DATA")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = <<3+4=7>>7\n#### 7", 7),
        ("#### 7\nand then 8", 7),
        ("#### 1,234,567", 1234567),
        ("#### $1,000.50", Fraction(2001, 2)),
        ("#### -$5", -5),
        ("#### $-5", -5),
        ("#### −5", -5),
        ("#### 26.", 26),
        ("####26.0", 26),
        ("#### 50%", 50),
        ("#### .5", Fraction(1, 2)),
        ("#### 3/4", Fraction(3, 4)),
        ("#### nothing\nA: 9", 9),
        ("A: 26\nA: 27", 27),
        ("The answer is 26.", 26),
        ("the answer is: $12 dollars, as 13 is odd", 12),
        ("He has 16-3=13 left", 13),
        ("He has 16 - 3", 3),
        ("about 1,2", 2),
        ("so x2 is 5.", 5),
        ("the work <<1+1=2>> shows nothing", None),
        ("none at all", None),
        ("", None),
        ("#### 1/0", 1),  # no fraction; the numerator is what can be read
        ("9" * 5000, None),
    ],
)
def test_final_number(text: str, number: Fraction | int | None) -> None:
    assert final_number(text) == number


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "{}.0", "{}.", "${}", "{} apples"]))
def test_a_whole_number_is_read_however_it_is_written(value: int, form: str) -> None:
    assert final_number(f"1+1 = <<1+1=2>>2\n#### {form.format(value)}\n") == value


@pytest.mark.parametrize(
    ("answer", "right", "verdict"),
    [
        ("#### 26.0", "#### 26", True),
        ("#### 10000001", "#### 10000000", False),  # whole numbers are equal or not, however large
        ("#### 0.333333", "1/3", True),
        ("#### 0.3333", "1/3", False),
        ("no idea", "#### 1", False),
        ("#### 1", "no idea", False),
    ],
)
def test_is_right(answer: str, right: str, verdict: bool) -> None:
    assert is_right(answer, right) is verdict


def test_grading_is_openais_own() -> None:
    lines = (Path(__file__).parent / "gsm8k_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 50
    assert {row["is_correct"] for row in rows} == {True, False}
    assert [is_right(row["solution"], row["ground_truth"]) for row in rows] == [row["is_correct"] for row in rows]


@pytest.mark.skipif(
    DATA is None, reason="DIFFRACT_DATA names no folder with math/gsm8k.example_model_solutions.jsonl.gz"
)
def test_grading_is_openais_own_on_all_solutions() -> None:
    with gzip.open(
        Path(str(DATA)) / "math" / "gsm8k.example_model_solutions.jsonl.gz", "rt", encoding="utf-8"
    ) as lines:
        rows = [json.loads(line) for line in lines]
    graded = [is_right(row[s]["solution"], row["ground_truth"]) for row in rows for s in SOLVERS]
    assert len(graded) == 4 * 1319
    assert graded == [row[s]["is_correct"] for row in rows for s in SOLVERS]
