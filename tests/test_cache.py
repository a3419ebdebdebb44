"""The store of results by content."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

import polars as pl
import pytest

from diffract.store import Cache


def test_opening_waits_for_a_process_that_is_writing(tmp_path: Path) -> None:
    """SQLite refuses at once, whatever its timeout, to set WAL mode beside another writer."""
    other = sqlite3.connect(tmp_path / "results.sqlite", check_same_thread=False)
    other.execute("CREATE TABLE mine (x)")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        sqlite3.connect(tmp_path / "results.sqlite", timeout=0).execute("PRAGMA journal_mode = WAL")

    def finish() -> None:
        time.sleep(0.2)
        other.rollback()
        other.close()

    waiting = threading.Thread(target=finish)
    waiting.start()
    with Cache(tmp_path) as cache:
        cache.put("key", pl.DataFrame({"a": [1]}))
        assert cache.get("key") is not None
    waiting.join()
