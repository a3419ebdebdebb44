"""Distributed checkpoints of torch (DCP): tensors in pieces over files, read piece by piece where they are wanted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from diffract.checkpoints.archive import KNOWN, ArchivedTensor, Stored, read_archive, unpickle
from diffract.checkpoints.checkpoint import Checkpoint, Range, Source
from diffract.checkpoints.files import ByteFile, LocalFolder
from diffract.checkpoints.header import ITEMSIZES, SetAside, TensorInfo
from diffract.checkpoints.sources import SLICES, is_plain_name
from diffract.checkpoints.states import find_model
from diffract.errors import CheckpointError, printable

if TYPE_CHECKING:
    import torch

METADATA = ".metadata"
"""The file that says which pieces there are and where they lie."""

INSIDE = ("model_and_optim", "pytorch_model_fsdp_0", "pytorch_model_fsdp")
"""Subfolders of a step in which OLMo-core and transformers' Trainer keep it."""


class Section(ByteFile):
    """A part of a file, read as if it were one."""

    def __init__(self, file: ByteFile, start: int, size: int) -> None:
        self.name, self.size, self._file, self._start = file.name, size, file, start

    def fill(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the bytes from ``offset`` on."""
        self._file.fill(view, self._start + offset)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass
class Chunk:
    """A block of a tensor.

    Attributes:
        offsets, sizes: Where it lies in the tensor, and its shape.
        source: Reads its rows; ``None`` until it is first read, for an archive within a file.
        info: The piece as its source knows it.
        section: Where that archive lies.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    source: Source | None
    info: TensorInfo
    section: Section | None = None

    def read(self, rows: Range | None) -> torch.Tensor:
        """Return rows of the piece."""
        if self.source is None:
            assert self.section is not None
            stored = read_archive(self.section, self.section.name)
            if not isinstance(stored, Stored) or (stored.shape, stored.dtype) != (self.sizes, self.info.dtype):
                raise CheckpointError(
                    f"{self.section.name!r}: a piece of {printable(self.info.name)!r} is not what {METADATA} says. "
                    "Fetch the checkpoint again."
                )
            self.source = ArchivedTensor(self.section, stored)
        return self.source.read(self.info, rows)


@dataclass
class Pieces:
    """The source of a tensor that lies in pieces."""

    pieces: Sequence[Chunk]
    files: Iterable[ByteFile] = field(default_factory=tuple)

    def read(self, info: TensorInfo, rows: Range | None) -> torch.Tensor:
        """Return entries ``rows`` of the leading axis; of each piece only the rows that are wanted are read."""
        import torch

        from diffract.checkpoints.dtypes import TORCH_DTYPES

        first, last = rows or (0, info.shape[0] if info.shape else 1)
        shape = (last - first, *info.shape[1:]) if info.shape else ()
        found = torch.empty(shape, dtype=TORCH_DTYPES[info.dtype])
        for piece in self.pieces:
            if not info.shape:
                return piece.read(None)
            low, high = max(first, piece.offsets[0]), min(last, piece.offsets[0] + piece.sizes[0])
            if low >= high:
                continue
            inner = (low - piece.offsets[0], high - piece.offsets[0])
            others = zip(piece.offsets[1:], piece.sizes[1:], strict=True)
            place = (slice(low - first, high - first), *(slice(at, at + size) for at, size in others))
            found[place] = piece.read(None if inner == (0, piece.sizes[0]) else inner)
        return found

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()


class Record:
    """Stands in for a record of DCP: keeps the state that its pickle gives it."""

    def __new__(cls, *_: Any) -> Record:
        """Return a record without state."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Keep the state."""
        self.state = state

    def get(self, name: str) -> Any:
        """Return a field, ``None`` if there is none."""
        state = getattr(self, "state", None)
        return state.get(name) if isinstance(state, dict) else None


class _Tensor(Record):
    """What is kept of a tensor; the other kinds of entries are bytes."""


_PLACE = "torch.distributed.checkpoint"
GLOBALS = {
    **KNOWN,
    (f"{_PLACE}.metadata", "TensorStorageMetadata"): _Tensor,
    **{
        (f"{_PLACE}.metadata", name): Record
        for name in (
            *("Metadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex"),
            *("StorageMeta", "_MEM_FORMAT_ENCODING"),
        )
    },
    (f"{_PLACE}.filesystem", "_StorageInfo"): Record,
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): Record,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): Record,
}
"""What ``.metadata`` may name."""


@dataclass(frozen=True)
class _Leaf:
    """A tensor of a distributed checkpoint before it is known whether it is a weight."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    @property
    def ndim(self) -> int:
        """Number of axes, as tensors have it."""
        return len(self.shape)


def open_distributed(folder: LocalFolder, *, part: str | None = None) -> Checkpoint:
    """Open a distributed checkpoint; of its files only ``.metadata`` is read.

    Args:
        folder: Where it is.
        part: The part of the state that is wanted, if it holds several models.

    Raises:
        CheckpointError: ``.metadata`` is damaged or holds code, or a piece or its file is missing.
    """
    where = f"{folder.where}, {METADATA}"
    held = unpickle(folder.read_bytes(METADATA), where, GLOBALS)
    if not isinstance(held, Record) or not isinstance(held.get("state_dict_metadata"), dict):
        raise CheckpointError(f"{where!r} is no metadata of a distributed checkpoint (DCP). Fetch it again.")
    try:
        leaves = [_leaf(key, entry) for key, entry in held.get("state_dict_metadata").items() if type(entry) is _Tensor]
        places = {
            (str(index.get("fqn")), tuple(index.get("offset") or ())): _place(stored)
            for index, stored in (held.get("storage_data") or {}).items()
        }
        tree = _tree(leaves, held.get("planner_data") or {})
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise CheckpointError(f"{where!r} is damaged ({printable(error)}). Fetch it again.") from error
    found = find_model(tree, lambda value: isinstance(value, _Leaf), folder.where, part=part)
    if not found.tensors:
        raise CheckpointError(
            f"{folder.where!r} is a distributed checkpoint (DCP) without tensors. Is it the right one?"
        )
    aside = {
        name: SetAside(leaf.shape, leaf.dtype, prod(leaf.shape) * ITEMSIZES[leaf.dtype], reason)
        for name, leaf, reason in found.set_aside
    }
    files: dict[str, ByteFile] = {}
    try:
        infos = {name: TensorInfo(name, leaf.shape, leaf.dtype, folder.where) for name, leaf in found.tensors}
        sources = {name: Pieces(_pieces(leaf, places, folder, files), files.values()) for name, leaf in found.tensors}
    except BaseException:
        for file in files.values():
            file.close()
        raise
    note = "The checkpoint is distributed (DCP); it is read piece by piece."
    return Checkpoint(folder.where, infos, dict(sources), set_aside=aside, notes=(note,))


def _leaf(key: str, entry: Record) -> _Leaf:
    properties = entry.get("properties")
    state = getattr(properties, "state", None)
    dtype = state[0] if isinstance(state, tuple) else properties.get("dtype")
    if dtype not in ITEMSIZES:
        raise ValueError(f"{printable(key)!r} has no dtype that is known")
    chunks = tuple((_whole(c.get("offsets")), _whole(c.get("sizes"))) for c in entry.get("chunks"))
    return _Leaf(str(key), _whole(entry.get("size")), dtype, chunks)


def _whole(numbers: Any) -> tuple[int, ...]:
    found = tuple(numbers)
    if len(found) > 64 or any(type(n) is not int or not 0 <= n < 1 << 48 for n in found):
        raise ValueError(f"{printable(numbers, 60)} is no place or size")
    return found


def _place(stored: Record) -> tuple[str, int, int]:
    if stored.get("transform_descriptors"):
        raise ValueError("its pieces are compressed; save it without")
    start, length = _whole((stored.get("offset"), stored.get("length")))
    return str(stored.get("relative_path")), start, length


def _tree(leaves: Iterable[_Leaf], paths: Mapping[Any, Any]) -> dict[str, Any]:
    """Return leaves as the nested mapping that was saved; its keys are kept beside the joined names."""
    tree: dict[str, Any] = {}
    for leaf in leaves:
        path = paths.get(leaf.key, (leaf.key,)) if isinstance(paths, Mapping) else (leaf.key,)
        node = tree
        for key in path[:-1]:
            node = node.setdefault(str(key), {})
        node[str(path[-1])] = leaf
    return tree


def _pieces(
    leaf: _Leaf,
    places: Mapping[tuple[str, tuple[int, ...]], tuple[str, int, int]],
    folder: LocalFolder,
    files: dict[str, ByteFile],
) -> list[Chunk]:
    """Return where the pieces of a tensor lie; together they must be the tensor."""
    pieces = []
    for offsets, sizes in leaf.chunks:
        name, start, length = places.get((leaf.key, offsets), places.get((leaf.key, ()), ("", 0, 0)))
        if not is_plain_name(name) or name not in folder.names:
            raise CheckpointError(
                f"{folder.where}: a piece of {printable(leaf.key)!r} is missing: "
                f"{f'the file {printable(name, 60)}' if name else 'no file holds it'}. Fetch the checkpoint again."
            )
        file = files.get(name) or files.setdefault(name, folder.open(name))
        if start + length > file.size:
            raise CheckpointError(
                f"{file.name!r} ends within {printable(leaf.key)!r}: it is truncated. Fetch it again."
            )
        info = TensorInfo(leaf.key, sizes, leaf.dtype, file.name)
        pieces.append(Chunk(offsets, sizes, source=None, info=info, section=Section(file, start, length)))
    _check_cover(leaf.key, leaf.shape, pieces, folder.where)
    return pieces


def _check_cover(name: str, shape: tuple[int, ...], pieces: Sequence[Chunk], where: str) -> None:
    """Raise unless pieces lie within a tensor and have as many entries as it has."""
    inside = all(
        len(piece.offsets) == len(piece.sizes) == len(shape)
        and all(at + size <= n for at, size, n in zip(piece.offsets, piece.sizes, shape, strict=True))
        for piece in pieces
    )
    if not inside or sum(prod(piece.sizes) for piece in pieces) != prod(shape):
        raise CheckpointError(
            f"{where}: the pieces of {printable(name)!r} are not the whole of its shape {list(shape)}: some are "
            "missing. Fetch the checkpoint again."
        )


def join_slices(files: Iterable[tuple[Checkpoint, Mapping[str, str]]], where: str) -> Checkpoint:
    """Return files that hold slices of tensors, as DCP writes them in safetensors' format, as one checkpoint.

    Args:
        files: Each file, with its own metadata.
        where: What to call it.

    Raises:
        CheckpointError: A file does not say which slices it holds, or some are missing.
    """
    pieces: dict[str, list[Chunk]] = {}
    dtypes: dict[str, str] = {}
    aside: dict[str, SetAside] = {}
    for held, metadata in files:
        try:
            slices = json.loads(metadata.get(SLICES, "{}"))
            offsets = {name: _whole(slices[name]["saved_offsets"]) if name in slices else () for name in held.infos}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(f"{held.reference}: its {SLICES} is damaged. Fetch it again.") from error
        aside |= held.set_aside
        for name, info in held.infos.items():
            at = offsets[name] or (0,) * len(info.shape)
            pieces.setdefault(name, []).append(Chunk(at, info.shape, held.sources[name], info))
            dtypes[name] = info.dtype
    infos: dict[str, TensorInfo] = {}
    for name, held in pieces.items():
        if len({len(piece.offsets) for piece in held}) > 1 or len({piece.info.dtype for piece in held}) > 1:
            raise CheckpointError(f"{where}: the slices of {printable(name)!r} do not fit each other. Fetch it again.")
        ends = [map(sum, zip(piece.offsets, piece.sizes, strict=True)) for piece in held]
        shape = tuple(map(max, zip(*ends, strict=True)))
        _check_cover(name, shape, held, where)
        infos[name] = TensorInfo(name, shape, dtypes[name], where)
    sources: dict[str, Source] = {name: Pieces(held, _files(held)) for name, held in pieces.items()}
    return Checkpoint(where, infos, sources, set_aside=aside)


def _files(pieces: Iterable[Chunk]) -> list[ByteFile]:
    return [piece.source for piece in pieces if isinstance(piece.source, ByteFile)]
