"""Tensors to safetensors files, one by one: memory stays flat, and nothing looks whole before it is."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING
from uuid import uuid4

from diffract.checkpoints.checkpoint import as_bytes
from diffract.checkpoints.files import LocalFile
from diffract.checkpoints.header import TensorInfo, encode_header
from diffract.checkpoints.sources import SAFETENSORS
from diffract.errors import CheckpointError, printable
from diffract.settings import SHARD_BYTES

if TYPE_CHECKING:
    import torch


COPY_BYTES = 1 << 24
"""Bytes copied at once."""


def file_names(count: int) -> list[str]:
    """Return what the files of a model are called; none for no file."""
    return [SAFETENSORS] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def index_text(weight_map: Mapping[str, str], total_bytes: int) -> str:
    """Return the index of a sharded model."""
    return json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2) + "\n"


@dataclass
class Shard:
    """A file in the making: its tensors, and their bytes in a file without a name.

    The header comes first in a file but is known last, hence the detour of the bytes.
    """

    spool: IO[bytes]
    infos: list[TensorInfo] = field(default_factory=list)
    size_bytes: int = 0

    def add(self, info: TensorInfo, tensor: torch.Tensor) -> None:
        """Take a tensor; nothing of it stays in memory."""
        self.spool.seek(self.size_bytes)  # past whatever a write that failed has left
        self.spool.write(as_bytes(tensor))
        self.infos.append(info)
        self.size_bytes += info.size_bytes

    def write(self, path: Path) -> None:
        """Write the file, wide dtypes first, so that every tensor begins at a multiple of its itemsize."""
        infos = sorted(self.infos, key=lambda info: -info.itemsize)
        with path.open("wb") as file:
            file.write(encode_header(infos))
            for info in infos:
                self.spool.seek(info.offset)
                for start in range(0, info.size_bytes, COPY_BYTES):
                    file.write(self.spool.read(min(COPY_BYTES, info.size_bytes - start)))


class TensorWriter:
    """Writes named tensors into a folder: as ``model.safetensors``, or as shards with an index.

    A context manager, for one thread. The files get their names, the index last, when the block ends well;
    an error in it, a full disk included, leaves none of them. Without a tensor nothing is written.
    """

    def __init__(self, folder: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        """Prepare a folder.

        Args:
            folder: Where to write; made if it is not there. Files that are no weights may be in it.
            shard_bytes: A file holds at most so many bytes of tensors, or one tensor.

        Raises:
            CheckpointError: There are weights in the folder, or it cannot be written.
        """
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self._where = f"folder {printable(self.folder, 1000)!r}"
        self._files: list[Path] = []
        self._places: dict[str, int] = {}
        self._size_bytes = 0
        self._shard: Shard | None = None
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            present = sorted(p.name for p in self.folder.iterdir() if ".safetensors" in p.name)
        if present:
            raise CheckpointError(f"{self._where} holds {printable(present[0])}. Choose another folder.")

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor.

        Args:
            name: Its name, not used yet.
            tensor: On any device, of a dtype that safetensors has.

        Raises:
            CheckpointError: The name is taken, the dtype has no counterpart, or the disk is full.
        """
        shape, dtype = tuple(tensor.shape), self._check(name, tensor)
        with self._explained():
            if self._shard and self._shard.size_bytes + tensor.nbytes > self.shard_bytes:
                self._end_shard()
            if self._shard is None:
                self._shard = Shard(tempfile.TemporaryFile(dir=self.folder))  # noqa: SIM115 (closed at its end)
            self._shard.add(TensorInfo(name, shape, dtype, offset=self._shard.size_bytes), tensor.cpu())
        self._places[name] = len(self._files)
        self._size_bytes += tensor.nbytes

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with self._explained():
                    self._commit()
        except BaseException as error:
            kind = type(error)
            raise
        finally:
            self._clean(whole=kind is None)

    def _check(self, name: str, tensor: torch.Tensor) -> str:
        """Return the name of a tensor's dtype, or raise."""
        from diffract.checkpoints.dtypes import DTYPE_NAMES

        if name in self._places or name == "__metadata__":
            raise CheckpointError(f"{self._where}: the name {printable(name)!r} is taken. Choose another one.")
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{self._where}, tensor {printable(name)!r}: safetensors has no {tensor.dtype}, expected one "
                f"of {', '.join(DTYPE_NAMES.values())}. Convert it."
            )
        return DTYPE_NAMES[tensor.dtype]

    def _draft(self) -> Path:
        """A new file that does not look like weights yet."""
        self._files.append(self.folder / f".{uuid4().hex}.partial")
        return self._files[-1]

    def _end_shard(self) -> None:
        if self._shard:
            with self._shard.spool:
                self._shard.write(self._draft())
            self._shard = None

    def _commit(self) -> None:
        """Give the files their names; one alone needs no index."""
        self._end_shard()
        names = file_names(len(self._files))
        if len(names) > 1:
            weight_map = {tensor: names[place] for tensor, place in self._places.items()}
            self._draft().write_text(index_text(weight_map, self._size_bytes), encoding="utf-8")
            names.append(f"{SAFETENSORS}.index.json")
        for place, file in enumerate(self._files):
            self._files[place] = file.rename(self.folder / names[place])

    def _clean(self, *, whole: bool) -> None:
        """Close what is open; of what is not whole, leave nothing."""
        with suppress(OSError):
            if self._shard:
                self._shard.spool.close()
        for file in () if whole else self._files:
            file.unlink(missing_ok=True)
        with suppress(OSError):  # a folder that something is in stays
            self.folder.rmdir()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"cannot write to {self._where}: {error.strerror or error}. Make room, or choose another folder."
            ) from error


class ShardedWriter:
    """Writes tensors whose shapes and dtypes are known beforehand, as ``model.safetensors`` or shards with an index.

    A context manager. The files have no names that a loader knows before the block ends well, the index last. The
    folder is the caller's: after an error it is to be thrown away.

    Attributes:
        folder: Where it writes.
        names: The files.
        places: For each tensor the number of its file, and its offset there.
        written_bytes: Bytes of tensors that are written, not shared with other files.
    """

    fresh = True
    """Whether every tensor must be written; otherwise the files hold what was there before."""

    def __init__(self, folder: Path, infos: Sequence[TensorInfo], *, shard_bytes: int = SHARD_BYTES) -> None:
        """Lay out the files.

        Args:
            folder: Where to write; exists, without weights.
            infos: The tensors in the order in which they are put into files.
            shard_bytes: A file holds at most so many bytes of tensors, or one tensor.
        """
        self.folder = folder
        shards = list(_shards(infos, shard_bytes))
        self.names = file_names(len(shards))
        self.places: dict[str, tuple[int, int]] = {}
        self.written_bytes = sum(info.size_bytes for info in infos)
        self._descriptors: list[int] = []
        self._total_bytes = self.written_bytes
        for shard in shards:
            self._begin(shard)

    def write(self, name: str, tensor: torch.Tensor, first: int = 0) -> None:
        """Write a tensor, or entries of its leading axis from ``first`` on; on the CPU, in the stated dtype."""
        number, offset = self.places[name]
        view = as_bytes(tensor)
        offset += first * (len(view) // len(tensor)) if first else 0
        _write_all(self._descriptors[number], view, offset)

    def file_of(self, name: str) -> str:
        """Return the name of the file that a tensor is in."""
        return self.names[self.places[name][0]]

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for descriptor in self._descriptors:
            with suppress(OSError):  # closing after a full disk
                os.close(descriptor)
        if kind is None:
            # Names last, and the index after them: until then no loader takes these files for a model.
            for number, name in enumerate(self.names):
                self._draft(number).rename(self.folder / name)
            if len(self.names) > 1:
                weight_map = {name: self.file_of(name) for name in self.places}
                (self.folder / f"{file_names(1)[0]}.index.json").write_text(
                    index_text(weight_map, self._total_bytes), encoding="utf-8"
                )

    def _begin(self, shard: Iterable[TensorInfo]) -> None:
        """Write a file's header; wide dtypes come first, so that every tensor begins at a multiple of its itemsize."""
        infos = sorted(shard, key=lambda info: -info.itemsize)
        header = encode_header(infos)
        number = len(self._descriptors)
        self._descriptors.append(os.open(self._draft(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        _write_all(self._descriptors[-1], memoryview(header), 0)
        offset = len(header)
        for info in infos:
            self.places[info.name] = (number, offset)
            offset += info.size_bytes
        # At its full length from the start, so that threads write their blocks wherever these belong.
        os.truncate(self._descriptors[-1], offset)

    def _draft(self, number: int) -> Path:
        return self.folder / f".weights-{number}.partial"


class PatchingWriter(ShardedWriter):
    """Takes over a model's files as they are, to be written to only where values change.

    Files share their bytes with the old ones where the file system can do that (reflinks). Otherwise files in which
    nothing changes are hard links, which stay the same file under two names, and the others are copies.
    """

    fresh = False

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, LocalFile],
        *,
        infos: Mapping[str, TensorInfo],
        changed: Mapping[str, int],
    ) -> None:
        """Take the files over.

        Args:
            folder: Where to write; exists, without weights, on the same file system.
            files: The model's files, by what its tensors' places call them.
            infos: The tensors, with their places in these files.
            changed: Bytes that will be written to each file in which anything changes.
        """
        self.folder, self.names = folder, [file.path.name for file in files.values()]
        numbers = {name: number for number, name in enumerate(files)}
        self.places = {name: (numbers[info.file], info.offset) for name, info in infos.items()}
        self.written_bytes = sum(changed.values())
        self._descriptors = []
        self._total_bytes = sum(info.size_bytes for info in infos.values())
        for number, (name, file) in enumerate(files.items()):
            draft = self._draft(number)
            if not file.cloned(draft):
                if name in changed:
                    file.copied(draft)
                    self.written_bytes += file.size
                else:
                    file.linked(draft)
            self._descriptors.append(os.open(draft, os.O_WRONLY if name in changed else os.O_RDONLY))


def can_clone(file: LocalFile, folder: Path) -> bool:
    """Whether a folder's file system lets a new file share a file's bytes."""
    probe = folder / ".probe.partial"
    found = file.cloned(probe)
    probe.unlink(missing_ok=True)
    return found


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    """Write bytes at an offset; the system may take fewer at once than it is given."""
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def _shards(infos: Sequence[TensorInfo], shard_bytes: int) -> Iterable[list[TensorInfo]]:
    """Fill one file after another."""
    shard: list[TensorInfo] = []
    size_bytes = 0
    for info in infos:
        if shard and size_bytes + info.size_bytes > shard_bytes:
            yield shard
            shard, size_bytes = [], 0
        shard.append(info)
        size_bytes += info.size_bytes
    yield shard
