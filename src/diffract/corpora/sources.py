"""Where text comes from: files, folders of code, the standard library, data sets on the hub, made-up word problems."""

from __future__ import annotations

import gzip
import json
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffract.corpora.splits import (
    Document,
    Split,
    check_split,
    document,
    record_text,
    refuse_evaluation_only,
    split_documents,
    split_of,
)
from diffract.corpora.word_problems import problem_documents
from diffract.errors import CorpusError, printable

STANDARD_LIBRARY = "stdlib"
WORD_PROBLEMS = "word-problems"
HUB = "datasets:"

UNPACKED_BYTES, UNPACKED_TIMES = 100_000_000, 100
"""What a packed file may come to whatever its size, and as a multiple of it: text packs to a third or a tenth, and a
file of a megabyte that comes to gigabytes is made to fill the memory."""

PIECE_CHARACTERS = 20_000
"""A text file without articles of its own is cut into pieces of about so many characters, at blank lines."""

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders of the standard library that are left out."""

RECORDS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
"""How files of records end."""

ARTICLE = re.compile(r"^ = [^=].* = $", re.MULTILINE)
"""How WikiText begins an article."""


def read_documents(source: str, split: Split, *, data: Path | None = None) -> Iterator[Document]:
    """Yield the documents of a source that are in a split, always the same ones in the same order.

    Args:
        source: A file (``.jsonl``, ``.json``, ``.txt``, also with ``.gz``; ``.parquet``), a folder of ``.py`` files,
            ``stdlib`` (the running Python's standard library without its tests), ``word-problems``
            (``word-problems:1-2`` for some levels of them), or ``datasets:org/name``,
            ``datasets:org/name:config:split`` on the hub, which needs the ``datasets`` package and is streamed.
        split: ``train``, ``selection`` or ``held-out``.
        data: The folder that files' names are relative to.

    Raises:
        CorpusError: The source is not there, cannot be read, holds nothing, or is for evaluation only.
    """
    check_split(split)
    # Before anything is read: what is only for evaluation shall not be streamed first.
    refuse_evaluation_only(source.removeprefix(HUB).partition(":")[0])
    if source.partition(":")[0] == WORD_PROBLEMS:
        yield from problem_documents(source.partition(":")[2], split)
    elif source.startswith(HUB):
        yield from (d for d in _hub_documents(source) if split_of(d.id) == split)
    else:
        # A finished collection is split by rank, and so has to be known as a whole; a stream cannot be.
        found = [document(text) for text in read_texts(source, data=data) if text.strip()]
        if not found:
            raise CorpusError(f"{printable(source)} holds no text. Is this the right file?")
        yield from split_documents(found, split)


def read_texts(source: str, *, data: Path | None = None) -> Iterator[str]:
    """Yield all texts of a file or folder, in order.

    Raises:
        CorpusError: The source cannot be read, or is for evaluation only.
    """
    path = _place(source, data)
    if path.is_dir():
        yield from (p.read_text(encoding="utf-8", errors="replace") for p in _code_files(path))
        return
    stem = path.name.removesuffix(".gz")
    if path.name.endswith(RECORDS):
        records = list(read_records(path))
        refuse_evaluation_only(source, (str(r.get("question", "")) for r in records))
        yield from (record_text(r, f"{printable(source)}, record {i}") for i, r in enumerate(records, start=1))
    elif stem.endswith(".txt"):
        yield from _articles(_decoded(path))
    else:
        raise CorpusError(
            f"{printable(source)}: unknown kind of file, expected .jsonl, .json or .txt, also with .gz, or .parquet."
        )


def source_files(source: str, *, data: Path | None = None) -> list[Path]:
    """Return the files that a source's text is read from, in order; made-up text and the hub have none.

    Raises:
        CorpusError: The source is not there.
    """
    if source.partition(":")[0] == WORD_PROBLEMS or source.startswith(HUB):
        return []
    path = _place(source, data)
    return list(_code_files(path)) if path.is_dir() else [path]


def read_records(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the records of a JSON-lines file, of a JSON list, or of a Parquet file.

    Raises:
        CorpusError: The file cannot be read, or holds something else than records.
    """
    if path.name.endswith(".parquet"):
        import polars as pl

        try:
            yield from pl.read_parquet(path).iter_rows(named=True)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise CorpusError(f"cannot read {printable(path)!r}: {printable(error, 200)}. Fetch it again.") from error
        return
    text = _decoded(path)
    # A .json file may be one list over many lines; of .jsonl each line stands alone.
    whole = path.name.removesuffix(".gz").endswith(".json")
    lines: Iterable[str] = [text] if whole else text.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{printable(path)}, line {number} is no JSON: {printable(error)}. Mend it.") from error
        for record in found if whole and isinstance(found, list) else [found]:
            if not isinstance(record, dict):
                raise CorpusError(f"{printable(path)}, line {number}: expected an object, got {type(record).__name__}.")
            yield record


def _place(source: str, data: Path | None) -> Path:
    if source == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    places = [Path(source), *([data / source] if data else [])]
    found = next((path for path in places if path.exists()), None)
    if found is None:
        raise CorpusError(
            f"no text at {printable(source)!r}: expected a file, a folder, {STANDARD_LIBRARY}, {WORD_PROBLEMS} or "
            f"{HUB}org/name{'' if data else '; --data says where files are'}."
        )
    return found


def _decoded(path: Path) -> str:
    if not path.is_file():  # to read a pipe or a device may never end
        raise CorpusError(f"cannot read {printable(path)!r}: it is no file. Fetch it again.")
    try:
        if not path.name.endswith(".gz"):
            return path.read_bytes().decode("utf-8")
        most = max(UNPACKED_BYTES, UNPACKED_TIMES * path.stat().st_size)
        with gzip.open(path) as file:
            raw = file.read(most + 1)
        if len(raw) > most:
            raise CorpusError(
                f"{printable(path)!r}: unpacks to more than {UNPACKED_TIMES} times its size, as no text does. If it is "
                "one all the same, unpack it first."
            )
        return raw.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CorpusError(f"cannot read {printable(path)!r}: {printable(error)}. Fetch it again.") from error


def _code_files(root: Path) -> Iterator[Path]:
    return (p for p in sorted(root.rglob("*.py")) if not SKIPPED & set(p.relative_to(root).parts))


def _articles(text: str) -> Iterator[str]:
    """Cut a text into its articles, or into pieces where it has none."""
    starts = [m.start() for m in ARTICLE.finditer(text)]
    # One or two lines that look like titles may be by chance.
    if len(starts) > 2:
        yield from (text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True))
        return
    piece = ""
    for paragraph in re.split(r"(?<=\n\n)", text):
        piece += paragraph
        if len(piece) >= PIECE_CHARACTERS:
            yield piece
            piece = ""
    if piece:
        yield piece


def _hub_documents(source: str) -> Iterator[Document]:
    """Stream a data set of the hub."""
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError as error:
        raise CorpusError(f"{printable(source)} needs the datasets package: pip install datasets.") from error
    name, config, part = (*source.removeprefix(HUB).split(":"), "", "")[:3]
    try:
        stream = load_dataset(name, config or None, split=part or "train", streaming=True)
        for number, record in enumerate(stream, start=1):
            yield document(record_text(record, f"{printable(source)}, record {number}"))
    except (OSError, ValueError, RuntimeError) as error:
        raise CorpusError(
            f"cannot stream {printable(source)}: {printable(error)}. Check name, config and split."
        ) from error
