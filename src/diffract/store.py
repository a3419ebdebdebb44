"""Results by content: what was computed of the same bytes in the same way is not computed again.

One SQLite file in WAL mode: several threads and processes may use it at once, and a process that is killed leaves
every result that it had finished.
"""

from __future__ import annotations

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


@contextmanager
def whole_folder(folder: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a draft folder beside ``folder`` and rename it there when the block ends well.

    An error inside the block, a full disk included, removes the draft and leaves what was there untouched. What a
    killed process has left is removed by the next one that writes to the same folder.
    """
    folder = Path(folder)
    refuse_existing(folder, force=force)
    draft = folder.parent / f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        draft.mkdir()
        with held(draft):
            yield draft
            refuse_existing(folder, force=force)  # another process may have finished meanwhile
            _replace(draft, folder)
    except OSError as error:
        raise RunError(
            f"cannot write {str(folder)!r}: {error.strerror or error}. Nothing was changed there."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def held(draft: Path) -> Iterator[bool]:
    """Hold a lock on a folder, which ends with the process however that ends; yield whether it was free."""
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


def _remove_abandoned(folder: Path) -> None:
    """Remove drafts of a folder that nobody is writing to any more."""
    pattern = re.compile(re.escape(folder.name) + r"\.tmp-[0-9a-f]{8}")
    for draft in folder.parent.iterdir():
        if pattern.fullmatch(draft.name) and draft.is_dir():
            with suppress(OSError), held(draft) as free:
                if free:
                    shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` and rename it there when the block ends well."""
    path = Path(path)
    draft = path.parent / f"{path.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        draft.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {str(path)!r}: {error.strerror or error}. Nothing was changed there.") from error
    finally:
        with suppress(OSError):  # where the parent is a file, there is no draft either
            draft.unlink()


def refuse_existing(folder: str | Path, *, force: bool) -> None:
    """Raise unless ``folder`` is free, or is a run folder (or empty) that ``force`` may replace."""
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunError(f"{str(folder)!r} is a file, expected a folder to write to. Choose another name.")
    if not any(folder.iterdir()):
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


def _replace(draft: Path, folder: Path) -> None:
    """Rename ``draft`` to ``folder``; an older folder of that name is moved aside first and removed last."""
    if not folder.exists():
        draft.replace(folder)
        return
    aside = folder.parent / f"{folder.name}.tmp-old-{uuid.uuid4().hex[:8]}"
    folder.replace(aside)
    draft.replace(folder)
    shutil.rmtree(aside, ignore_errors=True)
