"""Digests of a loaded model as it stands, and of its tokenizer: what scores depend on besides the task."""

from __future__ import annotations

import json
from typing import Any

import blake3
import torch
from torch import Tensor

CHUNK_BYTES = 1 << 26
"""Of a tensor on another device so much is copied at a time."""

NOT_PART = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Entries of a config that do not change what a loaded model computes; its dtype is that of its tensors."""


def model_digest(model: torch.nn.Module) -> str:
    """Return a digest of a model: its class, its config, and name, dtype, shape and bytes of every tensor.

    Tensors are read where they lie; tied ones are read once. One changed bit gives another digest.
    """
    hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)
    hasher.update(json.dumps([type(model).__name__, _config(model)], default=str, sort_keys=True).encode())
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            hasher.update(f"{name} {tensor!r}".encode())
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        twin = seen.setdefault(place, name) if tensor.numel() else name
        hasher.update(json.dumps([name, str(tensor.dtype), list(tensor.shape), twin]).encode())
        if twin == name:
            _update(hasher, tensor.detach())
    return hasher.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of a tokenizer: its JSON without padding and truncation, and its special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    return blake3.blake3(json.dumps([content, special], sort_keys=True).encode()).hexdigest()


def has_adapters(model: torch.nn.Module) -> bool:
    """Return whether a model holds adapters of PEFT: their scales and switches are not among what is digested."""
    return bool(getattr(model, "peft_config", None))


def _config(model: torch.nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    own = config.to_dict() if hasattr(config, "to_dict") else {}
    return {k: v for k, v in own.items() if k not in NOT_PART}


def _update(hasher: blake3.blake3, tensor: Tensor) -> None:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    for begun in range(0, flat.numel(), CHUNK_BYTES):
        hasher.update(flat[begun : begun + CHUNK_BYTES].cpu().numpy().data)
