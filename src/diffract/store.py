"""Results by content: what was computed of the same bytes in the same way is not computed again.

One SQLite file in WAL mode: several threads and processes may use it at once, and a process that is killed leaves
every result that it had finished.
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
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import blake3
import platformdirs
import polars as pl

from diffract.errors import RunError

FORMAT = 1
"""Raised when the layout of what is stored changes."""

WAIT_SECONDS = 60

DIGEST_BYTES = 32
"""A digest stands before each value."""


def cache_folder() -> Path:
    """Return where results are kept: ``DIFFRACT_CACHE_DIR``, or the user's cache folder."""
    return Path(os.environ.get("DIFFRACT_CACHE_DIR") or platformdirs.user_cache_dir("diffract"))


def cache_key(*parts: Any) -> str:
    """Return the key of a result: a digest of everything that it depends on, as JSON."""
    return blake3.blake3(json.dumps([FORMAT, *parts]).encode()).hexdigest()


class Cache:
    """Frames by key.

    Args:
        folder: Where the file lies; made if it is not there.

    Raises:
        RunError: The file cannot be opened or written; nothing of it is used then.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.sqlite"
        self._local = threading.local()
        self._opened: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True)
            self._connection()

    def get(self, key: str) -> pl.DataFrame | None:
        """Return a result, or ``None``; one whose bytes have changed counts as absent."""
        with self._explained():
            row = self._connection().execute("SELECT value FROM results WHERE key = ?", (key,)).fetchone()
        if row is None or row[0][:DIGEST_BYTES] != blake3.blake3(row[0][DIGEST_BYTES:]).digest():
            return None
        return pl.read_ipc(io.BytesIO(row[0][DIGEST_BYTES:]))

    def put(self, key: str, value: pl.DataFrame) -> None:
        """Keep a result; it is there whole, or not at all."""
        buffer = io.BytesIO()
        value.write_ipc(buffer)
        content = buffer.getvalue()
        checked = blake3.blake3(content).digest() + content
        with self._explained():
            connection = self._connection()
            with connection:
                connection.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (key, checked))

    def close(self) -> None:
        """Close all connections, those of other threads too."""
        with self._lock:
            for connection in self._opened:
                connection.close()
            self._opened.clear()
        self._local = threading.local()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connection(self) -> sqlite3.Connection:
        """This thread's connection."""
        if not hasattr(self._local, "connection"):
            connection = sqlite3.connect(self.path, timeout=WAIT_SECONDS, check_same_thread=False)
            _log_ahead(connection)
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, value BLOB NOT NULL)")
            with self._lock:
                self._opened.append(connection)
            self._local.connection = connection
        return self._local.connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise RunError(
                f"the cache at {str(self.path)!r} cannot be used: {error}. "
                "Free space or remove the file, set DIFFRACT_CACHE_DIR to another folder, or pass --no-cache."
            ) from error


def _log_ahead(connection: sqlite3.Connection) -> None:
    """Set WAL mode; SQLite does not wait by itself while another process is setting it."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


DRAFT = re.compile(r"(?P<name>.+)\.tmp-(?P<old>old-)?[0-9a-f]{8}")
"""What is being written beside the name that it will have, or was there before and is about to be removed."""


def _draft_of(path: Path, kind: str = "") -> Path:
    return path.parent / f"{path.name}.tmp-{kind}{uuid.uuid4().hex[:8]}"


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
            for place, _, names in os.walk(draft, topdown=False):
                for name in names:
                    _sync(Path(place, name))
                _sync(Path(place))
            _replace(draft, folder)
            _sync(folder.parent)
    except OSError as error:
        raise RunError(
            f"cannot write {str(folder)!r}: {error.strerror or error}. Nothing was changed there."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def held(draft: Path) -> Iterator[bool]:
    """Hold a lock on a folder or file, which ends with the process however that ends; yield whether it was free."""
    descriptor = os.open(draft, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(descriptor)


def _clear_away(path: Path, *, folders: bool) -> None:
    """Remove drafts of a folder or file that nobody writes any more; put back what was moved aside and not replaced."""
    for draft in path.parent.iterdir() if path.parent.is_dir() else ():
        match = DRAFT.fullmatch(draft.name)
        if match is None or match["name"] != path.name or draft.is_symlink() or draft.is_dir() != folders:
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
            _sync(draft)
            draft.replace(path)
            _sync(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {str(path)!r}: {error.strerror or error}. Nothing was changed there.") from error
    finally:
        with suppress(OSError):  # where the parent is a file, there is no draft either
            draft.unlink()


def _sync(path: Path) -> None:
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
    if not _is_ours(folder / "manifest.json"):
        raise RunError(
            f"{str(folder)!r} holds no manifest.json of diffract's, so --force does not replace it. "
            "Choose another name."
        )


def _is_ours(manifest: Path) -> bool:
    """Whether a manifest is one that diffract writes; other programs call theirs so too."""
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
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
