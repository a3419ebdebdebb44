"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffract.errors import RunError


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
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
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
