"""The final number of an answer, read as a person reads it, and whether it is the right one."""

from __future__ import annotations

import re
from fractions import Fraction

CALCULATOR = re.compile(r"<<[^<>\n]*>>")
"""GSM8K's marks, which show a calculator's work."""

GAP = "[\\ \u00a0\u202f\u2009]"
"""Spaces that may stand between groups of three digits."""

SIGNS = "\\-\u2212\u2013"
"""Minus, as it is typed, as it is set, and the dash that takes its place."""

WORDS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

NUMBER = re.compile(
    rf"""(?<![\w^])(?<!\d\.)(?P<sign>[{SIGNS}]?)(?:[$€£¥₹]\s?)?(?P<minus>[{SIGNS}]?)
    (?:(?P<whole>\d+)\s+(?=\d+\s?/\s?\d))?
    (?P<number>\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?(?!\d)|\d{{1,3}}(?:\.\d{{3}})+,\d+(?!\d)
      |\d{{1,3}}(?:{GAP}\d{{3}})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|\.\d+)
    (?:\s?/\s?(?P<below>\d+)(?![\d.,]*\d))?
    (?:(?P<e>[eE][+{SIGNS}]?\d+)(?!\w)|\s?[x×*]\s?10\^?(?P<power>[{SIGNS}]?\d+)|\^(?P<own>[{SIGNS}]?\d+))?
    (?:\s?(?P<word>thousand|million|billion|trillion)\b)?""",
    re.VERBOSE | re.IGNORECASE,
)

ANSWER = r"\banswer(?:\s+(?:is|would\s+be|comes\s+to|to\s+(?:this|the)\s+(?:question|problem)\s+is)\b:?|\s*[:=])"
"""How words announce a final number."""

# The surest first. After the mark of GSM8K the number must follow at once, but for such words: a heading is no answer.
MARKS = (
    re.compile(
        rf"""(?<!\#)\#{{4}}(?!\#)[ \t]*(?:(?:the\s+)?(?:final\s+)?{ANSWER}\s*)?
        (?P<rest>(?:[*_$€£¥₹({SIGNS} \t=≈~]|[A-Z]{{2,3}}[ ]|Rs\.?[ ]?)*\.?\d(?!\d*[.):][ \t]+[A-Za-z])[^\n]*)""",
        re.VERBOSE | re.IGNORECASE,
    ),
    re.compile(r"\\boxed\s*(?P<rest>\{(?:[^{}\n]|\{[^{}\n]*\})*\}|\d)"),
    re.compile(r"^[ \t]*A:[ \t]*(?P<rest>[^\n]*)", re.MULTILINE),
    re.compile(rf"{ANSWER}\s*(?P<rest>[^\n]*)", re.IGNORECASE),
)
"""What stands before the final number, the surest first."""

LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}"), r" \1/\2 "),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r" \1/\2 "),
    (re.compile(r"(?<=\d)(?:\{,\}|\\,|\\!|\\;|~|\\ )(?=\d{3})"), ","),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\(?:times|cdot)\b\s?"), "×"),
    (re.compile(r"\^\{\s*([^{}]*?)\s*\}"), r"^\1"),
    (re.compile(r"\\([$%#&])"), r"\1"),
    (re.compile(r"\\[,;!: ]"), " "),
)
"""What LaTeX writes, and what is read for it."""

SMALL = {
    **{"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5"},
    **{"⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"},
}
"""Characters that are fractions."""

RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")

LONGEST = 300
"""Digits of what counts as a number."""

TOLERANCE = Fraction(1, 10**6)
"""Relative, for right answers that are no whole numbers: 0.333333 is one third. Whole numbers must be equal."""


def final_number(text: str) -> Fraction | None:
    r"""Return the final number of an answer, or ``None`` where it has none.

    It is the one after the first ``####`` that a number follows at once (a heading such as ``#### Step 1`` is none);
    without that mark, in the last ``\boxed{}``; without that, after the last ``A:`` at a line's beginning; without
    that, after the last "answer is" or "answer:"; without that, the last number of all. Where an equation follows a
    mark its right side counts. Calculator marks do not count. A mark without a number after it is none.

    >>> final_number("He has 48/2 = <<48/2=24>>24 left. #### $1,024.0")
    Fraction(1024, 1)
    """
    bare = _read(CALCULATOR.sub("", text))
    for place, mark in enumerate(MARKS):
        found = [m for m in (_marked(found["rest"]) for found in mark.finditer(bare)) if m]
        if found:
            # What follows the mark of GSM8K is another question; of other marks a later one corrects an earlier.
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


def _marked(rest: str) -> re.Match[str] | None:
    """Return the number that a mark announces: the first, or what an equation comes to."""
    sentence = re.split(r"[.;,]\s+(?=\D)", rest, maxsplit=1)[0]
    last = re.split(r"[=≈]", sentence)[-1]
    return NUMBER.search(last) or NUMBER.search(rest)


def _read(text: str) -> str:
    """Return a text without LaTeX's ways to write numbers, and without characters that are fractions or powers."""
    if "\\" in text or "{,}" in text or "^{" in text:
        for pattern, plain in LATEX:
            text = pattern.sub(plain, text)
    text = re.sub(f"([{''.join(SMALL)}])", lambda m: f" {SMALL[m[0]]}", text)
    return re.sub(r"(?<=\d)⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: f"^{m[0].translate(RAISED)}", text)


def _value(match: re.Match[str]) -> Fraction | None:
    # Powers of numbers without end would take memory without end.
    if len(match[0]) > LONGEST:
        return None
    text = re.sub(GAP, "", match["number"])
    if re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d+", text):  # a comma before the decimals, points between groups
        text = text.replace(".", "").replace(",", ".")
    value = Fraction(text.replace(",", ""))
    below = int(match["below"] or 1)
    value = value / below if below else value
    value += int(match["whole"] or 0)
    exponent = match["e"][1:] if match["e"] else match["power"]
    for base, text in ((Fraction(10), exponent), (value, match["own"])):
        power = int(re.sub(f"[{SIGNS}]", "-", text)) if text else None
        if power is None:
            continue
        if abs(power) > LONGEST or (power < 0 and not base):
            return None
        value = base**power * (value if base is not value else 1)
    value *= WORDS.get((match["word"] or "").lower(), 1)
    return -value if match["sign"] or match["minus"] else value
