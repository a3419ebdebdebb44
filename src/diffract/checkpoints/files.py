"""Files whose bytes are read by position, and folders on disk."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from diffract.checkpoints.index import HEADER_LIMIT
from diffract.checkpoints.reader import Range, byte_range, from_bytes
from diffract.checkpoints.tensors import TensorInfo
from diffract.errors import CheckpointError, printable

if TYPE_CHECKING:  # headers are read without torch
    import torch


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
