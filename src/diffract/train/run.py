"""Training by a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffract.train.extra import require_extra
from diffract.train.records import TrainRun, finished_run, read_run
from diffract.train.settings import TrainRecipe, load_train_recipe

Progress = Callable[[float, float, str], None]
"""``progress(done, total, what)``, in tokens."""


def train(
    recipe: TrainRecipe | Mapping[str, Any] | str | Path, output: str | Path, *, progress: Progress | None = None
) -> TrainRun:
    """Train a model by a recipe.

    A run that is finished is returned as it is; one that was broken off goes on from its last state. On the CPU of one
    machine it then gives the same losses and the same weights as if it had not been broken off.

    Args:
        recipe: One, its settings, or the YAML file that it stands in.
        output: The run's folder.
        progress: Is told how far it is.

    Raises:
        RecipeError: The recipe is wrong, does not fit the model, or is another one than the run began with.
        CorpusError: Text cannot be read, is for evaluation only, or is too short.
        RunError: Something else lies in the folder, or it cannot be written.
        DiffractError: The run has diverged, memory does not suffice, or a package is missing.
    """
    recipe, folder = load_train_recipe(recipe), Path(output)
    manifest = read_run(folder, recipe)
    if not manifest.get("finished"):
        require_extra()
        from diffract.train.session import run_session

        run_session(recipe, folder, manifest, progress)
        manifest = read_run(folder, recipe)
    return finished_run(folder, manifest)
