"""Results by content: what was computed of the same bytes in the same way is not computed again.

One SQLite file in WAL mode: several threads and processes may use it at once, and a process that is killed leaves
every result that it had finished.
"""

from __future__ import annotations

import io
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
