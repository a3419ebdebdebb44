"""A folder of checkpoints: which of its folders and files are one checkpoint each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffract.checkpoints import adapter
from diffract.checkpoints.files import LocalFolder
from diffract.checkpoints.folder import TORCH_SUFFIXES, TRAINER, read_object
from diffract.errors import CheckpointError, printable

STATE = "trainer_state.json"
"""What the Hugging Face trainer leaves in each of its checkpoints."""

IN_FOLDERS = (".safetensors", *TORCH_SUFFIXES)
ALONE = (*IN_FOLDERS, ".npz")
"""How the names of weights end: in a folder that is a checkpoint, and of a file that is one."""

USUAL = ("model", "pytorch_model", "adapter_model")
"""How a checkpoint's file is called whatever it holds, so that its folder's name says more."""

BESIDE = tuple(start for start in TRAINER if start != "global_step")
"""How files begin that are no checkpoint where each file of weights is one; it may be called global_step1000."""

SHOWN = 5
"""Names that a message lists."""

_SHARD = re.compile(r".*-\d+-of-\d+\.\w+", re.ASCII)


@dataclass(frozen=True)
class Found:
    """The checkpoints of a folder.

    Attributes:
        paths: One for each, by name.
        left_out: Names of subfolders without weights, and of weights that are taken for no checkpoint.
    """

    paths: list[Path]
    left_out: list[str]


def find_checkpoints(path: Path) -> Found:
    """Return the checkpoints that a folder holds: its subfolders with weights, or else each file of weights.

    Shards, files that a trainer leaves beside the weights, and links to another of the checkpoints are none.

    Raises:
        CheckpointError: There are none.
    """
    folder = LocalFolder(path)
    files = [name for name in folder.names if _is_weights(name, ALONE, BESIDE)]
    subfolders = [p for p in _children(path) if p.is_dir()]
    if folders := [p for p in subfolders if _holds_weights(p)]:
        return Found(_distinct(folders), [*files, *(f"{p.name}/" for p in subfolders if p not in folders)])
    sharded = any(name.endswith(".index.json") for name in folder.names)
    alone = [] if sharded else [name for name in files if not _SHARD.fullmatch(name)]
    if not alone:
        raise CheckpointError(
            f"no checkpoints in folder {folder.where!r}: expected subfolders with weights such as checkpoint-500, or "
            f"files such as step_02000.safetensors, one a checkpoint. Found "
            f"{some([p.name + '/' * p.is_dir() for p in _children(path)])}."
        )
    return Found(_distinct([path / name for name in alone]), [name for name in files if name not in alone])


def trainer_state(path: Path) -> dict[str, Any]:
    """Return what the Hugging Face trainer has noted in a checkpoint, empty if there is nothing.

    Args:
        path: The checkpoint's folder, or its file if that is called as usual.

    Raises:
        CheckpointError: The note is no JSON object.
    """
    place = path if path.is_dir() else path.parent
    if place == path or path.stem in USUAL:
        return read_object(LocalFolder(place), STATE) or {}
    return {}


def some(names: Sequence[str]) -> str:
    """Return the first of some names in words."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(printable(name, 60) for name in names[:SHOWN]) + more or "nothing"


def _children(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if not p.name.startswith("."))


def _holds_weights(path: Path) -> bool:
    names = LocalFolder(path).names
    return adapter.CONFIG in names or any(_is_weights(name, IN_FOLDERS, TRAINER) for name in names)


def _is_weights(name: str, suffixes: tuple[str, ...], beside: tuple[str, ...]) -> bool:
    return name.endswith(suffixes) and not name.startswith((*beside, "adapter_", "."))


def _distinct(paths: list[Path]) -> list[Path]:
    """Each checkpoint once: ``latest`` is often a link to one of the others."""
    own = {p.resolve() for p in paths if not p.is_symlink()}
    return [p for p in paths if not p.is_symlink() or p.resolve() not in own]
