"""Edited models that need more than weights load again: those that see, those of several modules, those with code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from diffract.edits import Interpolate
from edit_cases import edited

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
TEXT = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""The mean of two weights is rounded to float32 here from float64, there in float32."""


def between(model: tf.PreTrainedModel, folder: Path) -> tuple[Path, Path]:
    """Save a base and a tuned model; leave in ``model`` the mean of both."""
    model.save_pretrained(folder / "base")
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder / "tuned")
    last = model.state_dict()
    mean = {name: (t + first[name]) / 2 if t.is_floating_point() else t for name, t in last.items()}
    model.load_state_dict(mean)
    return folder / "base", folder / "tuned"


def llava() -> tf.PreTrainedModel:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision, image_size=8, patch_size=4, projection_dim=16),
        text_config=tf.LlamaConfig(**TEXT, num_key_value_heads=1),
        image_token_index=31,
    )
    return tf.LlavaForConditionalGeneration(config)


def gemma3() -> tf.PreTrainedModel:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.Gemma3Config(
        vision_config={**vision, "image_size": 8, "patch_size": 4},
        text_config=tf.Gemma3TextConfig(**TEXT, num_key_value_heads=1, head_dim=8),
        mm_tokens_per_image=4,
        image_token_index=31,
    )
    return tf.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("build", [llava, gemma3])
def test_a_model_that_sees(build: Callable[[], tf.PreTrainedModel], tmp_path: Path) -> None:
    """Towers, projector and language model are all edited, and the answer to a picture is that of the mean."""
    torch.manual_seed(0)
    model = build()
    base, tuned = between(model, tmp_path)
    (tuned / "preprocessor_config.json").write_text('{"size": 8}')
    edited(tmp_path / "out", tuned, Interpolate(other=str(base), at=0.5))
    loaded, told = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    picture = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    ids = torch.cat([torch.full((1, 4), 31), IDS], dim=1)
    kinds = {"token_type_ids": (ids == 31).long()} if build is gemma3 else {}
    with torch.no_grad():
        found, expected = (
            m.eval()(input_ids=ids, pixel_values=picture, attention_mask=torch.ones_like(ids), **kinds).logits
            for m in (loaded, model)
        )
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 8}'


def embed(folder: Path, body: torch.nn.Module) -> torch.Tensor:
    """Follow a folder's list of modules, as sentence-transformers does."""
    with torch.no_grad():
        found: Any = body.eval()(input_ids=IDS).last_hidden_state
    for row in json.loads((folder / "modules.json").read_text())[1:]:
        config = json.loads((folder / row["path"] / "config.json").read_text())
        if row["type"].endswith("Pooling"):
            assert config["pooling_mode_mean_tokens"]
            found = found.mean(dim=1)
        else:
            dense = load_file(folder / row["path"] / "model.safetensors")
            found = found @ dense["linear.weight"].T + dense["linear.bias"]
    return found


def test_an_embedding_model_of_several_modules(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tf.BertModel(tf.BertConfig(**TEXT), add_pooling_layer=False)
    base, tuned = between(model, tmp_path)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    beside = {
        "modules.json": json.dumps(listed),
        "sentence_bert_config.json": '{"max_seq_length": 16, "do_lower_case": false}',
        "config_sentence_transformers.json": '{"prompts": {"query": "q: "}}',
        "1_Pooling/config.json": '{"word_embedding_dimension": 16, "pooling_mode_mean_tokens": true}',
        "2_Dense/config.json": '{"in_features": 16, "out_features": 4, "bias": true}',
    }
    for name, text in beside.items():
        (tuned / name).parent.mkdir(exist_ok=True)
        (tuned / name).write_text(text)
    dense = {"linear.weight": torch.randn(4, 16), "linear.bias": torch.randn(4)}
    save_file(dense, tuned / "2_Dense" / "model.safetensors")
    edited(tmp_path / "out", tuned, Interpolate(other=str(base), at=0.5))
    for name, text in beside.items():
        assert (tmp_path / "out" / name).read_text() == text
    loaded = tf.AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    torch.testing.assert_close(embed(tmp_path / "out", loaded), embed(tuned, model), **CLOSE)


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from .constants_mine import TIMES

Path({told!r}).touch()

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * TIMES
        return found
"""


def test_a_model_with_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code comes along, the file that it imports too; it runs where its user asks for it, and not while editing."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, num_key_value_heads=1))
    base, tuned = between(model, tmp_path)
    ran = tmp_path / "ran"
    classes = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    for folder in (base, tuned):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": classes}))
        (folder / "modeling_mine.py").write_text(CODE.format(told=str(ran)))
        (folder / "constants_mine.py").write_text("TIMES = 3")
    edited(tmp_path / "out", tuned, Interpolate(other=str(base), at=0.5))
    assert not ran.exists()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert ran.exists()
    assert type(loaded).__name__ == "MineForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, 3 * model.eval()(IDS).logits, **CLOSE)
