"""Folders and files that appear whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffract.errors import RunError
from diffract.store import LOCK, MACHINE, held, is_local, whole_file, whole_folder

KILLED = """
import os, signal, sys
from diffract.store import whole_folder
with whole_folder(sys.argv[1]) as draft:
    (draft / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""

HELD = """
import sys
from diffract.store import whole_folder
with whole_folder(sys.argv[1]) as draft:
    (draft / "mine").write_text("mine")
    print("ready", flush=True)
    sys.stdin.read()
"""


def ours(folder: Path, text: str = "old") -> Path:
    """A folder that a run could have written."""
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "kind": "scan"}))
    (folder / "content").write_text(text)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_at_the_end(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "deep" / "out") as draft:
        (draft / "a").write_text("a")
        assert draft.parent == tmp_path / "deep"
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "a"
    assert names(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    ours(tmp_path / "out")

    def write() -> None:
        with whole_folder(tmp_path / "out", force=True) as draft:
            (draft / "a").write_text("a")
            raise error("meanwhile")

    with pytest.raises(RunError if error is OSError else error, match="meanwhile"):
        write()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "content").read_text() == "old"


def test_force_replaces_what_was_there(tmp_path: Path) -> None:
    ours(tmp_path / "out")
    with whole_folder(tmp_path / "out", force=True) as draft:
        assert (tmp_path / "out" / "content").read_text() == "old"
        (draft / "a").write_text("a")
    assert names(tmp_path / "out") == ["a"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "manifest", [None, "", "{", "[]", '{"name": "a web page", "icons": []}', "[" * 100_000, b"\xff\xfe"], ids=repr
)
def test_force_replaces_nothing_else(manifest: str | bytes | None, tmp_path: Path) -> None:
    """Neither a folder without a manifest, nor one with a file of that name from elsewhere."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    if manifest is not None:
        (folder / "manifest.json").write_bytes(manifest if isinstance(manifest, bytes) else manifest.encode())
    with pytest.raises(RunError, match="--force does not replace it"), whole_folder(folder, force=True):
        pass
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="exists"), whole_folder(ours(tmp_path / "out")):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file"), whole_folder(tmp_path / "file", force=True):
        pass
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as draft:
        (draft / "a").write_text("a")
    assert names(tmp_path / "empty") == ["a"]


def test_a_killed_process_leaves_a_draft_that_the_next_removes(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    assert ended.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith("out.tmp-")
    with whole_folder(tmp_path / "out") as draft:
        assert names(tmp_path) == [draft.name]
        (draft / "a").write_text("a")
    assert names(tmp_path) == ["out"]


def test_a_draft_in_the_making_stays(tmp_path: Path) -> None:
    """Two processes write the same folder: neither removes what the other works on, and the second is refused."""
    command = [sys.executable, "-c", HELD, str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin
        assert other.stdout
        assert other.stdout.readline() == "ready\n"
        with whole_folder(tmp_path / "out") as draft:
            assert len(names(tmp_path)) == 2
            (draft / "manifest.json").write_text(json.dumps({"format": 1, "kind": "scan"}))
        _, said = other.communicate("")
    assert other.returncode == 1
    assert "exists" in said
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["manifest.json"]


@pytest.mark.parametrize("name", ["out.tmp-backup", "out.tmp-0123456", "another.tmp-01234567", "out.tmp-01234567x"])
def test_what_only_looks_like_a_draft_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("x")
    with whole_folder(tmp_path / "out"):
        pass
    assert (tmp_path / name / "precious").exists()


def test_a_file_of_a_drafts_name_and_a_link_stay(tmp_path: Path) -> None:
    (tmp_path / "out.tmp-01234567").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("x")
    (tmp_path / "out.tmp-89abcdef").symlink_to(tmp_path / "elsewhere")
    with whole_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out.tmp-01234567").is_file()
    assert (tmp_path / "elsewhere" / "precious").exists()


def test_no_descriptors_stay_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(3):
        (tmp_path / f"out{number}.tmp-01234567").mkdir()
        with whole_folder(tmp_path / f"out{number}"):
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with whole_file(tmp_path / "a") as draft:
        draft.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"

    def fail() -> None:
        with whole_file(tmp_path / "a") as draft:
            draft.write_text("newer")
            raise OSError(os.strerror(28))

    with pytest.raises(RunError, match="No space left"):
        fail()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "new"


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def noted(name: str) -> None:
        real = getattr(os, name)

        def call(first: object, *rest: object) -> object:
            path = Path(f"/proc/self/fd/{first}").readlink() if isinstance(first, int) else Path(str(first))
            calls.append(f"{name} {path.name.partition('.tmp-')[0]}")
            return real(first, *rest)

        monkeypatch.setattr(os, name, call)

    noted("fsync")
    noted("rename")
    noted("replace")
    with whole_folder(tmp_path / "out") as draft:
        (draft / "deep").mkdir()
        (draft / "deep" / "a").write_text("a")
    renames = [call for call in calls if not call.startswith("fsync")]
    assert calls == ["fsync a", "fsync deep", "fsync out", *renames, f"fsync {tmp_path.name}"]
    calls.clear()
    with whole_file(tmp_path / "b") as file:
        file.write_text("b")
    assert calls[0] == "fsync b"
    assert calls[-1] == f"fsync {tmp_path.name}"


def test_a_full_disk_at_the_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"), whole_folder(tmp_path / "out") as draft:
        (draft / "a").write_text("a")
    assert names(tmp_path) == []


def test_without_an_exchange_the_old_one_is_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())  # a C library that has no renameat2
    ours(tmp_path / "out")
    with whole_folder(tmp_path / "out", force=True) as draft:
        (draft / "a").write_text("a")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a"]


def test_what_was_moved_aside_by_a_killed_process_is_put_back(tmp_path: Path) -> None:
    ours(tmp_path / "out.tmp-old-01234567")
    with pytest.raises(RunError, match="exists"), whole_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]
    ours(tmp_path / "out.tmp-old-01234567")
    with whole_folder(tmp_path / "out", force=True) as draft:
        (draft / "a").write_text("a")
    assert names(tmp_path) == ["out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    ours(tmp_path / "real")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with whole_folder(tmp_path / "out", force=True) as draft:
        (draft / "a").write_text("a")
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "real") == ["a"]
    assert names(tmp_path) == ["out", "real"]


def test_drafts_of_a_killed_file_are_removed_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "a.tmp-01234567").write_text("half")
    (tmp_path / "b.tmp-01234567").write_text("another's")
    with whole_file(tmp_path / "a") as draft, whole_file(tmp_path / "a") as second:
        draft.write_text("first")
        second.write_text("second")
    assert names(tmp_path) == ["a", "b.tmp-01234567"]
    assert (tmp_path / "a").read_text() == "first"


@pytest.mark.parametrize("output", [".", "..", "/", "file/out", "file/deep/out", "/proc"])
def test_a_place_where_nothing_can_appear_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    (tmp_path / "inner" / "file").write_text("x")
    worked = []
    refused = pytest.raises(RunError, match=r"cannot be made|to stand in|cannot be written")
    with refused, whole_folder(output, force=True):
        worked.append(output)
    assert worked == []


def test_what_a_killed_process_began_is_free(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json.tmp-01234567").write_text("{")
    with whole_folder(tmp_path / "out") as draft:
        (draft / "a").write_text("a")
    assert names(tmp_path / "out") == ["a"]


def on(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the C library answer that everything lies on a file system of this number."""

    def statfs(path: bytes, answer: Any) -> int:
        answer[0] = kind
        return 0

    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: SimpleNamespace(statfs=statfs))


@pytest.mark.parametrize(
    ("kind", "local"),
    [
        (0xEF53, True), (0x01021994, True), (0xFFFFFFFF_9123683E, True),  # ext4, tmpfs, btrfs as a signed number
        (0x6969, False), (0xFE534D42, False), (0x0BD00BD0, False), (0x47504653, False), (0x00C36400, False),
        (0x19830326, False), (0x01021997, False), (0x65735546, False), (0x12345678, False),
    ],
)  # fmt: skip
def test_file_systems_that_may_be_shared_are_known(
    kind: int, local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS, SMB, Lustre, GPFS, CephFS, BeeGFS, 9p, FUSE, and one that nobody knows."""
    on(kind, monkeypatch)
    assert is_local(tmp_path) is local


def test_where_there_is_no_such_folder_nothing_is_relied_on(tmp_path: Path) -> None:
    assert not is_local(tmp_path / "gone")


@pytest.mark.parametrize(("kind", "stays"), [(0xEF53, False), (0x6969, True)])
def test_on_a_shared_file_system_a_draft_is_removed_by_its_own_machine_alone(
    kind: int, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine may be writing it: its lock on a folder is not seen here."""
    on(kind, monkeypatch)
    other = "01234567" if MACHINE != "01234567" else "76543210"
    for name in (f"out.tmp-{other}89abcdef", "out.tmp-89abcdef", f"out.tmp-{MACHINE}89abcdef"):
        (tmp_path / name).mkdir()
    with whole_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == (["out", f"out.tmp-{other}89abcdef", "out.tmp-89abcdef"] if stays else ["out"])


def like_nfs(descriptor: int, operation: int) -> None:
    """Locks as NFS has them since Linux 2.6.12, by flock(2): exclusive ones on what is open for writing."""
    writable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    if stat.S_ISREG(os.fstat(descriptor).st_mode) and not writable:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def without_locks(descriptor: int, operation: int) -> None:
    """Locks as Lustre has them where it is mounted without."""
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.mark.parametrize("locks", [like_nfs, without_locks])
def test_folders_and_files_appear_on_network_file_systems(
    locks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", locks)
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())  # which have no exchange either
    ours(tmp_path / "out")
    with whole_folder(tmp_path / "out", force=True) as draft:
        (draft / "a").write_text("a")
    with whole_file(tmp_path / "b") as file:
        file.write_text("b")
    assert names(tmp_path) == ["b", "out"]
    assert names(tmp_path / "out") == ["a"]


def test_where_there_are_no_locks_nobody_knows_whether_a_draft_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks)
    (tmp_path / f"out.tmp-{MACHINE}89abcdef").mkdir()
    with held(tmp_path) as free, whole_folder(tmp_path / "out"):
        assert free is None
    assert names(tmp_path) == ["out", f"out.tmp-{MACHINE}89abcdef"]


def test_a_lock_is_on_a_file_so_that_other_machines_see_it(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    with held(tmp_path / LOCK) as first, held(tmp_path / LOCK) as second, held(tmp_path) as third:
        assert (first, second, third) == (True, False, True)
