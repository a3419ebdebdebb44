"""PEFT's LoRA adapters: which tensors are modules that can carry one, their names and configuration, their files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffract.checkpoints import TensorWriter, tensor_digest
from diffract.checkpoints.adapter import CONFIG, WEIGHTS
from diffract.checkpoints.dtypes import DTYPE_NAMES
from diffract.checkpoints.header import TensorInfo
from diffract.checkpoints.sources import SAFETENSORS
from diffract.edits.bench import Bench
from diffract.errors import SelectionError, printable
from diffract.matrices import Entry, Matrix, parse_selection

RENAMED = ("embed_out.weight",)
"""GPT-NeoX's head: files call it so, transformers since 5.0 loads it as lm_head, and an adapter would not find it."""

ONE_FILE = 1 << 62
"""Bytes that no adapter has: PEFT reads one file, never shards."""

TASKS = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


@dataclass(frozen=True)
class Module:
    """A linear layer.

    Attributes:
        tensor: Name of its weight in the checkpoint.
        name: What the module is called in the loaded model.
        transposed: The weight is stored (in, out).
    """

    tensor: str
    name: str
    transposed: bool

    def oriented(self, w: Tensor) -> Tensor:
        """Return a weight as torch's linear layers have it, (out, in), or one of these as it is stored."""
        return w.mT if self.transposed else w


@dataclass(frozen=True)
class LoraFactors:
    """An adapter of one module: delta = B A, as torch's linear layers have it, (out, r) and (r, in)."""

    module: Module
    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        """Number of directions, r."""
        return self.A.shape[0]


def linear_modules(bench: Bench, select: str | None) -> tuple[list[Module], dict[str, str]]:
    """Return what of a model can carry an adapter, and for each other tensor why it cannot.

    Raises:
        SelectionError: Nothing can.
    """
    selection = parse_selection(select)
    bench.matrices(select, heads=False)  # refuses what names nothing
    found: list[Module] = []
    left: dict[str, str] = {}
    for name, entry in bench.whole_layout.entries.items():
        if not entry.info.is_float or (entry.matrices and not any(map(selection.keeps, entry.matrices))):
            continue
        reason = _obstacle(bench, name, entry)
        if reason:
            left[name] = reason
        else:
            place = bench.layout.architecture.place(name)
            found.append(Module(name, _module_name(bench, name), bool(place and place.role.transposed)))
    # One word of PEFT's configuration says for all modules how they are stored; GPT-2 with a head of its own has both.
    if any(m.transposed for m in found):
        left |= {m.tensor: "stored (out, in), the others (in, out)" for m in found if not m.transposed}
        found = [m for m in found if m.transposed]
    if not found:
        raise SelectionError(
            f"{printable(bench.checkpoint.reference)}: no linear layer among what is selected"
            f"{''.join(f'; {printable(n)}: {reason}' for n, reason in list(left.items())[:3])}."
        )
    return found, left


def whole_matrix(bench: Bench, tensor: str) -> Matrix:
    """Return a 2-D tensor as one matrix, fused parts together."""
    info = bench.checkpoint.info(tensor)
    return Matrix(tensor, tensor, (info.shape[0], info.shape[1]), info.dtype)


def _obstacle(bench: Bench, name: str, entry: Entry) -> str:
    """Say why a tensor cannot carry an adapter; empty if it can."""
    if name in bench.ties or name in bench.ties.values():
        return "tied to another tensor: an adapter would change one of them only"
    if name in RENAMED:
        return "loaded under another name, which differs between versions of transformers"
    if len(entry.info.shape) < 2:
        return "a vector: adapters change matrices only"
    if len(entry.info.shape) > 2 or not name.endswith(".weight") or not entry.matrices:
        return "no weight of a linear layer"
    matrix = entry.matrices[0]
    if matrix.expert is not None or matrix.projection == "router":
        return "an expert or a router: loaders keep these as parameters, not as linear layers"
    embeds = "embed" in (matrix.block or "").split(".") or (matrix.block == "other" and "embed" in name)
    return "an embedding: only linear layers carry plain LoRA" if embeds or matrix.projection == "position_bias" else ""


def _module_name(bench: Bench, tensor: str) -> str:
    """Return the name in the loaded model; old files lack the prefix that a model with a head gives its body."""
    name, spec = tensor.removesuffix(".weight"), bench.layout.architecture.spec
    prefix = spec.prefix if spec else ""
    headed = not str((bench.checkpoint.config.get("architectures") or ["Model"])[0]).endswith("Model")
    matrix = bench.whole_layout.entries[tensor].matrices[0]
    if prefix and headed and matrix.block != "unembed" and bench.layout.architecture.bare[tensor] == tensor:
        return prefix + name
    return name


def adapter_config(bench: Bench, base: str, ranks: Mapping[Module, int]) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter whose scale is 1 everywhere: alpha equals the rank.

    Args:
        bench: The model.
        base: What the adapter lies over.
        ranks: The rank of each module.
    """
    # PEFT scales by alpha / rank: alpha equal to the rank, module by module, keeps B A what it is.
    top = max(ranks.values())
    pattern = {m.name: rank for m, rank in ranks.items() if rank != top}
    architecture = str((bench.checkpoint.config.get("architectures") or [""])[0])
    return {
        "peft_type": "LORA",
        "task_type": next((task for end, task in TASKS.items() if architecture.endswith(end)), None),
        "base_model_name_or_path": base,
        "r": top,
        "lora_alpha": top,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": [m.name for m in ranks],
        "fan_in_fan_out": all(m.transposed for m in ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def write_adapter(folder: Path, factors: Iterable[LoraFactors], *, bench: Bench, base: str) -> dict[str, str]:
    """Write an adapter's weights and configuration; return the digest of each tensor.

    Args:
        folder: Where to write.
        factors: Of each module, in the dtype in which they are stored. Modules of rank 0 are left out.
        bench: The model.
        base: What the adapter lies over.
    """
    digests: dict[str, str] = {}
    ranks: dict[Module, int] = {}
    with TensorWriter(folder, shard_bytes=ONE_FILE) as writer:
        for found in factors:
            if not found.rank:
                continue
            ranks[found.module] = found.rank
            for side, factor in (("A", found.A), ("B", found.B)):
                name, tensor = f"base_model.model.{found.module.name}.lora_{side}.weight", factor.contiguous()
                writer.add(name, tensor)
                info = TensorInfo(name, tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])
                digests[name] = tensor_digest(info, tensor)
    if not ranks:
        raise SelectionError(
            "the rule keeps no direction of any matrix: there is nothing for an adapter to hold. Keep more."
        )
    (folder / SAFETENSORS).rename(folder / WEIGHTS)
    text = json.dumps(adapter_config(bench, base, ranks), indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    return digests
