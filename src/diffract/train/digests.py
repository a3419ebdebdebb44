"""What stands for the text of sources: a digest of their bytes and of the code that reads them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path

import blake3

from diffract.corpora import source_files

CHUNK = 1 << 24
"""Bytes of a file that are read at once."""


def digest_parts(parts: Iterable[bytes]) -> str:
    """Return a digest of a list of contents; each goes in with its length, so that no two lists look alike."""
    hasher = blake3.blake3()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()


def digest_sources(sources: Iterable[str], data: Path | None) -> str:
    """Return a digest of everything that the text of sources follows from.

    The names of files belong to it, as some are refused. What is on the hub stands there with its name alone.

    Args:
        sources: As ``read_documents`` takes them.
        data: The folder that files' names are relative to.

    Raises:
        CorpusError: A source is not there.
    """
    parts = [_reading_code().encode()]
    for source in sources:
        found = source_files(source, data=data)
        parts.append((Path(source).name if found else source).encode())
        parts += [_file_digest(path) for path in found]
    return digest_parts(parts)


@cache
def _reading_code() -> str:
    resources = sorted(files("diffract.corpora").iterdir(), key=lambda found: found.name)
    return digest_parts(resource.read_bytes() for resource in resources if resource.is_file())


def _file_digest(path: Path) -> bytes:
    hasher = blake3.blake3()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return hasher.digest()
