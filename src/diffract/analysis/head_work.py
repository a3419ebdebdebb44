"""One tensor that holds attention heads: inner products of its changes in several checkpoints, slice by slice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from torch import Tensor

from diffract.analysis.stack import Held
from diffract.analysis.work import cut_factors, factor_digest
from diffract.cache import Cache, cache_key
from diffract.checkpoints import Checkpoint, Factors, TensorInfo
from diffract.linalg import LowRank, change_grams
from diffract.matrices import Matrix, batches, cut
from diffract.matrices.cost import KEEP_BYTES, PIECE_BYTES

BLOCK_ENTRIES = 1 << 22
"""Entries read at once of each checkpoint's tensor where it is too large to be kept."""

VERSION = 1
"""Raised when the numbers change."""


@dataclass(frozen=True)
class HeadTask:
    """The slices of one tensor.

    Attributes:
        info: The tensor as the base stores it.
        matrices: Its slices.
        tuned: Which checkpoints have changed it.
    """

    info: TensorInfo
    matrices: tuple[Matrix, ...]
    tuned: tuple[int, ...]

    @property
    def workspace_bytes(self) -> int:
        """Memory that it needs at most, about."""
        piece = min(PIECE_BYTES, 8 * max(m.entries for m in self.matrices))
        return (1 + len(self.tuned)) * (min(self.info.size_bytes, KEEP_BYTES) + piece)

    @property
    def cost(self) -> float:
        """Entries that are read."""
        return float(self.info.entries * (1 + len(self.tuned)))


@dataclass(frozen=True)
class HeadWorker:
    """Does tasks.

    Attributes:
        checkpoints: Base first.
        adapters: Which of them are adapters over that very base, so that their factors are the change.
        device: Where.
        cache: Results that are known already.
    """

    checkpoints: Sequence[Checkpoint]
    adapters: frozenset[int]
    device: torch.device
    cache: Cache | None

    def __call__(self, task: HeadTask) -> np.ndarray:
        """Return the inner products (slices, k, k) of W0 and the k - 1 changes of each slice."""
        base = Held(self.checkpoints[0], task.info.name)
        changed = [self._open(i, task.info.name) for i in task.tuned]
        key = self._key(task, base, changed) if self.cache else ""
        known = self.cache.get(key) if self.cache else None
        if known is not None:
            return known["grams"].to_numpy().reshape(len(known), 1 + len(changed), 1 + len(changed))
        grams = _slice_grams(task, base, changed, self.device).cpu().numpy()
        if self.cache:
            flat = grams.reshape(len(grams), -1)
            self.cache.put(key, pl.DataFrame({"grams": pl.Series(flat, dtype=pl.Array(pl.Float64, flat.shape[1]))}))
        return grams

    def _open(self, model: int, name: str) -> Held | Factors:
        """A checkpoint's tensor; of an adapter the change as factors, which are never multiplied out."""
        checkpoint = self.checkpoints[model]
        if model in self.adapters and name in checkpoint.factors:
            return checkpoint.factors[name]()
        return Held(checkpoint, name)

    def _key(self, task: HeadTask, base: Held, changed: Sequence[Held | Factors]) -> str:
        content = [factor_digest(one) if isinstance(one, Factors) else one.digest() for one in changed]
        slices = [m.slice_key for m in task.matrices]
        return cache_key("heads", VERSION, base.digest(), content, slices, self.device.type)


def _slice_grams(task: HeadTask, base: Held, changed: Sequence[Held | Factors], device: torch.device) -> Tensor:
    """Sum the inner products over blocks of rows; each stored row is read once."""
    size = 1 + len(changed)
    total = torch.zeros(len(task.matrices), size, size, dtype=torch.float64, device=device)
    for start, stop in _spans(task.info):
        rows = base.rows(start, stop).to(device)
        others = [
            Factors(one.B[start:stop].to(device), one.A.to(device))
            if isinstance(one, Factors)
            else one.rows(start, stop).to(device)
            for one in changed
        ]
        places, parts = _inside(task, start, stop)
        for batch in batches(parts):
            here, places = places[: len(batch)], places[len(batch) :]
            total[here] += change_grams(cut(rows, batch), [_cut(one, batch) for one in others])
    return total


def _spans(info: TensorInfo) -> Iterator[tuple[int, int]]:
    rows, cols = info.shape
    step = rows if info.size_bytes <= KEEP_BYTES else max(1, BLOCK_ENTRIES // cols)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _inside(task: HeadTask, start: int, stop: int) -> tuple[list[int], list[Matrix]]:
    """What of each slice lies in a block of stored rows, counted from the block's first; and which slices these are."""
    places, parts = [], []
    for place, m in enumerate(task.matrices):
        first, last = m.rows or (0, task.info.shape[0])
        first, last = max(first, start) - start, min(last, stop) - start
        if first < last:
            width = m.shape[0] if m.transposed else m.shape[1]
            shape = (width, last - first) if m.transposed else (last - first, width)
            places.append(place)
            parts.append(replace(m, rows=(first, last), shape=shape))
    return places, parts


def _cut(one: Tensor | Factors, batch: Sequence[Matrix]) -> Tensor | LowRank:
    return cut_factors(one, batch) if isinstance(one, Factors) else cut(one, batch)
