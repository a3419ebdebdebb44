"""A tiny grouped-query model, and a descendant of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama_tensors(seed: int, base: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """A grouped-query model in bf16; with ``base``, that one changed by 5%."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (50, 32), "lm_head.weight": (50, 32)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{p}_proj.weight": (32, 32) for p in "qo"}
        shapes |= {f"{prefix}self_attn.{p}_proj.weight": (16, 32) for p in "kv"}
        shapes |= {f"{prefix}mlp.{p}_proj.weight": (48, 32) for p in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (32, 48), f"{prefix}input_layernorm.weight": (32,)}
    noise = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if base is None:
        return {name: value.bfloat16() for name, value in noise.items()}
    return {name: (base[name].float() + 0.05 * value).bfloat16() for name, value in noise.items()}


def save_llama(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """Write tensors as a model folder; keywords change its config."""
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LLAMA | config))
    return folder
