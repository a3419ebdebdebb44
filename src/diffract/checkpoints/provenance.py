"""Where a model comes from: the manifest of an edited one (what went in, what was done, what came out), and dates."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import blake3

from diffract._version import __version__
from diffract.checkpoints.checkpoint import Checkpoint
from diffract.checkpoints.files import LocalFile, LocalFolder, real_path
from diffract.checkpoints.open import open_checkpoint
from diffract.checkpoints.sources import open_safetensors
from diffract.errors import CheckpointError, printable
from diffract.settings import read_file

MANIFEST = "manifest.json"
KIND = "diffract edit"
FORMAT = 1
"""Number of the manifest's layout; a reader refuses a newer one."""

WEIGHTS = (".safetensors", ".safetensors.index.json")
"""What the names of weight files end in; the digests of tensors speak for them."""


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, with digests of all its files that hold no weights."""
    files = {name: file_digest(folder / name) for name in _file_names(folder) if not name.endswith(WEIGHTS)}
    head = {"kind": KIND, "format": FORMAT, "diffract": __version__}
    text = json.dumps({**head, **content, "files": files}, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _file_names(folder: Path) -> list[str]:
    """All files of a folder but the manifest, by their paths in it."""
    names = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file())
    return [name for name in names if name != MANIFEST]


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return the manifest of an edited checkpoint.

    Raises:
        CheckpointError: There is none, or it is none that this version reads.
    """
    path = Path(folder) / MANIFEST
    try:
        found = json.loads(read_file(path).decode())
    except OSError as error:
        raise CheckpointError(
            f"{printable(folder)}: no readable {MANIFEST} ({error.strerror}). Only what diffract wrote can be verified."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{printable(path)} is no JSON: {printable(error)}. It was damaged.") from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise CheckpointError(f"{printable(path)} belongs to no edited checkpoint. Give the folder that an edit wrote.")
    outputs, inputs, files = (found.get(key) for key in ("outputs", "inputs", "files"))
    groups = [group for group in (outputs, inputs) if isinstance(group, dict)]
    parts = [files, *(part for group in groups for part in group.values())] if len(groups) == 2 else [None]
    whole = all(isinstance(part, dict) and all(isinstance(v, str) for v in part.values()) for part in parts)
    stated = whole and any(outputs.values())  # pyright: ignore[reportOptionalMemberAccess] (whole says that it is one)
    if found.get("format") != FORMAT or not stated:
        raise CheckpointError(
            f"{printable(path)} is of format {printable(found.get('format'))}, expected {FORMAT} with digests of "
            "outputs, inputs and files. Update diffract, or do not trust this folder."
        )
    return found


@dataclass
class Verdict:
    """What verifying a folder found.

    Attributes:
        tensors: How many tensors are as they were written.
        inputs: How many tensors of inputs are as they were read.
        faults: What is not as the manifest says.
        unchecked: What could not be checked, and why.
    """

    tensors: int = 0
    inputs: int = 0
    faults: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def verify_folder(folder: str | Path) -> Verdict:
    """Compare an edited checkpoint, and its inputs as far as they can be opened, with its manifest.

    Raises:
        CheckpointError: There is no manifest, or the weights cannot be opened.
    """
    manifest = read_manifest(folder)
    verdict = Verdict()
    verdict.faults += _file_faults(Path(folder), manifest["files"])
    verdict.unchecked += [
        f"file {printable(name)!r}: the manifest has no digest of it"
        for name in _file_names(Path(folder))
        if name not in manifest["files"]
        and not (
            name.endswith(WEIGHTS) and any(PurePosixPath(name).is_relative_to(part) for part in manifest["outputs"])
        )
    ]
    for part, stated in manifest["outputs"].items():
        path = _weights(Path(folder), part)  # a file is what was written, be it an adapter's factors
        opened = open_safetensors(LocalFile(path))[0] if path.is_file() else open_checkpoint(path)
        with opened as checkpoint:
            faults = list(_tensor_faults(checkpoint, stated))
            strange = [name for name in checkpoint.names if name not in stated]
        verdict.tensors += len(stated) - len(faults)
        verdict.faults += faults + [f"tensor {printable(name)!r} is not in the manifest" for name in strange]
    for label, stated in manifest["inputs"].items():
        _check_input(label, stated, verdict)
    return verdict


def _weights(folder: Path, part: str) -> Path:
    """Where a part of the output lies: ``.`` is the folder, others are files or folders in it."""
    path = real_path(folder / part)
    if not path.is_relative_to(real_path(folder)):
        raise CheckpointError(f"{printable(folder)}: the manifest names {printable(part)!r}, which is outside of it.")
    return path


def _check_input(label: str, stated: Mapping[str, str], verdict: Verdict) -> None:
    try:
        with open_checkpoint(label) as checkpoint:
            faults = list(_tensor_faults(checkpoint, stated))
    except CheckpointError as error:
        verdict.unchecked.append(f"input {printable(label)}: {error}")
        return
    verdict.inputs += len(stated) - len(faults)
    verdict.faults += [f"input {printable(label)}, {fault}" for fault in faults]


def _tensor_faults(checkpoint: Checkpoint, stated: Mapping[str, str]) -> Iterator[str]:
    for name, digest in stated.items():
        if name not in checkpoint:
            yield f"tensor {printable(name)!r} is missing"
        elif checkpoint.digest(name) != digest:
            yield f"tensor {printable(name)!r} is not what it was"


def _file_faults(folder: Path, stated: Mapping[str, str]) -> Iterator[str]:
    for name, digest in stated.items():
        path = _weights(folder, name)
        if not path.is_file():
            yield f"file {printable(name)!r} is missing"
        elif file_digest(path) != digest:
            yield f"file {printable(name)!r} is not what it was"


def file_digest(path: Path) -> str:
    """Return the digest of a file, which is read block by block."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, blake3.blake3).hexdigest()  # pyright: ignore[reportArgumentType] (it updates and tells)


CARD = "README.md"
DATES = ("date", "created", "created_at", "modelspec.date")
"""Keys under which manifests, cards and the metadata of weight files say when a model was made."""

_IN_CARD = re.compile(rf"^(?:{'|'.join(map(re.escape, DATES))})\s*:\s*['\"]?([^'\"\n#]+)", re.MULTILINE)


def stated_date(path: Path) -> datetime | None:
    """Return when a model was made, as its manifest, its card's head or its weights' metadata say; these in order.

    Args:
        path: The model's folder, or its file. Only the first of several weight files is asked.
    """
    folder, told = LocalFolder(path if path.is_dir() else path.parent), []
    if path.is_dir() and MANIFEST in folder.names:
        try:
            manifest = json.loads(folder.read_bytes(MANIFEST))
        except (ValueError, RecursionError):
            manifest = None
        if isinstance(manifest, dict):
            told += [manifest.get(key) for key in DATES]
    if path.is_dir() and CARD in folder.names:
        text = folder.read_bytes(CARD).decode(errors="replace")
        told += _IN_CARD.findall(text.split("\n---", 1)[0]) if text.startswith("---") else []
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.suffix == ".safetensors" else []
    for file in files[:1]:
        checkpoint, metadata = open_safetensors(LocalFile(file))
        checkpoint.close()
        told += [metadata.get(key) for key in DATES]
    return next(filter(None, map(_as_date, told)), None)


def _as_date(value: object) -> datetime | None:
    try:
        found = datetime.fromisoformat(str(value).strip())
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
