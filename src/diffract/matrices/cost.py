"""What analysing matrices will cost, from their shapes alone."""

from __future__ import annotations

from collections.abc import Sequence

from diffract.matrices.batches import batches
from diffract.matrices.matrix import Matrix

KEEP_BYTES = 1 << 27
"""A stored tensor up to this size is read once and kept while its matrices are analysed."""

PIECE_BYTES = 1 << 25
"""Float64 bytes that are cast at once."""

PASSES = 60
"""What reading, hashing, casting and summing an entry costs, in multiplications."""

EIGENSOLVER = 12
"""What the eigensolver costs per entry of a Gram matrix and row, in multiplications: it runs far from the peak rate."""


def scan_cost(matrices: Sequence[Matrix]) -> float:
    """Return the work of finding all singular values of matrices, in multiplications, about."""
    shorts = ((m.entries, min(m.shape)) for m in matrices)
    return float(sum(entries * (short + PASSES) + EIGENSOLVER * short**3 for entries, short in shorts))


def workspace_bytes(matrices: Sequence[Matrix], size_bytes: int, *, pair: bool = False) -> int:
    """Return the memory that analysing one tensor takes, about.

    Args:
        matrices: What is taken of the tensor.
        size_bytes: Of the stored tensor.
        pair: Whether it is compared with another.
    """
    batch = max(batches(matrices), key=lambda b: len(b) * b[0].entries)
    buffers = min(PIECE_BYTES, 8 * batch[0].entries) * (3 if pair else 2)
    products = 8 * len(batch) * min(batch[0].shape) ** 2 * (8 if pair else 3)
    return (1 + pair) * min(size_bytes, KEEP_BYTES) + buffers + products
