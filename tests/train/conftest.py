"""Small texts and recipes: a run takes a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TINY = {
    "model_type": "olmo2",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}

STORIES = [f"On day {i} the {w} walked {i * 7} miles to the sea and slept." for i in range(60) for w in ("fox", "cat")]
SUMS = [f"{a} plus {b} is {a + b}." for a in range(12) for b in range(12)]


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of two files of text."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_texts(folder / "stories.jsonl", STORIES)
    write_texts(folder / "sums.jsonl", SUMS)
    return folder


@pytest.fixture
def recipe(texts: Path) -> Callable[..., dict[str, Any]]:
    """Settings of a run of twelve steps; keywords change them."""

    def make(**changes: Any) -> dict[str, Any]:
        usual = {
            "model": {"config": TINY},
            "tokenizer": {"train": {"vocabulary": 280}},
            "data": str(texts),
            "mix": {
                "stories": {"sources": ["stories.jsonl"], "share": 3},
                "sums": {"sources": ["sums.jsonl"], "share": 1},
            },
            "context": 16,
            "batch_tokens": 64,
            "tokens": 12 * 64,
            "state_every": 5,
            "threads": 1,
        }
        return usual | changes

    return make
