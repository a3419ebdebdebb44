"""What findings are made from: the family, how it is judged, and everything that was scored so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import torch

from diffract.checkpoints import TensorWriter, open_checkpoint
from diffract.corpora import Split
from diffract.evaluate import Evaluator, Task, load_subject, load_tasks, paired, summarise
from diffract.store import Cache, whole_folder
from diffract.studies.family import FAMILY, Family, Say
from diffract.studies.finding import Number, shown
from diffract.studies.recipe import StudyRecipe

NOISE = "noise"
"""The control of a tuned model: its base with changes of the same norms in random directions."""


@dataclass
class Study:
    """A study whose family is trained.

    Attributes:
        recipe: What is asked.
        family: The checkpoints of the study.
        folder: Where everything goes.
        data: The folder that files' names are relative to.
        say: Told what is being done.
    """

    recipe: StudyRecipe
    family: Family
    folder: Path
    data: Path | None
    say: Say

    @cached_property
    def task_of(self) -> dict[str, str]:
        """The name of each domain's task."""
        return {domain: self._load([spec], "held-out")[0].name for domain, spec in self.recipe.quality.tasks.items()}

    @cached_property
    def tasks(self) -> list[Task]:
        """All tasks on held-out items: those of domains first."""
        return self._load([*self.recipe.quality.tasks.values(), *self.recipe.quality.further], "held-out")

    @cached_property
    def target(self) -> Task:
        """The task of the domain that is asked about."""
        return next(task for task in self.tasks if task.name == self.task_of[self.recipe.target])

    @property
    def base(self) -> str:
        """The base with the largest budget that was trained on from."""
        return self.family.bases[self.family.last]

    @property
    def tuned(self) -> dict[str, str]:
        """What was trained from that base, by domain."""
        return dict(self.family.tuned[self.family.last])

    def _load(self, specs: Sequence[str], split: Split) -> list[Task]:
        return load_tasks(list(specs), split=split, data=self.data, limit=self.recipe.quality.limit)

    def scores(self, ref: str) -> pl.DataFrame:
        """Return a checkpoint's scores item by item, in all tasks."""
        with Cache(self.folder / "scores") as cache:
            return Evaluator(load_subject(ref), self.tasks, cache=cache).scores()

    def quality(self, ref: str) -> pl.DataFrame:
        """Return a checkpoint's quality in all tasks, with intervals."""
        return summarise(self.scores(ref), self.tasks)

    def searching(self) -> dict[str, Any]:
        """Return what all searches are told: which task decides, on which items, and where."""
        target = self.recipe.quality.tasks[self.recipe.target]
        return {"eval": [target], "data": self.data, "limit": self.recipe.search.limit}

    def gain(self, before: str, after: str, task: Task | None = None) -> Number:
        """Return how much better a checkpoint is than another, item by item; positive is better.

        Args:
            before: The checkpoint that is held against.
            after: The checkpoint that is judged.
            task: What quality is measured in; the target's task by default.
        """
        task = task or self.target
        row = paired(self.scores(before), self.scores(after), self.tasks).row(
            by_predicate=pl.col("task") == task.name, named=True
        )
        low, high = row["low"], row["high"]
        if task.better == "lower" and low is not None:
            low, high = -high, -low
        return Number(f"gain in {task.name}", row["gain"], low=low, high=high, unit=task.unit)

    def tuning(self) -> str:
        """Say what tuning on the target as a whole gained, for comparison."""
        return f"Tuning as a whole gained {shown(self.gain(self.base, self.tuned[self.recipe.target]))}."

    def noise(self, domain: str) -> str:
        """Return the control of a tuned model: every tensor changes by as much, in a random direction."""
        folder = self.folder / FAMILY / f"{NOISE}-{domain}"
        if not folder.exists():
            write_noise(self.base, self.tuned[domain], folder)
        return str(folder)


def write_noise(base: str, tuned: str, folder: Path, *, seed: int = 0) -> None:
    """Write a base whose tensors are changed by Gaussian noise of the norm that a tuned model's changes have.

    Rounded to the stored dtype as trained weights are. Tensors without a partner are left out.

    Args:
        base: W0.
        tuned: W1: each tensor becomes W0 + G ||W1 - W0||_F / ||G||_F.
        folder: Where to; it appears whole or not at all.
        seed: The seed of G.
    """
    generator = torch.Generator().manual_seed(seed)
    with open_checkpoint(base) as before, open_checkpoint(tuned) as after, whole_folder(folder) as draft:
        (draft / "config.json").write_text(json.dumps(dict(before.config)), encoding="utf-8")
        with TensorWriter(draft) as writer:
            for name in (name for name in before.names if name in after.names):
                origin = before.read(name)
                change = after.read(name).double() - origin.double()
                noise = torch.randn(origin.shape, generator=generator, dtype=torch.float64)
                scale = torch.linalg.vector_norm(change) / torch.linalg.vector_norm(noise)
                writer.add(name, (origin.double() + noise * scale).to(origin.dtype))
