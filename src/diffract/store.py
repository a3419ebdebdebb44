"""Results by content: what was computed of the same bytes in the same way is not computed again.

And folders and files that appear whole: what a process writes has its name when all of it is on the disk.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import io
import json
import os
import re
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
import platformdirs
import polars as pl

from diffract.errors import DiffractWarning, RunError, printable
from diffract.settings import read_file, size_text

FORMAT = 1
"""Raised when the layout of what is stored changes."""

RESULTS, FOLDERS = "results", 256
"""The folder of results within the cache; folders within it, by the first two digits of keys."""

CACHED = (RESULTS, "tokens", "tokenizers")
"""What lies in the cache: results, and what training makes of text."""

CACHED_NAME = re.compile(r"[0-9a-f]{32,64}(\.npy|\.json)?(\.tmp-([0-9a-f]{8}){1,2})?")
"""What files of the cache are called; no other file is ever removed."""

MOST_BYTES = 10_000_000_000
"""What the results of all analyses and evaluations may take."""

DIGEST_BYTES = 32
"""A digest stands before each frame."""


def cache_folder() -> Path:
    """Return where results are kept: ``DIFFRACT_CACHE_DIR``, or the user's cache folder."""
    return Path(os.environ.get("DIFFRACT_CACHE_DIR") or platformdirs.user_cache_dir("diffract"))


def cache_key(*parts: Any) -> str:
    """Return the key of a result: a digest of everything that it depends on, as JSON."""
    return blake3.blake3(json.dumps([FORMAT, *parts]).encode()).hexdigest()


class Cache:
    """Frames by key, each in a file of its own that appears whole.

    Any number of threads, processes and machines may use a folder at once, on network file systems too: nothing is
    locked and nothing is written over. A digest of key and content stands before each frame; what does not have its
    digest, damaged or taken from another place, counts as absent. Where a file cannot be read or written, a warning
    says so and work goes on without.

    Args:
        folder: Where the files lie; made when something is kept.
        most_bytes: What they may take together; beyond that, what was not used for longest is removed. No bound by
            default.
    """

    def __init__(self, folder: Path, *, most_bytes: int | None = None) -> None:
        self.folder, self._most_bytes = folder, most_bytes
        self._last: Path | None = None
        self._told = False

    def get(self, key: str) -> pl.DataFrame | None:
        """Return a result, or ``None``."""
        path = self._path(key)
        try:
            content = read_file(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            # Of a file that another machine has just removed network file systems say that it is stale.
            return None if error.errno == errno.ESTALE else self._warn(error)
        if content[:DIGEST_BYTES] != _digest(key, content[DIGEST_BYTES:]):
            return None
        with suppress(OSError):  # results of others may be read and not touched
            os.utime(path)  # it is used: of what has not been for long, room is made first
        return pl.read_ipc(io.BytesIO(content[DIGEST_BYTES:]))

    def put(self, key: str, value: pl.DataFrame) -> None:
        """Keep a result; it is there whole, or not at all."""
        buffer, path = io.BytesIO(), self._path(key)
        value.write_ipc(buffer)
        # Not synced: of a file that a power cut has emptied the digest tells, and it is computed again.
        draft = _draft_of(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(_digest(key, buffer.getvalue()) + buffer.getvalue())
            draft.replace(path)
            self._last = path
        except OSError as error:
            self._warn(error)
            with suppress(OSError):
                draft.unlink()

    def close(self) -> None:
        """Make room, if what was kept may have passed the bound."""
        if self._most_bytes is None or self._last is None:
            return
        # Keys are digests, so that any of the folders holds its share of all: one is looked at instead of all.
        with suppress(OSError):
            if FOLDERS * sum(path.stat().st_size for path in self._last.parent.iterdir()) > self._most_bytes:
                own = [entry for entry in entries(self.folder) if entry.kind == RESULTS]
                removed = prune(own, most_bytes=self._most_bytes)
                size = size_text(sum(entry.size_bytes for entry in removed))
                self._say(f"the cache at {str(self.folder)!r} was full: {size} that were not used for longest are gone")

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, key: str) -> Path:
        return self.folder / RESULTS / key[:2] / key

    def _warn(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            self._say(
                f"the cache at {str(self.folder)!r} cannot be used: {error.strerror or error}. Work goes on without. "
                "Free space, set DIFFRACT_CACHE_DIR to another folder, or pass --no-cache."
            )

    def _say(self, text: str) -> None:
        warnings.warn(text, DiffractWarning, stacklevel=3)


def _digest(key: str, content: bytes) -> bytes:
    return blake3.blake3(key.encode() + b"\0" + content).digest()


def remembered(cache: Cache | None, key: Callable[[], str], make: Callable[[], pl.DataFrame]) -> pl.DataFrame:
    """Return a result that a cache holds, or make it and keep it there.

    Args:
        cache: Where results are kept. Without one the key, which may take a pass over all bytes, is not asked for.
        key: What the result depends on.
        make: Computes it.
    """
    if cache is None:
        return make()
    own = key()
    found = cache.get(own)
    if found is None:
        found = make()
        cache.put(own, found)
    return found


def free_bytes(folder: Path) -> int:
    """Return the room on the disk that a folder lies on, or will lie on once it is made."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


@dataclass(frozen=True)
class CachedFile:
    """A file of the cache.

    Attributes:
        kind: What it is: a name of ``CACHED``.
        path: Where it lies.
        size_bytes: What it takes.
        used: When it was last used, in seconds since 1970.
    """

    kind: str
    path: Path
    size_bytes: int
    used: float


def entries(folder: Path) -> list[CachedFile]:
    """Return all files of a cache; what is not the cache's own, and what goes meanwhile, is left out."""
    paths = [path for path in folder.glob("results.sqlite*") if path.is_file()]  # of versions before
    for kind in CACHED:
        for place, _, names in os.walk(folder / kind):
            paths += [Path(place, name) for name in names if CACHED_NAME.fullmatch(name)]
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            stat, kind = path.lstat(), path.relative_to(folder).parts[0]
            found.append(CachedFile(kind, path, stat.st_size, used=max(stat.st_atime, stat.st_mtime)))
    return found


def prune(
    found: Sequence[CachedFile], *, most_bytes: int | None = None, most_seconds: float | None = None
) -> list[CachedFile]:
    """Remove the files of a cache that were not used for longest, and return them.

    Args:
        found: Which files there are.
        most_bytes: What all of them may take together afterwards.
        most_seconds: How long ago any that stays was used at most.
    """
    removed, total, now = [], 0, time.time()
    # The last used first: what no longer fits is what was not used for longest.
    for entry in sorted(found, key=lambda entry: -entry.used):
        total += entry.size_bytes
        if (most_bytes is not None and total > most_bytes) or (
            most_seconds is not None and now - entry.used > most_seconds
        ):
            with suppress(OSError):
                entry.path.unlink()
                removed.append(entry)
    return removed


PARTS = "parts"
"""The folder within a run's in which shares of the work lie until they are joined."""

MACHINE = blake3.blake3(os.uname().nodename.encode()).hexdigest()[:8]
"""Stands in the names of drafts: locks of other machines may not be seen."""

DRAFT = re.compile(r"(?P<name>.+)\.tmp-(?P<old>old-)?(?P<machine>[0-9a-f]{8})?[0-9a-f]{8}")
"""What is being written beside the name that it will have, or was there before and is about to be removed."""


def _draft_of(path: Path, kind: str = "") -> Path:
    return path.parent / f"{path.name}.tmp-{kind}{MACHINE}{uuid.uuid4().hex[:8]}"


LOCAL = {
    0xEF53: "ext2, ext3, ext4", 0x58465342: "xfs", 0x9123683E: "btrfs", 0x2FC12FC1: "zfs", 0xF2F52010: "f2fs",
    0xCA451A4E: "bcachefs", 0x01021994: "tmpfs", 0x858458F6: "ramfs", 0x794C7630: "overlay", 0x3153464A: "jfs",
    0x52654973: "reiserfs", 0x4D44: "vfat", 0x2011BAB0: "exfat", 0x7366746E: "ntfs3",
}  # fmt: skip
"""File systems that one machine alone writes to, by the number that statfs(2) gives. NFS, SMB, Lustre, GPFS, CephFS,
BeeGFS, 9p, FUSE and whatever comes count as shared: what cannot be known to be safe is not relied on."""


def is_local(folder: Path) -> bool:
    """Return whether a folder is known to lie on a file system that no other machine writes to."""
    if sys.platform != "linux":
        return False
    answer = (ctypes.c_ulong * 64)()  # more than statfs writes on any processor; the number stands first
    failed = ctypes.CDLL(None).statfs(os.fsencode(folder), answer)
    return not failed and answer[0] & 0xFFFFFFFF in LOCAL


@contextmanager
def whole_folder(folder: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a draft folder beside ``folder``, which takes its name when the block ends well.

    An error inside the block, a full disk included, removes the draft and leaves what was there untouched. What a
    killed process has left is removed by the next one that writes to the same folder. When the name is given, files,
    draft and parent are on the disk, in this order, so that a power cut leaves the old folder or the new one.
    """
    folder = Path(folder)
    folder = folder.resolve() if folder.is_symlink() else folder  # what a link points to is replaced, not the link
    draft = _draft_of(folder)
    try:
        _clear_away(folder, folders=True)
        refuse_existing(folder, force=force)
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        with held(draft):
            yield draft
            refuse_existing(folder, force=force)  # another process may have finished meanwhile
            sync_tree(draft)
            _replace(draft, folder)
            sync(folder.parent)
    except OSError as error:
        raise RunError(
            f"cannot write {str(folder)!r}: {error.strerror or error}. Nothing was changed there."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


LOCK = ".lock"
"""File in a folder that one run after the other works in, which each holds; a lock on the folder itself would not be
seen by other machines that share it."""


@contextmanager
def held(path: Path) -> Iterator[bool | None]:
    """Hold a lock on a folder or file, which ends with the process however that ends.

    Yields:
        Whether it was free; ``None`` where the file system has no locks, so that nobody knows.
    """
    # NFS gives exclusive locks only on what is open for writing, as a folder cannot be.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except (BlockingIOError, PermissionError):  # SMB says the latter
            free = False
        except OSError:
            free = None
        yield free
    finally:
        os.close(descriptor)


@contextmanager
def claimed(folder: Path, doing: str) -> Iterator[None]:
    """Make a folder that one run after the other works in, and keep other runs out of it.

    A lock, and no mark in the folder: a run that was killed leaves the folder, and must be able to go on.

    Args:
        folder: The folder.
        doing: What another process does that is in it, such as ``trains into``.

    Raises:
        RunError: Another run is in the folder, or it cannot be made.
    """
    lock = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise RunError(
            f"cannot write to {printable(folder)!r}: {error.strerror or error}. Choose another folder."
        ) from error
    with held(lock) as free:
        if free is False:
            raise RunError(f"another process {doing} {printable(folder)!r}. Wait for it, or choose another folder.")
        yield
        lock.unlink(missing_ok=True)  # the folder itself may have found another place


def _clear_away(path: Path, *, folders: bool) -> None:
    """Remove drafts of a folder or file that nobody writes any more; put back what was moved aside and not replaced.

    Those of other machines stay where they may still be written: a lock there says nothing here.
    """
    for draft in path.parent.iterdir() if path.parent.is_dir() else ():
        match = DRAFT.fullmatch(draft.name)
        if match is None or match["name"] != path.name or draft.is_symlink() or draft.is_dir() != folders:
            continue
        if match["machine"] != MACHINE and not is_local(path.parent):
            continue
        with suppress(OSError), held(draft) as free:
            if not free:
                continue
            if match["old"] and not path.exists():
                draft.replace(path)
            elif folders:
                shutil.rmtree(draft, ignore_errors=True)
            else:
                draft.unlink()


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` and rename it there when the block ends well, as ``whole_folder`` does."""
    path = Path(path)
    draft = _draft_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_away(path, folders=False)
        draft.touch()
        with held(draft):
            yield draft
            sync(draft)
            draft.replace(path)
            sync(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {str(path)!r}: {error.strerror or error}. Nothing was changed there.") from error
    finally:
        with suppress(OSError):  # where the parent is a file, there is no draft either
            draft.unlink()


def sync_tree(folder: Path) -> None:
    """Have the disk hold all files of a folder, and after them their names."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names a folder has."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot, most of them for folders
            raise
    finally:
        os.close(descriptor)


def refuse_existing(folder: str | Path, *, force: bool) -> None:
    """Raise unless ``folder`` is free and can be made, or is a run folder (or empty) that ``force`` may replace."""
    folder = Path(folder)
    above = next((place for place in folder.absolute().parents if place.exists()), Path("/"))
    if not above.is_dir():
        raise RunError(f"{str(folder)!r} cannot be made: {str(above)!r} is a file. Choose another name.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise RunError(f"{str(folder)!r} cannot be written: {str(above)!r} is not yours to write to.")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunError(f"{str(folder)!r} is a file, expected a folder to write to. Choose another name.")
    if folder.is_mount() or Path.cwd().is_relative_to(folder.resolve()):
        # Neither can be replaced by another folder, as which a whole run appears.
        raise RunError(f"{str(folder)!r} is in use as a folder to stand in. Name a new folder, such as one within it.")
    if all(DRAFT.fullmatch(path.name) for path in folder.iterdir()):
        return
    if not force:
        raise RunError(f"{str(folder)!r} exists. Choose another name, or pass --force to replace it.")
    if not _is_ours(folder / "manifest.json") and {path.name for path in folder.iterdir()} != {PARTS}:
        raise RunError(
            f"{str(folder)!r} holds no manifest.json of diffract's, so --force does not replace it. "
            "Choose another name."
        )


def _is_ours(manifest: Path) -> bool:
    """Whether a manifest is one that diffract writes; other programs call theirs so too."""
    try:
        found = json.loads(read_file(manifest).decode())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"format", "kind"} <= found.keys()


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file whole or not at all, UTF-8."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return Path(path)


AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Parameters of Linux' renameat2."""


def _replace(draft: Path, folder: Path) -> None:
    """Give a draft the name of a folder. An older folder of that name is what the draft's name stands for then."""
    if not folder.exists():
        draft.replace(folder)
        return
    try:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # not Linux, or an old C library
        failed = errno.ENOSYS
    else:
        names = (os.fsencode(draft), os.fsencode(folder))
        failed = ctypes.get_errno() if exchange(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) else 0
    if failed in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        # There is a moment without either; who is killed then leaves the old one aside, and the next run puts it back.
        aside = _draft_of(folder, "old-")
        with held(folder):
            folder.replace(aside)
            draft.replace(folder)
        shutil.rmtree(aside, ignore_errors=True)
    elif failed:
        raise OSError(failed, os.strerror(failed))
