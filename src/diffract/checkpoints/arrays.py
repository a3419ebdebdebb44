"""Tensors that torch holds, as a checkpoint: mappings of arrays, modules, ``.npz`` archives, old PyTorch files.

Headers are read without this module, since loading torch takes seconds.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, TypeGuard

import numpy as np
import torch

from diffract.checkpoints.checkpoint import Checkpoint, Range, Source
from diffract.checkpoints.dtypes import DTYPE_NAMES
from diffract.checkpoints.header import SetAside, TensorInfo
from diffract.checkpoints.states import find_model
from diffract.errors import CheckpointError, printable

Array = torch.Tensor | np.ndarray

BIT_TYPES: dict[str, tuple[type[np.generic], torch.dtype]] = {
    "bfloat16": (np.uint16, torch.bfloat16),
    "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
    "float8_e5m2": (np.uint8, torch.float8_e5m2),
}
"""ml_dtypes' names: NumPy holds the bits, torch knows the type."""


class Memory:
    """One array that already lies in memory, or is mapped into it; only what is read is converted."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def read(self, info: TensorInfo, rows: Range | None) -> torch.Tensor:
        """Return entries ``rows`` of the leading axis, on the CPU."""
        array = self.array.detach().dequantize() if _is_coded(self.array) else self.array
        return _to_tensor(array if rows is None else array[rows[0] : rows[1]])

    def close(self) -> None:
        """Nothing is open."""


def open_mapping(
    arrays: Mapping[str, Any], *, reference: str = "<memory>", config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Return an in-memory mapping as a checkpoint; arrays that share their memory are recognised as tied.

    Args:
        arrays: Names to arrays: torch, NumPy, or anything with ``__dlpack__`` or ``__array__``; nested
            mappings (JAX/Flax parameters) are flattened with dots.
        reference: What to call it.
        config: The model's configuration.

    Raises:
        CheckpointError: A value is no array of a known dtype, or two values get the same name.
    """
    return open_pairs(flatten(arrays), reference=reference, config=config)


def open_pairs(
    pairs: Iterable[tuple[str, Any]], *, reference: str, config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Return names and arrays as a checkpoint; as ``open_mapping``, with nothing left to flatten."""
    found: dict[str, Array] = {}
    for name, value in pairs:
        if name in found:
            raise CheckpointError(f"{reference}: two values are called {printable(name)!r}. Rename one of them.")
        found[name] = _as_array(value, f"{reference}, {printable(name)!r}")
    infos = {name: _describe(name, array, reference) for name, array in found.items()}
    sources: dict[str, Source] = {name: Memory(array) for name, array in found.items()}
    return Checkpoint(reference, infos, sources, config=config or {}, tied=_ties(found))


def open_module(module: torch.nn.Module, *, reference: str = "<module>") -> Checkpoint:
    """Return a module's tensors as a checkpoint; a ``config`` with ``to_dict`` (transformers) is its config.

    Args:
        module: The model. What of its state is no tensor is left out.
        reference: What to call it.
    """
    config = getattr(module, "config", None)
    found = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    state = module.state_dict(keep_vars=True)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return open_mapping(tensors, reference=reference, config=found)


class Archived:
    """An array of a NumPy archive: read whole when it is first wanted, and kept."""

    def __init__(self, path: Path, member: str) -> None:
        self._path, self._member, self._lock = path, member, Lock()
        self._array: Array | None = None

    def read(self, info: TensorInfo, rows: Range | None) -> torch.Tensor:
        """Return entries ``rows`` of the leading axis."""
        with self._lock, _npz_explained(self._path):
            if self._array is None:
                with zipfile.ZipFile(self._path) as archive, archive.open(self._member) as file:
                    self._array = np.lib.format.read_array(file, allow_pickle=False)
        return Memory(self._array).read(info, rows)

    def close(self) -> None:
        """Let go of the array."""
        self._array = None


def open_npz(path: Path) -> Checkpoint:
    """Open a NumPy archive. Only the arrays' headers are read; pickled objects are refused.

    Raises:
        CheckpointError: It is no archive of plain arrays.
    """
    where = printable(path, 1000)
    infos: dict[str, TensorInfo] = {}
    sources: dict[str, Source] = {}
    with _npz_explained(path), zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = header(file)
            if dtype.hasobject:
                raise ValueError(f"{printable(name, 60)!r} holds pickled objects")
            # an array of this shape and dtype without memory tells what the entries will be
            infos[name] = _describe(name, np.broadcast_to(np.empty((), dtype), shape), where)
            sources[name] = Archived(path, member)
    return Checkpoint(where, infos, sources)


@contextmanager
def _npz_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive can make zipfile, zlib or NumPy raise almost anything
        raise CheckpointError(
            f"cannot read {printable(path, 1000)!r} as .npz of plain arrays: {printable(error)}. "
            "Save it with numpy.savez."
        ) from error


def flatten(arrays: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings, names joined with dots."""
    for key, value in arrays.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_coded(array: Array) -> TypeGuard[torch.Tensor]:
    """Whether a tensor stands for codes and scales that it holds itself, as torchao's do, and can turn into numbers."""
    return _stands_for_others(array) and type(array).dequantize is not torch.Tensor.dequantize


def _stands_for_others(array: Array) -> TypeGuard[torch.Tensor]:
    """Whether a tensor has no entries of its own, but is a class that says what operations on it do."""
    plain = getattr(torch.Tensor, "__torch_dispatch__")  # noqa: B009  # that torch has no type for
    return isinstance(array, torch.Tensor) and getattr(type(array), "__torch_dispatch__", plain) is not plain


def _whole(value: torch.Tensor, where: str) -> torch.Tensor:
    """Return a tensor that FSDP2 or tensor parallelism has distributed, where one process has all of it.

    Raises:
        CheckpointError: It lies on several processes, or is a kind of tensor that hides what it holds.
    """
    mesh, local = getattr(value, "device_mesh", None), getattr(value, "to_local", None)
    if mesh is not None and local is not None:
        if mesh.size() > 1:
            raise CheckpointError(
                f"{where}: it is distributed over {mesh.size()} processes (DTensor). Gather the model: pass what "
                "get_model_state_dict of torch.distributed.checkpoint.state_dict returns with full_state_dict=True."
            )
        return local()
    if _stands_for_others(value) and not _is_coded(value):
        raise CheckpointError(
            f"{where}: a {type(value).__name__} hides its entries, and has no dequantize(). Pass plain tensors."
        )
    return value


def _as_array(value: Any, where: str) -> Array:
    """Return a value as a dense array that holds data, without a copy."""
    try:
        array = _plain(_whole(value, where) if isinstance(value, torch.Tensor) else value)
        if isinstance(array, torch.Tensor) and (array.is_meta or array.is_quantized or array.layout != torch.strided):
            raise TypeError(f"a {array.layout} tensor of {array.dtype} on {array.device} holds no plain entries")
        return array
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise CheckpointError(
            f"{where}: expected an array, got {type(value).__name__} ({printable(error)}). Pass dense arrays."
        ) from error


def _plain(value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        return np.asarray(value)
    if hasattr(value, "__dlpack__"):
        try:
            return torch.from_dlpack(value)
        except (TypeError, RuntimeError, BufferError):
            if not hasattr(value, "__array__"):
                raise
    if hasattr(value, "__array__"):
        return np.asarray(value)
    raise TypeError("it has neither __dlpack__ nor __array__")


def _describe(name: str, array: Array, reference: str) -> TensorInfo:
    where = f"{reference}, tensor {printable(name)!r}"
    try:
        dtype = array.dtype if _is_coded(array) else _to_tensor(array[:0] if array.ndim else array).dtype
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: dtype {array.dtype} has no counterpart ({printable(error)}). Convert it."
        ) from error
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{where}: unknown dtype {dtype}, expected one of {', '.join(DTYPE_NAMES.values())}. Convert it."
        )
    return TensorInfo(name, tuple(array.shape), DTYPE_NAMES[dtype], reference)


def _to_tensor(array: Array) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array.detach().cpu()
    bits = BIT_TYPES.get(array.dtype.name)
    plain = array.view(bits[0]) if bits else array
    # what torch cannot take as it lies is copied: read-only, swapped bytes, backwards or between entries
    whole_steps = all(step >= 0 and step % plain.itemsize == 0 for step in plain.strides)
    if not (plain.flags.writeable and plain.dtype.isnative and whole_steps):
        plain = plain.astype(plain.dtype.newbyteorder("="), order="C")
    tensor = torch.from_numpy(plain)
    return tensor.view(bits[1]) if bits else tensor


def _ties(arrays: Mapping[str, Array]) -> dict[str, str]:
    """Map each name whose array is the very memory of an earlier one to that one."""
    first: dict[tuple[Any, ...], str] = {}
    # a tensor that stands for others has no memory of its own, and would share that with every such
    own = {name: array for name, array in arrays.items() if 0 not in array.shape and not _is_coded(array)}
    places = {name: _place(array) for name, array in own.items()}
    return {name: first[place] for name, place in places.items() if first.setdefault(place, name) != name}


def _place(array: Array) -> tuple[Any, ...]:
    shape, dtype = tuple(array.shape), array.dtype
    if isinstance(array, torch.Tensor):
        return array.device, array.data_ptr(), shape, array.stride(), dtype
    return "numpy", array.__array_interface__["data"][0], shape, array.strides, dtype


def open_old_pickle(path: Path, *, part: str | None = None) -> Checkpoint:
    """Open a PyTorch file of the format before zip archives; it is read whole. As ``archive.open_pickle``."""
    where = printable(path, 1000)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{where!r} is refused: it is damaged, or its pickle holds more than weights and would run code "
            f"({printable(_first_line(error))}). Save it as safetensors where you trust it."
        ) from error
    except Exception as error:  # a damaged pickle can make torch raise almost anything
        reason = printable(_first_line(error))
        raise CheckpointError(f"cannot read {where!r} as a PyTorch file: {reason}. Fetch it again.") from error
    found = find_model(loaded, lambda value: isinstance(value, torch.Tensor), where, part=part)
    if not found.tensors:
        raise CheckpointError(f"{where!r} holds no named tensors, expected a state dict. Is this the right file?")
    aside = {
        name: SetAside(tuple(leaf.shape), str(leaf.dtype).removeprefix("torch."), leaf.nbytes, reason)
        for name, leaf, reason in found.set_aside
    }
    return replace(open_pairs(found.tensors, reference=where), set_aside=aside)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
