"""The store of results by content: safe among threads and processes, damage and full disks, and bounded."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from diffract.errors import DiffractWarning
from diffract.store import Cache, cache_key, entries, prune

FRAME = pl.DataFrame({"a": [1.5, None], "b": ["x", "y"]})


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    with Cache(tmp_path / "deep") as cache:
        assert cache.get(cache_key(1)) is None
        cache.put(cache_key(1), FRAME)
        found = cache.get(cache_key(1))
        assert found is not None
        assert_frame_equal(found, FRAME)
        assert cache.get(cache_key(2)) is None


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "another key's"])
def test_a_damaged_result_counts_as_absent(tmp_path: Path, damage: str) -> None:
    """The digest is over key and content: the result of another key, whole in itself, is damage too."""
    keys = [cache_key(1), cache_key(2)]
    with Cache(tmp_path) as cache:
        for number, key in enumerate(keys):
            cache.put(key, FRAME.with_columns(c=pl.lit(number)))
        first, second = (tmp_path / "results" / key[:2] / key for key in keys)
        content = first.read_bytes()
        flipped = bytes([*content[:200], content[200] ^ 1, *content[201:]])
        changed = {"cut": content[:100], "empty": b"", "bit": flipped, "another key's": second.read_bytes()}
        first.write_bytes(changed[damage])
        assert cache.get(keys[0]) is None
        cache.put(keys[0], FRAME)
        assert cache.get(keys[0]) is not None


WRITER = """
import sys
from pathlib import Path
import polars as pl
from diffract.store import Cache, cache_key
with Cache(Path(sys.argv[1])) as cache:
    for number in range(200):
        found = cache.get(cache_key(number))
        assert found is None or found["a"].to_list() == [number] * 50
        cache.put(cache_key(number), pl.DataFrame({"a": [number] * 50}))
"""


def test_processes_share_a_folder_and_kills_leave_whole_results(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    running = [subprocess.Popen(command) for _ in range(3)]
    deadline = time.monotonic() + 60
    while len(files(tmp_path)) < 20 and time.monotonic() < deadline:
        time.sleep(0.005)
    running[0].kill()
    assert [process.wait(60) for process in running][1:] == [0, 0]
    with Cache(tmp_path) as cache:
        for number in range(200):
            found = cache.get(cache_key(number))
            assert found is not None
            assert found["a"].to_list() == [number] * 50


def keep_three(folder: Path) -> None:
    with Cache(folder) as cache:
        for number in range(3):
            cache.put(cache_key(number), FRAME)


def test_a_full_disk_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(DiffractWarning, match=r"No space left on device.*Work goes on") as told:
        keep_three(tmp_path)
    assert len(told) == 1
    assert files(tmp_path) == []


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    (tmp_path / "results" / "precious.txt").parent.mkdir()
    (tmp_path / "results" / "precious.txt").write_text("another's")
    with Cache(tmp_path) as cache:
        for number in range(40):
            cache.put(cache_key(number), FRAME)
    found = entries(tmp_path)
    assert {entry.kind for entry in found} == {"results"}
    size = found[0].size_bytes
    for age, entry in enumerate(sorted(found, key=lambda entry: entry.path)):
        os.utime(entry.path, (time.time() - 1000 * age - 500,) * 2)
    oldest = max(entries(tmp_path), key=lambda entry: -entry.used).path
    with Cache(tmp_path) as cache:
        assert cache.get(oldest.name) is not None  # and so it is used
    with pytest.warns(DiffractWarning, match="not used for longest"), Cache(tmp_path, most_bytes=10 * size) as cache:
        cache.put(cache_key("new"), FRAME)
    left = entries(tmp_path)
    assert sum(entry.size_bytes for entry in left) <= 10 * size
    assert {oldest.name, cache_key("new")} < {entry.path.name for entry in left}
    assert (tmp_path / "results" / "precious.txt").is_file()
    assert len(prune(left, most_seconds=400)) == len(left) - 2


def test_nothing_is_removed_below_the_bound(tmp_path: Path) -> None:
    with Cache(tmp_path, most_bytes=10**9) as cache:
        for number in range(5):
            cache.put(cache_key(number), FRAME)
    assert len(entries(tmp_path)) == 5
