"""What a recipe would do: decided and measured on a few tensors, with nothing written."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffract.checkpoints import TensorInfo
from diffract.edits.bench import Bench
from diffract.edits.draft import Draft
from diffract.edits.exports import EXPORTERS
from diffract.edits.recipe import Recipe
from diffract.edits.to_files import Plans, as_recipe, described, open_bench, plan
from diffract.edits.write import written_infos
from diffract.engine import cores, single_threaded

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
