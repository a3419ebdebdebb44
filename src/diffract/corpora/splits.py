"""Which documents are for training, for choosing, and for reporting: by content, so that order does not matter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from diffract.errors import CorpusError

Split = Literal["train", "selection", "held-out"]

SHARE = 0.05
"""Of the documents: one such share is held out, another is for selection, the rest is for training."""


@dataclass(frozen=True)
class Document:
    """A text that is in one split as a whole.

    Attributes:
        id: 32 hex digits, of the text alone.
        text: The text.
    """

    id: str
    text: str


def document(text: str) -> Document:
    """Return a text as a document."""
    return Document(digest(text), text)


def digest(text: str) -> str:
    """Return 32 hex digits that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def split_of(key: str) -> Split:
    """Return the split of one document, or of one instance, from a digest of it alone.

    >>> split_of("00" * 16), split_of("ff" * 16)
    ('held-out', 'train')
    """
    place = int(key[:16], 16) / 2**64
    return "held-out" if place < SHARE else "selection" if place < 2 * SHARE else "train"


def split_documents(documents: Iterable[Document], split: Split) -> list[Document]:
    """Return those of a finished collection that are in a split; each split gets one at least if there are three.

    Equal documents are one. They keep their order.

    Raises:
        CorpusError: There are too few documents, or there is no such split.
    """
    check_split(split)
    unique = list({d.id: d for d in documents}.values())
    if len(unique) < len(get_args(Split)):
        raise CorpusError(f"{len(unique)} documents cannot be split into {', '.join(get_args(Split))}. Give more text.")
    ranked = sorted(d.id for d in unique)
    few = max(1, round(SHARE * len(ranked)))
    parts: dict[str, Sequence[str]] = {
        "held-out": ranked[:few],
        "selection": ranked[few : 2 * few],
        "train": ranked[2 * few :],
    }
    wanted = set(parts[split])
    return [d for d in unique if d.id in wanted]


def check_split(split: str) -> None:
    """Raise unless a split is one.

    Raises:
        CorpusError: It is none.
    """
    if split not in get_args(Split):
        raise CorpusError(f"unknown split {split!r}, expected one of {', '.join(get_args(Split))}.")
