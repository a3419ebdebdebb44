"""PyTorch files: zip archives are read by position and without torch, those of the old format by torch.

The pickle inside is read by an unpickler that knows how tensors are rebuilt and nothing that runs; whatever else a
training state usually holds (arguments, random states) becomes an empty stand-in, and what it does not know is refused.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffract.checkpoints.checkpoint import Checkpoint, Range, Source
from diffract.checkpoints.files import ByteFile, LocalFile, LocalFolder
from diffract.checkpoints.formats import refuse_format
from diffract.checkpoints.header import DIMENSIONS_LIMIT, HEADER_LIMIT, ITEMSIZES, SIZE_LIMIT, SetAside, TensorInfo
from diffract.checkpoints.sources import Shards, check_promised, join
from diffract.checkpoints.states import Found, find_model
from diffract.errors import CheckpointError, printable
from diffract.settings import size_text

if TYPE_CHECKING:
    import torch

LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a zip record: its signature, and the lengths of its name and extra field, after which its bytes begin."""

DTYPES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "bool": "BOOL"},
    **{"uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"},
    **{"float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ"},
}
"""torch's names of dtypes, and safetensors'."""

STORAGES = {
    **{"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"},
    **{"LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8"},
    **{"BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": ""},
}
"""Kinds of storages, and the dtype of their entries; an untyped one holds bytes."""


LEAVES_LIMIT = 10_000_000
"""Values that a file may hold; mappings that share each other could stand for more than any memory has."""


class Storage(NamedTuple):
    """What a pickle says of a storage: its record's key, dtype of its entries, and their number."""

    key: str
    dtype: str
    entries: int


@dataclass(frozen=True)
class Stored:
    """A tensor of an archive.

    Attributes:
        storage: What holds its entries.
        dtype: A key of ``ITEMSIZES``.
        shape, stride: As of a torch tensor, in entries.
        first: Its first entry within the storage.
        position: Where the storage begins in the file.
    """

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    first: int
    position: int = 0

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def offset(self) -> int:
        """Where its first entry lies in the file."""
        return self.position + self.first * ITEMSIZES[self.dtype]

    @property
    def place(self) -> tuple[Any, ...]:
        """Equal for tensors that share their entries."""
        return self.storage.key, self.first, self.shape, self.stride, self.dtype


MOST_EXPANDED = 1 << 26
"""Bytes that a tensor may have whose entries are repeated, by strides of zero; a kilobyte could claim any number."""


@dataclass(frozen=True)
class Odd:
    """A tensor that holds no plain entries: sparse, quantised, a subclass."""

    kind: str
    ndim: int = 1


class Inert:
    """Stands in for an object that is not needed; takes whatever its pickle gives it, and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        """Return an empty stand-in."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Take no state."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take no item."""

    def append(self, value: Any) -> None:
        """Take no item."""

    def extend(self, values: Any) -> None:
        """Take no items."""


def _rebuild(storage: Storage, first: int, shape: Any, stride: Any, *_: Any) -> Stored:
    return Stored(storage, storage.dtype, tuple(shape), tuple(stride), first=first)


def _rebuild_typed(storage: Storage, first: int, shape: Any, stride: Any, *more: Any) -> Stored:
    """Of dtypes for which there is no kind of storage the dtype comes after gradient and hooks."""
    return Stored(storage, more[2], tuple(shape), tuple(stride), first=first)


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda _, kind, arguments, __: _rebuild(*arguments),
    ("torch", "Size"): tuple,
    **{
        ("torch._utils", f"_rebuild_{kind}"): lambda *_, kind=kind: Odd(kind)
        for kind in ("sparse_tensor", "qtensor", "wrapper_subclass")
    },
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    **{(module, name): dtype for module in ("torch", "torch.storage") for name, dtype in STORAGES.items()},
}
"""What pickles of tensors name, and what is taken for it."""

HARMLESS = {
    ("argparse", "Namespace"),
    ("_codecs", "encode"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    *(
        (module, name)
        for module in ("builtins", "__builtin__")  # the second is what older pickles say
        for name in ("set", "frozenset", "complex", "slice", "bytearray", "range", "xrange")
    ),
    *(("collections", name) for name in ("defaultdict", "deque", "Counter")),
    *(("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(("pathlib._local", name) for name in ("Path", "PosixPath", "WindowsPath")),
    *(
        (f"numpy{core}", name)
        for core in ("", ".core.multiarray", "._core.multiarray", ".dtypes", ".random._pickle")
        for name in ("ndarray", "dtype", "_reconstruct", "scalar", "Float64DType", "Int64DType", "UInt32DType")
    ),
}
"""What training states hold beside tensors; none of it is made, only stood in for."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, known: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file)
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        """Return what is taken for a global; nothing is imported."""
        if (module, name) in self._known:
            return self._known[module, name]
        if (module, name) in HARMLESS:
            return Inert
        raise pickle.UnpicklingError(f"it names {printable(module, 60)}.{printable(name, 60)}")

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage that a tensor refers to."""
        kind, dtype, key, _, entries = pid
        if kind != "storage" or not isinstance(dtype, str) or type(entries) is not int or entries < 0:
            raise pickle.UnpicklingError(f"it refers to {printable(pid, 60)}")
        return Storage(str(key), dtype, entries)


def unpickle(raw: bytes, where: str, known: Mapping[tuple[str, str], Any] = KNOWN) -> Any:
    """Return what a pickle holds, of known things only; nothing of it is run.

    Raises:
        CheckpointError: The pickle is damaged, or names something else.
    """
    try:
        return _Unpickler(io.BytesIO(raw), known).load()
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{where!r} is refused: it is damaged, or its pickle holds more than weights and would run code "
            f"({printable(error)}). Save it as safetensors where you trust it."
        ) from error
    except Exception as error:  # a damaged pickle can raise almost anything
        raise CheckpointError(
            f"cannot read {where!r} as a PyTorch file: {printable(error)}. Fetch it again."
        ) from error


class _Reader(io.RawIOBase):
    """A file as zipfile wants it."""

    def __init__(self, file: ByteFile) -> None:
        self._file, self._at = file, 0

    def seekable(self) -> bool:
        """Whether any place can be read next; it can."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place, counted from the beginning, from here (1) or from the end (2), and return it."""
        self._at = offset + (0, self._at, self._file.size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, at most ``size`` of them; by default all that are left."""
        left = max(0, self._file.size - self._at)
        found = self._file.fetch(self._at, left if size < 0 else min(size, left))
        self._at += len(found)
        return found


def read_archive(file: ByteFile, where: str) -> Any:
    """Return what a zip archive of torch holds: its pickle, with a ``Stored`` for each tensor.

    Raises:
        CheckpointError: The archive is damaged, compressed, or its records are not what its tensors need.
    """
    try:
        with zipfile.ZipFile(_Reader(file)) as archive:
            records = {info.filename: info for info in archive.infolist()}
    except (
        zipfile.BadZipFile,
        ValueError,
        OSError,
        OverflowError,
        NotImplementedError,
        EOFError,
        struct.error,
    ) as error:
        raise CheckpointError(
            f"cannot read {where!r} as a PyTorch file: {printable(error)}. Fetch it again."
        ) from error
    pickles = [name for name in records if name.rpartition("/")[2] == "data.pkl"]
    # TorchScript archives hold code beside the pickle; several pickles are no file of torch.save.
    if len(pickles) != 1 or any(name.rpartition("/")[2] == "constants.pkl" for name in records):
        raise CheckpointError(f"cannot read {where!r} as a PyTorch file: it is no archive of torch.save. Save it so.")
    prefix = pickles[0].removesuffix("data.pkl")
    places = _places(file, records.values(), where)
    if f"{prefix}byteorder" in places and file.fetch(*places[f"{prefix}byteorder"])[:6] != b"little":
        raise CheckpointError(f"{where!r}: its numbers are stored high bytes first. Save it on another machine.")
    start, size = places[pickles[0]]
    if size > HEADER_LIMIT:
        raise CheckpointError(f"{where!r}: its pickle has {size} bytes, more than the limit of {HEADER_LIMIT}.")
    data = {name.removeprefix(f"{prefix}data/"): place for name, place in places.items() if f"{prefix}data/" in name}
    return _placed(unpickle(file.fetch(start, size), where), data, where)


def _places(file: ByteFile, records: Any, where: str) -> dict[str, tuple[int, int]]:
    """Return where the bytes of each record lie: first and number. Records must be stored, whole and apart."""
    found: dict[str, tuple[int, int]] = {}
    # By their place in the file, so that records that share bytes are found: a small file could stand for any size.
    end, previous = 0, ""
    for record in sorted(records, key=lambda r: r.header_offset):
        fault = "is compressed" if record.compress_type != zipfile.ZIP_STORED else ""
        if not 0 <= record.header_offset <= file.size - LOCAL_HEADER.size:
            fault = "is cut off"
        if not fault:
            raw = file.fetch(record.header_offset, LOCAL_HEADER.size)
            signature, name, extra = LOCAL_HEADER.unpack(raw)
            start = record.header_offset + LOCAL_HEADER.size + name + extra
            fault = "" if signature == b"PK\3\4" and start + record.file_size <= file.size else "is cut off"
            fault = fault or ("overlaps " + printable(previous, 60) if record.header_offset < end else "")
            end, previous = start + record.file_size, record.filename
            found[record.filename] = start, record.file_size
        if fault:
            raise CheckpointError(
                f"cannot read {where!r} as a PyTorch file: its record {printable(record.filename, 60)} {fault}, which "
                "torch.save never writes. Fetch it again, or load it with torch and save it anew."
            )
    return found


def _placed(held: Any, places: Mapping[str, tuple[int, int]], where: str) -> Any:
    """Put into each tensor where it lies, once it is known to fit its record."""
    done: dict[int, tuple[Any, int]] = {}

    def placed(value: Any, depth: int) -> tuple[Any, int]:
        """Return a value and of how many leaves it consists, however often it shares them."""
        if isinstance(value, Stored):
            return _checked(value, places, where), 1
        if not isinstance(value, dict | list | tuple) or isinstance(value, Storage):
            return value, 1
        # What is shared is walked once, and counted as often as it stands for.
        if id(value) not in done:
            found = [placed(inner, depth + 1) for inner in (value.values() if isinstance(value, dict) else value)]
            inner, count = [v for v, _ in found], 1 + sum(n for _, n in found)
            if depth > DIMENSIONS_LIMIT or count > LEAVES_LIMIT:
                raise CheckpointError(
                    f"{where!r}: its mappings lie in each other too deep, or too often. Do not use it."
                )
            done[id(value)] = dict(zip(value, inner, strict=True)) if isinstance(value, dict) else inner, count
        return done[id(value)]

    return placed(held, 0)[0]


def _checked(tensor: Stored, places: Mapping[str, tuple[int, int]], where: str) -> Stored:
    storage, dtype = tensor.storage, tensor.dtype
    numbers = (tensor.first, *tensor.shape, *tensor.stride)
    whole = len(tensor.shape) == len(tensor.stride) <= DIMENSIONS_LIMIT and all(
        type(n) is int and n >= 0 for n in numbers
    )
    known = dtype in ITEMSIZES and prod(n or 1 for n in tensor.shape) * 16 < SIZE_LIMIT if whole else False
    position, size = places.get(storage.key, (0, 0))
    needed = storage.entries * ITEMSIZES[storage.dtype or "U8"]
    # The entry that lies farthest: with strides that need not be the last in order.
    last = (
        tensor.first + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True)) if known else 0
    )
    if not known or size != needed or (0 not in tensor.shape and (last + 1) * ITEMSIZES[dtype] > size):
        raise CheckpointError(
            f"{where!r}: a tensor of shape {printable(tensor.shape, 60)} does not fit its record "
            f"{printable(storage.key, 20)} of {size} bytes. The file is damaged; fetch it again."
        )
    claimed = prod(tensor.shape) * ITEMSIZES[dtype]
    if claimed > max(size, MOST_EXPANDED):
        raise CheckpointError(
            f"{where!r}: a tensor of shape {printable(tensor.shape, 60)} repeats its record of {size} bytes to "
            f"{size_text(claimed)}. No weight does; save it anew with .contiguous() if it is meant."
        )
    return replace(tensor, position=position)


class ArchivedTensor:
    """The source of one tensor of an archive."""

    def __init__(self, file: ByteFile, stored: Stored) -> None:
        self.file, self.stored = file, stored

    def read(self, info: TensorInfo, rows: Range | None) -> torch.Tensor:
        """Return entries ``rows`` of the leading axis: the bytes from the first to the last of them, as they lie."""
        import torch

        from diffract.checkpoints.dtypes import TORCH_DTYPES

        shape, stride = self.stored.shape, self.stored.stride
        first, itemsize = 0, info.itemsize
        if rows is not None:
            first, shape = rows[0] * stride[0], (rows[1] - rows[0], *shape[1:])
        span = 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        buffer = torch.empty(span * itemsize, dtype=torch.uint8)
        if span:
            self.file.fill(buffer.numpy().data, self.stored.offset + first * itemsize)
        return buffer.view(TORCH_DTYPES[info.dtype]).as_strided(shape, stride if span else (0,) * len(shape))

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def open_pickles(folder: LocalFolder, shards: Shards, *, part: str | None = None) -> Checkpoint:
    """Open PyTorch files as one checkpoint.

    Raises:
        CheckpointError: A file is damaged or refused, or a tensor is in two of them or in none.
    """
    joined = join((open_pickle(folder.path / name, part=part) for name in shards.files), folder.where)
    check_promised(joined, shards, folder.where)
    return joined


def open_pickle(path: Path, *, part: str | None = None) -> Checkpoint:
    """Open one PyTorch file; tensors that share their memory are recognised as tied.

    Only weights are loaded: a pickle that holds code is refused, and none of it runs. Of a training state the model is
    taken, and everything else is set aside.

    Args:
        path: The file.
        part: The key, or keys joined by dots, of the part of a training state that is wanted.

    Raises:
        CheckpointError: The file is damaged, holds more than weights, or holds no named tensors.
    """
    file = LocalFile(path)
    where = file.name
    try:
        start = file.fetch(0, min(file.size, 64))
        if not start.startswith(b"PK"):
            refuse_format(where, start=start)
            if not start.startswith(b"\x80"):  # of a pickle, which the format before zip archives is
                raise CheckpointError(
                    f"cannot read {where!r} as a PyTorch file: it does not begin as one. Fetch it again, or convert it "
                    "with the program that wrote it."
                )
            file.close()
            from diffract.checkpoints.arrays import open_old_pickle

            return open_old_pickle(path, part=part)
        found = find_model(read_archive(file, where), lambda value: isinstance(value, Stored | Odd), where, part=part)
        return _as_checkpoint(file, found, where)
    except BaseException:
        file.close()
        raise


def _as_checkpoint(file: ByteFile, found: Found, where: str) -> Checkpoint:
    infos: dict[str, TensorInfo] = {}
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    sources: dict[str, Source] = {}
    for name, stored in found.tensors:
        if isinstance(stored, Odd):
            raise CheckpointError(
                f"{where!r}, {printable(name)!r}: expected an array, got a {stored.kind}. Pass dense arrays."
            )
        if name in infos:
            raise CheckpointError(f"{where!r}: two values are called {printable(name)!r}. Rename one of them.")
        infos[name] = TensorInfo(name, stored.shape, stored.dtype, where, offset=stored.offset)
        sources[name] = ArchivedTensor(file, stored)
        # Empty tensors share their place with whatever begins there.
        if 0 not in stored.shape and first.setdefault(stored.place, name) != name:
            tied[name] = first[stored.place]
    if not infos:
        raise CheckpointError(f"{where!r} holds no named tensors, expected a state dict. Is this the right file?")
    aside = {
        name: SetAside(leaf.shape, leaf.dtype, prod(leaf.shape) * ITEMSIZES[leaf.dtype], reason)
        for name, leaf, reason in found.set_aside
        if isinstance(leaf, Stored)
    }
    return Checkpoint(where, infos, sources, tied=tied, set_aside=aside)
