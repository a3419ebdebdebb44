"""In what two models differ besides their weights."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffract.checkpoints import open_checkpoint
from diffract.checkpoints.configurations import compare_configurations, compare_settings, token_texts

SAMPLES = Path(__file__).parents[2] / "samples" / "tiny-olmo2"
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "rms_norm_eps": 1e-5, "hidden_act": "silu"}


def told(base: dict[str, Any], tuned: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [(d.key, d.base, d.tuned, d.effect) for d in compare_configurations(base, tuned)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rms_norm_eps": 1e-3}, ("rms_norm_eps", "1e-05", "0.001", "computation")),
        ({"hidden_act": "gelu"}, ("hidden_act", "silu", "gelu", "computation")),
        ({"rope_theta": 5e5}, ("rope_theta", "not stated", "500000.0", "computation")),
        ({"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 8},
         ("num_attention_heads", "8", "16", "computation")),
        ({"tie_word_embeddings": True}, ("tie_word_embeddings", "false", "true", "computation")),
        ({"attention_bias": True}, ("attention_bias", "false", "true", "computation")),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}},
         ("rope_scaling.rope_type", "not stated", "linear", "computation")),
        ({"never_heard_of": 3}, ("never_heard_of", "not stated", "3", "computation")),
        ({"eos_token_id": 7}, ("eos_token_id", "not stated", "7", "text")),
        ({"use_cache": False}, ("use_cache", "not stated", "false", "none")),
        ({"attention_dropout": 0.1}, ("attention_dropout", "not stated", "0.1", "none")),
        ({"id2label": {"0": "good"}}, ("id2label.0", "not stated", "good", "none")),
        ({"max_position_embeddings": 9}, ("max_position_embeddings", "not stated", "9", "none")),
    ],
)  # fmt: skip
def test_a_changed_key_is_told_with_what_it_changes(change: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert told(LLAMA, LLAMA | change)[0] == expected


@pytest.mark.parametrize(
    "same",
    [
        {"num_key_value_heads": 8},
        {"head_dim": 8},
        {"attention_bias": False},
        {"pretraining_tp": 1},
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rms_norm_eps": 0.00001},
    ],
)
def test_what_a_silent_configuration_means_is_no_difference(same: dict[str, Any]) -> None:
    assert told(LLAMA, LLAMA | same) == told(LLAMA | same, LLAMA) == []


def test_a_model_that_does_not_tell_its_type_is_read_as_the_other() -> None:
    bert = {"hidden_size": 8, "num_attention_heads": 2}
    full = bert | {"model_type": "bert", "tie_word_embeddings": True, "is_decoder": False, "eos_token_ids": 0}
    assert told(bert, full) == [("eos_token_ids", "not stated", "0", "text")]
    assert told(bert, full | {"tie_word_embeddings": False})[0] == (
        "tie_word_embeddings",
        "true",
        "false",
        "computation",
    )
    assert told(full, full | {"model_type": "roberta"})[0] == ("model_type", "bert", "roberta", "computation")


def test_two_spellings_of_one_thing_are_one() -> None:
    old = LLAMA | {"torch_dtype": "bfloat16", "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}}
    new = LLAMA | {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 10000, "rope_type": "linear", "factor": 2.0}}
    assert told(old, new) == []
    longer = new | {"max_position_embeddings": 4096}
    assert told(new, longer) == [("max_position_embeddings", "not stated", "4096", "computation")]


def test_sections_are_told_key_by_key_and_computation_comes_first() -> None:
    nested = {"text_config": {"rope_theta": 1.0, "use_cache": True}, "_name_or_path": "a"}
    other = {"text_config": {"rope_theta": 2.0, "use_cache": False}, "_name_or_path": "b"}
    assert [d[0] for d in told(nested, other)] == ["text_config.rope_theta", "text_config.use_cache", "_name_or_path"]


def test_without_a_configuration_nothing_is_compared_and_nan_equals_itself() -> None:
    assert told({}, LLAMA) == told(LLAMA, {}) == []
    assert told({"a": float("nan")}, {"a": float("nan")}) == []


def test_untrusted_values_are_shown_safely_and_short() -> None:
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"a": deep}
    (difference,) = compare_configurations({"k\x1b[2J": "\x1b]0;x" + "y" * 500, "d": deep}, {"k\x1b[2J": 1, "d": deep})
    assert "\x1b" not in str(difference)
    assert len(str(difference)) < 150


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of one model with tokenizer, as copies that may be changed."""
    folders = tmp_path / "base", tmp_path / "tuned"
    for folder in folders:
        folder.mkdir()
        for source in (SAMPLES / "base").iterdir():
            (folder / source.name).write_bytes(source.read_bytes())
    return folders


def differences(pair: tuple[Path, Path]) -> list[tuple[str, str, str, str, str]]:
    with open_checkpoint(pair[0]) as base, open_checkpoint(pair[1]) as tuned:
        return [(d.file, d.key, d.base, d.tuned, d.effect) for d in compare_settings(base, tuned)]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text() if path.exists() else "{}") | changes))


def test_the_same_folder_differs_in_nothing(pair: tuple[Path, Path]) -> None:
    assert differences(pair) == []


def test_tokenizers_are_compared_by_vocabulary_merges_and_special_tokens(pair: tuple[Path, Path]) -> None:
    path = pair[1] / "tokenizer.json"
    parsed = json.loads(path.read_text())
    parsed["model"]["vocab"] |= {"new-token": 2048}
    parsed["model"]["vocab"]["!"], parsed["model"]["vocab"]['"'] = 2, 1
    parsed["model"]["merges"] = parsed["model"]["merges"][:-3]
    parsed["added_tokens"].append({"id": 2049, "content": "<|im_end|>", "special": True})
    parsed["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    path.write_text(json.dumps(parsed))
    found = differences(pair)
    assert {(file, effect) for file, *_, effect in found} == {("tokenizer.json", "text")}
    by_key = {(key, one): other for _, key, one, other, _ in found}
    assert by_key["vocabulary", "2,048 entries, 0 of its own"].startswith("2,050 entries, 2 of its own ('new-token'")
    assert by_key["vocabulary", "2 tokens elsewhere, '!' at 1"] == "2 tokens elsewhere, '!' at 2"
    assert [other for (key, _), other in by_key.items() if key == "special tokens"] == ["<|endoftext|>, <|im_end|>"]
    merges = len(json.loads((pair[0] / "tokenizer.json").read_text())["model"]["merges"])
    assert next(one for key, one in by_key if key == "merges").startswith(f"{merges:,} entries, 3 of its own")
    assert any(key.startswith("pre_tokenizer") for key, _ in by_key)


def test_the_order_of_merges_counts(pair: tuple[Path, Path]) -> None:
    path = pair[1] / "tokenizer.json"
    parsed = json.loads(path.read_text())
    parsed["model"]["merges"].reverse()
    path.write_text(json.dumps(parsed))
    ((_, key, _, other, _),) = differences(pair)
    assert key == "merges"
    assert other.endswith("in another order")


def test_a_chat_template_counts_wherever_it_lies(pair: tuple[Path, Path]) -> None:
    edit(pair[0] / "tokenizer_config.json", chat_template="{{ hello }}")
    (pair[1] / "chat_template.jinja").write_text("{{ hello }}")
    assert differences(pair) == []
    (pair[1] / "chat_template.jinja").write_text("{{ hello!! }}")
    assert differences(pair) == [("chat template", "", "11 characters", "13 characters", "text")]


def test_generation_settings_and_files_that_one_lacks(pair: tuple[Path, Path]) -> None:
    for folder, heat in zip(pair, (0.6, 1.0), strict=True):
        edit(folder / "generation_config.json", temperature=heat, transformers_version=str(heat))
    (pair[1] / "special_tokens_map.json").write_text("{}")
    (pair[1] / "modeling_own.py").write_text("")
    (pair[0] / "modeling_own.py").write_text("# other")
    assert differences(pair) == [
        ("modeling_own.py", "", "7 bytes", "0 bytes", "computation"),
        ("generation_config.json", "temperature", "0.6", "1.0", "text"),
        ("generation_config.json", "transformers_version", "0.6", "1.0", "none"),
        ("special_tokens_map.json", "", "not there", "there", "none"),
    ]


def test_damaged_companions_are_told_and_stop_nothing(pair: tuple[Path, Path]) -> None:
    (pair[1] / "tokenizer.json").write_text("{")
    ((file, *_, effect),) = differences(pair)
    assert (file, effect) == ("tokenizer.json", "text")
    (pair[0] / "tokenizer.json").write_text('{"model": [1], "added_tokens": {"a": 2}}')
    (pair[1] / "tokenizer.json").write_text('{"model": {"vocab": 3, "merges": 4}}')
    assert isinstance(differences(pair), list)


def test_how_weights_are_stored(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    weights = {"a": np.ones((2, 2), np.float32), "b": np.ones(3, np.float32)}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    save_file(weights, tmp_path / "one" / "model.safetensors")
    save_file({"a": weights["a"].astype(np.float16)}, tmp_path / "two" / "x.safetensors")
    save_file({"b": weights["b"]}, tmp_path / "two" / "y.safetensors")
    assert differences((tmp_path / "one", tmp_path / "two")) == [
        ("weights", "dtype", "F32 of 2 tensors", "F16 of 1 tensors, F32 of 1 tensors", "none"),
        ("weights", "files", "1", "2", "none"),
    ]


def test_adapters_are_compared_by_their_own_configuration() -> None:
    base = open_checkpoint({"w": np.ones((2, 2))})
    one, other = (replace(base, adapter={"r": r, "lora_alpha": 8, "lora_dropout": r / 8}) for r in (2, 4))
    found = [(d.file, d.key, d.base, d.tuned, d.effect) for d in compare_settings(one, other)]
    assert found == [
        ("adapter_config.json", "r", "2", "4", "computation"),
        ("adapter_config.json", "lora_dropout", "0.25", "0.5", "none"),
    ]
    assert compare_settings(base, other) == []


def test_texts_of_tokens() -> None:
    with open_checkpoint(SAMPLES / "base") as checkpoint:
        texts = token_texts(checkpoint)
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(SAMPLES / "base" / "tokenizer.json"))
    assert texts == {i: reference.decode([i], skip_special_tokens=False) for i in range(2048)}


def test_a_unigram_vocabulary_and_a_plain_list(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"w": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "vocab.txt").write_text("[PAD]\nC\nO\n")
    assert token_texts(open_checkpoint(tmp_path)) == {0: "[PAD]", 1: "C", 2: "O"}
    (tmp_path / "tokenizer.json").write_text(
        '{"model": {"type": "Unigram", "vocab": [["<s>", 0.0], ["\\u2581a", -1]]}}'
    )
    assert token_texts(open_checkpoint(tmp_path)) == {0: "<s>", 1: "▁a"}


def test_no_torch_is_loaded() -> None:
    code = "import sys, diffract.checkpoints.configurations; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
