"""Documents are in one split each, whatever their order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffract.corpora import split_documents, split_of
from diffract.corpora.splits import document
from diffract.errors import CorpusError

SPLITS = ("train", "selection", "held-out")


@given(count=st.integers(3, 120), seed=st.integers(0, 5))
def test_splits_part_the_documents(count: int, seed: int) -> None:
    documents = [document(f"text {i}") for i in range(count)]
    parts = {split: {d.id for d in split_documents(documents, split)} for split in SPLITS}
    assert all(parts.values())
    assert sum(map(len, parts.values())) == count == len(set().union(*parts.values()))
    random.Random(seed).shuffle(documents)
    assert {split: {d.id for d in split_documents(documents, split)} for split in SPLITS} == parts


def test_equal_documents_are_one() -> None:
    documents = [document(t) for t in ("a", "b", "c", "a", "a")]
    assert sum(len(split_documents(documents, split)) for split in SPLITS) == 3


def test_shares_of_single_documents() -> None:
    """10,000 draws: the standard deviation of a share of 5% is 0.22%, five of it are allowed."""
    found = [split_of(document(str(i)).id) for i in range(10_000)]
    for split in ("selection", "held-out"):
        assert abs(found.count(split) / 10_000 - 0.05) < 0.011


def test_what_cannot_be_split() -> None:
    with pytest.raises(CorpusError, match="2 documents cannot be split"):
        split_documents([document("a"), document("b")], "train")
    with pytest.raises(CorpusError, match="unknown split 'test'"):
        split_documents([], "test")  # pyright: ignore
