"""Which files of a folder make up its model, opened as one checkpoint, and its configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from diffract.checkpoints.checkpoint import Checkpoint, Source
from diffract.checkpoints.files import ByteFile
from diffract.checkpoints.header import SetAside, TensorInfo, read_header
from diffract.errors import CheckpointError, printable

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
DELTA = "delta.json"
TORCH = "pytorch_model.bin"
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
GGUF = ".gguf"
KINDS = ((SAFETENSORS, (".safetensors",)), (TORCH, TORCH_SUFFIXES), (f"model{GGUF}", (GGUF,)))
"""Weights by kind, the preferred one first: a file that is not sharded, and how the names of others end."""

TRAINER = (
    *("training_args", "optim", "scheduler", "lr_scheduler", "scaler", "sampler", "rng_state", "random_states"),
    *("train.pt", "train_state", "trainer_state", "training_state", "recipe_state", "global_step"),
    *("zero_pp_rank_", "bf16_zero_pp_rank_", "fp16_zero_pp_rank_"),
)
"""How files begin that a training run leaves beside the weights."""

SLICES = "DCP_SHARDING_INFO"
"""Key of a file's metadata under which a distributed checkpoint notes which part of each tensor the file holds."""

HEADERS_AT_ONCE = 8
"""Headers read at the same time; on the hub each costs a round trip or two."""


class Folder(Protocol):
    """Files by name, wherever they lie."""

    @property
    def where(self) -> str:
        """What to call it in messages."""
        ...

    @property
    def names(self) -> list[str]:
        """Its files, those of its subfolders left out."""
        ...

    @property
    def nested(self) -> list[str]:
        """Files of its subfolders, with slashes."""
        ...

    def below(self, name: str) -> Folder:
        """Return a subfolder as a folder of its own."""
        ...

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a small file."""
        ...

    def open(self, name: str) -> ByteFile:
        """Open a large file."""
        ...

    def holds(self, name: str) -> bool:
        """Whether a file is the folder's own, not one that a link brings in from elsewhere."""
        ...


@dataclass(frozen=True)
class Shards:
    """The files that make up a model.

    Attributes:
        files: Their names.
        tensors: Names of tensors that an index promises; empty without an index.
        index: The name of that index.
    """

    files: list[str]
    tensors: Iterable[str] = ()
    index: str | None = None


def open_safetensors(file: ByteFile) -> tuple[Checkpoint, dict[str, str]]:
    """Open one safetensors file; return it and the file's own metadata. An error closes it.

    Raises:
        CheckpointError: The file is damaged.
    """
    try:
        header = read_header(file.fetch, file.size, file.name)
    except BaseException:
        file.close()
        raise
    sources = dict.fromkeys(header.infos, file)
    return Checkpoint(file.name, header.infos, sources, set_aside=header.set_aside), header.metadata


def open_shards(folder: Folder, shards: Shards) -> Checkpoint:
    """Open safetensors files as one checkpoint; an error closes them all.

    Raises:
        CheckpointError: A file is damaged, or a tensor is in two of them, or in none though it should be.
    """
    with ExitStack() as opened, ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:

        def open_one(name: str) -> tuple[Checkpoint, dict[str, str]]:
            file = folder.open(name)
            opened.callback(file.close)
            return open_safetensors(file)

        files = list(pool.map(open_one, shards.files))
        if any(SLICES in metadata for _, metadata in files):
            from diffract.checkpoints.distributed import join_slices  # it reads archives too, which come after files

            joined = join_slices(files, folder.where)
        else:
            joined = join((held for held, _ in files), folder.where)
        check_promised(joined, shards, folder.where)
        opened.pop_all()
    return joined


def find_weights(folder: Folder) -> Shards:
    """Return the files that make up a folder's model, of the kind that is preferred; none if there are no weights.

    Of one kind only: repositories often hold the same weights twice.
    """
    found = (find_shards(folder, single, suffixes) for single, suffixes in KINDS)
    return next((one for one in found if one.files), Shards([]))


def find_shards(folder: Folder, single: str, suffixes: tuple[str, ...]) -> Shards:
    """Return the files that make up a folder's model: the single one, those of the index, or all there are.

    Args:
        folder: Where to look.
        single: Name of the file of a model that is not sharded; the index is called after it.
        suffixes: What the files' names end in.

    Raises:
        CheckpointError: The index is wrong or names files that are not there, or a numbered file is missing.
    """
    index = f"{single}.index.json"
    if single in folder.names:
        return Shards([single])
    if index in folder.names:
        weight_map = parse_index(folder.read_bytes(index), f"{folder.where}, {index}")
        shards = Shards(list(dict.fromkeys(weight_map.values())), weight_map, index)
    else:
        found = [n for n in folder.names if n.endswith(suffixes) and not n.startswith(TRAINER)]
        shards = Shards([n for n in found if not n.startswith("adapter_")])
        _refuse_gaps(shards.files, folder.where)
    _refuse_missing(shards.files, set(folder.names), folder.where)
    return shards


def parse_index(raw: bytes, where: str) -> dict[str, str]:
    """Return an index's map from tensor to file, each file checked to be a plain name.

    Raises:
        CheckpointError: The index is no index, or names a file outside its folder.
    """
    weight_map = parse_object(raw, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: expected a weight_map of tensor to file names. Fetch the index again.")
    for name in weight_map.values():
        if not isinstance(name, str) or not is_plain_name(name):
            raise CheckpointError(
                f"{where}: names {printable(name)!r}, expected the name of a file in the same folder. "
                "Do not use this checkpoint."
            )
    return weight_map


def is_plain_name(name: str) -> bool:
    """Whether a name from an index is a file name and nothing more."""
    return name not in ("", ".", "..") and name.isprintable() and not any(c in name for c in "/\\:")


def check_promised(found: Checkpoint, shards: Shards, where: str) -> None:
    """Raise unless every tensor that the index promises is in one of the files."""
    lost = sorted(set(shards.tensors) - set(found) - set(found.set_aside))
    if lost:
        raise CheckpointError(
            f"{where}: the index promises {len(lost)} tensors that no file holds, first "
            f"{printable(lost[0])!r}. Fetch the checkpoint again."
        )


def join(shards: Iterable[Checkpoint], where: str) -> Checkpoint:
    """Return several files as one checkpoint.

    Raises:
        CheckpointError: A tensor is in two of them.
    """
    infos: dict[str, TensorInfo] = {}
    sources: dict[str, Source] = {}
    tied: dict[str, str] = {}
    set_aside: dict[str, SetAside] = {}
    for shard in shards:
        twice = sorted(infos.keys() & shard.infos.keys())
        if twice:
            raise CheckpointError(
                f"{where}: tensor {printable(twice[0])!r} is in two files, {infos[twice[0]].file} and "
                f"{shard.reference}. Open one of them, or remove what does not belong."
            )
        infos |= shard.infos
        sources |= shard.sources
        tied |= shard.tied
        set_aside |= shard.set_aside
    return Checkpoint(where, infos, sources, tied=tied, set_aside=set_aside)


MOST_CONFIG_BYTES = 1 << 24
"""A configuration is of some kilobytes, and takes thirty times as much memory as on disk."""


def read_config(folder: Folder) -> dict[str, Any]:
    """Return a folder's config.json, empty if there is none.

    Raises:
        CheckpointError: It is no JSON object, or too large.
    """
    if CONFIG not in folder.names:
        return {}
    raw, where = folder.read_bytes(CONFIG), f"{folder.where}, {CONFIG}"
    if len(raw) > MOST_CONFIG_BYTES:
        raise CheckpointError(f"{where} has {len(raw):,} bytes, which is too many for a configuration. Fetch it again.")
    return parse_object(raw, where)


def read_object(folder: Folder, name: str) -> dict[str, Any] | None:
    """Return the JSON object that a folder's file holds, ``None`` if there is no such file."""
    return parse_object(folder.read_bytes(name), f"{folder.where}, {name}") if name in folder.names else None


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object that a file's content is.

    Raises:
        CheckpointError: It is no JSON, or no object.
    """
    try:
        found = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is no JSON: {printable(error)}. Fetch it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(found).__name__}. Fetch it again.")
    return found


def _refuse_missing(files: list[str], present: set[str], where: str) -> None:
    missing = [name for name in files if name not in present]
    if missing:
        some = ", ".join(map(printable, missing[:3]))
        raise CheckpointError(f"{where}: {len(missing)} of {len(files)} files are missing: {some}. Fetch them.")


def _refuse_gaps(files: list[str], where: str) -> None:
    """Without an index, ``model-00002-of-00003`` still tells that there must be three."""
    for name in files:
        stem, _, suffix = name.rpartition(".")
        head, _, total = stem.rpartition("-of-")
        start, _, number = head.rpartition("-")
        if number.isdecimal() and total.isdecimal() and len(total) <= 5:
            numbered = (f"{start}-{i:0{len(number)}d}-of-{total}.{suffix}" for i in range(1, int(total) + 1))
            _refuse_missing(list(numbered), set(files), where)
