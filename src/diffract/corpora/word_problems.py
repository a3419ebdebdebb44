"""Made-up word problems in GSM8K's format, graded in difficulty, for models of a few million parameters.

A problem is an instance: a template and its numbers. Instances, not texts, are split, so that a held-out problem is in
no training text under other names either.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from diffract.corpora.splits import Document, Split, digest, question_text, split_of
from diffract.errors import CorpusError, printable

NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Eva")
THINGS = ("apples", "books", "coins", "pens", "cards", "eggs", "balls", "stones")

LEVELS = (1, 2, 3, 4)
"""A step with numbers up to 20; a step with larger ones, multiplying or sharing; two steps; three steps."""

COUNT = {"train": 40_000, "selection": 1_000, "held-out": 1_000}
"""Problems in each split of the corpus."""

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """A kind of problem.

    Attributes:
        level: How hard it is.
        text: The question; ``{A}``, ``{B}`` are people, ``{t}`` things, ``{0}``, ``{1}`` numbers.
        limits: For each number the least and the largest.
        solve: Makes steps of the numbers: an expression and its value, the last of which is the answer; ``None`` if the
            numbers make no sense together.
    """

    level: int
    text: str
    limits: tuple[tuple[int, int], ...]
    solve: Callable[..., tuple[tuple[str, int], ...] | None]


def _add(a: int, b: int) -> tuple[str, int]:
    return f"{a}+{b}", a + b


def _take(a: int, b: int) -> tuple[str, int]:
    return f"{a}-{b}", a - b


def _times(a: int, b: int) -> tuple[str, int]:
    return f"{a}*{b}", a * b


def _share(a: int, b: int) -> tuple[str, int]:
    return f"{a}/{b}", a // b


def _chain(first: tuple[str, int], *rest: Callable[[int], tuple[str, int]]) -> tuple[tuple[str, int], ...] | None:
    """Return steps each of which goes on with the last value; none may fall below zero."""
    steps = [first]
    for step in rest:
        steps.append(step(steps[-1][1]))
    return tuple(steps) if all(value >= 0 for _, value in steps) else None


SMALL, MIDDLE, FACTOR, SCORE = (1, 20), (1, 50), (2, 9), (2, 30)

TEMPLATES = (
    Template(1, "{A} has {0} {t}. {B} gives {A} {1} more. How many {t} does {A} have?", (SMALL, SMALL),
             lambda a, b: (_add(a, b),)),
    Template(1, "{A} has {0} {t} and {B} has {1}. How many {t} do they have together?", (SMALL, SMALL),
             lambda a, b: (_add(a, b),)),
    Template(1, "{A} finds {0} {t} and then {1} more. How many {t} are that?", (SMALL, SMALL),
             lambda a, b: (_add(a, b),)),
    Template(1, "There are {0} {t} in a box. {A} adds {1}. How many {t} are in the box?", (SMALL, SMALL),
             lambda a, b: (_add(a, b),)),
    Template(1, "{A} has {0} {t} and gives {1} to {B}. How many {t} are left?", (SMALL, SMALL),
             lambda a, b: _chain(_take(a, b))),
    Template(1, "{A} has {0} {t}. {B} has {1} fewer. How many {t} does {B} have?", (SMALL, SMALL),
             lambda a, b: _chain(_take(a, b))),
    Template(1, "{A} had {0} {t} and lost {1}. How many {t} are left?", (SMALL, SMALL),
             lambda a, b: _chain(_take(a, b))),
    Template(1, "There are {0} {t} in a box. {A} takes {1}. How many {t} are in the box?", (SMALL, SMALL),
             lambda a, b: _chain(_take(a, b))),
    Template(2, "{A} has {0} {t} in one box and {1} in another. How many {t} does {A} have?", (MIDDLE, MIDDLE),
             lambda a, b: (_add(a, b),)),
    Template(2, "{A} has {0} {t} and {B} has {1}. How many more does {A} have?", (MIDDLE, MIDDLE),
             lambda a, b: _chain(_take(a, b))),
    Template(2, "{A} buys {0} boxes with {1} {t} each. How many {t} are that?", (FACTOR, SCORE),
             lambda a, b: (_times(a, b),)),
    Template(2, "{A} shares {0} {t} among {1} friends. How many {t} does each get?", ((4, 240), FACTOR),
             lambda a, b: (_share(a, b),) if a % b == 0 else None),
    Template(2, "One of the {t} costs {0} dollars. {A} buys {1}. How many dollars does {A} pay?", (SCORE, FACTOR),
             lambda a, b: (_times(a, b),)),
    Template(3, "{A} has {0} {t}, finds {1} more and gives {2} to {B}. How many {t} are left?", (SMALL, SMALL, SMALL),
             lambda a, b, c: _chain(_add(a, b), lambda x: _take(x, c))),
    Template(3, "{A} buys {0} boxes with {1} {t} each and loses {2}. How many {t} are left?", (FACTOR, FACTOR, SMALL),
             lambda a, b, c: _chain(_times(a, b), lambda x: _take(x, c))),
    Template(3, "{A} has {0} {t}. {B} has {1} times as many. How many {t} do they have together?", (SMALL, (2, 5)),
             lambda a, b: _chain(_times(a, b), lambda x: _add(x, a))),
    Template(4, "{A} buys {0} boxes with {1} {t} each, loses {2} and finds {3}. How many {t} does {A} have?",
             (FACTOR, FACTOR, SMALL, SMALL),
             lambda a, b, c, d: _chain(_times(a, b), lambda x: _take(x, c), lambda x: _add(x, d))),
    Template(4, "{A} has {0} {t} and {B} has {1}. They put them together and share them among {2} friends. "
             "{A} is one of them and had {3} hidden. How many {t} does {A} have now?", (SMALL, SMALL, (2, 5), (1, 9)),
             lambda a, b, c, d: _chain(_add(a, b), lambda x: _share(x, c), lambda x: _add(x, d))
             if (a + b) % c == 0 else None),
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: A digest of template and numbers; people and things do not count.
        level: 1 to 4.
        question: The text.
        answer: Steps with GSM8K's calculator marks, then ``#### n``.
        value: n.
    """

    id: str
    level: int
    question: str
    answer: str
    value: int


def make_problems(split: Split, count: int, *, levels: tuple[int, ...] = LEVELS, seed: int = 0) -> Iterator[Problem]:
    """Yield problems of a split; of selection and held-out problems no instance comes twice.

    Args:
        split: ``train``, ``selection`` or ``held-out``.
        count: How many, at most: a split of few levels has an end.
        levels: Which difficulties, all equally likely.
        seed: The seed of what is drawn.
    """
    draw = random.Random(f"{seed} {split} {levels}")
    by_level = {level: [t for t in TEMPLATES if t.level == level] for level in levels}
    place = {template.text: number for number, template in enumerate(TEMPLATES)}
    seen: set[str] = set()
    made = tries = 0
    while made < count and tries < 200 * count:
        tries += 1
        template = draw.choice(by_level[draw.choice(levels)])
        numbers = tuple(draw.randint(*limit) for limit in template.limits)
        people, thing = draw.sample(NAMES, 2), draw.choice(THINGS)
        steps = template.solve(*numbers)
        if steps is None:
            continue
        # Of twenty instances nineteen are of another split than a held-out one: their texts are not made at all.
        instance = digest(f"{place[template.text]} {numbers}")
        if split_of(instance) != split or (split != "train" and instance in seen):
            continue
        seen.add(instance)
        made += 1
        question = template.text.format(*numbers, A=people[0], B=people[1], t=thing)
        lines = [f"{expression} = <<{expression}={value}>>{value}" for expression, value in steps]
        answer = "\n".join([*lines, f"#### {steps[-1][1]}"])
        yield Problem(instance, template.level, question, answer=answer, value=steps[-1][1])


@cache
def problems_to_evaluate(split: Split, levels: tuple[int, ...]) -> tuple[Problem, ...]:
    """Return all problems of a split; drawing those of the smaller splits takes longer than reading a file."""
    return tuple({p.id: p for p in make_problems(split, COUNT[split], levels=levels)}.values())


def parse_levels(text: str) -> tuple[int, ...]:
    """Read which levels: ``2``, ``1-3``, or nothing for all.

    Raises:
        CorpusError: There are no such levels.
    """
    match = re.fullmatch(r"(\d)(?:-(\d))?", text) if text else None
    levels = tuple(range(int(match[1]), int(match[2] or match[1]) + 1)) if match else LEVELS
    if (text and not match) or not levels or not set(levels) <= set(LEVELS):
        raise CorpusError(f"word-problems: expected levels such as 2 or 1-3 of {LEVELS}, got {printable(text)!r}.")
    return levels


def problem_documents(levels: str, split: Split) -> Iterator[Document]:
    """Yield problems with their answers as texts."""
    wanted = parse_levels(levels)
    # Training takes tens of thousands, with repetitions: they are drawn one by one, not kept.
    training = split == "train"
    found = make_problems(split, COUNT[split], levels=wanted) if training else problems_to_evaluate(split, wanted)
    for problem in found:
        yield Document(problem.id, question_text(problem.question, problem.answer))
