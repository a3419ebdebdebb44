"""What is known of a stored tensor before it is read, and the dtypes that can be analysed."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

ITEMSIZES: dict[str, int] = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1},
    **{"C64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}
"""Bytes per entry by safetensors' dtype names, the one spelling that diffract uses everywhere."""

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""dtypes whose tensors are analysed; the others are listed."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header states it.

    Attributes:
        name: Its name, untrusted text.
        shape: Its shape.
        dtype: A key of ``ITEMSIZES``.
        file: The file that holds it, or where else it lies.
        offset: First byte within the file, where that means something.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str = ""
    offset: int = 0

    @property
    def entries(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per entry."""
        return ITEMSIZES[self.dtype]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.entries * self.itemsize

    @property
    def is_float(self) -> bool:
        """Whether the tensor can be analysed."""
        return self.dtype in FLOATS
