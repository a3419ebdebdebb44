"""Files whose bytes are read by position, and folders on disk."""

from __future__ import annotations

import json
import os
import pickle
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch

from diffract.checkpoints.checkpoint import Checkpoint, Range, Source, byte_range, from_bytes
from diffract.checkpoints.header import DTYPE_NAMES, HEADER_LIMIT, TensorInfo, read_header
from diffract.errors import CheckpointError, printable


class ByteFile(ABC):
    """A file that holds tensors and can be read from any position by several threads at once.

    Attributes:
        name: What to call it in messages.
        size: Its size in bytes.
    """

    name: str
    size: int

    @abstractmethod
    def fill(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the bytes from ``offset`` on, or raise ``CheckpointError``."""

    @abstractmethod
    def close(self) -> None:
        """Release what is open; further calls do nothing."""

    def fetch(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
        buffer = bytearray(length)
        self.fill(memoryview(buffer), offset)
        return bytes(buffer)

    def read(self, info: TensorInfo, rows: Range | None) -> torch.Tensor:
        """Return entries ``rows`` of a tensor; one allocation, no further copy."""
        import torch

        offset, length = byte_range(info, rows)
        buffer = torch.empty(length, dtype=torch.uint8)
        if length:
            self.fill(buffer.numpy().data, offset)
        return from_bytes(buffer, info, rows)


class LocalFile(ByteFile):
    """A file on disk, read by position, so that threads do not disturb each other and nothing stays mapped.

    It stays the same file when another is renamed to its name, and closes itself when nothing refers to it.
    """

    def __init__(self, path: Path) -> None:
        self.name = printable(path, 1000)
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(f"cannot open {self.name!r}: {error.strerror}.") from error
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size

    def fill(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the bytes from ``offset`` on."""
        if not self._close.alive:
            raise CheckpointError(f"{self.name!r} is closed. Keep the checkpoint open while reading from it.")
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.name!r}: {error.strerror}.") from error
            if got == 0:
                raise CheckpointError(
                    f"{self.name!r} ends at byte {offset + done}: it shrank while open. Fetch it again."
                )
            done += got

    def close(self) -> None:
        """Close the file; further calls do nothing."""
        self._close()


class LocalFolder:
    """A folder on disk.

    Attributes:
        path: Where it is.
        where: What to call it in messages.
        names: Its files. A link counts even if it leads nowhere, so that opening it can say so.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where = printable(path, 1000)
        try:
            self.names = sorted(p.name for p in path.iterdir() if p.is_file() or (p.is_symlink() and not p.exists()))
        except OSError as error:
            raise CheckpointError(f"cannot list {self.where!r}: {error.strerror}.") from error

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a small file."""
        file = self.open(name)
        try:
            if file.size > HEADER_LIMIT:
                raise CheckpointError(f"{file.name}: {file.size} bytes are too many for a configuration or an index.")
            return file.fetch(0, file.size)
        finally:
            file.close()

    def open(self, name: str) -> LocalFile:
        """Open one of its files."""
        return LocalFile(self.path / name)


Array = torch.Tensor | np.ndarray

BIT_TYPES: dict[str, tuple[type[np.generic], torch.dtype]] = {
    "bfloat16": (np.uint16, torch.bfloat16),
    "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
    "float8_e5m2": (np.uint8, torch.float8_e5m2),
}
"""ml_dtypes' names: NumPy holds the bits, torch knows the type."""


class Memory:
    """One array that already lies in memory, or is mapped into it; only what is read is converted."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def read(self, info: TensorInfo, rows: Range | None) -> torch.Tensor:
        """Return entries ``rows`` of the leading axis, on the CPU."""
        return _to_tensor(self.array if rows is None else self.array[rows[0] : rows[1]])

    def close(self) -> None:
        """Nothing is open."""


def open_mapping(
    arrays: Mapping[str, Any], *, reference: str = "<memory>", config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Return an in-memory mapping as a checkpoint; arrays that share their memory are recognised as tied.

    Args:
        arrays: Names to arrays: torch, NumPy, or anything with ``__dlpack__`` or ``__array__``; nested
            mappings (JAX/Flax parameters) are flattened with dots.
        reference: What to call it.
        config: The model's configuration.

    Raises:
        CheckpointError: A value is no array of a known dtype, or two values get the same name.
    """
    return open_pairs(flatten(arrays), reference=reference, config=config)


def open_pairs(
    pairs: Iterable[tuple[str, Any]], *, reference: str, config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Return names and arrays as a checkpoint; as ``open_mapping``, with nothing left to flatten."""
    found: dict[str, Array] = {}
    for name, value in pairs:
        if name in found:
            raise CheckpointError(f"{reference}: two values are called {printable(name)!r}. Rename one of them.")
        found[name] = _as_array(value, f"{reference}, {printable(name)!r}")
    infos = {name: _describe(name, array, reference) for name, array in found.items()}
    sources: dict[str, Source] = {name: Memory(array) for name, array in found.items()}
    return Checkpoint(reference, infos, sources, config or {}, _ties(found))


def open_module(module: torch.nn.Module, *, reference: str = "<module>") -> Checkpoint:
    """Return a module's tensors as a checkpoint; a ``config`` with ``to_dict`` (transformers) is its config.

    Args:
        module: The model. What of its state is no tensor is left out.
        reference: What to call it.
    """
    config = getattr(module, "config", None)
    found = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    state = module.state_dict(keep_vars=True)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return open_mapping(tensors, reference=reference, config=found)


def open_npz(path: Path) -> Checkpoint:
    """Open a NumPy archive. It is read whole, as it cannot be read in part; pickled objects are refused.

    Raises:
        CheckpointError: It is no archive of plain arrays.
    """
    where = printable(path, 1000)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # a damaged archive can make zipfile, zlib or NumPy raise almost anything
        raise CheckpointError(
            f"cannot read {where!r} as .npz of plain arrays: {printable(error)}. Save it with numpy.savez."
        ) from error
    return open_mapping(arrays, reference=where)


def flatten(arrays: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings, names joined with dots."""
    for key, value in arrays.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _as_array(value: Any, where: str) -> Array:
    """Return a value as a dense array that holds data, without a copy."""
    try:
        array = _plain(value)
        if isinstance(array, torch.Tensor) and (array.is_meta or array.is_quantized or array.layout != torch.strided):
            raise TypeError(f"a {array.layout} tensor of {array.dtype} on {array.device} holds no plain entries")
        return array
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise CheckpointError(
            f"{where}: expected an array, got {type(value).__name__} ({printable(error)}). Pass dense arrays."
        ) from error


def _plain(value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        return np.asarray(value)
    if hasattr(value, "__dlpack__"):
        try:
            return torch.from_dlpack(value)
        except (TypeError, RuntimeError, BufferError):
            if not hasattr(value, "__array__"):
                raise
    if hasattr(value, "__array__"):
        return np.asarray(value)
    raise TypeError("it has neither __dlpack__ nor __array__")


def _describe(name: str, array: Array, reference: str) -> TensorInfo:
    where = f"{reference}, tensor {printable(name)!r}"
    try:
        dtype = _to_tensor(array[:0] if array.ndim else array).dtype
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: dtype {array.dtype} has no counterpart ({printable(error)}). Convert it."
        ) from error
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{where}: unknown dtype {dtype}, expected one of {', '.join(DTYPE_NAMES.values())}. Convert it."
        )
    return TensorInfo(name, tuple(array.shape), DTYPE_NAMES[dtype], reference)


def _to_tensor(array: Array) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array.detach().cpu()
    bits = BIT_TYPES.get(array.dtype.name)
    plain = array.view(bits[0]) if bits else array
    # what torch cannot take as it lies is copied: read-only, swapped bytes, backwards or between entries
    whole_steps = all(step >= 0 and step % plain.itemsize == 0 for step in plain.strides)
    if not (plain.flags.writeable and plain.dtype.isnative and whole_steps):
        plain = plain.astype(plain.dtype.newbyteorder("="), order="C")
    tensor = torch.from_numpy(plain)
    return tensor.view(bits[1]) if bits else tensor


def _ties(arrays: Mapping[str, Array]) -> dict[str, str]:
    """Map each name whose array is the very memory of an earlier one to that one."""
    first: dict[tuple[Any, ...], str] = {}
    places = {name: _place(array) for name, array in arrays.items() if 0 not in array.shape}
    return {name: first[place] for name, place in places.items() if first.setdefault(place, name) != name}


def _place(array: Array) -> tuple[Any, ...]:
    shape, dtype = tuple(array.shape), array.dtype
    if isinstance(array, torch.Tensor):
        return array.device, array.data_ptr(), shape, array.stride(), dtype
    return "numpy", array.__array_interface__["data"][0], shape, array.strides, dtype


SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
TORCH_SUFFIXES = (".bin", ".pt", ".pth")
TRAINER = (
    "training_args",
    "optimizer",
    "scheduler",
    "scaler",
    "sampler",
    "rng_state",
    "random_states",
    "global_step",
)
"""How files begin that a training run leaves beside the weights."""

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

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a small file."""
        ...

    def open(self, name: str) -> ByteFile:
        """Open a large file."""
        ...


@dataclass(frozen=True)
class Shards:
    """The files that make up a model.

    Attributes:
        files: Their names.
        tensors: Names of tensors that an index promises; empty without an index.
    """

    files: list[str]
    tensors: Iterable[str] = ()


def open_safetensors(file: ByteFile) -> tuple[Checkpoint, dict[str, str]]:
    """Open one safetensors file; return it and its own metadata. An error closes it.

    Raises:
        CheckpointError: The file is damaged.
    """
    try:
        infos, metadata = read_header(file.fetch, file.size, file.name)
    except BaseException:
        file.close()
        raise
    return Checkpoint(file.name, infos, dict.fromkeys(infos, file)), metadata


def open_shards(folder: Folder, shards: Shards) -> Checkpoint:
    """Open safetensors files as one checkpoint; an error closes them all.

    Raises:
        CheckpointError: A file is damaged, or a tensor is in two of them, or in none though it should be.
    """
    with ExitStack() as opened, ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:

        def open_one(name: str) -> Checkpoint:
            file = folder.open(name)
            opened.callback(file.close)
            return open_safetensors(file)[0]

        joined = join(pool.map(open_one, shards.files), folder.where)
        check_promised(joined.infos, shards, folder.where)
        opened.pop_all()
    return joined


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
        shards = Shards(list(dict.fromkeys(weight_map.values())), weight_map)
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


def check_promised(found: Mapping[str, Any], shards: Shards, where: str) -> None:
    """Raise unless every tensor that the index promises is in one of the files."""
    lost = sorted(set(shards.tensors) - set(found))
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
    return Checkpoint(where, infos, sources, tied=tied)


def read_config(folder: Folder) -> dict[str, Any]:
    """Return a folder's config.json, empty if there is none.

    Raises:
        CheckpointError: It is no JSON object.
    """
    return read_object(folder, "config.json") or {}


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


CONFIG = "config.json"

PATTERNS = (
    *(CONFIG, "generation_config.json", "*processor_config.json", "configuration_*.py", "modeling_*.py"),
    *("tokenizer*", "tokenization_*.py", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.*", "vocab-*", "merges.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken", "LICENSE*", "NOTICE*"),
)
"""Names of what a loader may need besides weights, and of what says how the weights may be used."""


def find_companions(folder: Folder) -> dict[str, Callable[[], bytes]]:
    """Return a function that reads it for each file of a folder that belongs to its model."""
    wanted = (name for name in folder.names if any(fnmatchcase(name, pattern) for pattern in PATTERNS))
    return {name: partial(folder.read_bytes, name) for name in wanted}


WRAPPERS = ("state_dict", "model")
"""Keys under which training code puts the weights."""


def open_pickles(folder: LocalFolder, shards: Shards) -> Checkpoint:
    """Open PyTorch files as one checkpoint.

    Raises:
        CheckpointError: A file is damaged or refused, or a tensor is in two of them or in none.
    """
    joined = join((open_pickle(folder.path / name) for name in shards.files), folder.where)
    check_promised(joined.infos, shards, folder.where)
    return joined


def open_pickle(path: Path) -> Checkpoint:
    """Open one PyTorch file; tensors that share their memory are recognised as tied.

    Only weights are loaded: a pickle that holds anything else is refused, and none of its code runs.
    ``{"state_dict": ...}`` and ``{"model": ...}`` wrappers are taken off. The file must stay as it is.

    Raises:
        CheckpointError: The file is damaged, holds more than weights, or holds no named tensors.
    """
    where = printable(path, 1000)
    try:
        loaded = _unwrap(_load(path))
        leaves = list(flatten(loaded)) if isinstance(loaded, Mapping) else []
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{where!r} is refused: it is damaged, or its pickle holds more than weights and would run code "
            f"({printable(_first_line(error))}). Save it as safetensors where you trust it."
        ) from error
    except Exception as error:  # a damaged pickle or zip can make torch raise almost anything
        reason = printable(_first_line(error))
        raise CheckpointError(f"cannot read {where!r} as a PyTorch file: {reason}. Fetch it again.") from error
    tensors = [(name, value) for name, value in leaves if isinstance(value, torch.Tensor)]
    if not tensors:
        raise CheckpointError(f"{where!r} holds no named tensors, expected a state dict. Is this the right file?")
    return open_pairs(tensors, reference=where)


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _unwrap(loaded: Any) -> Any:
    """Take off wrappers, at most as many as there are kinds; tensors beside one show that it is none."""
    for _ in WRAPPERS:
        if not isinstance(loaded, Mapping) or any(isinstance(v, torch.Tensor) for v in loaded.values()):
            break
        inner = next((loaded[k] for k in WRAPPERS if isinstance(loaded.get(k), Mapping)), None)
        loaded = loaded if inner is None else cast("Mapping[str, Any]", inner)
    return loaded


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
