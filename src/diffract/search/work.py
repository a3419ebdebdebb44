"""Where a search keeps what it has measured while it is not finished: ``RUN.work``, and ``RUN/cache`` afterwards."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffract.cache import Cache
from diffract.errors import RunError
from diffract.tables import RunTables, refuse_existing, whole_folder, write

KEPT = "cache"
"""Subfolder of a finished run with the scores, for another search into the same folder."""


@contextmanager
def working(output: str | Path | None, *, force: bool) -> Iterator[Cache | None]:
    """Yield a cache beside the run folder that will be written; nothing where none will be.

    A search that was killed leaves it, and goes on from it when it is started again. One that replaces a finished run
    begins with that run's scores: they count only where weights, task and settings are the same.

    Raises:
        RunError: The folder exists, or another process is searching for it.
    """
    if output is None:
        yield None
        return
    refuse_existing(output, force=force)
    folder, before = work_folder(output), Path(output) / KEPT
    if before.is_dir() and not folder.exists():
        shutil.copytree(before, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder), Cache(folder) as cache:
        yield cache


def work_folder(output: str | Path) -> Path:
    """Return where an unfinished search is."""
    return Path(output).with_name(Path(output).name + ".work")


def finish(tables: RunTables, output: str | Path, cache: Cache | None, *, force: bool) -> None:
    """Write the run folder, with the scores in it, and remove the one for work."""
    with whole_folder(output, force=force) as draft:
        write(tables, draft)
        if cache is not None:
            cache.close()
            shutil.copytree(cache.path.parent, draft / KEPT)
    shutil.rmtree(work_folder(output), ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(
            f"another process is searching into {str(folder)!r}. Wait for it, or write elsewhere."
        ) from error
