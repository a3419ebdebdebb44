"""States that a run is taken up from: written whole, and the one before kept until then."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from diffract.errors import RunError, printable
from diffract.train.records import STATES

if TYPE_CHECKING:
    from accelerate import Accelerator

PROGRESS = "progress.json"

_STATE = re.compile(r"step(\d+)", re.ASCII)


def last_state(folder: Path) -> tuple[int, Path] | None:
    """Return the step and the folder of a run's last whole state."""
    found = {int(m[1]): p for p in (folder / STATES).glob("step*") if (m := _STATE.fullmatch(p.name))}
    return (max(found), found[max(found)]) if found else None


def save_state(accelerator: Accelerator, folder: Path, step: int, content: dict[str, Any]) -> Path:
    """Write the state after a step; all processes do so together.

    Args:
        accelerator: Whose state it is.
        folder: Of the run.
        step: How many steps are done.
        content: Plain values that belong to it.
    """
    path = folder / STATES / f"step{step:09d}"
    draft = path.with_suffix(".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(draft), safe_serialization=False)  # tied weights stay tied
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (draft / PROGRESS).write_text(json.dumps(content), encoding="utf-8")
            draft.replace(path)
            _remove_others(path)
    except OSError as error:
        raise RunError(f"cannot write {printable(path)!r}: {error.strerror or error}. Make room.") from error
    return path


def load_state(accelerator: Accelerator, path: Path) -> dict[str, Any]:
    """Take up a state, and return the plain values that belong to it.

    Raises:
        RunError: It cannot be read.
    """
    try:
        content = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        accelerator.load_state(str(path))
    except (OSError, ValueError, RuntimeError, KeyError, UnpicklingError) as error:
        raise RunError(
            f"the state in {printable(path)!r} cannot be taken up: {printable(error)}. Remove it to begin anew."
        ) from error
    return content


def _remove_others(path: Path) -> None:
    for other in path.parent.iterdir():
        if other != path:
            shutil.rmtree(other, ignore_errors=True)
