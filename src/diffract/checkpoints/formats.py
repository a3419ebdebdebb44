"""What is no whole checkpoint that can be read: other formats, and parts of a model; named, with what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from diffract.errors import CheckpointError, printable

TRANSFORMERS = "load it with transformers ({how}), then model.save_pretrained(FOLDER)"


@dataclass(frozen=True)
class Format:
    """A format that is not read.

    Attributes:
        kind: What it is called.
        names: Patterns of its files' names.
        starts: How its files begin.
        remedy: How it becomes safetensors.
    """

    kind: str
    names: tuple[str, ...]
    starts: tuple[bytes, ...]
    remedy: str


FORMATS = (
    Format(
        "a pointer of Git LFS, not the weights themselves",
        (),
        (b"version ",),
        "fetch them: git lfs pull, or hf download",
    ),
    Format(
        "Flax weights (msgpack)",
        ("*.msgpack", "*.msgpack.index.json"),
        (),
        TRANSFORMERS.format(how="a version below 5, from_pretrained(FOLDER, from_flax=True)"),
    ),
    Format(
        "TensorFlow or Keras weights (HDF5)",
        ("*.h5", "*.keras", "*.hdf5"),
        (b"\x89HDF\r\n\x1a\n",),
        TRANSFORMERS.format(how="a version below 5, from_pretrained(FOLDER, from_tf=True)"),
    ),
    Format(
        "a TensorFlow checkpoint",
        ("saved_model.pb", "*.ckpt.index", "*.ckpt.meta", "*.ckpt.data-*", "checkpoint"),
        (),
        "convert it with the model's own script of transformers",
    ),
    Format("an ONNX model", ("*.onnx", "*.onnx_data"), (), "take the checkpoint that it was exported from"),
    Format(
        "an Orbax checkpoint (JAX)",
        ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "_sharding"),
        (),
        "restore it with orbax.checkpoint, and pass the tree of arrays to diffract.open",
    ),
    Format(
        "a model of llm.c",
        (),
        tuple(magic.to_bytes(4, "little") for magic in (20240326, 20240520, 20240527)),
        "write it from llm.c with its dev/eval/export_hf.py",
    ),
    Format("a model of llama2.c", (), (b"24ka",), "take the checkpoint that it was exported from"),
    Format("a GGML file", ("*.ggml",), (b"lmgg", b"fmgg", b"tjgg"), "take the checkpoint that it was converted from"),
    Format("a NeMo archive", ("*.nemo",), (), "export it with NeMo: llm.export_ckpt(..., target='hf')"),
    Format("PaddlePaddle weights", ("*.pdparams",), (), "save them as safetensors with PaddleNLP"),
)
"""Formats that are named; a folder or file of any other is only said to be unknown."""


def name_format(names: Iterable[str], start: bytes = b"") -> Format | None:
    """Return the format that files' names, or the first bytes of one, give away.

    >>> name_format(["config.json", "tf_model.h5"]).kind
    'TensorFlow or Keras weights (HDF5)'
    """
    listed = list(names)
    for known in FORMATS:
        by_name = any(fnmatchcase(name, pattern) for name in listed for pattern in known.names)
        if by_name or start.startswith(known.starts or (b"\0never",)):
            return known
    return None


def refuse_format(where: str, names: Iterable[str] = (), start: bytes = b"") -> None:
    """Raise if names or first bytes are those of a known other format.

    Raises:
        CheckpointError: It names the format and how it becomes one that is read.
    """
    if known := name_format(names, start):
        raise CheckpointError(f"{where!r} is {known.kind}, which is not read: {known.remedy}.")


_SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.\w+", re.ASCII)
_PARALLEL = (
    (re.compile(r"consolidated\.\d+\.(pth|safetensors)"), "transformers' convert_llama_weights_to_hf.py"),
    (re.compile(r"mp_rank_\d+_model_states\.pt"), "DeepSpeed's ds_to_universal.py, or save a merged model"),
    (re.compile(r"(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt"), "the zero_to_fp32.py beside it"),
    (re.compile(r"model_optim_rng\.pt|model_rng\.pt"), "Megatron's tools/checkpoint/convert.py"),
    (re.compile(r"layer_\d+-model_\d+-model_states\.pt"), "GPT-NeoX's tools/ckpts/convert_neox_to_hf.py"),
    (re.compile(r"model_world_size_\d+_rank_\d+\.pt"), "verl's model_merger"),
)
"""Names of files of which each holds a slice of every tensor, and what joins them."""

_NEVER_WHOLE = re.compile(r"zero_pp_rank|layer_\d|world_size_(?!1_)")
"""What such a name holds that is a part even where it is the only one."""


def refuse_parts(path: Path, names: Iterable[str]) -> None:
    """Raise if files of a folder are slices of a parallel model.

    Args:
        path: The folder, or what stands for it.
        names: Its files.

    Raises:
        CheckpointError: It says so, and what joins them.
    """
    where, listed = printable(path, 1000), list(names)
    for pattern, converter in _PARALLEL:
        parts = [name for name in listed if pattern.fullmatch(name)]
        if len(parts) > 1 or any(_NEVER_WHOLE.search(name) for name in parts):
            raise CheckpointError(
                f"{where!r} holds the parts of a parallel model, {printable(parts[0], 60)} and others: each has slices "
                f"of the tensors. Join them with {converter}, and open the result."
            )
        ranks = [p for p in path.parent.glob("mp_rank_*") if parts and path.name.startswith("mp_rank_")]
        if len(ranks) > 1:
            raise CheckpointError(
                f"{where!r} is one of {len(ranks)} parts of a parallel model (Megatron). Join them with {converter}, "
                "and open the result."
            )


def refuse_lone_part(path: Path) -> None:
    """Raise if a file, by its name and its neighbours, is not a whole model.

    Raises:
        CheckpointError: It is one shard of several, a slice of a parallel model, or an adapter.
    """
    where, shard = printable(path, 1000), _SHARD.fullmatch(path.name)
    if shard and int(shard[2]) > 1:
        raise CheckpointError(
            f"{where!r} is one part of {int(shard[2])} of a model. Open the folder that holds them all."
        )
    if path.name.startswith("adapter_model.") and (path.parent / "adapter_config.json").exists():
        raise CheckpointError(f"{where!r} holds the factors of an adapter, no weights. Open its folder.")
    if path.suffix == ".distcp":
        raise CheckpointError(
            f"{where!r} is one part of a distributed checkpoint (DCP). Open the folder that holds it."
        )
    if any(pattern.fullmatch(path.name) for pattern, _ in _PARALLEL):
        refuse_parts(path.parent, (p.name for p in path.parent.iterdir()))
