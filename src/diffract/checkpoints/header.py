"""What is known of a stored tensor before it is read, and the dtypes that can be analysed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from diffract.checkpoints.formats import refuse_format
from diffract.errors import CheckpointError, printable

ITEMSIZES: dict[str, int] = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1},
    **{"C64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}
"""Bytes per entry by safetensors' dtype names, the one spelling that diffract uses everywhere."""

BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits per entry of dtypes that safetensors has and nothing here reads: their tensors are set aside."""

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
        axes: Its shape as stored, where ``shape`` is that of the matrix that it is read as.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str = ""
    offset: int = 0
    axes: tuple[int, ...] | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its shape in its file."""
        return self.shape if self.axes is None else self.axes

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


@dataclass(frozen=True)
class SetAside:
    """A stored tensor that is no weight.

    Attributes:
        shape: Its shape, as stored.
        dtype: Its dtype as its file names it, untrusted text.
        size_bytes: Bytes of it.
        reason: Why it is not handed out.
    """

    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    reason: str


@dataclass(frozen=True)
class Header:
    """What the header of one file states.

    Attributes:
        infos: Tensors by name, in file order.
        set_aside: Tensors of a dtype that is not read.
        metadata: The file's own metadata.
    """

    infos: dict[str, TensorInfo]
    set_aside: dict[str, SetAside]
    metadata: dict[str, str]


HEADER_LIMIT = 100_000_000
"""Largest header that is read, in bytes: the limit that the reference implementation sets too."""

SIZE_LIMIT = 2**63
"""More bytes than any tensor can have."""

DIMENSIONS_LIMIT = 64
"""More dimensions than torch can have."""

DIGITS_LIMIT = 19
"""Digits of the largest number of 63 bits."""

Fetch = Callable[[int, int], bytes]
"""``fetch(offset, length)`` returns that many bytes of a file."""


def read_header(fetch: Fetch, size: int, file: str) -> Header:
    """Read and check the header of one safetensors file.

    Args:
        fetch: Reads bytes of the file.
        size: Size of the file in bytes.
        file: What to call it.

    Raises:
        CheckpointError: The header is no header, or states what cannot be.
    """
    if size < 8:
        raise CheckpointError(
            f"{file}: {size} bytes are too few for a safetensors file. It is truncated; fetch it again."
        )
    start = fetch(0, 8)
    length = int.from_bytes(start, "little")
    if length > HEADER_LIMIT:
        refuse_format(file, start=start)
        raise CheckpointError(
            f"{file}: the header claims {length} bytes, more than the limit of {HEADER_LIMIT}. "
            "It is no safetensors file, or damaged; fetch it again."
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{file}: the header claims {length} bytes, the file has {size}. It is truncated; fetch it again."
        )
    entries = _parse(fetch(8, length), file)
    metadata = _metadata(entries.pop("__metadata__", None), file)
    infos = [_tensor(name, entry, 8 + length, file) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.size_bytes))
    _check_layout(infos, 8 + length, size, file)
    unknown = {info.name: entries[info.name] for info in infos if entries[info.name]["dtype"] not in ITEMSIZES}
    sizes = {info.name: info.size_bytes for info in infos}
    set_aside = {
        name: SetAside(tuple(entry["shape"]), entry["dtype"], sizes[name], f"dtype {printable(entry['dtype'], 20)}")
        for name, entry in unknown.items()
    }
    return Header({info.name: info for info in infos if info.name not in unknown}, set_aside, metadata)


def encode_header(infos: list[TensorInfo]) -> bytes:
    """Return the start of a file that holds these tensors in this order; their own offsets do not matter."""
    # transformers refuses a file that does not say for which framework it is
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in infos:
        begin, end = end, end + info.size_bytes
        header[info.name] = {"dtype": info.dtype, "shape": info.stored_shape, "data_offsets": (begin, end)}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _parse(raw: bytes, file: str) -> dict[str, Any]:
    try:
        entries = json.loads(raw.decode(), object_pairs_hook=_unique, parse_int=_whole, parse_constant=_whole)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: the header is no UTF-8 JSON as safetensors has it ({printable(error)}). "
            "It is no safetensors file, or damaged; fetch it again."
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: the header is a {type(entries).__name__}, expected an object. Fetch it again.")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs; a name given twice could mean one thing here and another elsewhere."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{printable(twice)!r} is there twice")
    return found


def _whole(text: str) -> int:
    """Read a number; ``NaN``, a sign, or more digits than 64 bits hold are refused unread."""
    if not text.isdecimal() or len(text) > DIGITS_LIMIT:
        raise ValueError(f"{text[:DIGITS_LIMIT]!r} is no count or offset")
    return int(text)


def _metadata(found: Any, file: str) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(f"{file}: the header's __metadata__ is no map of text to text. Fetch it again.")
    return found


def _tensor(name: str, entry: Any, start: int, file: str) -> TensorInfo:
    where = f"{file}, tensor {printable(name)!r}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        name.encode()
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{where}: expected a dtype, a shape and two data_offsets, got {printable(entry)}. "
            "The header is damaged; fetch the file again."
        ) from error
    if not isinstance(dtype, str) or dtype not in {**ITEMSIZES, **BITS}:
        raise CheckpointError(
            f"{where}: unknown dtype {printable(dtype)!r}, expected one of {', '.join(ITEMSIZES)}. "
            "Save the tensor in one of them."
        )
    check_numbers(shape, begin, end, where)
    bits = prod(shape) * (BITS.get(dtype) or 8 * ITEMSIZES[dtype])
    if 8 * (end - begin) != bits:
        raise CheckpointError(
            f"{where}: offsets {begin}..{end} hold {end - begin} bytes, but {dtype} of shape {shape} "
            f"needs {-(-bits // 8)}. The header lies; do not use this file."
        )
    if dtype in BITS:  # bytes, so that its place is checked as any other's
        return TensorInfo(name, (end - begin,), "U8", file=file, offset=start + begin)
    return TensorInfo(name, tuple(shape), dtype, file=file, offset=start + begin)


def check_numbers(shape: Any, begin: Any, end: Any, where: str) -> None:
    """Refuse what is no number, and shapes that no memory can address."""
    listed = isinstance(shape, list) and len(shape) <= DIMENSIONS_LIMIT
    whole = listed and all(type(n) is int for n in (*shape, begin, end))
    if not whole or prod(n or 1 for n in shape) * 16 >= SIZE_LIMIT:
        raise CheckpointError(
            f"{where}: shape {printable(shape)} and offsets {printable((begin, end))} are not the whole "
            "numbers that a tensor can have. The header lies; do not use this file."
        )


def _check_layout(infos: list[TensorInfo], start: int, size: int, file: str) -> None:
    """Refuse tensors, in file order, that share bytes, leave a gap, or do not end where the file ends."""
    position, previous = start, "the header"
    for info in infos:
        name, end = printable(info.name), info.offset + info.size_bytes
        if end > size:
            raise CheckpointError(
                f"{file}, tensor {name!r}: ends at byte {end}, the file has {size}. It is truncated; fetch it again."
            )
        if info.offset != position:
            fault = "overlap" if info.offset < position else "leave a gap between them"
            raise CheckpointError(
                f"{file}: tensors {printable(previous)!r} and {name!r} {fault}. The header lies; do not use this file."
            )
        position, previous = end, info.name
    if position != size:
        raise CheckpointError(
            f"{file}: {size - position} bytes follow the last tensor, expected none. "
            "The file is damaged; fetch it again."
        )
