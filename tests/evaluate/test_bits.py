"""Bits per byte: pieces, windows, and sums against straightforward references."""

from __future__ import annotations

from math import log, log2

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffract.corpora.splits import document
from diffract.errors import CheckpointError, CorpusError
from diffract.evaluate import Subject, load_subject
from diffract.evaluate.scoring import PIECE_BYTES, BatchLimit, cut, score_texts, windows
from diffract.evaluate.tasks import Piece
from tiny_language_model import byte_tokenizer, tiny_model

WORDS = "Zoë paid 3 € for “tea”, then the ship left. "
LENGTH = len(WORDS.encode())


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=400), st.integers(4, 60))
def test_pieces_are_the_document(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffract.evaluate.scoring.PIECE_BYTES", size)
        pieces = list(cut([document(text)]))
    assert "".join(piece.text for piece in pieces) == text
    assert all(0 < len(piece.text.encode()) <= size + 3 for piece in pieces)  # a border moves by 3 bytes at most
    assert len({piece.id for piece in pieces}) == len(pieces)


def test_a_long_document_is_cut_into_equal_pieces() -> None:
    pieces = list(cut([document("a" * (2 * PIECE_BYTES + 1)), document("b")]))
    assert len(pieces) == 4
    lengths = [len(p.text) for p in pieces]
    assert lengths[3] == 1
    assert sum(lengths[:3]) == 2 * PIECE_BYTES + 1
    assert max(lengths[:3]) - min(lengths[:3]) <= 1


def test_text_that_utf8_cannot_hold_is_refused() -> None:
    from diffract.corpora import Document

    with pytest.raises(CorpusError, match="UTF-8"):
        list(cut([Document("0" * 32, "\ud800")]))


@given(st.integers(1, 200), st.integers(1, 70))
def test_windows_predict_every_token_once(count: int, context: int) -> None:
    ids = list(range(count))
    seen: list[int] = []
    for row in windows(ids, context, "x"):
        assert len(row.ids) - 1 <= context
        assert list(row.ids) == ids[row.ids[0] : row.ids[-1] + 1]
        targets = row.ids[-row.scored :]
        # at least half a context before each target, or all that there is
        assert all(t - row.ids[0] >= min(t, context - max(1, context // 2) + 1) for t in targets)
        seen += targets
    assert seen == ids[1:]


def straightforward_bits(subject: Subject, text: str) -> float:
    """One forward pass for each token, from what its window shows of the tokens before it."""
    ids = [*subject.start, *subject.encode([text])[0]]
    bits = 0.0
    for target in range(1, len(ids)):
        half, context = subject.context // 2, subject.context
        # the first window shows all before it; a later one ends at context + j * half, j the least that reaches
        end = (
            min(context, len(ids) - 1)
            if target <= context
            else min(context + -(-(target - context) // half) * half, len(ids) - 1)
        )
        begin = max(0, end - context)
        with torch.no_grad():
            logits = subject.model(input_ids=torch.tensor([ids[begin:target]])).logits[0, -1].double()
        bits -= float(torch.log_softmax(logits, dim=-1)[ids[target]]) / log(2)
    return bits


def test_bits_of_short_and_long_texts_in_one_batch(subject: Subject) -> None:
    texts = [WORDS, "a", WORDS * 4, WORDS[:30], WORDS * 2]
    found = score_texts(subject, [Piece(str(i), t) for i, t in enumerate(texts)], BatchLimit(1000))
    assert [s.item for s in found] == ["0", "1", "2", "3", "4"]
    assert [s.weight for s in found] == [len(t.encode()) for t in texts]
    for score, text in zip(found, texts, strict=True):
        # float32 logits of about 5 have an error of some 1e-6 for each of up to 200 tokens of some 8 bits each
        assert score.value == pytest.approx(straightforward_bits(subject, text), rel=1e-5)


def test_batches_change_rounding_alone(subject: Subject) -> None:
    pieces = [Piece(str(i), WORDS[i:] * (1 + i % 3)) for i in range(20)]
    one = [score_texts(subject, [p], BatchLimit(1))[0].value for p in pieces]
    together = [s.value for s in score_texts(subject, pieces, BatchLimit(100_000))]
    assert together == pytest.approx(one, rel=1e-5)  # float32, as above


def test_another_tokenizer_scores_the_same_bytes() -> None:
    """Of a model that finds all tokens equally likely, bits are tokens times log2 of their number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"th": 256, "the": 257, "<|end|>": 258}
    merged = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    merged.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = tiny_model(vocabulary=259)
    model.lm_head.weight.data.zero_()
    tokenizers = [byte_tokenizer(), PreTrainedTokenizerFast(tokenizer_object=merged, eos_token="<|end|>")]
    plain, short = (
        score_texts(load_subject(model, tokenizer=t, device="cpu"), [Piece("x", "the cat the dog")], BatchLimit(999))[0]
        for t in tokenizers
    )
    assert plain.weight == short.weight == 15
    assert plain.value == pytest.approx(15 * log2(259), rel=1e-6)  # float32
    assert short.value == pytest.approx(11 * log2(259), rel=1e-6)


def test_without_a_token_for_beginnings_the_first_costs_a_uniform_guess() -> None:
    model = tiny_model(vocabulary=256)
    model.config.eos_token_id = None
    subject = load_subject(model, tokenizer=byte_tokenizer(end=False), device="cpu")
    assert subject.start == []
    alone, pair = score_texts(subject, [Piece("0", "a"), Piece("1", "ab")], BatchLimit(99))
    assert alone.value == 8.0
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(subject.encode(["a"]))).logits[0, -1]
    second = -torch.log_softmax(logits, dim=-1)[subject.encode(["b"])[0][0]].item() / log(2)
    assert pair.value == pytest.approx(8.0 + second, rel=1e-6)  # float32


def test_nan_is_an_error_that_names_the_item(subject: Subject) -> None:
    dict(subject.model.named_parameters())["model.embed_tokens.weight"].data[:] = torch.nan
    with pytest.raises(CheckpointError, match="nan bits for abc:0: its logits are not finite"):
        score_texts(subject, [Piece("abc:0", "text")], BatchLimit(99))


def test_a_tokenizer_of_another_model_is_refused(subject: Subject) -> None:
    subject.model = tiny_model(vocabulary=100)
    with pytest.raises(CheckpointError, match="gives token 256, the model has 100 of them"):
        score_texts(subject, [Piece("0", "text")], BatchLimit(99))


def test_where_memory_runs_out_batches_are_halved(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [Piece(str(i), WORDS) for i in range(9)]
    expected = [s.value for s in score_texts(subject, pieces, BatchLimit(10_000))]
    forward, sizes, notes = subject.model.forward, [], []

    def small(**given):
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(**given)

    monkeypatch.setattr(subject.model, "forward", small)
    budget = BatchLimit(10_000, notes.append)
    found = score_texts(subject, pieces, budget)
    assert sizes == [9, 4, 2, 2, 2, 2, 1]
    assert [s.value for s in found] == pytest.approx(expected, rel=1e-5)  # float32
    assert notes == [f"out of memory: batches of {n * LENGTH // 2} tokens from here on" for n in (9, 4)]
    monkeypatch.setattr(subject.model, "forward", lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(CheckpointError, match=f"out of memory with one item of {LENGTH} tokens"):
        score_texts(subject, pieces, budget)
