"""Answers in words: generation, and exact match."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import GenerationConfig

from diffract.corpora import make_problems, question_text
from diffract.errors import CheckpointError
from diffract.evaluate import Subject, load_subject
from diffract.evaluate.scoring import LOOK_EVERY, BatchLimit, Prompt, generate, score_questions, shorten
from diffract.evaluate.tasks import Question
from tiny_language_model import byte_tokenizer, tiny_model

TEXTS = ["Question: 1+1?\nAnswer:", "a", "Anna has", "to be or not to be, that", "12", "####", "x" * 40]


@pytest.fixture(scope="module")
def learned() -> tuple[Subject, list[Question]]:
    """A model that knows four problems by heart."""
    problems = list(make_problems("train", 4, levels=(1,)))
    model = tiny_model(context=256)
    subject = load_subject(model, tokenizer=byte_tokenizer(), device="cpu")
    texts = [question_text(p.question, p.answer) for p in problems]
    rows = [[256, *ids, 256] for ids in subject.encode(texts)]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(150):
        loss = model(input_ids=ids.clamp(min=0), labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    questions = [Question(p.id, question_text(p.question), p.answer, 100) for p in problems]
    return subject, questions


def prompts_of(subject: Subject, texts: Sequence[str], tokens: int = 20) -> list[Prompt]:
    return [Prompt([*subject.start, *ids], tokens, str(i)) for i, ids in enumerate(subject.encode(texts))]


def straightforward(subject: Subject, prompt: Prompt) -> str:
    """One token after the other, everything computed anew for each."""
    ids = list(prompt.ids)
    while len(ids) < len(prompt.ids) + prompt.tokens:
        with torch.no_grad():
            ids.append(int(subject.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == subject.tokenizer.eos_token_id:
            break
    return shorten(subject.decode(ids[len(prompt.ids) :]))


def test_batches_say_what_one_after_the_other_says(subject: Subject) -> None:
    """In float32 the strings are the same; two tokens as likely as each other to 1e-6 could tip over, none are here."""
    prompts = prompts_of(subject, TEXTS)
    expected = [straightforward(subject, p) for p in prompts]
    assert len(set(expected)) > 3
    assert generate(subject, prompts, BatchLimit(10_000)) == expected
    assert generate(subject, prompts, BatchLimit(1)) == expected


def test_each_prompt_has_its_own_limit(subject: Subject) -> None:
    prompts = prompts_of(subject, ["a", "a"], tokens=30)
    short = Prompt(prompts[0].ids, 3, "short")
    long, cut = generate(subject, [prompts[0], short], BatchLimit(10_000))
    assert cut == subject.decode(subject.encode([long])[0][:3]) != long


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("#### 2\n#### 3\n", "#### 2\n"),
        ("1\n\nQuestion: what", "1"),
        (" 2\nQuestion", " 2\nQuestion"),
        ("#### 2", "#### 2"),
        ("", ""),
    ],
)
def test_an_answer_ends_with_its_number_or_before_a_question(said: str, kept: str) -> None:
    assert shorten(said) == kept


def test_a_model_answers_what_it_has_learned(learned: tuple[Subject, list[Question]]) -> None:
    subject, questions = learned
    wrong = Question("wrong", questions[0].prompt, "#### 999", 100)
    asked: list[int] = []
    forward = subject.model.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject.model, "forward", lambda **given: asked.append(1) or forward(**given))
        scores = score_questions(subject, [*questions, wrong], BatchLimit(10_000))
    assert [s.value for s in scores] == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert all(s.weight == 1.0 for s in scores)
    longest = max(len(q.answer) for q in questions)
    assert all(str(s.output).strip() == q.answer for s, q in zip(scores, questions, strict=False))
    assert len(asked) <= longest + 2 + LOOK_EVERY  # generation ends with the answers: blank, newline, and the look


def test_a_models_own_generation_settings_do_not_count(subject: Subject) -> None:
    expected = generate(subject, prompts_of(subject, TEXTS), BatchLimit(10_000))
    own = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0, max_new_tokens=1)
    subject.model.generation_config = own
    assert generate(subject, prompts_of(subject, TEXTS), BatchLimit(10_000)) == expected
    assert subject.model.generation_config is own


def test_a_prompt_without_room_is_wrong_and_has_no_output(subject: Subject) -> None:
    fits, full = "x" * (subject.context - 2), "x" * (subject.context - 1)  # and a token for a beginning
    scores = score_questions(subject, [Question("a", full, "1", 9), Question("b", fits, "1", 9)], BatchLimit(10_000))
    assert [(s.item, s.value, s.output is None) for s in scores] == [("a", 0.0, True), ("b", 0.0, False)]


def test_nan_while_answering_names_the_item(subject: Subject) -> None:
    dict(subject.model.named_parameters())["model.norm.weight"].data[:] = torch.nan
    with pytest.raises(CheckpointError, match="logits of q7 are NaN"):
        score_questions(subject, [Question("q7", "1+1?", "2", 9)], BatchLimit(10_000))
