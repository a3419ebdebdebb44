"""Files whose bytes are read by position, and folders on disk."""

from __future__ import annotations

import errno
import fcntl
import os
import resource  # opens a file of its own: too late when there are too many
import weakref
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from diffract.checkpoints.checkpoint import Checkpoint, Range, byte_range, from_bytes
from diffract.checkpoints.header import HEADER_LIMIT, TensorInfo
from diffract.errors import CheckpointError, printable

if TYPE_CHECKING:
    import torch


class ByteFile(ABC):
    """A file that holds tensors and can be read from any position by several threads at once.

    Attributes:
        name: What to call it in messages.
        size: Its size in bytes.
        origin: What stands for its bytes without their being read, ``None`` where nothing does.
        remote: Whether they come over a network.
    """

    name: str
    size: int
    origin: str | None = None
    remote: bool = False

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


def is_remote(checkpoint: Checkpoint) -> bool:
    """Whether tensors of a checkpoint come over a network."""
    return any(isinstance(source, ByteFile) and source.remote for source in checkpoint.sources.values())


def origin_of(checkpoint: Checkpoint, name: str) -> str | None:
    """Return what stands for a tensor's bytes without their being read, ``None`` where nothing does."""
    source, info = checkpoint.sources[name], checkpoint.info(name)
    if not isinstance(source, ByteFile) or source.origin is None:
        return None
    return f"{source.origin} {info.offset} {info.dtype} {info.shape}"


class LocalFile(ByteFile):
    """A file on disk, read by position, so that threads do not disturb each other and nothing stays mapped.

    It stays the same file when another is renamed to its name, and closes itself when nothing refers to it.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.path = printable(path, 1000), path
        try:
            self._descriptor = _open_descriptor(path)
        except OSError as error:
            raise CheckpointError(f"cannot open {self.name!r}: {error.strerror}.") from error
        self._close = weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        self.size, self._written = status.st_size, status.st_mtime_ns

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
        # What is read twice, for a digest and for numbers, must be the same: results are kept by the digest.
        if os.fstat(self._descriptor).st_mtime_ns != self._written:
            raise CheckpointError(f"{self.name!r} was written to while it was read. Try again when it is whole.")

    def cloned(self, path: Path) -> bool:
        """Make a file that shares this one's bytes on disk until either changes; ``False`` where that is not known."""
        with path.open("xb") as file:
            try:
                fcntl.ioctl(file, CLONE, self._descriptor)
            except OSError as error:
                if error.errno in CANNOT_CLONE:
                    path.unlink()
                    return False
                raise
        return True

    def copied(self, path: Path) -> None:
        """Make a file of the same bytes."""
        with path.open("xb") as file:
            done = 0
            while done < self.size:
                got = os.copy_file_range(self._descriptor, file.fileno(), self.size - done, offset_src=done)
                if got == 0:
                    raise CheckpointError(f"{self.name!r} ends at byte {done}: it shrank while open. Fetch it again.")
                done += got

    def linked(self, path: Path) -> None:
        """Give this very file another name; what is written to one is in the other."""
        try:
            os.link(self.path.resolve(), path)
        except OSError as error:
            raise CheckpointError(
                f"cannot link {self.name!r}: {error.strerror}. Choose an output on the same file system, or leave out "
                "--link."
            ) from error

    def close(self) -> None:
        """Close the file; further calls do nothing."""
        self._close()


CLONE = 0x40049409
"""Linux's FICLONE: share a file's extents."""

CANNOT_CLONE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.ENOSYS)


def real_path(path: Path) -> Path:
    """Return where a path leads to; ``Path.resolve`` ends in an error for links that go in a circle."""
    return Path(os.path.realpath(path))


def _open_descriptor(path: Path) -> int:
    """Open a file; where a process has too many open, allow it as many as the system lets it have."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        return os.open(path, flags)


class TooLargeError(CheckpointError):
    """A file is larger than what is read whole."""


DEEPEST = 3
"""Subfolders below each other in which files of a model are looked for."""


class LocalFolder:
    """A folder on disk.

    Files may be links within it, and within the hub's cache where it is a version there; what a link brings in from
    elsewhere is no part of a model: it would be published with everything that is made of it.

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
        whole = real_path(path)
        # the hub's cache keeps a version's files as links to what all versions share
        versions = [place for place in (whole, *whole.parents[:DEEPEST]) if place.parent.name == "snapshots"]
        self._inside = (whole, *(version.parents[1] / "blobs" for version in versions))

    @property
    def nested(self) -> list[str]:
        """Files of its subfolders, with slashes; hidden folders, and those that links lead to, left out."""
        found: list[str] = []
        for here, folders, files in os.walk(self.path):
            below = Path(here).relative_to(self.path)
            ends = len(below.parts) == DEEPEST
            folders[:] = [] if ends else sorted(f for f in folders if not f.startswith((".", "__pycache__")))
            found += [(below / name).as_posix() for name in sorted(files) if below.parts]
        return found

    def below(self, name: str) -> LocalFolder:
        """Return a subfolder as a folder of its own."""
        return LocalFolder(self.path / name)

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a small file."""
        file = self.open(name)
        try:
            if file.size > HEADER_LIMIT:
                raise TooLargeError(f"{file.name}: {file.size} bytes are too many for a configuration or an index.")
            return file.fetch(0, file.size)
        finally:
            file.close()

    def open(self, name: str) -> LocalFile:
        """Open one of its files.

        Raises:
            CheckpointError: It cannot be opened, or is a link that leads out of the folder.
        """
        if not self.holds(name):
            raise CheckpointError(
                f"{printable(self.path / name, 1000)!r} is a link that leads out of its folder. Copy the file there "
                "or open the checkpoint where it lies."
            )
        return LocalFile(self.path / name)

    def holds(self, name: str) -> bool:
        """Whether a file lies in the folder, or in the part of the hub's cache that belongs to it."""
        target = real_path(self.path / name)
        return any(target.is_relative_to(place) for place in self._inside)
