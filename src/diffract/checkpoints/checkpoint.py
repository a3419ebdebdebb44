"""A checkpoint: named tensors that are read when asked for, whole or in part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import blake3

from diffract.checkpoints.header import SetAside, TensorInfo
from diffract.errors import CheckpointError, printable, suggest
from diffract.timing import timed

if TYPE_CHECKING:
    import torch


Range = tuple[int, int]
"""Half-open: first index, and the one after the last."""

BLOCK_BYTES = 1 << 26
"""Bytes read at once where a tensor is streamed."""


class Source(Protocol):
    """Where the bytes of tensors come from: a file, a server, memory."""

    def read(self, info: TensorInfo, rows: Range | None) -> torch.Tensor:
        """Return entries ``rows`` of the leading axis (all if ``None``), in the stored dtype."""
        ...

    def close(self) -> None:
        """Release what is open; further calls do nothing."""
        ...


class MissingTensorError(CheckpointError, KeyError):
    """A checkpoint holds no tensor of that name; also a ``KeyError``, as of any mapping."""

    __str__ = Exception.__str__


@dataclass(frozen=True)
class Factors:
    """A low-rank change of a tensor, kept as factors: delta = B @ A, in the tensor's stored orientation.

    Attributes:
        B: (m, r), float64, the adapter's scale included.
        A: (r, n), float64.
    """

    B: torch.Tensor
    A: torch.Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint(Mapping[str, "torch.Tensor"]):
    """Named tensors, read lazily; a mapping, safe to read from several threads, and a context manager.

    A tensor that already lies in memory is handed out without a copy: do not write to it.

    Attributes:
        reference: What was opened.
        infos: Every tensor's shape, dtype and place, by name.
        sources: The source of each tensor.
        config: The model's config.json, empty if there is none.
        tied: Name of a tensor that shares its memory with another, to that other's name.
        factors: For each tensor that an adapter changes by low rank, a function that reads the change as factors.
        unrounded: For each tensor that an adapter changes, a function that reads rows of it before they are rounded.
        adapter: An adapter's own configuration, empty for any other checkpoint.
        base_reference: The reference of an adapter's base, ``None`` for any other checkpoint.
        companions: For each file that belongs to the model besides its weights, a function that reads it.
        set_aside: Stored tensors that are no weights, each with its reason.
        notes: What a reader of numbers should know of how the weights are read, in sentences.
    """

    reference: str
    infos: Mapping[str, TensorInfo]
    sources: Mapping[str, Source]
    config: Mapping[str, Any] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    factors: Mapping[str, Callable[[], Factors]] = field(default_factory=dict)
    unrounded: Mapping[str, Callable[[Range | None], torch.Tensor]] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    base_reference: str | None = None
    companions: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    set_aside: Mapping[str, SetAside] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Tensor names in file order."""
        return list(self.infos)

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and place of a tensor.

        Raises:
            CheckpointError: No tensor of that name.
        """
        try:
            return self.infos[name]
        except KeyError:
            known = suggest(name, self.infos)
            raise MissingTensorError(f"{self.reference}: no tensor {printable(name)!r}.{known}") from None

    @timed("read")
    def read(self, name: str, rows: Range | None = None, cols: Range | None = None) -> torch.Tensor:
        """Return a tensor, or a part of it, in its stored dtype on the CPU.

        Args:
            name: Tensor name.
            rows: Half-open range of the leading axis; only these bytes are read.
            cols: Half-open range of the last axis; whole rows are read for it.

        Raises:
            CheckpointError: No such tensor, a range outside it, or its bytes cannot be read.
        """
        info = self.info(name)
        _check_range(info, 0, rows)
        _check_range(info, -1, cols)
        tensor = _in_shape(info, rows, self.sources[name].read)
        return tensor if cols is None else tensor[..., cols[0] : cols[1]]

    def read_unrounded(self, name: str, rows: Range | None = None) -> torch.Tensor:
        """Return a tensor, or rows of it, as an adapter makes it, before that is rounded to its stored dtype.

        What no adapter changes is read as it is stored.
        """
        made = self.unrounded.get(name)
        return self.read(name, rows) if made is None else _in_shape(self.info(name), rows, lambda _, own: made(own))

    @timed("read")
    def digest(self, name: str) -> str:
        """Return the BLAKE3 digest of a tensor's dtype, shape and bytes; 64 hex digits."""
        info = self.info(name)
        hasher = start_digest(info)
        for rows in row_blocks(info):
            hasher.update(as_bytes(self.read(name, rows)))
        return hasher.hexdigest()

    def close(self) -> None:
        """Release files and connections. Nothing may be reading any more; further calls do nothing."""
        close_sources(self.sources)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    # Mapping would compare, and so read, every tensor; a checkpoint is equal to itself only.
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"Checkpoint({printable(self.reference)!r}, {len(self.infos)} tensors)"

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def close_sources(sources: Mapping[str, Source]) -> None:
    """Close each source once."""
    # by identity: many tensors share a source, and a source need not be hashable
    for source in {id(s): s for s in sources.values()}.values():
        source.close()


def start_digest(info: TensorInfo) -> blake3.blake3:
    """Return a hasher that has taken a tensor's dtype and shape and waits for its bytes."""
    return blake3.blake3(f"{info.dtype}{list(info.stored_shape)}".encode())


def tensor_digest(info: TensorInfo, tensor: torch.Tensor) -> str:
    """Return the digest that ``Checkpoint.digest`` gives, of a tensor that is already read."""
    hasher = start_digest(info)
    hasher.update(as_bytes(tensor))
    return hasher.hexdigest()


def _in_shape(
    info: TensorInfo, rows: Range | None, read: Callable[[TensorInfo, Range | None], torch.Tensor]
) -> torch.Tensor:
    """Read entries of a tensor in the shape that it is read with, by what knows its stored axes alone."""
    if info.axes is None:
        return read(info, rows)
    each = info.shape[0] // info.axes[0]  # rows that an entry of the stored leading axis holds
    span = None if rows is None else (rows[0] // each, -(-rows[1] // each))
    found = read(_as_stored(info), span).reshape(-1, *info.shape[1:])
    return found if rows is None or span is None else found[rows[0] - span[0] * each : rows[1] - span[0] * each]


def _as_stored(info: TensorInfo) -> TensorInfo:
    return replace(info, shape=info.stored_shape, axes=None)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes in row-major order, without a copy where it lies so."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)  # bytes by torch's view, since NumPy has no bfloat16 and float8
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def row_blocks(info: TensorInfo, block_bytes: int = BLOCK_BYTES) -> Iterator[Range | None]:
    """Yield ranges of rows of at most ``block_bytes`` each, one row at least; ``None`` for a small tensor."""
    if info.size_bytes <= block_bytes or not info.shape:
        yield None
        return
    step = max(1, block_bytes * info.shape[0] // info.size_bytes)
    for start in range(0, info.shape[0], step):
        yield start, min(start + step, info.shape[0])


def from_bytes(buffer: torch.Tensor, info: TensorInfo, rows: Range | None) -> torch.Tensor:
    """Return raw bytes (uint8, 1-D) as a tensor of the stored dtype and shape, without a copy."""
    from diffract.checkpoints.dtypes import TORCH_DTYPES

    if info.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"tensor {printable(info.name)!r}: this torch has no {info.dtype}. Update torch.")
    lead = info.shape[:1] if rows is None else (rows[1] - rows[0],)
    return buffer.view(TORCH_DTYPES[info.dtype]).reshape((*lead, *info.shape[1:]))


def byte_range(info: TensorInfo, rows: Range | None) -> tuple[int, int]:
    """Return offset and length in the file of entries ``rows`` of the leading axis."""
    if rows is None:
        return info.offset, info.size_bytes
    row_bytes = info.size_bytes // info.shape[0]
    return info.offset + rows[0] * row_bytes, (rows[1] - rows[0]) * row_bytes


def _check_range(info: TensorInfo, axis: int, span: Range | None) -> None:
    if span is None:
        return
    extent = info.shape[axis] if info.shape else 0
    if not 0 <= span[0] < span[1] <= extent:
        raise CheckpointError(
            f"tensor {printable(info.name)!r}: range {span} of axis {axis} is empty or outside 0..{extent}."
        )


@dataclass
class _Progress:
    """How far a tensor was read from its first row on, without a gap."""

    hasher: blake3.blake3
    row: int = 0
    digest: str = ""
    lock: Lock = field(default_factory=Lock)

    def take(self, tensor: torch.Tensor, first: int, last: int, count: int) -> None:
        """Hash rows ``first`` to ``last`` of ``count`` if they are the next ones."""
        with self.lock:
            # Blocks read twice, or out of order, are left out: then the digest is found by reading once more.
            if self.digest or first != self.row:
                return
            self.hasher.update(as_bytes(tensor))
            self.row = last
            if last == count:
                self.digest = self.hasher.hexdigest()


@dataclass
class Recorder:
    """A source that hashes what it reads: blocks of rows in their order, or whole tensors, cost no second reading."""

    checkpoint: Checkpoint
    seen: dict[str, _Progress] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def read(self, info: TensorInfo, rows: Range | None) -> torch.Tensor:
        """Return entries ``rows`` of the leading axis."""
        tensor = self.checkpoint.sources[info.name].read(info, rows)
        self._take(info, tensor, rows)
        return tensor

    def unrounded(self, name: str, rows: Range | None) -> torch.Tensor:
        """Return entries before they are rounded; what is noted are those that are read where they are stored."""
        from diffract.checkpoints.dtypes import TORCH_DTYPES

        info, found = self.checkpoint.info(name), self.checkpoint.read_unrounded(name, rows)
        self._take(info, found.to(TORCH_DTYPES[info.dtype]), rows)
        return found

    def _take(self, info: TensorInfo, tensor: torch.Tensor, rows: Range | None) -> None:
        with self.lock:  # of the table only: each tensor has a lock of its own, so that hashing goes side by side
            if info.name not in self.seen:
                self.seen[info.name] = _Progress(start_digest(info))
            progress = self.seen[info.name]
        count = info.shape[0] if info.shape else 1
        progress.take(tensor, *(rows or (0, count)), count)

    def close(self) -> None:
        """Close the sources."""
        close_sources(self.checkpoint.sources)


def recorded(checkpoint: Checkpoint) -> tuple[Checkpoint, Recorder]:
    """Return a checkpoint that notes what is read from it, and its notes."""
    recorder = Recorder(checkpoint)
    # Both ways of reading are noted: what an adapter makes is read before it is rounded.
    unrounded = {name: partial(recorder.unrounded, name) for name in checkpoint.unrounded}
    return replace(checkpoint, sources=dict.fromkeys(checkpoint.infos, recorder), unrounded=unrounded), recorder


def unrecorded(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose reads are not noted: what is looked at only to judge is not what was used."""
    origins = {name: s.checkpoint for name, s in checkpoint.sources.items() if isinstance(s, Recorder)}
    sources = {name: origins[name].sources[name] if name in origins else s for name, s in checkpoint.sources.items()}
    unrounded = {n: origins[n].unrounded[n] if n in origins else made for n, made in checkpoint.unrounded.items()}
    return replace(checkpoint, sources=sources, unrounded=unrounded)


def read_digests(checkpoint: Checkpoint, recorder: Recorder) -> dict[str, str]:
    """Return the digest of each tensor that was read; what was read in part only is read once more."""
    return {name: digest_as_read(checkpoint, name) for name in checkpoint.names if name in recorder.seen}


def digest_as_read(checkpoint: Checkpoint, name: str) -> str:
    """Return the digest of a tensor: noted while it was read, or else by reading it."""
    source = checkpoint.sources[name]
    seen = source.seen.get(name) if isinstance(source, Recorder) else None
    return (seen and seen.digest) or checkpoint.digest(name)


def reshaped(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """Return a checkpoint some of whose tensors are read in another shape; they are written back in their own.

    Args:
        checkpoint: What holds them; both close the same files.
        shapes: For each of these tensors its shape from now on, whose rows fill entries of the stored leading axis.
    """
    infos = checkpoint.infos
    views = {name: replace(infos[name], shape=shape, axes=infos[name].stored_shape) for name, shape in shapes.items()}
    return replace(checkpoint, infos={**infos, **views}) if views else checkpoint


@dataclass(frozen=True)
class _Renamed:
    """A tensor's source that is asked by another name."""

    source: Source
    info: TensorInfo

    def read(self, info: TensorInfo, rows: Range | None) -> torch.Tensor:
        """Return entries ``rows`` of the leading axis."""
        return self.source.read(self.info, rows)

    def close(self) -> None:
        """Close the source."""
        self.source.close()


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Return a checkpoint some of whose tensors go by other names.

    Args:
        checkpoint: What is renamed; both close the same files.
        names: For each tensor to rename, what it is called from now on.
    """
    new = {name: names.get(name, name) for name in checkpoint.infos}
    infos = {new[n]: replace(info, name=new[n]) for n, info in checkpoint.infos.items()}
    sources = {
        new[n]: source if new[n] == n else _Renamed(source, _as_stored(checkpoint.infos[n]))
        for n, source in checkpoint.sources.items()
    }
    factors = {names.get(name, name): made for name, made in checkpoint.factors.items()}
    unrounded = {names.get(name, name): made for name, made in checkpoint.unrounded.items()}
    tied = {names.get(one, one): names.get(two, two) for one, two in checkpoint.tied.items()}
    return replace(checkpoint, infos=infos, sources=sources, factors=factors, unrounded=unrounded, tied=tied)
