"""Recipes to files: apply one, say what it would do, and verify what one has made.

An edited checkpoint appears whole or not at all, with its recipe, a card, and a manifest of all digests beside it.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from diffract._version import __version__
from diffract.checkpoints import Checkpoint, TensorInfo
from diffract.checkpoints.files import TooLargeError
from diffract.checkpoints.provenance import Verdict, read_manifest, verify_folder, write_manifest
from diffract.checkpoints.sources import CONFIG
from diffract.edits.bench import Bench, Plans
from diffract.edits.draft import Draft
from diffract.edits.recipe import Output, Recipe, StepItem, load_recipe
from diffract.edits.write import Target, Written, computed, write_checkpoint, written_infos
from diffract.engine import cores, single_threaded
from diffract.errors import RecipeError, printable
from diffract.settings import Progress, validated
from diffract.store import whole_folder

RECIPE = "recipe.yaml"
CARD = "README.md"

SHOWN = 12
"""Names that the card lists; the manifest has all."""

SAMPLE_SECONDS = 3.0
"""Time that a preview spends on measuring; what is not reached is judged by what was."""


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
    allow: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Edited:
    """Make the checkpoint that a recipe describes.

    Args:
        recipe: A recipe, or a YAML file; or a model's folder, which is written as it stands: a delta or an adapter is
            put on its base.
        output: The folder to write; must not exist unless ``force``.
        allow: What is allowed besides what the recipe allows.
        force: Replace a folder that an edit has written.
        progress: Called with bytes done, all bytes, and what was just finished.

    Raises:
        DiffractError: The recipe is wrong, checkpoints do not fit, or the folder cannot be written.
    """
    recipe = as_recipe(recipe, allow)
    with whole_folder(output, force=force) as folder, open_bench(recipe) as bench:
        draft, plans = bench.plan(recipe.edits)
        write = next((planned.write for _, planned in plans if planned.write), write_checkpoint)
        written = write(draft, Target(folder, Path(output), recipe.output, progress))
        left = _write_companions(bench.checkpoint, written, recipe.output)
        saved = tuple(StepItem(**{s.name: s.saved(folder, Path(output))}) for s in (i.chosen for i in recipe.steps))
        manifest = {
            "torch": torch.__version__,
            "recipe": recipe.model_copy(update={"steps": saved}).as_dict(),
            "steps": described(plans),  # what edits find out while they compute is known only now
            "inputs": {label: found.digests() for label, found in bench.inputs.items()},
            "outputs": dict(written.outputs),
            "kept": {label: stays for label, stays in bench.kept.items() if stays},
            "notes": [*bench.notes, *bench.permissions.unneeded()],
        }
        stored = {name: digest for part in written.outputs.values() for name, digest in part.items()}
        equal = [label for label, read in manifest["inputs"].items() if stored.items() <= read.items()]
        manifest["same_weights_as"] = equal if stored else []
        manifest["left_out"] = left
        manifest["written_bytes"] = written.written_bytes
        text = yaml.safe_dump(manifest["recipe"], sort_keys=False, allow_unicode=True)
        (folder / RECIPE).write_text(text, encoding="utf-8")
        card = model_card(manifest["recipe"], manifest["steps"], adapter=recipe.export is not None)
        (folder / CARD).write_text(card, encoding="utf-8")
        write_manifest(folder, manifest)
    return Edited(Path(output), {"diffract": __version__, **manifest})


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path, allow: Sequence[str] = ()) -> Recipe:
    """Return a recipe that allows some more, read and validated where it is not one yet."""
    if isinstance(recipe, str | Path):
        recipe = Recipe(model=recipe) if Path(recipe).expanduser().is_dir() else load_recipe(recipe)
    elif not isinstance(recipe, Recipe):
        recipe = validated(Recipe, recipe, "recipe")
    return recipe.model_copy(update={"allow": tuple(dict.fromkeys((*recipe.allow, *allow)))}) if allow else recipe


def open_bench(recipe: Recipe) -> Bench:
    """Open the model of a recipe."""
    return Bench(
        recipe.model,
        architecture=recipe.architecture,
        adapter_base=recipe.adapter_base,
        download=recipe.download,
        allow=recipe.allow,
        vocabulary=recipe.vocabulary,
    )


def described(plans: Plans) -> list[dict[str, Any]]:
    """Return what each edit did, for the manifest."""
    return [{"step": edit.name, **planned.described()} for edit, planned in plans]


def _write_companions(checkpoint: Checkpoint, written: Written, output: Output) -> dict[str, str]:
    """Write all that lies beside the model's weights; its configuration where what is written is a model.

    A configuration beside an adapter would make loaders take the folder for a whole model.

    Returns:
        For each file that is too large to be taken along, so much.
    """
    left: dict[str, str] = {}
    for name, read in checkpoint.companions.items():
        # Beside an adapter alone a model's configuration would promise weights that are not there.
        if not written.loads_alone and name == CONFIG:
            continue
        try:
            content = read()
        except TooLargeError as error:
            left[name] = str(error)
            continue
        place = written.model / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    config = dict(checkpoint.config)
    # The file's own bytes stay wherever they are true; a model in memory has none, and another dtype makes them wrong.
    if written.loads_alone and config and (output.dtype or CONFIG not in checkpoint.companions):
        if output.dtype:
            config = {**_restated(config, output.dtype), "dtype": output.dtype}
        (written.model / CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    return left


def _restated(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a configuration whose sections that state a dtype all state this one, under today's name."""
    found = {key: _restated(value, dtype) if isinstance(value, Mapping) else value for key, value in config.items()}
    stated = [key for key in ("dtype", "torch_dtype") if isinstance(found.get(key), str)]
    rest = {key: value for key, value in found.items() if key not in stated}
    return {**rest, "dtype": dtype} if stated else rest


def model_card(recipe: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], *, adapter: bool = False) -> str:
    """Return the README of an edited checkpoint.

    Args:
        recipe: As it stands in a file.
        steps: What each step did.
        adapter: Whether it is a PEFT adapter.
    """
    library = "peft" if adapter else "transformers"
    head = yaml.safe_dump({"base_model": recipe["model"], "library_name": library, "tags": ["diffract"]})
    told = [(step["step"], "; ".join(f"{k} {said(v)}" for k, v in step["summary"].items())) for step in steps]
    lines = [f"- `{name}`: {summary}" for name, summary in told]
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


@dataclass(frozen=True)
class EditPreview:
    """What a recipe would do.

    Attributes:
        steps: What each step decided.
        tensors: How many tensors there are.
        changed: How many of them change.
        read_bytes: What is read, about.
        written_bytes: Bytes of tensors that are written; of an adapter that is found out with its ranks.
        changed_bytes: Bytes of the rows in which anything changes: what is written where the rest can be shared.
        seconds: How long it takes, about.
        notes: What a reader of the outcome should know, in sentences.
    """

    steps: list[dict[str, Any]]
    tensors: int
    changed: int
    read_bytes: int
    written_bytes: int | None
    changed_bytes: int
    seconds: float
    notes: list[str]


def preview(recipe: Recipe | Mapping[str, Any] | str | Path, *, allow: Sequence[str] = ()) -> EditPreview:
    """Say what a recipe would do; checkpoints are opened and compared, a few tensors computed, nothing is written.

    Args:
        recipe: A recipe, or a YAML file.
        allow: What is allowed besides what the recipe allows.

    Raises:
        DiffractError: The recipe is wrong, or checkpoints do not fit.
    """
    recipe = as_recipe(recipe, allow)
    with open_bench(recipe) as bench:
        draft, plans = bench.plan(recipe.edits)
        infos = written_infos(draft, recipe.output)
        sizes = {name: info.size_bytes for name, info in draft.checkpoint.infos.items()}
        changed = {name for step in draft.steps for name in step}
        others = len(bench.inputs) - 1  # of each of them what changes is read, and of the model everything
        return EditPreview(
            steps=[{key: step[key] for key in ("step", "summary")} for step in described(plans)],
            tensors=len(infos),
            changed=len(changed),
            read_bytes=sum(sizes.values()) + others * sum(sizes[name] for name in changed),
            written_bytes=None if recipe.export is not None else sum(info.size_bytes for info in infos.values()),
            changed_bytes=sum(draft.touched_bytes(name) for name in sizes),
            seconds=_seconds(draft),
            notes=[*bench.notes, *bench.permissions.unneeded()],
        )


def _seconds(draft: Draft) -> float:
    """Measure one tensor of each kind, small ones first; of kinds that were not reached, judge by work."""
    kinds: dict[tuple[Any, ...], list[TensorInfo]] = defaultdict(list)
    for name, info in draft.checkpoint.infos.items():
        kinds[info.shape, info.dtype, tuple(name in step for step in draft.steps)].append(info)
    # Kinds that time does not suffice for are taken to work as fast as the slowest that was measured.
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
        folder: The folder that an edit wrote.
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
        draft, _ = bench.plan(recipe.edits)
        digests = computed(draft, written_infos(draft, recipe.output))
    stated = manifest["outputs"]["."]
    verdict.faults += [
        f"tensor {printable(name)!r}: the recipe gives another one today"
        for name, digest in digests.items()
        if stated.get(name) != digest
    ]
