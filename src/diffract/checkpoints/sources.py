"""Files whose bytes are read by position, and folders on disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource  # opens a file of its own: too late when there are too many
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diffract.checkpoints.checkpoint import Checkpoint, Range, Source, byte_range, from_bytes
from diffract.checkpoints.header import HEADER_LIMIT, SetAside, TensorInfo, read_header
from diffract.errors import CheckpointError, printable

if TYPE_CHECKING:
    import torch


class ByteFile(ABC):
    """A file that holds tensors and can be read from any position by several threads at once.

    Attributes:
        name: What to call it in messages.
        size: Its size in bytes.
        origin: What stands for its bytes without their being read, ``None`` where nothing does.
        remote: Whether they come over a network.
    """

    name: str
    size: int
    origin: str | None = None
    remote: bool = False

    @abstractmethod
    def fill(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the bytes from ``offset`` on, or raise ``CheckpointError``."""

    @abstractmethod
    def close(self) -> None:
        """Release what is open; further calls do nothing."""

    def fetch(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
        buffer = bytearray(length)
        self.fill(memoryview(buffer), offset)
        return bytes(buffer)

    def read(self, info: TensorInfo, rows: Range | None) -> torch.Tensor:
        """Return entries ``rows`` of a tensor; one allocation, no further copy."""
        import torch

        offset, length = byte_range(info, rows)
        buffer = torch.empty(length, dtype=torch.uint8)
        if length:
            self.fill(buffer.numpy().data, offset)
        return from_bytes(buffer, info, rows)


def is_remote(checkpoint: Checkpoint) -> bool:
    """Whether tensors of a checkpoint come over a network."""
    return any(isinstance(source, ByteFile) and source.remote for source in checkpoint.sources.values())


def origin_of(checkpoint: Checkpoint, name: str) -> str | None:
    """Return what stands for a tensor's bytes without their being read, ``None`` where nothing does."""
    source, info = checkpoint.sources[name], checkpoint.info(name)
    if not isinstance(source, ByteFile) or source.origin is None:
        return None
    return f"{source.origin} {info.offset} {info.dtype} {info.shape}"


class LocalFile(ByteFile):
    """A file on disk, read by position, so that threads do not disturb each other and nothing stays mapped.

    It stays the same file when another is renamed to its name, and closes itself when nothing refers to it.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.path = printable(path, 1000), path
        try:
            self._descriptor = _open_descriptor(path)
        except OSError as error:
            raise CheckpointError(f"cannot open {self.name!r}: {error.strerror}.") from error
        self._close = weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        self.size, self._written = status.st_size, status.st_mtime_ns

    def fill(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the bytes from ``offset`` on."""
        if not self._close.alive:
            raise CheckpointError(f"{self.name!r} is closed. Keep the checkpoint open while reading from it.")
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.name!r}: {error.strerror}.") from error
            if got == 0:
                raise CheckpointError(
                    f"{self.name!r} ends at byte {offset + done}: it shrank while open. Fetch it again."
                )
            done += got
        # What is read twice, for a digest and for numbers, must be the same: results are kept by the digest.
        if os.fstat(self._descriptor).st_mtime_ns != self._written:
            raise CheckpointError(f"{self.name!r} was written to while it was read. Try again when it is whole.")

    def cloned(self, path: Path) -> bool:
        """Make a file that shares this one's bytes on disk until either changes; ``False`` where that is not known."""
        with path.open("xb") as file:
            try:
                fcntl.ioctl(file, CLONE, self._descriptor)
            except OSError as error:
                if error.errno in CANNOT_CLONE:
                    path.unlink()
                    return False
                raise
        return True

    def copied(self, path: Path) -> None:
        """Make a file of the same bytes."""
        with path.open("xb") as file:
            done = 0
            while done < self.size:
                got = os.copy_file_range(self._descriptor, file.fileno(), self.size - done, offset_src=done)
                if got == 0:
                    raise CheckpointError(f"{self.name!r} ends at byte {done}: it shrank while open. Fetch it again.")
                done += got

    def linked(self, path: Path) -> None:
        """Give this very file another name; what is written to one is in the other."""
        try:
            os.link(self.path.resolve(), path)
        except OSError as error:
            raise CheckpointError(
                f"cannot link {self.name!r}: {error.strerror}. Choose an output on the same file system, or leave out "
                "--link."
            ) from error

    def close(self) -> None:
        """Close the file; further calls do nothing."""
        self._close()


CLONE = 0x40049409
"""Linux's FICLONE: share a file's extents."""

CANNOT_CLONE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.ENOSYS)


def real_path(path: Path) -> Path:
    """Return where a path leads to; ``Path.resolve`` ends in an error for links that go in a circle."""
    return Path(os.path.realpath(path))


def _open_descriptor(path: Path) -> int:
    """Open a file; where a process has too many open, allow it as many as the system lets it have."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        return os.open(path, flags)


class TooLargeError(CheckpointError):
    """A file is larger than what is read whole."""


DEEPEST = 3
"""Subfolders below each other in which files of a model are looked for."""


class LocalFolder:
    """A folder on disk.

    Files may be links within it, and within the hub's cache where it is a version there; what a link brings in from
    elsewhere is no part of a model: it would be published with everything that is made of it.

    Attributes:
        path: Where it is.
        where: What to call it in messages.
        names: Its files. A link counts even if it leads nowhere, so that opening it can say so.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where = printable(path, 1000)
        try:
            self.names = sorted(p.name for p in path.iterdir() if p.is_file() or (p.is_symlink() and not p.exists()))
        except OSError as error:
            raise CheckpointError(f"cannot list {self.where!r}: {error.strerror}.") from error
        whole = real_path(path)
        # the hub's cache keeps a version's files as links to what all versions share
        versions = [place for place in (whole, *whole.parents[:DEEPEST]) if place.parent.name == "snapshots"]
        self._inside = (whole, *(version.parents[1] / "blobs" for version in versions))

    @property
    def nested(self) -> list[str]:
        """Files of its subfolders, with slashes; hidden folders, and those that links lead to, left out."""
        found: list[str] = []
        for here, folders, files in os.walk(self.path):
            below = Path(here).relative_to(self.path)
            ends = len(below.parts) == DEEPEST
            folders[:] = [] if ends else sorted(f for f in folders if not f.startswith((".", "__pycache__")))
            found += [(below / name).as_posix() for name in sorted(files) if below.parts]
        return found

    def below(self, name: str) -> LocalFolder:
        """Return a subfolder as a folder of its own."""
        return LocalFolder(self.path / name)

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a small file."""
        file = self.open(name)
        try:
            if file.size > HEADER_LIMIT:
                raise TooLargeError(f"{file.name}: {file.size} bytes are too many for a configuration or an index.")
            return file.fetch(0, file.size)
        finally:
            file.close()

    def open(self, name: str) -> LocalFile:
        """Open one of its files.

        Raises:
            CheckpointError: It cannot be opened, or is a link that leads out of the folder.
        """
        if not self.holds(name):
            raise CheckpointError(
                f"{printable(self.path / name, 1000)!r} is a link that leads out of its folder. Copy the file there "
                "or open the checkpoint where it lies."
            )
        return LocalFile(self.path / name)

    def holds(self, name: str) -> bool:
        """Whether a file lies in the folder, or in the part of the hub's cache that belongs to it."""
        target = real_path(self.path / name)
        return any(target.is_relative_to(place) for place in self._inside)


CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
GGUF = ".gguf"
KINDS = ((SAFETENSORS, (".safetensors",)), (TORCH, TORCH_SUFFIXES), (f"model{GGUF}", (GGUF,)))
"""Weights by kind, the preferred one first: a file that is not sharded, and how the names of others end."""

TRAINER = (
    *("training_args", "optim", "scheduler", "lr_scheduler", "scaler", "sampler", "rng_state", "random_states"),
    *("train.pt", "train_state", "trainer_state", "training_state", "recipe_state", "global_step"),
    *("zero_pp_rank_", "bf16_zero_pp_rank_", "fp16_zero_pp_rank_"),
)
"""How files begin that a training run leaves beside the weights."""

SLICES = "DCP_SHARDING_INFO"
"""Key of a file's metadata under which a distributed checkpoint notes which part of each tensor the file holds."""

HEADERS_AT_ONCE = 8
"""Headers read at the same time; on the hub each costs a round trip or two."""


class Folder(Protocol):
    """Files by name, wherever they lie."""

    @property
    def where(self) -> str:
        """What to call it in messages."""
        ...

    @property
    def names(self) -> list[str]:
        """Its files, those of its subfolders left out."""
        ...

    @property
    def nested(self) -> list[str]:
        """Files of its subfolders, with slashes."""
        ...

    def below(self, name: str) -> Folder:
        """Return a subfolder as a folder of its own."""
        ...

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a small file."""
        ...

    def open(self, name: str) -> ByteFile:
        """Open a large file."""
        ...

    def holds(self, name: str) -> bool:
        """Whether a file is the folder's own, not one that a link brings in from elsewhere."""
        ...


@dataclass(frozen=True)
class Shards:
    """The files that make up a model.

    Attributes:
        files: Their names.
        tensors: Names of tensors that an index promises; empty without an index.
        index: The name of that index.
    """

    files: list[str]
    tensors: Iterable[str] = ()
    index: str | None = None


def open_safetensors(file: ByteFile) -> tuple[Checkpoint, dict[str, str]]:
    """Open one safetensors file; return it and the file's own metadata. An error closes it.

    Raises:
        CheckpointError: The file is damaged.
    """
    try:
        header = read_header(file.fetch, file.size, file.name)
    except BaseException:
        file.close()
        raise
    sources = dict.fromkeys(header.infos, file)
    return Checkpoint(file.name, header.infos, sources, set_aside=header.set_aside), header.metadata


def open_shards(folder: Folder, shards: Shards) -> Checkpoint:
    """Open safetensors files as one checkpoint; an error closes them all.

    Raises:
        CheckpointError: A file is damaged, or a tensor is in two of them, or in none though it should be.
    """
    with ExitStack() as opened, ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:

        def open_one(name: str) -> tuple[Checkpoint, dict[str, str]]:
            file = folder.open(name)
            opened.callback(file.close)
            return open_safetensors(file)

        files = list(pool.map(open_one, shards.files))
        if any(SLICES in metadata for _, metadata in files):
            from diffract.checkpoints.distributed import join_slices  # it reads archives too, which come after files

            joined = join_slices(files, folder.where)
        else:
            joined = join((held for held, _ in files), folder.where)
        check_promised(joined, shards, folder.where)
        opened.pop_all()
    return joined


def find_weights(folder: Folder) -> Shards:
    """Return the files that make up a folder's model, of the kind that is preferred; none if there are no weights.

    Of one kind only: repositories often hold the same weights twice.
    """
    found = (find_shards(folder, single, suffixes) for single, suffixes in KINDS)
    return next((one for one in found if one.files), Shards([]))


def find_shards(folder: Folder, single: str, suffixes: tuple[str, ...]) -> Shards:
    """Return the files that make up a folder's model: the single one, those of the index, or all there are.

    Args:
        folder: Where to look.
        single: Name of the file of a model that is not sharded; the index is called after it.
        suffixes: What the files' names end in.

    Raises:
        CheckpointError: The index is wrong or names files that are not there, or a numbered file is missing.
    """
    index = f"{single}.index.json"
    if single in folder.names:
        return Shards([single])
    if index in folder.names:
        weight_map = parse_index(folder.read_bytes(index), f"{folder.where}, {index}")
        shards = Shards(list(dict.fromkeys(weight_map.values())), weight_map, index)
    else:
        found = [n for n in folder.names if n.endswith(suffixes) and not n.startswith(TRAINER)]
        shards = Shards([n for n in found if not n.startswith("adapter_")])
        _refuse_gaps(shards.files, folder.where)
    _refuse_missing(shards.files, set(folder.names), folder.where)
    return shards


def parse_index(raw: bytes, where: str) -> dict[str, str]:
    """Return an index's map from tensor to file, each file checked to be a plain name.

    Raises:
        CheckpointError: The index is no index, or names a file outside its folder.
    """
    weight_map = parse_object(raw, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: expected a weight_map of tensor to file names. Fetch the index again.")
    for name in weight_map.values():
        if not isinstance(name, str) or not is_plain_name(name):
            raise CheckpointError(
                f"{where}: names {printable(name)!r}, expected the name of a file in the same folder. "
                "Do not use this checkpoint."
            )
    return weight_map


def is_plain_name(name: str) -> bool:
    """Whether a name from an index is a file name and nothing more."""
    return name not in ("", ".", "..") and name.isprintable() and not any(c in name for c in "/\\:")


def check_promised(found: Checkpoint, shards: Shards, where: str) -> None:
    """Raise unless every tensor that the index promises is in one of the files."""
    lost = sorted(set(shards.tensors) - set(found) - set(found.set_aside))
    if lost:
        raise CheckpointError(
            f"{where}: the index promises {len(lost)} tensors that no file holds, first "
            f"{printable(lost[0])!r}. Fetch the checkpoint again."
        )


def join(shards: Iterable[Checkpoint], where: str) -> Checkpoint:
    """Return several files as one checkpoint.

    Raises:
        CheckpointError: A tensor is in two of them.
    """
    infos: dict[str, TensorInfo] = {}
    sources: dict[str, Source] = {}
    tied: dict[str, str] = {}
    set_aside: dict[str, SetAside] = {}
    for shard in shards:
        twice = sorted(infos.keys() & shard.infos.keys())
        if twice:
            raise CheckpointError(
                f"{where}: tensor {printable(twice[0])!r} is in two files, {infos[twice[0]].file} and "
                f"{shard.reference}. Open one of them, or remove what does not belong."
            )
        infos |= shard.infos
        sources |= shard.sources
        tied |= shard.tied
        set_aside |= shard.set_aside
    return Checkpoint(where, infos, sources, tied=tied, set_aside=set_aside)


MOST_CONFIG_BYTES = 1 << 24
"""A configuration is of some kilobytes, and takes thirty times as much memory as on disk."""


def read_config(folder: Folder) -> dict[str, Any]:
    """Return a folder's config.json, empty if there is none.

    Raises:
        CheckpointError: It is no JSON object, or too large.
    """
    if CONFIG not in folder.names:
        return {}
    raw, where = folder.read_bytes(CONFIG), f"{folder.where}, {CONFIG}"
    if len(raw) > MOST_CONFIG_BYTES:
        raise CheckpointError(f"{where} has {len(raw):,} bytes, which is too many for a configuration. Fetch it again.")
    return parse_object(raw, where)


def read_object(folder: Folder, name: str) -> dict[str, Any] | None:
    """Return the JSON object that a folder's file holds, ``None`` if there is no such file."""
    return parse_object(folder.read_bytes(name), f"{folder.where}, {name}") if name in folder.names else None


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object that a file's content is.

    Raises:
        CheckpointError: It is no JSON, or no object.
    """
    try:
        found = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is no JSON: {printable(error)}. Fetch it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(found).__name__}. Fetch it again.")
    return found


def _refuse_missing(files: list[str], present: set[str], where: str) -> None:
    missing = [name for name in files if name not in present]
    if missing:
        some = ", ".join(map(printable, missing[:3]))
        raise CheckpointError(f"{where}: {len(missing)} of {len(files)} files are missing: {some}. Fetch them.")


def _refuse_gaps(files: list[str], where: str) -> None:
    """Without an index, ``model-00002-of-00003`` still tells that there must be three."""
    for name in files:
        stem, _, suffix = name.rpartition(".")
        head, _, total = stem.rpartition("-of-")
        start, _, number = head.rpartition("-")
        if number.isdecimal() and total.isdecimal() and len(total) <= 5:
            numbered = (f"{start}-{i:0{len(number)}d}-of-{total}.{suffix}" for i in range(1, int(total) + 1))
            _refuse_missing(list(numbered), set(files), where)
