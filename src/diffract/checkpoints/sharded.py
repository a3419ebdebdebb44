"""Tensors of known shapes to safetensors files: any part in any order, from several threads, without a detour."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from diffract.checkpoints.index import encode_header
from diffract.checkpoints.reader import as_bytes
from diffract.checkpoints.tensors import TensorInfo
from diffract.checkpoints.writer import SHARD_BYTES, file_names, index_text

if TYPE_CHECKING:  # headers are read without torch
    import torch


class ShardedWriter:
    """Writes tensors whose shapes and dtypes are known beforehand, as ``model.safetensors`` or shards with an index.

    A context manager. The files have no names that a loader knows before the block ends well, the index last. The
    folder is the caller's: after an error it is to be thrown away.
    """

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
        self._descriptors: list[int] = []
        self._total_bytes = sum(info.size_bytes for info in infos)
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
        os.truncate(self._descriptors[-1], offset)

    def _draft(self, number: int) -> Path:
        return self.folder / f".weights-{number}.partial"


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
