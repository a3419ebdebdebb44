"""Tensors are paired by the part that they are, whatever a wrapper or another version calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import diffract

SIZES = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32}


def folder(path: Path, prefix: str, scale: float, more: dict[str, torch.Tensor], config: dict) -> Path:
    generator = torch.Generator().manual_seed(0)
    body = {f"layers.0.self_attn.{n}.weight": torch.randn(s, generator=generator) for n, s in SIZES.items()}
    tensors = {
        f"{prefix}{n}": t * scale for n, t in (body | {"layers.0.input_layernorm.weight": torch.ones(32)}).items()
    }
    path.mkdir()
    save_file(tensors | more, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "prefixes"),
    [
        ({"model_type": "gemma3", "text_config": CONFIG}, ("language_model.model.", "model.language_model.")),
        (CONFIG | {"model_type": "llama"}, ("model.", "")),
        (CONFIG | {"model_type": "llama"}, ("model.", "module.model.")),
        (CONFIG | {"model_type": "brand_new"}, ("model.", "base_model.model.model.")),
    ],
)
def test_prefixes_do_not_keep_tensors_apart(config: dict, prefixes: tuple[str, str], tmp_path: Path) -> None:
    base = folder(tmp_path / "base", prefixes[0], 1, {}, config)
    tuned = folder(tmp_path / "tuned", prefixes[1], 1.01, {}, config)
    run = diffract.compare(base, tuned, cache=False)
    assert run.metrics["delta_relative"].drop_nulls().len() == 12
    assert run.models["delta_relative"].to_list()[-1] == pytest.approx(0.01, rel=1e-4)  # float32 products
    assert diffract.heads(base, tuned, cache=False).heads["status"].unique().to_list() == ["ok"]


def test_a_head_of_one_task_alone_is_listed(tmp_path: Path) -> None:
    config = CONFIG | {"model_type": "llama"}
    base = folder(tmp_path / "base", "model.", 1, {}, config)
    tuned = folder(tmp_path / "tuned", "model.", 1.01, {"classifier.weight": torch.ones(3, 32)}, config)
    run = diffract.compare(base, tuned, cache=False)
    found = dict(run.tensors.filter(model="tuned").select("tensor", "outcome").iter_rows())
    assert found["classifier.weight"] == "unmatched"


def test_stacked_and_single_experts_are_called_a_naming(tmp_path: Path) -> None:
    config = CONFIG | {"model_type": "mixtral"}
    single = {f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight": torch.ones(32, 24) for e in range(2)}
    base = folder(tmp_path / "base", "model.", 1, single, config)
    stacked = {"model.layers.0.mlp.experts.down_proj": torch.ones(2, 32, 24)}
    tuned = folder(tmp_path / "tuned", "model.", 1.01, stacked, config)
    with pytest.raises(diffract.CheckpointError, match="the same parts in another naming"):
        diffract.compare(base, tuned, cache=False)
