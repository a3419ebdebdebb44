"""What a training run keeps in its folder: manifest, checkpoints, the log of losses, and the state to go on from."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffract._version import __version__
from diffract.checkpoints.provenance import file_digest
from diffract.errors import DiffractError, RecipeError, RunError, printable
from diffract.settings import Progress, read_file
from diffract.store import DRAFT, LOCK, cache_key, sync, sync_tree, whole_file, write_text
from diffract.train.recipe import TrainRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator


MANIFEST, LOG, CHECKPOINTS, STATES = "manifest.json", "log.jsonl", "checkpoints", "state"
"""What lies in the folder of a run."""

LOGGED = {"step", "tokens", "loss", "rate", "grad_norm", "seconds"}
"""What a line of the log says."""

KIND = "diffract training"
FORMAT = 1
"""Number of the manifest's layout; a reader refuses another."""

VERSIONED = ("torch", "transformers", "accelerate", "tokenizers", "numpy")
"""Packages whose versions a manifest has."""


@dataclass(frozen=True)
class TrainRun:
    """A finished training run.

    Attributes:
        folder: Where the run lies.
        checkpoints: Folders of models, by the tokens that they have seen.
        seconds: How long the run took, without what was lost where it was taken up again.
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
    if not folder.exists():
        return {}
    if folder.is_dir() and all(DRAFT.fullmatch(path.name) or path.name == LOCK for path in folder.iterdir()):
        return {}
    try:
        found = json.loads(read_file(path).decode())
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
        recipe: The settings of the run.
        text: A digest of each part of the mix.
    """
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in VERSIONED}}
    return {"recipe": recipe.as_dict(), "versions": versions, "text": dict(text), "finished": False}


def checkpoint_name(recipe: TrainRecipe, step: int) -> str:
    """Return what a checkpoint's folder is called: sorted by name, they are in order.

    >>> checkpoint_name(TrainRecipe.model_construct(batch_tokens=4096, context=256, tokens=10**6), 50)
    'step050-tokens0204800'
    """
    last = recipe.steps * recipe.batch_tokens
    return f"step{step:0{len(str(recipe.steps))}d}-tokens{step * recipe.batch_tokens:0{len(str(last))}d}"


def checkpoint_folder(folder: Path, recipe: TrainRecipe, step: int) -> Path:
    """Return where the checkpoint after a step goes in the folder of a run."""
    return folder / CHECKPOINTS / checkpoint_name(recipe, step)


def file_digests(folder: Path) -> dict[str, str]:
    """Return a digest of each file of a checkpoint or a state."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_digest(path) for path in paths}


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
    """Return the steps of a log: for each its number, tokens, loss, rate, norm of the gradient, and seconds so far.

    Raises:
        RunError: The log is gone, empty or damaged.
    """
    try:
        steps = [json.loads(line) for line in read_file(path).decode().splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"cannot read the log {printable(path)!r}: {printable(error)}. "
            "Put it back; the checkpoints are whole without it."
        ) from error
    whole = (
        isinstance(step, dict) and all(isinstance(step.get(name), int | float) for name in LOGGED) for step in steps
    )
    if not steps or not all(whole):
        raise RunError(
            f"the log {printable(path)!r} is empty or damaged. Put it back; the checkpoints are whole without it."
        )
    return steps


def cut_log(path: Path, step: int) -> None:
    """Drop what a log says of later steps, a line that was cut off included.

    Raises:
        RunError: The log does not hold all steps up to there: half a log would pass for that of the whole run.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[:step] if path.is_file() else []
    if [_step_of(line) for line in lines] != list(range(1, step + 1)):
        raise RunError(
            f"{printable(path)!r} does not hold the {step} steps that the run has made: it was damaged or removed. Put "
            "it back, or train into another folder."
        )
    with whole_file(path) as draft:
        draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Say where two recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield f"{printable(path)} is {printable(json.dumps(old))} there, {printable(json.dumps(new))} here"


PROGRESS, DIGESTS = "progress.json", "digests"
"""What a state has besides files of accelerate: plain values, among them a digest of each of those files."""

_STATE = re.compile(r"step(\d+)", re.ASCII)


def last_state(folder: Path) -> tuple[int, Path] | None:
    """Return the step and the folder of a run's last whole state."""
    found = {int(m[1]): p for p in (folder / STATES).glob("step*") if (m := _STATE.fullmatch(p.name))}
    return (max(found), found[max(found)]) if found else None


def save_state(accelerator: Accelerator, folder: Path, *, step: int, content: dict[str, Any]) -> None:
    """Write the state after a step, and remove the one before; all processes do so together.

    Args:
        accelerator: Holds model, optimizer and random numbers.
        folder: The folder of the run.
        step: How many steps are done.
        content: Plain values that belong to the state.

    Raises:
        RunError: The state cannot be written.
    """
    path = folder / STATES / f"step{step:09d}"
    draft = path.with_suffix(".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        # Of tied weights safetensors would keep one, and the others would come back as tensors of their own.
        accelerator.save_state(str(draft), safe_serialization=False)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            digests = {**file_digests(draft), PROGRESS: cache_key(content)}
            (draft / PROGRESS).write_text(json.dumps({**content, DIGESTS: digests}), encoding="utf-8")
            # A power cut must not leave a state without its bytes, or without the steps that the log has up to it.
            sync(folder / LOG)
            sync_tree(draft)
            draft.replace(path)
            sync(path.parent)
            # Only now: a run that is killed before has the earlier state to go on from.
            for other in path.parent.iterdir():
                if other != path:
                    shutil.rmtree(other, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # of a full disk torch says the latter
        raise RunError(f"cannot write {printable(path)!r}: {printable(error)}. Make room.") from error


def load_state(accelerator: Accelerator, path: Path) -> dict[str, Any]:
    """Take up a state, and return the plain values that belong to it.

    Raises:
        RunError: The state cannot be read, or a file of it is not as it was written: one changed bit in weights,
            optimizer or random numbers would give other results without a word.
    """
    try:
        content = json.loads(read_file(path / PROGRESS).decode())
        digests = content.pop(DIGESTS) if isinstance(content, dict) else None
        if not isinstance(digests, dict):
            raise ValueError(f"{PROGRESS} is damaged")
        found = {**file_digests(path), PROGRESS: cache_key(content)}
        if changed := [name for name, known in digests.items() if found.get(name) != known]:
            raise ValueError(f"{changed[0]} is not as it was written")
        accelerator.load_state(str(path))
    except (OSError, ValueError, RuntimeError, KeyError, UnpicklingError) as error:
        raise RunError(
            f"the state in {printable(path)!r} cannot be taken up: {printable(error)}. Remove it to begin anew."
        ) from error
    return content


STEPS_AT_ONCE = 10
"""Steps whose losses a device keeps before they are asked for: each time the processor waits for it."""


class Journal:
    """Collects losses where they are computed, and writes them together.

    Args:
        accelerator: Adds up the losses of all processes.
        recipe: The settings of the run.
        folder: The folder of the run.
        step: From which the run goes on; what the log says of later ones is dropped.
        seconds: How long the run took up to there.
        progress: Is told the tokens done, all tokens and the loss.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: TrainRecipe,
        folder: Path,
        *,
        step: int,
        seconds: float,
        progress: Progress | None,
    ) -> None:
        self._accelerator, self._recipe, self._folder, self._progress = accelerator, recipe, folder, progress
        self._waiting: list[tuple[int, float, Tensor, Tensor]] = []
        self._at_once = 1 if accelerator.device.type == "cpu" else STEPS_AT_ONCE
        self._begun = time.perf_counter() - seconds
        if accelerator.is_main_process:
            cut_log(folder / LOG, step)

    @property
    def seconds(self) -> float:
        """How long the run has taken, earlier parts included."""
        return time.perf_counter() - self._begun

    @property
    def waits(self) -> bool:
        """Whether there is something that has not been written."""
        return bool(self._waiting)

    def note(self, step: int, *, rate: float, loss: Tensor, norm: Tensor) -> None:
        """Take down a step.

        Args:
            step: The number of the step, counted from 1.
            rate: The learning rate.
            loss: This process's part of the loss.
            norm: The norm of the whole gradient.

        Raises:
            DiffractError: A loss or a gradient is no number.
        """
        self._waiting.append((step, rate, loss, norm))
        if len(self._waiting) >= self._at_once:
            self.write()

    def write(self) -> None:
        """Write what waits.

        Raises:
            DiffractError: A loss or a gradient is no number; the steps before are written.
        """
        if not self._waiting:
            return
        losses = torch.stack([loss for _, _, loss, _ in self._waiting]).float()
        norms = torch.stack([norm for *_, norm in self._waiting]).float()
        shown = zip(self._accelerator.reduce(losses, "sum").tolist(), norms.tolist(), strict=True)  # pyright: ignore[reportAttributeAccessIssue] (a tensor stays one)
        taken, self._waiting = self._waiting, []
        lines = []
        for (step, rate, *_), (loss, norm) in zip(taken, shown, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._append(lines)
                raise self._diverged(step, loss, norm)
            line = {"step": step, "tokens": step * self._recipe.batch_tokens, "loss": loss, "rate": rate}
            lines.append(line | {"grad_norm": norm, "seconds": round(self.seconds, 3)})
        self._append(lines)

    def _append(self, lines: list[dict[str, float]]) -> None:
        if not lines or not self._accelerator.is_main_process:
            return
        with (self._folder / LOG).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        for line in lines if self._recipe.log else []:
            self._accelerator.log({k: v for k, v in line.items() if k != "step"}, step=int(line["step"]))
        if self._progress:
            total = self._recipe.steps * self._recipe.batch_tokens
            self._progress(lines[-1]["tokens"], total, f"loss {lines[-1]['loss']:.3f}")

    def _diverged(self, step: int, loss: float, norm: float) -> DiffractError:
        good = last_state(self._folder)
        kept = f"The last good state is {str(good[1])!r}" if good else "There is no earlier state"
        return DiffractError(
            f"step {step} ({step * self._recipe.batch_tokens:,} tokens): loss {loss}, gradient norm {norm}. Training "
            f"has diverged. {kept}. Lower optimizer.rate, lengthen schedule.warmup, or lower optimizer.clip."
        )
