"""PEFT's LoRA adapters: which tensors are modules that can carry one, their names and configuration, their files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffract.architectures import resolve
from diffract.checkpoints import TensorWriter, tensor_digest
from diffract.checkpoints.adapter_parts import CONFIG, WEIGHTS
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
    built = built_names(bench)
    for name, entry in bench.whole_layout.entries.items():
        if not entry.info.is_float or (entry.matrices and not any(map(selection.keeps, entry.matrices))):
            continue
        reason = _obstacle(bench, name, entry)
        if not reason and built is not None and name not in built:
            reason = "transformers builds no layer of it"
        if reason:
            left[name] = reason
            continue
        place = bench.layout.architecture.place(name)
        own = _module_name(bench, name) if built is None else built[name].removesuffix(".weight")
        found.append(Module(name, own, bool(place and place.role.transposed)))
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
    if len(entry.info.stored_shape) > 2 or not name.endswith(".weight") or not entry.matrices:
        return "no weight of a linear layer"
    matrix = entry.matrices[0]
    if matrix.expert is not None or matrix.projection == "router":
        return "an expert or a router: loaders keep these as parameters, not as linear layers"
    embeds = "embed" in (matrix.block or "").split(".") or (matrix.block == "other" and "embed" in name)
    return "an embedding: only linear layers carry plain LoRA" if embeds or matrix.projection == "position_bias" else ""


def built_names(bench: Bench) -> dict[str, str] | None:
    """Return what tensors are called in the model that transformers builds, where that can be asked.

    Files keep names of earlier versions, models that see those of their parts: a name may differ by its prefix. The
    model is built without memory for its weights, and none of a checkpoint's own code is run.

    Returns:
        The names of those that are there; ``None`` without transformers, and for a model that it does not know.
    """
    config = dict(bench.checkpoint.config)
    name = str((config.get("architectures") or [""])[0])
    try:
        import transformers
    except ImportError:
        return None
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        return None
    try:
        with torch.device("meta"):
            own = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if "attn_implem" not in k})
            shapes = {
                n: tuple(w.shape) for n, w in kind._from_config(own, attn_implementation="eager").state_dict().items()
            }
    except Exception:  # a configuration that transformers cannot read: names are those of the files then
        return None
    by_place: dict[tuple[str, tuple[int, ...]], str] = {}
    for n, bare in resolve(config, shapes).bare.items():
        by_place.setdefault((bare, shapes[n]), n)
    infos, bares = bench.checkpoint.infos, bench.layout.architecture.bare
    found = {n: n if n in shapes else by_place.get((bares.get(n, n), info.stored_shape)) for n, info in infos.items()}
    return {n: own for n, own in found.items() if own is not None}


def _module_name(bench: Bench, tensor: str) -> str:
    """Return the name in a model that cannot be built here; old files lack the prefix of a body that has a head."""
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
        "fan_in_fan_out": any(m.transposed for m in ranks),  # one word for all; PEFT looks at each layer itself
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
