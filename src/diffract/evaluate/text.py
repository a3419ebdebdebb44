"""Bits per byte of text: what a model needs for a text's tokens, by its bytes, whatever the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import log2

from diffract.corpora import Document
from diffract.errors import CorpusError
from diffract.evaluate.batches import Budget
from diffract.evaluate.likelihood import Row, row_bits
from diffract.evaluate.subject import Subject
from diffract.evaluate.task import Piece, Score

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
        ends = [_border(content, (i + 1) * len(content) // count) for i in range(count)]
        for i, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end > begin:
                yield Piece(f"{document.id}:{i}", content[begin:end].decode())


def score_texts(subject: Subject, pieces: Sequence[Piece], budget: Budget) -> list[Score]:
    """Return bits and bytes of each piece.

    Every token counts once. The first is predicted from the tokenizer's token for a beginning (or for an end, where it
    has only that); without either it costs log2 of the vocabulary's size, as a uniform guess would.
    """
    rows: list[Row] = []
    owners: list[int] = []
    bits = [0.0] * len(pieces)
    for i, (piece, tokens) in enumerate(zip(pieces, subject.encode([p.text for p in pieces]), strict=True)):
        if not subject.start:
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
        end = min(done + max(1, context // 2), last)
        yield Row(ids[end - context : end + 1], end - done, item)
        done = end


def _border(content: bytes, place: int) -> int:
    """Return the last border of a character at or before a byte."""
    while 0 < place < len(content) and content[place] & 0xC0 == 0x80:
        place -= 1
    return place
