"""Made-up word problems: right answers, and no instance in two splits."""

from __future__ import annotations

import re

import pytest

from diffract.corpora import make_problems
from diffract.corpora.word_problems import COUNT, LEVELS, parse_levels, problem_documents
from diffract.errors import CorpusError


@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_right_and_as_long_as_the_level_says(level: int) -> None:
    steps_of = {1: 1, 2: 1, 3: 2, 4: 3}
    for problem in make_problems("train", 300, levels=(level,)):
        marks = re.findall(r"<<([^=]+)=(\d+)>>", problem.answer)
        assert len(marks) == steps_of[level]
        assert all(eval(expression) == int(value) for expression, value in marks)  # "12/4" gives 3.0
        assert problem.answer.endswith(f"#### {problem.value}")
        assert int(marks[-1][1]) == problem.value >= 0
        numbers = set(re.findall(r"\d+", problem.question))
        assert set(re.findall(r"\d+", marks[0][0])) <= numbers


def test_no_instance_is_in_two_splits() -> None:
    parts = [{p.id for p in make_problems(split, count)} for split, count in {**COUNT, "train": 4000}.items()]
    assert all(len(part) > 500 for part in parts)
    assert len(set.union(*parts)) == sum(map(len, parts))


def test_they_repeat_by_seed() -> None:
    first, again, other = (list(make_problems("train", 50, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_held_out_instances_come_once() -> None:
    found = [p.id for p in make_problems("held-out", 600, levels=(2,))]
    assert len(found) == len(set(found)) < 600


def test_as_documents() -> None:
    one = next(iter(problem_documents("2", "train")))
    assert re.fullmatch(r"Question: .*\nAnswer: .*\n#### \d+\n", one.text, re.DOTALL)


def test_levels() -> None:
    assert (parse_levels(""), parse_levels("2"), parse_levels("1-3")) == (LEVELS, (2,), (1, 2, 3))
    for text in ("0", "3-1", "9", "easy"):
        with pytest.raises(CorpusError, match="expected levels"):
            parse_levels(text)
