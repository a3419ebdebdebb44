"""A labelled matrix: what it is called, and which bytes of which tensor it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Matrix:
    """One matrix of a checkpoint, read on demand.

    Attributes:
        name: Unique label, the same in base and tuned model: ``L3.attn.q.h5``, ``L3.mlp.gate``, ``embed``.
        tensor: Name of the tensor it lies in.
        shape: (out, in), after slicing and un-transposing.
        dtype: The tensor's stored dtype.
        layer, block, projection, head, kv_head, expert: Labels; ``None`` where they do not apply.
        index: Position along the leading axis of a 3-D tensor.
        rows, cols: Half-open range within the stored 2-D tensor; ``None`` is all.
        transposed: The stored block is (in, out).
    """

    name: str
    tensor: str
    shape: tuple[int, int]
    dtype: str
    layer: int | None = None
    block: str | None = None
    projection: str | None = None
    head: int | None = None
    kv_head: int | None = None
    expert: int | None = None
    index: int | None = None
    rows: tuple[int, int] | None = None
    cols: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def labels(self) -> dict[str, Any]:
        """The label columns of the metrics table."""
        names = ("name", "tensor", "layer", "block", "projection", "head", "kv_head", "expert", "dtype")
        return {**{n: getattr(self, n) for n in names}, "rows": self.shape[0], "cols": self.shape[1]}

    @property
    def slice_key(self) -> str:
        """Which part of the tensor this is, as text for a cache key."""
        return f"{self.index}|{self.rows}|{self.cols}|{self.transposed}"

    @property
    def is_whole(self) -> bool:
        """Whether it is a stored 2-D tensor as it lies."""
        return self.index is None and self.rows is None and self.cols is None and not self.transposed

    @property
    def entries(self) -> int:
        """Number of entries."""
        return self.shape[0] * self.shape[1]

    def as_dict(self) -> dict[str, Any]:
        """All fields, for ``inspect --json``."""
        return asdict(self)
