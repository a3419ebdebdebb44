"""Whether a recipe still gives what it once gave: the truth of an edited checkpoint's own account."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diffract.checkpoints.provenance import Verdict, read_manifest, verify_folder
from diffract.edits.recipe import Recipe
from diffract.edits.to_files import open_bench, plan
from diffract.edits.write import compute, jobs_of, run_jobs, written_infos
from diffract.errors import RecipeError, printable
from diffract.settings import validated


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
