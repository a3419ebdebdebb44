"""What becomes of every tensor, and what is said of those that are no weights or that nothing describes."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from diffract.checkpoints import open_checkpoint
from diffract.matrices import lay_out

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "architectures": ["LlamaForCausalLM"],
}


def test_buffers_are_no_matrices() -> None:
    held = {
        "model.rotary_emb.cos_cached": np.ones((4, 4)),
        "h.0.attn.bias": np.ones((1, 1, 4, 4)),
        "h.0.attn.masked_bias": np.ones(()),
        "h.1.attn.bias": np.ones(4),
        "w": np.ones((4, 4)),
    }
    layout = lay_out(open_checkpoint(held))
    outcomes = {name: entry.outcome for name, entry in layout.entries.items()}
    assert outcomes == {
        "model.rotary_emb.cos_cached": "buffer",
        "h.0.attn.bias": "buffer",
        "h.0.attn.masked_bias": "buffer",
        "h.1.attn.bias": "vector",
        "w": "analysed",
    }


def test_matrices_that_a_family_does_not_describe_are_said_once(tmp_path: Path) -> None:
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
    held = {name: torch.ones(8, 8) for name in names} | {f"model.tower.{i}.weight": torch.ones(3, 3) for i in range(5)}
    save_file(held, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with open_checkpoint(tmp_path) as found:
        told = [text for text in lay_out(found).warnings if "not described" in text]
    assert told == [
        "5 of 8 matrices are not described by the family llama: model.tower.0.weight, model.tower.1.weight, "
        "model.tower.2.weight and others."
    ]


def test_convolutions_are_no_stacks_of_matrices() -> None:
    layout = lay_out(open_checkpoint({"conv1.weight": np.ones((6, 4, 3)), "mlp.experts.w": np.ones((2, 4, 3))}))
    assert [(m.name, m.shape) for m in layout.matrices] == [
        ("conv1.weight", (6, 12)),
        ("mlp.experts.w[0]", (4, 3)),
        ("mlp.experts.w[1]", (4, 3)),
    ]
