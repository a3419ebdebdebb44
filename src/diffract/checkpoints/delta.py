"""A model stored as what it has in other bits than its base: compressed, lossless, opened like any checkpoint.

``delta.json`` describes every tensor and its blocks of rows, ``delta.bin`` holds these one after another. A block is

``same``     the base's bytes; nothing is stored
``xor``      the bits that differ: bytes xor the base's
``entries``  which entries differ, a bit for each, and of these the bits that do
``whole``    the bytes themselves; the base has no such tensor

The bytes of entries are stored plane by plane (all lowest bytes first), since the upper ones of a small change are
mostly zero, and then by Zstandard. Each block has the digest of what it must come to, so that another base, or a
flipped bit, is an error and never a number.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from blake3 import blake3

from diffract.checkpoints.checkpoint import Checkpoint, Range, as_bytes, from_bytes, row_blocks, start_digest
from diffract.checkpoints.companions import find_companions
from diffract.checkpoints.files import ByteFile
from diffract.checkpoints.header import ITEMSIZES, TensorInfo, check_numbers
from diffract.checkpoints.sources import DELTA, Folder, read_config, read_object
from diffract.errors import CheckpointError, printable

if TYPE_CHECKING:
    import torch

BLOCKS, FILES = "delta.bin", "files"
"""The bytes, beside their description, and the folder with what lies beside the model's weights."""

FORMAT = 1

BLOCK_BYTES = 1 << 24
"""Bytes of a tensor that are compressed at once: more than Zstandard looks back, and few beside a matrix in float64."""

KEPT_BLOCKS = 8
"""Blocks that stay decompressed, of all tensors together: as many as threads read at once, and no more memory."""

LEVEL = 3
"""Zstandard's own default: of bits that differ at random a higher level finds no more."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Block:
    """A stored block: its rows (all for ``None``), how it is stored, where, and the digest of what it comes to."""

    rows: Range | None
    how: str
    offset: int
    length: int
    digest: str


def encode(own: memoryview, base: memoryview | None, itemsize: int) -> tuple[str, bytes]:
    """Return how a block is stored best, and its bytes.

    Args:
        own: The bytes of the block.
        base: As many of the base; ``None`` where it has none.
        itemsize: Bytes per entry.
    """
    mine = np.frombuffer(own, np.uint8)
    # Bytes of one significance side by side: signs and exponents repeat, mantissas hardly do.
    if base is None:
        return "whole", _compressed(_planes(mine, itemsize))
    changed = mine ^ np.frombuffer(base, np.uint8)
    which = changed.reshape(-1, itemsize).any(axis=1)
    if not which.any():
        return "same", b""
    # What is shorter depends on the training: all entries moved a little, or most rounded to where they were.
    found = {"xor": _compressed(_planes(changed, itemsize))}
    if not which.all():
        some = changed.reshape(-1, itemsize)[which]
        found["entries"] = _compressed(np.concatenate([np.packbits(which), _planes(some.reshape(-1), itemsize)]))
    return min(found.items(), key=lambda item: len(item[1]))


def decode(how: str, stored: bytes, base: memoryview | None, *, size: int, itemsize: int) -> Bytes:
    """Return the bytes of a block that `encode` has stored; what is damaged may come out as anything.

    Args:
        how: How it is stored.
        stored: Its bytes.
        base: The base's bytes; ``None`` for ``whole``.
        size: Bytes of the block.
        itemsize: Bytes per entry.

    Raises:
        ValueError: The bytes are no such block.
    """
    if how == "whole":
        return _joined(_decompressed(stored, size), itemsize)
    if base is None:
        raise ValueError("its base is missing")
    origin = np.frombuffer(base, np.uint8)
    if how == "same":
        return origin
    if how == "xor":
        return origin ^ _joined(_decompressed(stored, size), itemsize)
    if how != "entries":
        raise ValueError(f"stored as {printable(how)!r}, which this version does not know")
    entries = size // itemsize
    mask_bytes = -(-entries // 8)
    found = _decompressed(stored, mask_bytes + size, exactly=False)
    which = np.unpackbits(found[:mask_bytes], count=entries).astype(bool)
    some = found[mask_bytes:]
    if len(some) != int(which.sum()) * itemsize:
        raise ValueError("it holds another number of entries than it says")
    made = origin.copy().reshape(-1, itemsize)
    made[which] ^= _joined(some, itemsize).reshape(-1, itemsize)
    return made.reshape(-1)


def _planes(raw: Bytes, itemsize: int) -> Bytes:
    return np.ascontiguousarray(raw.reshape(-1, itemsize).T).reshape(-1)


def _joined(planes: Bytes, itemsize: int) -> Bytes:
    return np.ascontiguousarray(planes.reshape(itemsize, -1).T).reshape(-1)


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def _compressed(raw: Bytes) -> bytes:
    return _zstd().compress(raw.data, LEVEL)


def _decompressed(stored: bytes, size: int, *, exactly: bool = True) -> Bytes:
    zstd = _zstd()
    try:
        # never more than the block can hold, whatever a few bytes claim to become
        found = zstd.ZstdDecompressor().decompress(stored, size + 1)
    except zstd.ZstdError as error:
        raise ValueError(f"it cannot be decompressed ({error})") from error
    if len(found) > size or (exactly and len(found) != size):
        raise ValueError(f"it does not come to {size} bytes")
    return np.frombuffer(found, np.uint8)


class Origin(NamedTuple):
    """A tensor of a base."""

    checkpoint: Checkpoint
    name: str


class DeltaWriter:
    """Writes a delta tensor by tensor; a context manager that writes the description last."""

    def __init__(self, folder: Path, base: str) -> None:
        """Begin.

        Args:
            folder: Where it is written.
            base: What the base is called.
        """
        self._folder, self._base, self._file = folder, base, (folder / BLOCKS).open("xb")
        self._tensors: dict[str, Any] = {}
        self.written_bytes = 0

    def add(self, info: TensorInfo, read: Callable[[Range | None], torch.Tensor], origin: Origin | None) -> str:
        """Write a tensor, and return its digest.

        Args:
            info: What it is.
            read: Reads rows of it.
            origin: The base, and what it calls the tensor; ``None`` where it has none.
        """
        over = None if origin is None else origin.checkpoint.infos.get(origin.name)
        over = over if over is not None and _overlies(info, over) else None
        blocks: list[list[Any]] = []
        hasher = start_digest(info)
        for rows in row_blocks(info, BLOCK_BYTES):
            own, base = as_bytes(read(rows)), None
            if origin is not None and over is not None and _reaches(over, rows, info):
                base = as_bytes(origin.checkpoint.read(over.name, rows))
            how, raw = encode(own, base, info.itemsize)
            # Each block has a digest: a head is read and checked without the rest of its tensor.
            blocks.append([list(rows) if rows else None, how, self.written_bytes, len(raw), blake3(own).hexdigest()])
            self._file.write(raw)
            self.written_bytes += len(raw)
            hasher.update(own)
        name = None if over is None else over.name
        self._tensors[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "base": name, "blocks": blocks}
        return hasher.hexdigest()

    def __enter__(self) -> DeltaWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None:
            found = {"format": FORMAT, "base": self._base, "tensors": self._tensors}
            (self._folder / DELTA).write_text(json.dumps(found), encoding="utf-8")


@dataclass
class _Recent:
    """The blocks of a delta that were read last: heads are read row by row, and several threads read side by side."""

    lock: Lock = field(default_factory=Lock)
    blocks: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def get(self, key: tuple[str, int]) -> torch.Tensor | None:
        """Return a block that is still there."""
        with self.lock:
            return self.blocks.get(key)

    def keep(self, key: tuple[str, int], block: torch.Tensor) -> None:
        """Keep a block, in place of the one that came first of ``KEPT_BLOCKS``."""
        with self.lock:
            self.blocks[key] = block
            if len(self.blocks) > KEPT_BLOCKS:
                del self.blocks[next(iter(self.blocks))]


@dataclass(frozen=True)
class _Stored:
    """The source of a delta's tensor."""

    blocks: list[Block]
    file: ByteFile
    base: Checkpoint
    base_name: str | None
    owns_base: bool
    recent: _Recent

    def read(self, info: TensorInfo, rows: Range | None) -> torch.Tensor:
        """Return entries ``rows`` of the leading axis."""
        import torch

        first, last = rows or (0, info.shape[0] if info.shape else 1)
        parts = []
        for number, block in enumerate(self.blocks):
            begin, end = block.rows or (0, info.shape[0] if info.shape else 1)
            if (begin < last and first < end) or not info.entries:
                made = self._block(number, info)
                parts.append(
                    made if block.rows is None and rows is None else made[max(0, first - begin) : last - begin]
                )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _block(self, number: int, info: TensorInfo) -> torch.Tensor:
        import torch

        if (known := self.recent.get((info.name, number))) is not None:
            return known
        block = self.blocks[number]
        alone = block.how == "whole" or self.base_name is None
        base = None if alone else as_bytes(self.base.read(str(self.base_name), block.rows))
        size = (
            info.size_bytes
            if block.rows is None
            else info.size_bytes // info.shape[0] * (block.rows[1] - block.rows[0])
        )
        where = f"{self.file.name}, tensor {printable(info.name)!r}"
        try:
            stored = self.file.fetch(block.offset, block.length)
            made = decode(block.how, stored, base, size=size, itemsize=info.itemsize)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}. The delta is damaged; fetch it again.") from error
        # Over another base the bytes come to something too, which only the digest tells from the model.
        if blake3(made.data).hexdigest() != block.digest:
            raise CheckpointError(
                f"{where}: over {printable(self.base.reference)} it does not come to what was stored. Pass "
                "--adapter-base with the base that the delta was made of; if that is the one, the delta is damaged."
            )
        tensor = from_bytes(torch.from_numpy(made.copy()), info, block.rows)
        self.recent.keep((info.name, number), tensor)
        return tensor

    def close(self) -> None:
        """Close the file, and the base where it was opened for the delta."""
        self.file.close()
        if self.owns_base:
            self.base.close()


def delta_base(folder: Folder) -> str:
    """Return what a delta names as its base.

    Raises:
        CheckpointError: It names none, or is of another version.
    """
    found = read_object(folder, DELTA) or {}
    if found.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder.where}: {DELTA} is of format {printable(found.get('format'))}, this version reads {FORMAT}. "
            "Update diffract."
        )
    if not isinstance(found.get("base"), str):
        raise CheckpointError(f"{folder.where}: {DELTA} names no base. Pass --adapter-base MODEL.")
    return found["base"]


def open_delta(folder: Folder, base: Checkpoint, *, owns_base: bool) -> Checkpoint:
    """Open a delta over its base.

    Args:
        folder: Where it lies.
        base: The model that it was made against.
        owns_base: Whether closing the delta closes the base.

    Raises:
        CheckpointError: The description is damaged, or the base lacks a tensor, or has it in another shape.
    """
    found = read_object(folder, DELTA) or {}
    tensors = found.get("tensors")
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{folder.where}: {DELTA} lists no tensors. The delta is damaged; fetch it again.")
    file = folder.open(BLOCKS)
    try:
        infos, sources, recent = {}, {}, _Recent()
        for name, entry in tensors.items():
            info, blocks = _described(name, entry, file)
            _check_base(info, entry["base"], blocks, base)
            infos[name] = info
            sources[name] = _Stored(blocks, file, base, base_name=entry["base"], owns_base=owns_base, recent=recent)
    except BaseException:
        file.close()
        raise
    beside = folder.below(FILES)
    return Checkpoint(
        folder.where,
        infos,
        sources,
        config=read_config(beside),
        base_reference=base.reference,
        companions=find_companions(beside),
        notes=(f"A delta over {printable(base.reference)}.",),
    )


def _described(name: str, entry: Any, file: ByteFile) -> tuple[TensorInfo, list[Block]]:
    where = f"{file.name}, tensor {printable(name)!r}"
    damaged = CheckpointError(f"{where}: the description is damaged. Fetch the delta again.")
    try:
        dtype, shape, base = entry["dtype"], entry["shape"], entry["base"]
        made = [Block(rows and (rows[0], rows[1]), *stored) for rows, *stored in entry["blocks"]]
        numbers = [number for block in made for number in (block.offset, block.length)]
        known = dtype in ITEMSIZES and isinstance(base, str | None)
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise damaged from error
    if not known:
        raise damaged
    check_numbers(shape, 0, 0, where)
    info = TensorInfo(name, tuple(shape), dtype, file=file.name)
    # one more than there are is enough to tell: a shape may claim more blocks than any list could hold
    if [block.rows for block in made] != list(islice(row_blocks(info, BLOCK_BYTES), len(made) + 1)):
        raise damaged
    if not all(type(n) is int and n >= 0 for n in numbers) or any(b.offset + b.length > file.size for b in made):
        raise CheckpointError(f"{where}: it ends outside of the file. It is truncated; fetch it again.")
    return info, made


def _check_base(info: TensorInfo, name: str | None, blocks: list[Block], base: Checkpoint) -> None:
    over = [block for block in blocks if block.how != "whole"]
    if not over or name is None:
        return
    origin = base.infos.get(name)
    if origin is None or not _overlies(info, origin) or not _reaches(origin, over[-1].rows, info):
        has = "has no such tensor" if origin is None else f"has it as {origin.dtype} {list(origin.shape)}"
        raise CheckpointError(
            f"the delta's tensor {printable(info.name)!r} is {info.dtype} {list(info.shape)} over {printable(name)!r} "
            f"of its base, but {printable(base.reference)} {has}. Pass --adapter-base with the base that it was made "
            "of."
        )


def _overlies(info: TensorInfo, origin: TensorInfo) -> bool:
    """Whether a tensor's rows can be stored over a base's: one dtype, and rows of one shape."""
    return info.dtype == origin.dtype and (
        info.shape == origin.shape or (len(info.shape) > 1 and info.shape[1:] == origin.shape[1:])
    )


def _reaches(origin: TensorInfo, rows: Range | None, info: TensorInfo) -> bool:
    """Whether a base's tensor has the rows of a block, all of ``info`` for ``None``."""
    return info.shape == origin.shape if rows is None else rows[1] <= origin.shape[0]
