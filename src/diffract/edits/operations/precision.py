"""In which precision edits compute, and what they hand back."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of an edit's result for input of a stored dtype: float64 for 64 and 32 bits, else float32.

    Edits compute in float64 throughout. The result has at least 16 bits of significand more than what it is stored in,
    so that the caller's rounding to the stored dtype is in effect the only one.

    >>> work_dtype(torch.float32), work_dtype(torch.bfloat16)
    (torch.float64, torch.float32)
    """
    return torch.float64 if dtype.itemsize >= 4 else torch.float32


def wider(*dtypes: torch.dtype) -> torch.dtype:
    """Return the one with the most bits: what tensors of several dtypes count as together."""
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def widened(w: Float[Tensor, "m n"], dtype: torch.dtype) -> Float[Tensor, "m n"]:
    """Return a contiguous copy in a dtype that holds every value exactly."""
    return w.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def exact(w: Float[Tensor, "m n"]) -> Float64[Tensor, "m n"]:
    """Return a matrix in float64; float64 input is not copied.

    Raises:
        ValueError: If it is empty, or holds NaN or an infinity.
    """
    if w.numel() == 0:
        raise ValueError(f"expected a matrix with entries, got shape {tuple(w.shape)}")
    found = w.detach().double()
    if not bool(found.isfinite().all()):
        raise ValueError("expected finite values, got NaN or an infinity")
    return found


def require_same_shape(*tensors: Tensor) -> None:
    """Raise ``ValueError`` unless all tensors have the shape of the first."""
    for place, tensor in enumerate(tensors):
        if tensor.shape != tensors[0].shape:
            want, got = tuple(tensors[0].shape), tuple(tensor.shape)
            raise ValueError(f"expected matrices of one shape, got {want} and, at place {place}, {got}")
