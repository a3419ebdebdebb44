"""What a training run leaves beside its checkpoints: the manifest, and the log of losses."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3

from diffract._version import __version__
from diffract.errors import RecipeError, RunError, printable
from diffract.folders import whole_file, write_text
from diffract.train.settings import TrainRecipe

MANIFEST, LOG, CHECKPOINTS, STATES = "manifest.json", "log.jsonl", "checkpoints", "state"
"""What lies in the folder of a run."""

KIND = "diffract training"
FORMAT = 1
"""Number of the manifest's layout; a reader refuses another."""

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy")
"""Whose versions a manifest has."""


@dataclass(frozen=True)
class TrainRun:
    """A finished training run.

    Attributes:
        folder: Where it lies.
        checkpoints: Folders of models, by the tokens that they have seen.
        seconds: How long it took, without what was lost where it was taken up again.
        warnings: What did not go as the recipe has it.
    """

    folder: Path
    checkpoints: dict[int, Path]
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def final(self) -> Path:
        """The model at the end."""
        return self.checkpoints[max(self.checkpoints)]

    @property
    def log(self) -> Path:
        """One JSON object for each step."""
        return self.folder / LOG


def read_run(folder: Path, recipe: TrainRecipe) -> dict[str, Any]:
    """Return the manifest of a run that was begun with a recipe; empty if the folder is free.

    Raises:
        RunError: Something else lies there.
        RecipeError: The run was begun with another recipe.
    """
    path = folder / MANIFEST
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("kind") != KIND or found.get("format") != FORMAT:
        raise RunError(f"{printable(folder)!r} holds no training run of this version. Choose another folder.")
    if changed := list(_differences(found.get("recipe", {}), recipe.as_dict())):
        raise RecipeError(
            f"the run in {printable(folder)!r} has another recipe: {'; '.join(changed)}. "
            "Give its own recipe, or choose another folder."
        )
    return found


def begun(recipe: TrainRecipe, text: Mapping[str, str]) -> dict[str, Any]:
    """Return the manifest of a run that is not finished.

    Args:
        recipe: Of the run.
        text: A digest of each part of the mix.
    """
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
    return {"recipe": recipe.as_dict(), "versions": versions, "text": dict(text), "finished": False}


def file_digests(folder: Path) -> dict[str, str]:
    """Return a digest of each file of a checkpoint."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: blake3.blake3().update_mmap(path).hexdigest() for path in paths}


def write_run(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a run, whole or not at all."""
    head = {"kind": KIND, "format": FORMAT, "diffract": __version__}
    text = json.dumps({**head, **content}, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / MANIFEST, text + "\n")


def finished_run(folder: Path, manifest: Mapping[str, Any]) -> TrainRun:
    """Return a run as its manifest has it.

    Raises:
        RunError: A checkpoint is gone.
    """
    checkpoints = {entry["tokens"]: folder / CHECKPOINTS / name for name, entry in manifest["checkpoints"].items()}
    if gone := [path for path in checkpoints.values() if not path.is_dir()]:
        raise RunError(f"{printable(gone[0])!r} is gone. Put it back, or train into another folder.")
    return TrainRun(folder, checkpoints, manifest["seconds"], tuple(manifest["warnings"]))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the steps of a log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def cut_log(path: Path, step: int) -> None:
    """Drop what a log says of later steps, a line that was cut off included."""
    lines = path.read_text(encoding="utf-8").splitlines()[:step] if path.exists() else []
    with whole_file(path) as draft:
        draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Say where two recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield f"{printable(path)} is {printable(json.dumps(old))} there, {printable(json.dumps(new))} here"
