"""Several models in one folder: checkpoints of a training run, revisions in the hub's cache, adapters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from diffract.checkpoints import adapter
from diffract.checkpoints.distributed import INSIDE, METADATA
from diffract.checkpoints.files import LocalFolder, real_path
from diffract.checkpoints.formats import refuse_format
from diffract.checkpoints.sources import KINDS, TORCH_SUFFIXES, TRAINER, Folder, read_object
from diffract.errors import CheckpointError, printable, some

STATE = "trainer_state.json"
"""What the Hugging Face trainer leaves in each of its checkpoints."""

IN_FOLDERS = (".safetensors", ".gguf", *TORCH_SUFFIXES)
ALONE = (*IN_FOLDERS, ".npz")
"""How the names of weights end: in a folder that is a checkpoint, and of a file that is one."""

USUAL = ("model", "pytorch_model", "adapter_model")
"""How a checkpoint's file is called whatever it holds, so that its folder's name says more."""

BESIDE = tuple(start for start in TRAINER if start != "global_step")
"""How files begin that are no checkpoint where each file of weights is one; it may be called global_step1000."""

ACTORS = ("actor", "policy", "student", "model")
"""What the part that is trained is called where a step's folder holds several models: beside it are critics and
references."""

_SHARD = re.compile(r".*-\d+-of-\d+\.\w+", re.ASCII)

_STAGING = re.compile(r"(^|[-_.])(tmp|temp|staging|incomplete|partial)([-_.]|$)", re.ASCII | re.IGNORECASE)
"""In names of folders that a trainer writes to before it renames them."""


@dataclass(frozen=True)
class FoundCheckpoints:
    """The checkpoints of a folder.

    Attributes:
        paths: One for each, by name.
        left_out: Names of subfolders without weights, and of weights that are taken for no checkpoint.
        called: Names of those whose path does not tell one: revisions in the cache of the hub's client.
    """

    paths: list[Path]
    left_out: list[str]
    called: dict[Path, str] = field(default_factory=dict)


def find_checkpoints(path: Path) -> FoundCheckpoints:
    """Return the checkpoints that a folder holds: its subfolders with weights, or else each file of weights.

    A step's folder may hold the model further down, as ``global_step_100/actor/huggingface`` does, and a repository in
    the cache of the hub's client holds one for each of its ``refs``. Shards, files that a trainer leaves beside the
    weights, folders that it has not renamed yet, and links to another of the checkpoints are none.

    Raises:
        CheckpointError: There are none.
    """
    if (path / "refs").is_dir() and (path / "snapshots").is_dir():
        return _cached_revisions(path)
    folder = LocalFolder(path)
    files = [name for name in folder.names if _is_weights(name, ALONE, BESIDE)]
    subfolders = [p for p in _children(path) if p.is_dir()]
    held = {p: None if _STAGING.search(p.name) else _model_inside(p) for p in subfolders}
    if folders := [inside for inside in held.values() if inside]:
        left_out = [f"{p.name}/" for p, inside in held.items() if inside is None]
        return FoundCheckpoints(_distinct(folders), [*files, *left_out])
    sharded = any(name.endswith(".index.json") for name in folder.names)
    alone = [] if sharded else [name for name in files if not _SHARD.fullmatch(name)]
    if not alone:
        raise CheckpointError(
            f"no checkpoints in folder {folder.where!r}: expected subfolders with weights such as checkpoint-500, or "
            f"files such as step_02000.safetensors, one a checkpoint. Found "
            f"{some([p.name + '/' * p.is_dir() for p in _children(path)])}."
        )
    return FoundCheckpoints(_distinct([path / name for name in alone]), [name for name in files if name not in alone])


def _model_inside(folder: Path) -> Path | None:
    """Return the folder with weights that a step's folder is, or the one that it holds, up to two levels below."""
    level = [folder]
    for _ in range(3):
        if found := [p for p in level if _holds_weights(p)]:
            trained = [p for p in found if set(ACTORS).intersection(p.relative_to(folder.parent).parts)]
            return (trained or found)[0] if len(found) == 1 or trained else None
        level = [p for parent in level for p in _children(parent) if p.is_dir() and not _STAGING.search(p.name)]
    return None


def _cached_revisions(path: Path) -> FoundCheckpoints:
    """Return the revisions of a repository that the hub's client has downloaded, one for each of its refs."""
    snapshots: dict[Path, str] = {}
    left_out = []
    refs = {p.relative_to(path / "refs").as_posix(): p for p in (path / "refs").rglob("*") if p.is_file()}
    for name in sorted(refs, key=lambda name: (name == "main", name)):  # main is often one of the others, too
        snapshot = path / "snapshots" / refs[name].read_text(encoding="utf-8", errors="replace").strip()[:64]
        if snapshot.is_dir() and _holds_weights(snapshot) and snapshot not in snapshots:
            snapshots[snapshot] = name
        else:
            left_out.append(f"refs/{name}")
    if not snapshots:
        raise CheckpointError(f"{printable(path)}: no revision with weights lies in this cache. Download some.")
    return FoundCheckpoints(list(snapshots), left_out, called=snapshots)


def nested_adapters(folder: Folder) -> list[str]:
    """Return the subfolders that hold an adapter each, as PEFT saves several."""
    ends = f"/{adapter.CONFIG}"
    return [name.removesuffix(ends) for name in folder.nested if name.endswith(ends) and name.count("/") == 1]


def refuse_several(folder: Folder) -> None:
    """Raise if a folder holds several adapters, each in a subfolder.

    Raises:
        CheckpointError: It says which, and how one is named.
    """
    if nested := nested_adapters(folder):
        raise CheckpointError(
            f"{folder.where} holds several adapters: {some(nested)}. Say which by its folder, or its name after #, "
            f"such as {folder.below(nested[0]).where}."
        )


def refuse_without_weights(folder: Folder) -> NoReturn:
    """Say what a folder without weights holds instead.

    Raises:
        CheckpointError: Always: it names another format, or subfolders that are models.
    """
    refuse_format(folder.where, folder.names)
    refuse_several(folder)
    ends = tuple(end for _, suffixes in KINDS for end in suffixes)
    inner = sorted({name.rpartition("/")[0] for name in folder.nested if name.endswith((*ends, "/.metadata"))})
    advice = f"Its subfolders do: {some(inner)}. Open one of them." if inner else "Is this the right model?"
    raise CheckpointError(f"{folder.where!r} holds no weights ({', '.join(ends)}). {advice}")


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


def _children(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if not p.name.startswith("."))


def _holds_weights(path: Path) -> bool:
    names = LocalFolder(path).names
    if any((path / name / METADATA).is_file() for name in ("", *INSIDE)):
        return True
    return adapter.CONFIG in names or any(_is_weights(name, IN_FOLDERS, TRAINER) for name in names)


def _is_weights(name: str, suffixes: tuple[str, ...], beside: tuple[str, ...]) -> bool:
    return name.endswith(suffixes) and not name.startswith((*beside, "adapter_", "."))


def _distinct(paths: list[Path]) -> list[Path]:
    """Each checkpoint once: ``latest`` is often a link to one of the others."""
    own = {real_path(p) for p in paths if not p.is_symlink()}
    return [p for p in paths if not p.is_symlink() or real_path(p) not in own]
