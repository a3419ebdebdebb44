"""Scores of items: bits of text, answers, choices, computed in batches as large as memory allows."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from math import log, log2
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffract.corpora import Document
from diffract.errors import CheckpointError, CorpusError, printable
from diffract.evaluate.grading import MARKS, is_right
from diffract.evaluate.model import Subject
from diffract.evaluate.tasks import MultipleChoice, Piece, Question, Score

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class BatchLimit:
    """How much is computed at once.

    Attributes:
        tokens: The most in a batch, padding included; halved when memory runs out. One item is a batch in any case.
        notes: Takes what the user should know.
    """

    tokens: int
    notes: Callable[[str], None] | None = None

    def note(self, text: str) -> None:
        """Tell the user something, if anybody listens."""
        if self.notes is not None:
            self.notes(text)


def run_batches(
    items: Sequence[T],
    length: Callable[[T], int],
    compute: Callable[[list[T]], list[R]],
    *,
    budget: BatchLimit,
    most: int | None = None,
) -> list[R]:
    """Return the results of items in their order; long ones are computed first, and together with long ones.

    Args:
        items: What is to be done.
        length: Tokens that an item needs in a batch where it is the longest.
        compute: Does a batch.
        budget: How much at once; it stays halved where memory ran out.
        most: Tokens in a batch, where something else bounds them further.

    Raises:
        CheckpointError: Memory does not suffice for one item.
    """
    order = sorted(range(len(items)), key=lambda i: (-length(items[i]), i))
    results: dict[int, R] = {}
    while order:
        longest = max(1, length(items[order[0]]))
        allowed = budget.tokens if most is None else min(budget.tokens, most)
        # One item at least, however long: with less nothing would ever be done.
        batch = order[: max(1, allowed // longest)]
        found = _tried(compute, [items[i] for i in batch], longest)
        if found is None:
            _halve(budget, len(batch) * longest)
            continue
        results.update(zip(batch, found, strict=True))
        order = order[len(batch) :]
    return [results[i] for i in range(len(items))]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether memory ran out; on a CPU torch has no class for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _tried(compute: Callable[[list[T]], list[R]], batch: list[T], longest: int) -> list[R] | None:
    """Return a batch's results, or ``None`` if memory ran out; what it held is free by then."""
    try:
        return compute(batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(batch) == 1:
            raise CheckpointError(
                f"out of memory with one item of {longest} tokens. Use another device, or a smaller dtype."
            ) from error
    return None


def _halve(budget: BatchLimit, tokens: int) -> None:
    # Half of what was tried, not of the limit: the batch may have been far below it.
    budget.tokens = max(1, tokens // 2)
    budget.note(f"out of memory: batches of {budget.tokens} tokens from here on")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield consecutive parts of at most ``size`` items."""
    for begun in range(0, len(items), size):
        yield items[begun : begun + size]


NEXT = re.compile(r"\n\s*Question:")
"""Another question: what a model goes on with that was trained on rows of them."""

LOOK_EVERY = 8
"""Tokens after which answers are looked at for their end; what was said beyond it is cut off."""


@dataclass(frozen=True)
class Prompt:
    """What a model goes on from.

    Attributes:
        ids: The tokens of the prompt; they leave room for one more in the context.
        tokens: How many tokens the answer has at most.
        item: What to call the prompt in a message.
    """

    ids: Sequence[int]
    tokens: int
    item: str


def generate(subject: Subject, prompts: Sequence[Prompt], budget: BatchLimit) -> list[str]:
    """Return the model's greedy answers, each cut at its end.

    An answer ends with the line of its final number, before another question, or where the model ends it (see
    `Subject.ends`). Prompts are padded on the left, masked, and computed with prompts of about the same length;
    rounding apart, an answer does not depend on the others of its batch. What a recurrent model has read stays in its
    state, a masked token too: its batches hold prompts of one length, without padding. The model's own generation
    settings (sampling, penalties) do not count.

    Raises:
        CheckpointError: Logits are NaN, or memory does not suffice for one prompt.
    """
    # A batch goes on for one number of tokens, and no row may go on beyond what its context has room for.
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        alike[prompt.tokens, len(prompt.ids) if subject.recurrent else 0].append(i)
    ends, answers = (subject.ends, subject.stops), {}
    with _plain_generation(subject.model):
        for _, own in sorted(alike.items()):
            found = run_batches(
                [prompts[i] for i in own],
                lambda p: len(p.ids) + p.tokens,
                lambda batch: _batch_answers(subject, batch, ends),
                budget=budget,
            )
            answers.update(zip(own, found, strict=True))
    return [answers[i] for i in range(len(prompts))]


def shorten(answer: str, stops: Sequence[str] = ()) -> str:
    r"""Return an answer up to its end.

    Args:
        answer: What a model said.
        stops: What ends it as well; not part of the answer.

    >>> shorten(" 1+1 = 2\n#### 2\nQuestion: What")
    ' 1+1 = 2\n#### 2\n'
    """
    end = _end(answer, stops)
    return answer if end is None else answer[:end]


def _end(answer: str, stops: Sequence[str]) -> int | None:
    """Return where an answer ends, ``None`` while it goes on."""
    # by where each begins: the line of a final number is part of the answer, though another question may follow it
    found = [(m.start(), m.end() + 1) for m in MARKS[0].finditer(answer) if m.end() < len(answer)]
    found += [(m.start(), m.start()) for m in NEXT.finditer(answer)]
    found += [(answer.index(stop), answer.index(stop)) for stop in stops if stop in answer]
    return min(found)[1] if found else None


@torch.inference_mode()
def _batch_answers(subject: Subject, prompts: list[Prompt], ends: tuple[list[int], list[str]]) -> list[str]:
    tokens, stops = ends
    longest = max(len(p.ids) for p in prompts)
    ids = torch.full((len(prompts), longest), _padding(subject), dtype=torch.long)
    known = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        # Padding stands before the prompts: what is said must follow the prompt's last token.
        ids[i, longest - len(prompt.ids) :] = torch.as_tensor(prompt.ids)
        known[i, longest - len(prompt.ids) :] = 1
    found = subject.model.generate(  # pyright: ignore[reportCallIssue] (transformers)
        input_ids=ids.to(subject.device),
        attention_mask=known.to(subject.device),
        do_sample=False,
        max_new_tokens=prompts[0].tokens,
        eos_token_id=tokens or None,
        pad_token_id=_padding(subject),
        stopping_criteria=[_Ended(subject, stops, len(prompts), longest=longest)],
        logits_processor=[_Numbers(subject, prompts)],
    )
    answers = [list(takewhile(lambda token: token not in tokens, ids)) for ids in found[:, longest:].tolist()]
    return [shorten(subject.decode(ids), stops) for ids in answers]


def _padding(subject: Subject) -> int:
    # Any token that the embedding has will do, as it is masked; tokenizers name some that it has no row for.
    named = (subject.tokenizer.pad_token_id, subject.tokenizer.eos_token_id)
    return next((t for t in named if t is not None and 0 <= t < subject.vocabulary), 0)


class _Ended:
    """Says of each row whether its answer has ended."""

    def __init__(self, subject: Subject, stops: Sequence[str], rows: int, *, longest: int) -> None:
        self.subject, self.stops, self.longest = subject, stops, longest
        self.ended = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if (ids.shape[1] - self.longest) % LOOK_EVERY == 0:
            going = [i for i, ended in enumerate(self.ended.tolist()) if not ended]
            texts = [self.subject.decode(row) for row in ids[going, self.longest :].tolist()]
            self.ended[going] = torch.tensor([_end(t, self.stops) is not None for t in texts], dtype=torch.bool)
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


LOGITS_BYTES = 1 << 31
"""A batch has no more bytes of float32 logits."""

POSITIONS_AT_ONCE = 1024
"""The logits of so many positions are upcast at a time."""


@dataclass(frozen=True)
class Row:
    """A sequence of tokens.

    Attributes:
        ids: All but the last are given to the model, all but the first are predicted.
        scored: How many of the last ones count.
        item: What to call it in a message.
    """

    ids: Sequence[int]
    scored: int
    item: str


def row_bits(subject: Subject, rows: Sequence[Row], budget: BatchLimit) -> list[float]:
    """Return for each row -sum log2 p(token | those before it) over its last ``scored`` tokens.

    Logits are upcast to float32 for the log-softmax, sums are float64. Rows are padded on the right and masked, so that
    a causal model's numbers do not depend on what else is in a batch but for rounding.

    Raises:
        CheckpointError: A sum is NaN or infinite, or memory does not suffice for one row.
    """
    most = LOGITS_BYTES // (4 * subject.vocabulary)
    return run_batches(
        rows, lambda row: len(row.ids) - 1, lambda batch: _batch_bits(subject, batch), budget=budget, most=most
    )


@torch.inference_mode()
def _batch_bits(subject: Subject, rows: list[Row]) -> list[float]:
    ids = torch.zeros(len(rows), max(len(row.ids) for row in rows), dtype=torch.long)
    known = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.as_tensor(row.ids)
        # The last token is predicted, never read.
        known[i, : len(row.ids) - 1] = 1
    ids, known = ids.to(subject.device), known.to(subject.device)
    logits_BTV = subject.model(input_ids=ids[:, :-1], attention_mask=known[:, :-1], use_cache=False).logits
    spans = [slice(len(row.ids) - 1 - row.scored, len(row.ids) - 1) for row in rows]
    nats = [_nats(logits_BTV[i, span], ids[i, 1:][span]) for i, span in enumerate(spans)]
    sums = (torch.stack(nats) / log(2)).tolist()
    for row, bits in zip(rows, sums, strict=True):
        if not bits < float("inf"):
            raise CheckpointError(
                f"{printable(subject.name)}: {bits} bits for {printable(row.item)}: its logits are not finite. The "
                "weights hold NaN or Inf, or the dtype overflows; try --dtype float32."
            )
    return sums


def _nats(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Return the cross-entropy of a row's targets, summed in float64."""
    parts = zip(logits_TV.split(POSITIONS_AT_ONCE), targets_T.split(POSITIONS_AT_ONCE), strict=True)
    sums = [torch.nn.functional.cross_entropy(a.float(), b, reduction="none").double().sum() for a, b in parts]
    return torch.stack(sums).sum()


def score_questions(subject: Subject, questions: Sequence[Question], budget: BatchLimit) -> list[Score]:
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
    scores = []
    for i, question in enumerate(questions):
        answer = answers.get(i)
        right = answer is not None and is_right(answer, question.answer)
        scores.append(Score(question.id, float(right), output=answer))
    return scores


def score_choices(subject: Subject, choices: Sequence[MultipleChoice], budget: BatchLimit) -> list[Score]:
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
    bits, scores = iter(row_bits(subject, kept, budget)), []
    for choice in choices:
        # By byte, as long options are less likely than short ones whatever they say.
        by_byte = [next(bits) / max(1, len(option.encode())) for option in choice.options]
        taken = by_byte.index(min(by_byte))
        scores.append(Score(choice.id, float(taken == choice.right), output=choice.options[taken]))
    return scores


def _rows(subject: Subject, choice: MultipleChoice) -> list[Row]:
    """Return prompt and option as one text, of which the option's tokens count."""
    prompt, *whole = subject.encode([choice.prompt, *(f"{choice.prompt} {option}" for option in choice.options)])
    return [Row([*subject.start, *ids], max(1, len(ids) - len(prompt)), choice.id) for ids in whole]


PIECE_BYTES = 2048
"""Longer documents are cut into equal pieces of at most about so many bytes."""


def cut(documents: Iterable[Document]) -> Iterator[Piece]:
    """Yield the pieces of documents: at places that depend on bytes alone, so that all tokenizers score the same.

    A document of n bytes gives k = ceil(n / ``PIECE_BYTES``) pieces that end at bytes n/k, 2n/k, ..., each moved back
    to the border of a character.

    Raises:
        CorpusError: A text cannot be written in UTF-8.
    """
    for document in documents:
        try:
            content = document.text.encode()
        except UnicodeEncodeError as error:
            raise CorpusError(f"document {document.id} is no text that UTF-8 can hold. Mend the file.") from error
        count = -(-len(content) // PIECE_BYTES)
        ends = []
        for i in range(count):
            end = (i + 1) * len(content) // count
            # Bytes of the form 10xxxxxx go on with a character that has begun before them.
            while 0 < end < len(content) and content[end] & 0xC0 == 0x80:
                end -= 1
            ends.append(end)
        for i, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end > begin:
                yield Piece(f"{document.id}:{i}", content[begin:end].decode())


def score_texts(subject: Subject, pieces: Sequence[Piece], budget: BatchLimit) -> list[Score]:
    """Return bits and bytes of each piece.

    Every token counts once. The first is predicted from the tokenizer's token for a beginning (or for an end, where it
    has only that); without either it costs log2 of the vocabulary's size, as a uniform guess would.
    """
    rows: list[Row] = []
    owners: list[int] = []
    bits = [0.0] * len(pieces)
    for i, (piece, tokens) in enumerate(zip(pieces, subject.encode([p.text for p in pieces]), strict=True)):
        if not subject.start:
            # Without a token to begin with, nothing predicts the first one: it is charged as any of the vocabulary.
            bits[i] = log2(subject.vocabulary)
        own = list(windows([*subject.start, *tokens], subject.context, piece.id))
        rows += own
        owners += [i] * len(own)
    for i, found in zip(owners, row_bits(subject, rows, budget), strict=True):
        bits[i] += found
    return [Score(p.id, b, float(len(p.text.encode()))) for p, b in zip(pieces, bits, strict=True)]


def windows(ids: Sequence[int], context: int, item: str) -> Iterator[Row]:
    """Yield rows that together predict every token but the first exactly once.

    Each gives the model at most ``context`` tokens, all but the first exactly so many; they move on by half of that, so
    that a token is predicted from at least half a context, or from all that is before it.
    """
    last = len(ids) - 1
    done = min(context, last)
    if done:
        yield Row(ids[: done + 1], done, item)
    while done < last:
        # By half a context: every token after the first window has at least the other half before it.
        end = min(done + max(1, context // 2), last)
        yield Row(ids[end - context : end + 1], end - done, item)
        done = end
