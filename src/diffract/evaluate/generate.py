"""Greedy answers of a model, in batches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffract.errors import CheckpointError, printable
from diffract.evaluate.batches import Budget, run_batches
from diffract.evaluate.subject import Subject

END = re.compile(r"####[^\n]*\n|\n\s*Question:")
"""Where an answer ends: after the line of the final number, or before another question."""

LOOK_EVERY = 8
"""Tokens after which answers are looked at for their end; what was said beyond it is cut off."""


@dataclass(frozen=True)
class Prompt:
    """What a model goes on from.

    Attributes:
        ids: Its tokens; the answer must leave room for one more in the context.
        tokens: Of the answer, at most.
        item: What to call it in a message.
    """

    ids: Sequence[int]
    tokens: int
    item: str


def generate(subject: Subject, prompts: Sequence[Prompt], budget: Budget) -> list[str]:
    """Return the model's greedy answers, each cut at its end.

    Prompts are padded on the left, masked, and computed with prompts of about the same length; rounding apart, an
    answer does not depend on the others of its batch. The model's own generation settings (sampling, penalties) do not
    count.

    Raises:
        CheckpointError: Logits are NaN, or memory does not suffice for one prompt.
    """
    answers: dict[int, str] = {}
    with _plain_generation(subject.model):
        for tokens in sorted(
            {p.tokens for p in prompts}
        ):  # so that no row goes on beyond what its context has room for
            own = [i for i, p in enumerate(prompts) if p.tokens == tokens]
            found = run_batches(
                [prompts[i] for i in own],
                lambda p: len(p.ids) + p.tokens,
                lambda batch: _batch_answers(subject, batch),
                budget,
            )
            answers.update(zip(own, found, strict=True))
    return [answers[i] for i in range(len(prompts))]


def shorten(answer: str) -> str:
    r"""Return an answer up to its end.

    >>> shorten(" 1+1 = 2\n#### 2\nQuestion: What")
    ' 1+1 = 2\n#### 2\n'
    """
    match = END.search(answer)
    if match is None:
        return answer
    return answer[: match.end() if match[0].startswith("####") else match.start()]


@torch.inference_mode()
def _batch_answers(subject: Subject, prompts: list[Prompt]) -> list[str]:
    longest = max(len(p.ids) for p in prompts)
    ids = torch.full((len(prompts), longest), _padding(subject), dtype=torch.long)
    known = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt.ids) :] = torch.as_tensor(prompt.ids)
        known[i, longest - len(prompt.ids) :] = 1
    found = subject.model.generate(  # pyright: ignore[reportCallIssue] (transformers)
        input_ids=ids.to(subject.device),
        attention_mask=known.to(subject.device),
        do_sample=False,
        max_new_tokens=prompts[0].tokens,
        eos_token_id=subject.tokenizer.eos_token_id,
        pad_token_id=_padding(subject),
        stopping_criteria=[_Ended(subject, len(prompts), longest)],
        logits_processor=[_Numbers(subject, prompts)],
    )
    answers = found[:, longest:].tolist()
    return [shorten(_text(subject, ids)) for ids in answers]


def _text(subject: Subject, ids: list[int]) -> str:
    """Return what was said before the token for an end."""
    end = subject.tokenizer.eos_token_id
    return subject.decode(ids[: ids.index(end)] if end in ids else ids)


def _padding(subject: Subject) -> int:
    """Any token will do, as it is masked."""
    tokenizer = subject.tokenizer
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


class _Ended:
    """Says of each row whether its answer has ended."""

    def __init__(self, subject: Subject, rows: int, longest: int) -> None:
        self.subject, self.longest = subject, longest
        self.ended = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if (ids.shape[1] - self.longest) % LOOK_EVERY == 0:
            going = [i for i, ended in enumerate(self.ended.tolist()) if not ended]
            texts = [self.subject.decode(row) for row in ids[going, self.longest :].tolist()]
            self.ended[going] = torch.tensor([END.search(t) is not None for t in texts], dtype=torch.bool)
        return self.ended.to(ids.device)


class _Numbers:
    """Refuses logits that are NaN: the largest of them is no answer."""

    def __init__(self, subject: Subject, prompts: Sequence[Prompt]) -> None:
        self.subject, self.prompts = subject, prompts

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        lost = torch.isnan(scores).any(dim=-1)
        if bool(lost.any()):
            item = self.prompts[int(lost.nonzero()[0])].item
            raise CheckpointError(
                f"{printable(self.subject.name)}: logits of {printable(item)} are NaN. The weights hold NaN or Inf, "
                "or the dtype overflows; try --dtype float32."
            )
        return scores


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Set a model's own generation settings aside."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
