"""The final number of an answer, and whether it is the right one."""

from __future__ import annotations

import re
from fractions import Fraction

CALCULATOR = re.compile(r"<<[^<>\n]*>>")
"""GSM8K's marks, which show a calculator's work."""

NUMBER = re.compile(
    r"""(?<![\w.])(?P<sign>[-−]?)(?:[$€£]\s?)?(?P<minus>-?)
    (?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
    (?:\s?/\s?(?P<below>\d+)(?![\d.,]*\d))?""",
    re.VERBOSE,
)

MARKS = (
    re.compile(r"####[ \t]*(?P<rest>[^\n]*)"),
    re.compile(r"^[ \t]*A:[ \t]*(?P<rest>[^\n]*)", re.MULTILINE),
    re.compile(r"\banswer is:?\s*(?P<rest>[^\n]*)", re.IGNORECASE),
)
"""What stands before the final number, the surest first."""

LONGEST = 300
"""Digits of what counts as a number."""

TOLERANCE = Fraction(1, 10**6)
"""Relative, for right answers that are no whole numbers: 0.333333 is one third. Whole numbers must be equal."""


def final_number(text: str) -> Fraction | None:
    """Return the final number of an answer, or ``None`` where it has none.

    It is the first number after ``####``; without that mark, after the last ``A:`` at a line's beginning; without that,
    after the last "answer is"; without that, the last number of all. Calculator marks do not count. A mark without a
    number after it is none.

    >>> final_number("He has 48/2 = <<48/2=24>>24 left. #### $1,024.0")
    Fraction(1024, 1)
    """
    bare = CALCULATOR.sub("", text)
    for place, mark in enumerate(MARKS):
        found = [m for m in (NUMBER.search(found["rest"]) for found in mark.finditer(bare)) if m]
        if found:
            return _value(found[0 if place == 0 else -1])
    every = list(NUMBER.finditer(bare))
    return _value(every[-1]) if every else None


def is_right(answer: str, right: str) -> bool:
    """Return whether an answer's final number is that of the right answer.

    Whole numbers must be equal, however they are written (26.0 is 26); others within one millionth.
    """
    found, wanted = final_number(answer), final_number(right)
    if found is None or wanted is None:
        return False
    return found == wanted or (wanted.denominator != 1 and abs(found - wanted) <= TOLERANCE * abs(wanted))


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > LONGEST:
        return None
    value = Fraction(match["number"].replace(",", ""))
    below = int(match["below"] or 1)
    value = value / below if below else value
    return -value if match["sign"] or match["minus"] else value
