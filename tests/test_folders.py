"""Folders and files that appear whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffract.errors import RunError
from diffract.store import whole_file, whole_folder

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
