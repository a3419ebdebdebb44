"""Choice by likelihood."""

from __future__ import annotations

import torch

from diffract.evaluate import Subject
from diffract.evaluate.scoring import BatchLimit, score_choices
from diffract.evaluate.tasks import MultipleChoice


def straightforward(subject: Subject, choice: MultipleChoice) -> str:
    """The option with the highest mean log-likelihood per byte, each computed alone."""
    means = []
    for option in choice.options:
        before = len(subject.encode([choice.prompt])[0]) + 1
        ids = torch.tensor([[*subject.start, *subject.encode([f"{choice.prompt} {option}"])[0]]])
        with torch.no_grad():
            logs = torch.log_softmax(subject.model(input_ids=ids).logits[0].double(), dim=-1)
        means.append(sum(float(logs[i - 1, ids[0, i]]) for i in range(before, ids.shape[1])) / len(option.encode()))
    return choice.options[means.index(max(means))]


def test_the_likeliest_option_by_its_bytes_is_taken(subject: Subject) -> None:
    options = (("3", "seven hundred"), ("yes", "no", "maybe so"), ("é", "e", "€"), ("ab", "cd", "ef", "gh", "ij"))
    choices = [MultipleChoice(str(i), f"Question: number {i}?\nAnswer:", o, i % len(o)) for i, o in enumerate(options)]
    scores = score_choices(subject, choices, BatchLimit(10_000))
    expected = [straightforward(subject, c) for c in choices]
    assert [s.output for s in scores] == expected
    assert [s.value for s in scores] == [
        float(taken == c.options[c.right]) for taken, c in zip(expected, choices, strict=True)
    ]
    assert score_choices(subject, choices, BatchLimit(1)) == scores


def test_equal_options_give_the_first(subject: Subject) -> None:
    subject.model.lm_head.weight.data.zero_()  # every token costs the same
    # with the blank before it "abc" has 4 tokens for 3 bytes, "ab" 3 for 2: the longer one is cheaper by the byte
    first, second = score_choices(
        subject, [MultipleChoice("a", "x", ("ab", "cd"), 0), MultipleChoice("b", "x", ("ab", "abc"), 0)], BatchLimit(99)
    )
    assert (first.output, second.output) == ("ab", "abc")


def test_a_prompt_that_is_too_long_loses_its_beginning(subject: Subject) -> None:
    notes: list[str] = []
    short = MultipleChoice("a", "y" * (subject.context - 3), ("b", "c"), 0)
    long = MultipleChoice("a", "z" * 100 + short.prompt, short.options, 0)
    one, other = (score_choices(subject, [c], BatchLimit(10_000, notes.append))[0] for c in (short, long))
    assert one.output in short.options
    assert other.output in short.options
    assert notes == ["2 options with their prompts are longer than the context; their beginnings were cut off"]
