"""The table of graded answers in docs/evaluate.md: each as a person reads it, beside lm-evaluation-harness' two rules.

Run as a script it writes the table anew; the column "read" comes from ``ANSWERS`` and is what a person reads.
"""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pytest

from diffract.evaluate.grading import final_number
from diffract.evaluate.scoring import shorten

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"
BEGIN, END = "<!-- graded answers -->\n", "<!-- end of graded answers -->"
HEAD = "| answer | read | strict | flexible |\n|---|---|---|---|\n"

ANSWERS: list[tuple[str, str | None]] = [
    ("#### 1,024", "1024"),
    ("#### $1,024.00", "1024"),
    ("#### 1 024", "1024"),
    ("####1024", "1024"),
    ("#### -5", "-5"),
    ("#### −5", "-5"),
    ("#### -$5", "-5"),
    ("#### $-5", "-5"),
    ("#### 25%", "25"),
    ("#### 25 %", "25"),
    ("#### .5", "1/2"),
    ("#### 3/4", "3/4"),
    ("#### 1 1/2", "3/2"),
    ("#### 1½ hours", "3/2"),
    ("#### 2.5e3", "2500"),
    ("#### 6.02E+2", "602"),
    ("#### 3 x 10^4", "30000"),
    ("#### 18 eggs", "18"),
    ("#### 18km", "18"),
    ("#### 5 m^2", "5"),
    ("#### 5 m²", "5"),
    ("#### 42.", "42"),
    ("#### **42**", "42"),
    ("#### $\\boxed{42}$", "42"),
    ("#### The answer is 42", "42"),
    ("#### Answer: 42", "42"),
    ("#### 5 + 3 = 8", "8"),
    ("#### €1.024,50", "2049/2"),
    ("#### USD 12", "12"),
    ("#### Rs. 500", "500"),
    ("#### 1.5 million", "1500000"),
    ("#### (12)", "12"),
    ("#### Step 1\nAdd 2 and 3 to get 5.\n#### Step 2\nDouble it.\n#### 10", "10"),
    ("#### Step 1: 2+3=5\nThe answer is 10.", "10"),
    ("#### 1. Count\nThere are 4.\n#### 2. Double\n4*2=8\n#### 8", "8"),
    ("##### 3 steps\nSo it is 9.", "9"),
    ("#### 7\nQuestion: How many? Answer: 9\n#### 12", "7"),
    ("#### nothing\nA: 9", "9"),
    ("So \\boxed{42}.", "42"),
    ("$\\boxed{-7}$", "-7"),
    ("\\boxed{\\frac{3}{4}}", "3/4"),
    ("\\boxed{\\dfrac{1}{2}}", "1/2"),
    ("\\boxed{1{,}024}", "1024"),
    ("\\boxed{10\\,000}", "10000"),
    ("\\boxed{\\$18}", "18"),
    ("\\boxed{18 \\text{ dollars}}", "18"),
    ("\\boxed{25\\%}", "25"),
    ("\\boxed{x = 5}", "5"),
    ("\\boxed{2 \\times 10^{3}}", "2000"),
    ("First \\boxed{3}, no: \\boxed{4}", "4"),
    ("\\boxed 6", "6"),
    ("The answer is 26.", "26"),
    ("The answer is: $12, as 13 is odd", "12"),
    ("**Answer:** 42", "42"),
    ("Final Answer: 1,000 people", "1000"),
    ("The answer is 3 out of 10.", "3"),
    ("The final answer is $\\frac12$.", "1/2"),
    ("The answer is 20% of 50 = 10.", "10"),
    ("Therefore the answer would be -3 degrees.", "-3"),
    ("Answer = 15", "15"),
    ("A: 26\nA: 27", "27"),
    ("He has 16-3=13 left", "13"),
    ("He pays $1,250.75 in total.", "5003/4"),
    ("so x2 is 5.", "5"),
    ("It costs Rs.500.", "500"),
    ("10 000 are left", "10000"),
    ("There are 5 apples and 3 pears, 8 fruits.", "8"),
    ("10⁻³", "1/1000"),
    ("the work <<1+1=2>> shows nothing", None),
    ("none at all", None),
    ("", None),
    ("I cannot say.", None),
]
"""Answers, a line's end as it is, and the number that a person reads in them."""


def strict(text: str) -> str | None:
    """Return what the harness' strict rule takes: digits, points and commas right behind ``#### ``."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found[1] if found else None


def flexible(text: str) -> str | None:
    """Return what its flexible rule takes: the last run of digits, signs of dollar, points and commas."""
    found = [a or b for a, b in re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)]
    return found[-1].strip() if found else None


def harness_reads(taken: str | None) -> Fraction | None:
    """Return the number that the harness compares, commas, dollars and a last point left out; else nothing."""
    try:
        return None if taken is None else Fraction(re.sub(r"[,$]", "", taken).rstrip("."))
    except ValueError:
        return None


def number_text(value: Fraction | None) -> str:
    return "none" if value is None else str(value)


def table() -> str:
    rows = []
    for text, wanted in ANSWERS:
        want = None if wanted is None else Fraction(wanted)
        others = [harness_reads(rule(text)) for rule in (strict, flexible)]
        told = ["same" if other == want else f"**{number_text(other)}**" for other in others]
        shown = text.replace("\n", " ⏎ ")
        rows.append(f"| {f'`{shown}`' if shown else '(nothing)'} | {number_text(want)} | {' | '.join(told)} |\n")
    return HEAD + "".join(rows)


@pytest.mark.parametrize(("text", "wanted"), ANSWERS)
def test_a_number_is_read_as_a_person_reads_it(text: str, wanted: str | None) -> None:
    assert final_number(text) == (None if wanted is None else Fraction(wanted))


def test_the_table_stands_in_the_docs() -> None:
    assert len(ANSWERS) >= 60
    page = PAGE.read_text(encoding="utf-8")
    assert page[page.index(BEGIN) + len(BEGIN) : page.index(END)] == table()


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("2+2=4\n#### 4\nQuestion: What", "2+2=4\n#### 4\n"),
        ("#### Step 1\nAdd.\n#### 5\nmore", "#### Step 1\nAdd.\n#### 5\n"),
        ("#### Step 1: add\nsum 5", "#### Step 1: add\nsum 5"),
        ("It is 5.\n\nQuestion: What is 6?", "It is 5."),
        ("It is 5.<stop> And 6.", "It is 5."),
    ],
)
def test_an_answer_ends_where_its_number_is_said(said: str, kept: str) -> None:
    assert shorten(said, ["<stop>"]) == kept


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page[: page.index(BEGIN) + len(BEGIN)] + table() + page[page.index(END) :], encoding="utf-8")
