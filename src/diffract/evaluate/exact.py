"""Exact match of the final number."""

from __future__ import annotations

from collections.abc import Sequence

from diffract.evaluate.answers import is_right
from diffract.evaluate.batches import Budget
from diffract.evaluate.generate import Prompt, generate
from diffract.evaluate.subject import Subject
from diffract.evaluate.task import Question, Score


def score_questions(subject: Subject, questions: Sequence[Question], budget: Budget) -> list[Score]:
    """Return 1 for each question whose greedy answer ends in the right number, else 0, with the answer itself.

    A prompt that leaves no room for an answer in the model's context is not asked; it counts as wrong, without output.
    """
    asked: dict[int, Prompt] = {}
    for i, (question, tokens) in enumerate(zip(questions, subject.encode([q.prompt for q in questions]), strict=True)):
        ids = [*subject.start, *tokens]
        room = min(question.tokens, subject.context - len(ids))
        if room > 0 and ids:
            asked[i] = Prompt(ids, room, question.id)
    answers = dict(zip(asked, generate(subject, list(asked.values()), budget), strict=True))
    return [_score(q, answers.get(i)) for i, q in enumerate(questions)]


def _score(question: Question, answer: str | None) -> Score:
    right = answer is not None and is_right(answer, question.answer)
    return Score(question.id, float(right), 1.0, answer)
