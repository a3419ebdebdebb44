"""Apply a recipe: from checkpoints to one edited checkpoint on disk, which appears whole or not at all."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from diffract._version import __version__
from diffract.checkpoints import Checkpoint, TensorInfo
from diffract.checkpoints.provenance import Verdict, read_manifest, verify_folder, write_manifest
from diffract.checkpoints.sources import CONFIG
from diffract.edits.bench import Bench, Planned
from diffract.edits.draft import Draft
from diffract.edits.lora import EXPORTERS
from diffract.edits.peft import Target
from diffract.edits.recipe import Output, Recipe, load_recipe
from diffract.edits.settings import Settings
from diffract.edits.steps import plan_step
from diffract.edits.write import compute, jobs_of, run_jobs, write_draft, written_infos
from diffract.engine import cores, single_threaded
from diffract.errors import RecipeError, printable
from diffract.settings import Progress, validated
from diffract.store import whole_folder

SHOWN = 12
"""Names that the card lists; the manifest has all."""


def model_card(recipe: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], *, adapter: bool = False) -> str:
    """Return the README of an edited checkpoint.

    Args:
        recipe: As it stands in a file.
        steps: What each step did.
        adapter: Whether it is a PEFT adapter.
    """
    library = "peft" if adapter else "transformers"
    head = yaml.safe_dump({"base_model": recipe["model"], "library_name": library, "tags": ["diffract"]})
    lines = [f"- `{step['step']}`: {_listed(step['summary'])}" for step in steps]
    return f"""---
{head}---

# Edited checkpoint

Made by diffract {__version__} from `{printable(recipe["model"])}`. `manifest.json` holds the digests of all that
went in and came out; `diffract verify` compares them with what is there.

{chr(10).join(lines) or "- nothing was changed"}

## Recipe

```yaml
{yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)}```
"""


def _listed(summary: Mapping[str, Any]) -> str:
    return "; ".join(f"{key} {said(value)}" for key, value in summary.items())


def said(value: Any) -> str:
    """Return a value of a summary as text of bounded length."""
    if value is None:
        return "not finite"
    if isinstance(value, list):
        rest = f" and {len(value) - SHOWN} more" if len(value) > SHOWN else ""
        return printable(", ".join(map(str, value[:SHOWN])) + rest, 400)
    if isinstance(value, dict):
        return printable(", ".join(f"{k}={v}" for k, v in value.items()), 400)
    return f"{value:.4g}" if isinstance(value, float) else printable(value, 400)


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


SAMPLE_SECONDS = 3.0
"""Time spent on measuring; what is not reached is judged by what was."""


@dataclass(frozen=True)
class Preview:
    """What a recipe would do.

    Attributes:
        steps: What each step decided.
        tensors: How many tensors there are.
        changed: How many of them change.
        read_bytes: What is read, about.
        written_bytes: Bytes of tensors that are written; of an adapter that is found out with its ranks.
        seconds: How long it takes, about.
    """

    steps: list[dict[str, Any]]
    tensors: int
    changed: int
    read_bytes: int
    written_bytes: int | None
    seconds: float


def preview(recipe: Recipe | Mapping[str, Any] | str | Path) -> Preview:
    """Say what a recipe would do; checkpoints are opened and compared, a few tensors computed, nothing is written.

    Raises:
        DiffractError: The recipe is wrong, or checkpoints do not fit.
    """
    recipe = as_recipe(recipe)
    with open_bench(recipe) as bench:
        draft, plans = plan(recipe, bench)
        if recipe.export is not None:
            export = recipe.export.chosen
            split = EXPORTERS[type(export)].plan(export, bench, draft)
            plans.append((export, split.planned))
            draft = draft.then(split.planned.changes)
        infos = written_infos(draft, recipe.output)
        written = None if recipe.export is not None else sum(info.size_bytes for info in infos.values())
        changed = {name for step in draft.steps for name in step}
        return Preview(
            [{key: step[key] for key in ("step", "summary")} for step in described(plans)],
            len(infos),
            len(changed),
            _read_bytes(bench, draft, plans),
            written,
            _seconds(draft),
        )


def _read_bytes(bench: Bench, draft: Draft, plans: Plans) -> int:
    """The whole model, and of every other checkpoint what changes."""
    sizes = {name: info.size_bytes for name, info in draft.checkpoint.infos.items()}
    others = len(bench.inputs) - 1
    changed = {name for _, planned in plans for name in planned.changes}
    return sum(sizes.values()) + others * sum(sizes[name] for name in changed)


def _seconds(draft: Draft) -> float:
    """Measure one tensor of each kind, small ones first; of kinds that were not reached, judge by work."""
    kinds: dict[tuple[Any, ...], list[TensorInfo]] = defaultdict(list)
    for name, info in draft.checkpoint.infos.items():
        kinds[info.shape, info.dtype, tuple(name in step for step in draft.steps)].append(info)
    total, begun, rates = 0.0, time.monotonic(), defaultdict(float)
    with single_threaded():
        for (_, _, steps), infos in sorted(kinds.items(), key=lambda item: _work(draft, item[1][0])):
            work = _work(draft, infos[0])
            if time.monotonic() - begun < SAMPLE_SECONDS:
                start = time.monotonic()
                for _ in draft.blocks(infos[0].name):
                    pass
                rates[steps] = (time.monotonic() - start) / work
            total += len(infos) * work * (rates[steps] or max(rates.values()))
    return total / cores()


def _work(draft: Draft, info: TensorInfo) -> float:
    """Entries, times the short side where singular directions are sought."""
    whole = any(change.whole for change in draft.changes(info.name))
    return max(1.0, float(info.entries * (min(info.shape[-2:]) if whole else 1)))


def verify(folder: str | Path, *, replay: bool = False) -> Verdict:
    """Say whether an edited checkpoint is what its manifest says: its tensors, files, recipe, and inputs.

    Args:
        folder: What an edit wrote.
        replay: Compute the recipe anew, too, and compare what comes out.

    Raises:
        DiffractError: There is no manifest, or nothing can be opened.
    """
    verdict = verify_folder(folder)
    if replay:
        _replay(folder, verdict)
    return verdict


def _replay(folder: str | Path, verdict: Verdict) -> None:
    manifest = read_manifest(folder)
    recipe = validated(Recipe, manifest["recipe"], f"{printable(folder)}, manifest.json, recipe")
    if recipe.export is not None:
        raise RecipeError(f"{printable(folder)} holds an adapter; only whole checkpoints can be replayed.")
    with open_bench(recipe) as bench:
        draft, _ = plan(recipe, bench)
        jobs = jobs_of(draft, written_infos(draft, recipe.output))
        for job, digest in run_jobs(jobs, partial(compute, draft), None):
            stated = manifest["outputs"]["."]
            verdict.faults += [
                f"tensor {printable(name)!r}: the recipe gives another one today"
                for name in job.names
                if stated.get(name) != digest
            ]
