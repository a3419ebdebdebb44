"""Word problems that are drawn once: a search loads tasks of two splits, which takes longer than to score them."""

from __future__ import annotations

from functools import cache

import pytest

from diffract.corpora import Document, Split
from diffract.corpora import word_problems as corpus


@cache
def drawn(levels: str, split: Split) -> tuple[Document, ...]:
    return tuple(corpus.problem_documents(levels, split))


@pytest.fixture(autouse=True)
def problems_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffract.corpora.sources.problem_documents", drawn)
