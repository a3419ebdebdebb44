"""Apply a recipe: from checkpoints to one edited checkpoint on disk, which appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffract._version import __version__
from diffract.checkpoints import Checkpoint
from diffract.checkpoints.provenance import write_manifest
from diffract.checkpoints.sources import CONFIG
from diffract.edits.bench import Bench
from diffract.edits.card import model_card
from diffract.edits.draft import Draft
from diffract.edits.exports import EXPORTERS, Target
from diffract.edits.output import Output
from diffract.edits.planning import Planned
from diffract.edits.recipe import Recipe, load_recipe
from diffract.edits.settings import Settings
from diffract.edits.steps import plan_step
from diffract.edits.write import write_draft
from diffract.settings import Progress, validated
from diffract.store import whole_folder

RECIPE = "recipe.yaml"
CARD = "README.md"

Plans = list[tuple[Settings, Planned]]


@dataclass(frozen=True)
class Edited:
    """What an edit made.

    Attributes:
        folder: The checkpoint.
        manifest: Digests, recipe, what each step did.
    """

    folder: Path
    manifest: Mapping[str, Any]


def apply(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    output: str | Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Edited:
    """Make the checkpoint that a recipe describes.

    Args:
        recipe: A recipe, or a YAML file.
        output: The folder to write; must not exist unless ``force``.
        force: Replace a folder that an edit has written.
        progress: Called with bytes done, all bytes, and what was just finished.

    Raises:
        DiffractError: The recipe is wrong, checkpoints do not fit, or the folder cannot be written.
    """
    recipe = as_recipe(recipe)
    with whole_folder(output, force=force) as folder, open_bench(recipe) as bench:
        draft, plans = plan(recipe, bench)
        if recipe.export is None:
            outputs = {".": write_draft(draft, folder, recipe.output, progress)}
            write_companions(bench.checkpoint, folder, recipe.output)
        else:
            target = Target(folder, Path(output), recipe.output, progress)
            outputs = _export(bench, draft, recipe.export.chosen, plans, target)
        manifest = _describe(recipe, bench, plans, outputs, folder)
    return Edited(Path(output), manifest)


def _export(bench: Bench, draft: Draft, export: Settings, plans: Plans, target: Target) -> dict[str, Any]:
    """Write something else than a checkpoint; return the digests of its tensors."""
    exporter = EXPORTERS[type(export)]
    split = exporter.plan(export, bench, draft)
    found = exporter.write(export, bench, draft, split, target)
    write_companions(bench.checkpoint, found.model, target.output, config=found.loads_alone)
    plans.append((export, split.planned))
    return dict(found.outputs)


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """Return a recipe, read and validated where it is not one yet."""
    if isinstance(recipe, str | Path):
        return load_recipe(recipe)
    return recipe if isinstance(recipe, Recipe) else validated(Recipe, recipe, "recipe")


def open_bench(recipe: Recipe) -> Bench:
    """Open the model of a recipe."""
    return Bench(recipe.model, architecture=recipe.architecture, adapter_base=recipe.adapter_base)


def plan(recipe: Recipe, bench: Bench) -> tuple[Draft, Plans]:
    """Return the model as the steps will have changed it, and what they decided."""
    draft, plans = bench.draft(), []
    for item in recipe.steps:
        planned = plan_step(item.chosen, bench, draft)
        plans.append((item.chosen, planned))
        draft = draft.then(planned.changes)
    return draft, plans


def write_companions(checkpoint: Checkpoint, folder: Path, output: Output, *, config: bool = True) -> None:
    """Write tokenizer, chat template and what else belongs to the model; its configuration unless told otherwise."""
    for name, read in checkpoint.companions.items():
        if config or name != CONFIG:
            (folder / name).write_bytes(read())
    if config:
        _write_config(checkpoint, folder, output)


def _write_config(checkpoint: Checkpoint, folder: Path, output: Output) -> None:
    """Write config.json anew where it must say something else, or was no file."""
    config = dict(checkpoint.config)
    if config and (output.dtype or CONFIG not in checkpoint.companions):
        if output.dtype:
            config.pop("torch_dtype", None)
            config["dtype"] = output.dtype
        (folder / CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")


def described(plans: Plans) -> list[dict[str, Any]]:
    """Return what each step did, for the manifest."""
    return [{"step": settings.name, **planned.described()} for settings, planned in plans]


def _describe(recipe: Recipe, bench: Bench, plans: Plans, outputs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write recipe, card and manifest; return the manifest."""
    import torch

    plain, steps = recipe.as_dict(), described(plans)
    (folder / RECIPE).write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / CARD).write_text(model_card(plain, steps, adapter=recipe.export is not None), encoding="utf-8")
    manifest = {
        "torch": torch.__version__,
        "recipe": plain,
        "steps": steps,
        "inputs": {label: found.digests() for label, found in bench.inputs.items()},
        "outputs": outputs,
    }
    write_manifest(folder, manifest)
    return {"diffract": __version__, **manifest}
