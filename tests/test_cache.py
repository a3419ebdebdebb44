"""The store of results by content: safe among threads and processes, damage and full disks, and bounded."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors.torch import save_file

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


def test_what_others_keep_is_read_where_it_may_not_be_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of a group, or one that is mounted to be read."""

    def refused(path: Path, times: object = None) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    keep_three(tmp_path)
    monkeypatch.setattr(os, "utime", refused)
    found = Cache(tmp_path).get(cache_key(1))
    assert found is not None
    assert_frame_equal(found, FRAME)


def test_what_another_machine_has_just_removed_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(path: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    keep_three(tmp_path)
    monkeypatch.setattr("diffract.store.read_file", stale)
    assert Cache(tmp_path).get(cache_key(1)) is None


@pytest.mark.parametrize("seconds", [-(10**9), 10**9])
def test_clocks_that_jump_change_no_result(seconds: int, tmp_path: Path) -> None:
    keep_three(tmp_path)
    for path in files(tmp_path):
        os.utime(path, (time.time() + seconds,) * 2)
    with Cache(tmp_path) as cache:
        assert all(cache.get(cache_key(number)) is not None for number in range(3))
    assert all(abs(entry.used - time.time()) < 60 for entry in entries(tmp_path))


def test_an_older_and_a_newer_store_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results.sqlite").write_bytes(b"SQLite format 3")
    monkeypatch.setattr("diffract.store.FORMAT", 10**6)
    keep_three(tmp_path)
    before = files(tmp_path)
    monkeypatch.undo()
    assert Cache(tmp_path).get(cache_key(1)) is None
    keep_three(tmp_path)
    assert set(before) < set(files(tmp_path))


CROWD = """
import random, sys, time, warnings
from pathlib import Path
import polars as pl
from diffract.store import Cache, cache_key
folder, seed, end = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
rng = random.Random(seed)
warnings.filterwarnings("error")
warnings.filterwarnings("ignore", message=".* was full")
while time.time() < end:
    found = kept = 0
    with Cache(folder, most_bytes=20_000_000) as cache:
        for _ in range(100):
            number = rng.randrange(4000)
            expected = [number * 1000 + i for i in range(1 + number)]
            held = cache.get(cache_key(number))
            if held is None:
                cache.put(cache_key(number), pl.DataFrame({"a": expected}))
                kept += 1
            else:
                assert held["a"].to_list() == expected, number
                found += 1
    with Path(sys.argv[4]).open("a") as told:
        print(found, kept, file=told)
"""


def crowd(folder: Path, *, seconds: float) -> dict[str, int]:
    """Let eight processes share a folder whose bound is passed all the time; kill them and damage files meanwhile."""
    rng = random.Random(0)
    (folder / "told").mkdir()
    end = time.time() + seconds
    seeds = iter(range(10**6))
    counts = {"kills": 0, "damaged": 0}

    def start() -> subprocess.Popen[bytes]:
        seed = str(next(seeds))
        arguments = (str(folder / "cache"), seed, str(end), str(folder / "told" / seed))
        return subprocess.Popen([sys.executable, "-c", CROWD, *arguments])

    running = [start() for _ in range(8)]
    while time.time() < end - 5:
        time.sleep(rng.uniform(1, 3))
        at = rng.randrange(8)
        assert running[at].poll() is None  # it has met nothing wrong
        running[at].kill()
        assert running[at].wait() == -signal.SIGKILL
        running[at] = start()
        counts["kills"] += 1
        there = files(folder / "cache")
        for path in rng.sample(there, min(5, len(there))):
            try:
                content = path.read_bytes()
                damaged = (
                    content[: len(content) // 2],
                    content[:-9] + b"x" * 9,
                    rng.choice(files(path.parent)).read_bytes(),
                )
                path.with_name(path.name + ".tmp-01234567").write_bytes(rng.choice(damaged))
                path.with_name(path.name + ".tmp-01234567").replace(path)
                counts["damaged"] += 1
            except FileNotFoundError:
                pass  # room was made meanwhile
    assert [process.wait(60) for process in running] == [0] * 8
    lines = [line.split() for path in files(folder / "told") for line in path.read_text().splitlines()]
    return counts | {"found": sum(int(found) for found, _ in lines), "kept": sum(int(kept) for _, kept in lines)}


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_eight_processes_share_a_folder_for_five_minutes(tmp_path: Path) -> None:
    """Nobody meets another's numbers, nor a warning but that room was made; and the bound holds, about."""
    counts = crowd(tmp_path, seconds=300)
    print(counts)
    assert min(counts.values()) > 50
    assert sum(entry.size_bytes for entry in entries(tmp_path / "cache")) < 30_000_000


def test_a_home_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    """Without a folder for the cache, as in many containers, work goes on, and a line says so."""
    save_file({"w": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    environment = {k: v for k, v in os.environ.items() if k not in ("DIFFRACT_CACHE_DIR", "XDG_CACHE_HOME")}
    code = [sys.executable, "-m", "diffract", "scan", str(tmp_path / "m.safetensors")]
    environment |= {"HOME": "/proc/nowhere"}
    done = subprocess.run(code, env=environment, check=True, capture_output=True, text=True)
    assert "the cache at '/proc/nowhere/.cache/diffract' cannot be used" in done.stderr
