"""Choice among options by their likelihood."""

from __future__ import annotations

from collections.abc import Sequence

from diffract.evaluate.batches import Budget
from diffract.evaluate.likelihood import Row, row_bits
from diffract.evaluate.subject import Subject
from diffract.evaluate.task import Choice, Score


def score_choices(subject: Subject, choices: Sequence[Choice], budget: Budget) -> list[Score]:
    """Return 1 for each question whose right option is the likeliest one, else 0, with the option taken.

    An option's score is log p(option | prompt) by the UTF-8 bytes of the option, so that short options have no
    advantage (``acc_norm`` of lm-evaluation-harness). Of equal ones the first is taken. What is longer than the
    model's context loses its beginning.
    """
    rows = [row for choice in choices for row in _rows(subject, choice)]
    if shortened := sum(len(row.ids) - 1 > subject.context for row in rows):
        budget.note(
            f"{shortened} options with their prompts are longer than the context; their beginnings were cut off"
        )
    kept = [Row(row.ids[-subject.context - 1 :], min(row.scored, subject.context), row.item) for row in rows]
    bits = iter(row_bits(subject, kept, budget))
    return [_score(choice, [next(bits) for _ in choice.options]) for choice in choices]


def _rows(subject: Subject, choice: Choice) -> list[Row]:
    """Return prompt and option as one text, of which the option's tokens count."""
    prompt, *whole = subject.encode([choice.prompt, *(f"{choice.prompt} {option}" for option in choice.options)])
    return [Row([*subject.start, *ids], max(1, len(ids) - len(prompt)), choice.id) for ids in whole]


def _score(choice: Choice, bits: Sequence[float]) -> Score:
    by_byte = [b / max(1, len(option.encode())) for b, option in zip(bits, choice.options, strict=True)]
    taken = by_byte.index(min(by_byte))
    return Score(choice.id, float(taken == choice.right), 1.0, choice.options[taken])
