"""How an edited checkpoint is written: dtype, size of files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from diffract.checkpoints.writer import SHARD_BYTES
from diffract.settings import STRICT

Dtype = Literal["float64", "float32", "bfloat16", "float16"]

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(value: object) -> object:
    """Read a size in bytes: ``5GB``, ``200 MB``, or a number.

    >>> parse_size("5GB")
    5000000000
    """
    if not isinstance(value, str):
        return value
    text = value.strip().upper().removesuffix("B").strip()
    unit = text[-1:] if text[-1:] in UNITS else ""
    try:
        return int(float(text.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        raise ValueError(f"expected a size such as 5GB or 200MB, got {value!r}") from None


Size = Annotated[
    int, Field(ge=1), BeforeValidator(parse_size), WithJsonSchema({"type": ["string", "integer"], "examples": ["5GB"]})
]


class Output(BaseModel):
    """How an edited checkpoint is written."""

    model_config = STRICT

    dtype: Dtype | None = None
    """Convert floating-point tensors; their own dtype is kept by default."""
    shard_size: Size = SHARD_BYTES
    """Most bytes of tensors in a file, such as 5GB."""
