"""Checkpoints that note the digests of the tensors that are read from them, on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING

import blake3

from diffract.checkpoints.reader import Checkpoint, Range, Source, as_bytes, start_digest
from diffract.checkpoints.tensors import TensorInfo

if TYPE_CHECKING:  # headers are read without torch
    import torch


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
            if self.digest or first != self.row:
                return
            self.hasher.update(as_bytes(tensor))
            self.row = last
            if last == count:
                self.digest = self.hasher.hexdigest()


@dataclass
class Recorder:
    """A source that hashes what it reads: blocks of rows in their order, or whole tensors, cost no second reading."""

    sources: Mapping[str, Source]
    seen: dict[str, _Progress] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def read(self, info: TensorInfo, rows: Range | None) -> torch.Tensor:
        """Return entries ``rows`` of the leading axis."""
        tensor = self.sources[info.name].read(info, rows)
        with self.lock:
            if info.name not in self.seen:
                self.seen[info.name] = _Progress(start_digest(info))
            progress = self.seen[info.name]
        count = info.shape[0] if info.shape else 1
        progress.take(tensor, *(rows or (0, count)), count)
        return tensor

    def close(self) -> None:
        """Close the sources."""
        for source in {id(s): s for s in self.sources.values()}.values():
            source.close()


def recorded(checkpoint: Checkpoint) -> tuple[Checkpoint, Recorder]:
    """Return a checkpoint that notes what is read from it, and its notes."""
    recorder = Recorder(checkpoint.sources)
    return replace(checkpoint, sources=dict.fromkeys(checkpoint.infos, recorder)), recorder


def read_digests(checkpoint: Checkpoint, recorder: Recorder) -> dict[str, str]:
    """Return the digest of each tensor that was read; what was read in part only is read once more."""
    return {name: digest_as_read(checkpoint, name) for name in checkpoint.names if name in recorder.seen}


def digest_as_read(checkpoint: Checkpoint, name: str) -> str:
    """Return the digest of a tensor: noted while it was read, or else by reading it."""
    source = checkpoint.sources[name]
    seen = source.seen.get(name) if isinstance(source, Recorder) else None
    return (seen and seen.digest) or checkpoint.digest(name)
