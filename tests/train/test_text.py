"""Tokenizers and streams of tokens: what they hold, what they keep, what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from diffract.corpora import read_documents
from diffract.errors import CheckpointError, CorpusError, RecipeError
from diffract.evaluate.model import load_tokenizer as load_evaluated
from diffract.train import load_train_recipe
from diffract.train.data import END, load_tokenizer, make_tokenizer, read_stream, token_streams, train_bpe

Make = Callable[..., dict[str, Any]]

QUESTION, ANSWER = "Natalia sold clips to 48 friends. How many?", "48 / 2 = 24 #### 24"


def test_digits_stand_alone() -> None:
    tokenizer = train_bpe(["1234 1234 1234 and 1234"] * 50, 300)
    assert tokenizer.encode("1234").tokens == ["1", "2", "3", "4"]
    assert tokenizer.token_to_id(END) == 0


def test_any_text_comes_back() -> None:
    tokenizer = train_bpe(["the sea, the sea"] * 9, 260)
    text = " Straße \t\n  x = 3.14 # 海 \x00"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() <= 260


def test_training_twice_gives_one_tokenizer() -> None:
    texts = [f"the {word} sat on the {other}" for word in ("cat", "dog", "mat") for other in ("mat", "hat")] * 5
    assert train_bpe(texts, 320).to_str() == train_bpe(texts, 320).to_str()


def test_a_stream_holds_training_documents_and_their_ends(recipe: Make, texts: Path) -> None:
    made = load_train_recipe(recipe())
    tokenizer = make_tokenizer(made)
    stream = read_stream(token_streams(made, tokenizer)["sums"])
    expected = []
    for found in read_documents("sums.jsonl", "train", data=texts):
        expected += [*tokenizer.encode(found.text, add_special_tokens=False), tokenizer.eos_token_id]
    assert stream.tolist() == expected
    assert stream.dtype == np.uint16
    unseen = {d.text for split in ("selection", "held-out") for d in read_documents("sums.jsonl", split, data=texts)}
    assert unseen
    assert not unseen & set(tokenizer.decode(stream).split(END))


def test_a_large_vocabulary_takes_wider_numbers(recipe: Make) -> None:
    made = load_train_recipe(recipe())
    tokenizer = make_tokenizer(made)
    tokenizer.add_tokens([f"<{i}>" for i in range(1 << 16)])
    assert read_stream(token_streams(made, tokenizer)["sums"]).dtype == np.uint32


def test_what_was_tokenised_is_not_tokenised_again(recipe: Make, texts: Path, own_cache: Path, tmp_path: Path) -> None:
    made = load_train_recipe(recipe())
    tokenizer = make_tokenizer(made)
    first = token_streams(made, tokenizer)
    times = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*") if path.is_file()}
    assert len(times) == 3  # a tokenizer, two streams
    moved = shutil.copytree(texts, tmp_path / "elsewhere")
    again = load_train_recipe(recipe(data=str(moved), tokens=64))
    assert token_streams(again, make_tokenizer(again)) == first
    assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*") if path.is_file()} == times


def test_changed_text_makes_other_tokens(recipe: Make, texts: Path) -> None:
    made = load_train_recipe(recipe())
    tokenizer = make_tokenizer(made)
    before = token_streams(made, tokenizer)
    with (texts / "sums.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    after = token_streams(made, tokenizer)
    assert after["sums"] != before["sums"]
    assert after["stories"] == before["stories"]


@pytest.mark.parametrize("name", ["gsm8k.test.jsonl", "other.jsonl"])
def test_test_questions_are_refused(recipe: Make, texts: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffract.corpora import digest
    from diffract.corpora import splits as evaluation_only

    known = frozenset({digest(QUESTION)[: evaluation_only.DIGITS]})
    monkeypatch.setattr(evaluation_only, "_gsm8k_test", lambda: known)
    (texts / name).write_text(f'{{"question": "{QUESTION}", "answer": "{ANSWER}"}}\n' * 3)
    made = load_train_recipe(recipe(mix={"math": {"sources": [name]}}))
    with pytest.raises(CorpusError, match="do not train on it"):
        make_tokenizer(made)


def test_a_refused_name_is_refused_though_its_bytes_are_known(recipe: Make, texts: Path) -> None:
    made = load_train_recipe(recipe())
    tokenizer = make_tokenizer(made)
    token_streams(made, tokenizer)
    shutil.copy(texts / "sums.jsonl", texts / "svamp.jsonl")
    with pytest.raises(CorpusError, match="evaluation only"):
        token_streams(load_train_recipe(recipe(mix={"math": {"sources": ["svamp.jsonl"]}})), tokenizer)


def test_too_little_text_is_refused(recipe: Make) -> None:
    made = load_train_recipe(recipe(context=4096, batch_tokens=8192))
    with pytest.raises(CorpusError, match=r"mix\.(stories|sums) has \d+ tokens .* one window of 4096"):
        token_streams(made, make_tokenizer(made))


def test_no_text_is_refused(recipe: Make, texts: Path) -> None:
    (texts / "empty.jsonl").write_text("")
    made = load_train_recipe(recipe(mix={"nothing": {"sources": ["empty.jsonl"]}}))
    with pytest.raises(CorpusError, match="holds no text"):
        make_tokenizer(made)


def test_a_tokenizer_must_be_there_and_end_texts(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path))
    bare = PreTrainedTokenizerFast(tokenizer_object=train_bpe(["a b"] * 3, 257))
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(RecipeError, match="no eos_token"):
        load_tokenizer(str(tmp_path / "bare"))


def test_a_token_of_a_number_that_no_vocabulary_has_is_refused(tmp_path: Path) -> None:
    """To write such a vocabulary the tokenizers library asks for gigabytes, and ends the process without them."""
    PreTrainedTokenizerFast(tokenizer_object=train_bpe(["a b"] * 3, 257), eos_token=END).save_pretrained(tmp_path)
    found = json.loads((tmp_path / "tokenizer.json").read_text())
    found["model"]["vocab"]["a"] = 2**31 - 2
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match=r"gives 'a' the number 2,147,483,646, expected less than 16,777,216"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"gives 'a' the number 2,147,483,646"):
        load_evaluated(str(tmp_path))
