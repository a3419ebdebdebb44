"""What is known of a stored tensor before it is read, and the dtypes that can be analysed."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
"""safetensors' dtype names; the one spelling that diffract uses everywhere."""

if hasattr(torch, "float8_e8m0fnu"):  # from torch 2.7 on; scales of block formats
    TORCH_DTYPES["F8_E8M0"] = torch.float8_e8m0fnu

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""dtypes whose tensors are analysed; the others are listed."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header states it.

    Attributes:
        name: Its name, untrusted text.
        shape: Its shape.
        dtype: A key of ``TORCH_DTYPES``.
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
        return TORCH_DTYPES[self.dtype].itemsize

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.entries * self.itemsize

    @property
    def is_float(self) -> bool:
        """Whether the tensor can be analysed."""
        return self.dtype in FLOATS


def machine_epsilon(dtype: str) -> float:
    """Return the distance from 1 to the next larger number of a stored dtype.

    Args:
        dtype: One of ``FLOATS``.

    >>> machine_epsilon("BF16")
    0.0078125
    """
    return float(torch.finfo(TORCH_DTYPES[dtype]).eps)
