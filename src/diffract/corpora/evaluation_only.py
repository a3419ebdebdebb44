"""Data that is for evaluation: scores mean nothing once a model has been trained on it."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import PurePath

from diffract.corpora.splits import digest
from diffract.errors import CorpusError, printable

NAMES = (
    *("gsm8k.test*", "gsm8k_test*", "gsm8k.example_model_solutions*", "gsm_hard*", "gsmhard*", "gsm8k_main_test*"),
    *("humaneval*", "human-eval*", "HumanEval*", "user_oriented_instructions*", "svamp*", "SVAMP*"),
    *("aqua.dev*", "aqua.test*", "tal_scq5k_en.test*", "mbpp*"),
)
"""Names of files and data sets that nothing is trained on."""

DIGITS = 12
"""Of the digests of questions that are kept."""


def refuse_evaluation_only(name: str, questions: Iterable[str] = ()) -> None:
    """Raise if something is for evaluation only.

    Args:
        name: Of a file or data set.
        questions: What is asked in it, as far as that is known: GSM8K's test questions are told under any name.

    Raises:
        CorpusError: It is.
    """
    bare = PurePath(name).name
    if any(fnmatchcase(bare, pattern) for pattern in NAMES):
        raise CorpusError(f"{printable(name)} is for evaluation only: do not train on it. Choose other text.")
    for number, question in enumerate(questions, start=1):
        if question and digest(" ".join(question.split()))[:DIGITS] in _gsm8k_test():
            raise CorpusError(f"{printable(name)}, record {number} is a question of GSM8K's test: do not train on it.")


@cache
def _gsm8k_test() -> frozenset[str]:
    """Return the beginnings of the digests of GSM8K's test questions, blanks made one."""
    return frozenset((files("diffract.corpora") / "gsm8k_test.txt").read_text().split())
