"""Headers of safetensors files: name to dtype, shape and bytes. Nothing of a file is trusted.

Format: 8 bytes little-endian length of the header, the header as JSON, then the tensors' bytes without gaps.
What the reference implementation of safetensors refuses is refused here too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from typing import Any

from diffract.checkpoints.tensors import TORCH_DTYPES, TensorInfo
from diffract.errors import CheckpointError, printable

HEADER_LIMIT = 100_000_000
"""Largest header that is read, in bytes: the limit that the reference implementation sets too."""

SIZE_LIMIT = 2**63
"""More bytes than any tensor can have."""

DIMENSIONS_LIMIT = 64
"""More dimensions than torch can have."""

Fetch = Callable[[int, int], bytes]
"""``fetch(offset, length)`` returns that many bytes of a file."""


def read_header(fetch: Fetch, size: int, file: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check the header of one safetensors file.

    Args:
        fetch: Reads bytes of the file.
        size: Size of the file in bytes.
        file: What to call it.

    Returns:
        Tensors by name in file order, and the file's own metadata.

    Raises:
        CheckpointError: The header is no header, or states what cannot be.
    """
    if size < 8:
        raise CheckpointError(
            f"{file}: {size} bytes are too few for a safetensors file. It is truncated; fetch it again."
        )
    length = int.from_bytes(fetch(0, 8), "little")
    if length > HEADER_LIMIT:
        raise CheckpointError(
            f"{file}: the header claims {length} bytes, more than the limit of {HEADER_LIMIT}. "
            "It is no safetensors file, or damaged; fetch it again."
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{file}: the header claims {length} bytes, the file has {size}. It is truncated; fetch it again."
        )
    entries = _parse(fetch(8, length), file)
    metadata = entries.pop("__metadata__", None)
    infos = [_tensor(name, entry, 8 + length, file) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.size_bytes))
    _check_layout(infos, 8 + length, size, file)
    known = metadata if isinstance(metadata, dict) else {}
    return {info.name: info for info in infos}, {str(k): str(v) for k, v in known.items()}


def _parse(raw: bytes, file: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise CheckpointError(
                f"{file}: the header names a key twice. The header lies; do not use this file."
            )
        return found

    try:
        entries = json.loads(raw.decode(), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: the header is no UTF-8 JSON ({type(error).__name__}). "
            "It is no safetensors file, or damaged; fetch it again."
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(
            f"{file}: the header is a {type(entries).__name__}, expected an object of tensors. Fetch it again."
        )
    return entries


def _tensor(name: str, entry: Any, start: int, file: str) -> TensorInfo:
    where = f"{file}, tensor {printable(name)!r}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        name.encode()
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{where}: expected a dtype, a shape and two data_offsets, got {printable(entry)}. "
            "The header is damaged; fetch the file again."
        ) from error
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"{where}: unknown dtype {printable(dtype)!r}, expected one of {', '.join(TORCH_DTYPES)}. "
            "Save the tensor in one of them."
        )
    _check_numbers(shape, begin, end, where)
    info = TensorInfo(name, shape, dtype, file, start + begin)
    if end - begin != info.size_bytes:
        raise CheckpointError(
            f"{where}: offsets {begin}..{end} hold {end - begin} bytes, but {dtype} of shape {list(shape)} "
            f"needs {info.size_bytes}. The header lies; do not use this file."
        )
    return info


def _check_numbers(shape: tuple[Any, ...], begin: Any, end: Any, where: str) -> None:
    """Refuse what is no number, and sizes that no memory can address, before anything is multiplied out."""
    numbers = (*shape, begin, end)
    whole = all(type(n) is int and 0 <= n < SIZE_LIMIT for n in numbers)
    if not whole or len(shape) > DIMENSIONS_LIMIT or prod(n or 1 for n in shape) * 16 >= SIZE_LIMIT:
        raise CheckpointError(
            f"{where}: shape {_list(shape)} and offsets {_list((begin, end))} are not the whole numbers from 0 up "
            "that a tensor can have. The header lies; do not use this file."
        )


def _list(values: tuple[Any, ...]) -> str:
    """Values for a message; a number of thousands of digits cannot even be written out."""
    small = [v if not isinstance(v, int) or abs(v) < 10**30 else "(huge)" for v in values[:8]]
    return printable([*small, "..."] if len(values) > len(small) else small)


def _check_layout(infos: list[TensorInfo], start: int, size: int, file: str) -> None:
    """Refuse tensors, in file order, that share bytes, leave a gap, or do not end where the file ends."""
    position, previous = start, "the header"
    for info in infos:
        name, end = printable(info.name), info.offset + info.size_bytes
        if end > size:
            raise CheckpointError(
                f"{file}, tensor {name!r}: ends at byte {end}, the file has {size}. "
                "It is truncated; fetch it again."
            )
        if info.offset != position:
            fault = "overlap" if info.offset < position else "leave a gap between them"
            raise CheckpointError(
                f"{file}: tensors {printable(previous)!r} and {name!r} {fault}. "
                "The header lies; do not use this file."
            )
        position, previous = end, info.name
    if position != size:
        raise CheckpointError(
            f"{file}: {size - position} bytes follow the last tensor, expected none. "
            "The file is damaged; fetch it again."
        )
