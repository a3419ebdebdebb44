"""``diffract search truncate``: how much of a change is needed, by which rule, and against what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffract.search.change import matrix_changes_of
from diffract.search.choice import Which
from diffract.search.curves import Sketch, State, parse_fractions
from diffract.search.measure import build, measure
from diffract.search.plan import SPLITS, Estimate, Plan
from diffract.search.running import Asked, Found, run_search
from diffract.search.scorer import Progress, Scorer
from diffract.search.setup import How, Model, Stage
from diffract.search.tables import ITEMS, ON_TRUNCATION, QUALITY, TRUNCATION_CHOICE, TruncateTables
from diffract.search.truncating import SINGLE, Truncater, TruncationRule, parse_rules, truncation_sketches
from diffract.tables import frame


def search_truncate(
    base: Model,
    tuned: Model,
    *,
    rules: str | Sequence[str] | None = None,
    eval: str | Sequence[str] = "math",
    output: str | Path | None = None,
    fractions: str | Sequence[float] = "0:1:0.125",
    seeds: int = 3,
    tolerance: float | None = None,
    choose_by: Which = "best",
    write: str | Path | None = None,
    dry_run: bool = False,
    budget: str | int | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: Any = None,
    architecture: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> TruncateTables | Estimate:
    """Drop singular directions of the change by several rules, and measure what that does to quality.

    What is chosen is chosen on the selection split; the held-out split reports.

    Args:
        base: What the model was tuned from.
        tuned: The model that is searched.
        rules: As a list or separated by commas; all by default. ``drop`` keeps the largest directions, ``energy`` the
            fewest that hold a share, ``donoho-gavish`` and ``mp-edge`` what rises above noise. Controls, matched to
            ``drop`` at each fraction: ``tail`` keeps as many of the smallest; ``random`` as many by chance, so as many
            bytes; ``random-energy`` by chance until they hold as much energy; ``dare-energy`` and ``dare-bytes`` single
            entries by chance, scaled up, that hold as much energy or take as many bytes.
        eval: Tasks; the first decides.
        output: Write a run folder here; a search that was killed continues when it is started again.
        fractions: Of directions that are dropped, ``FROM:TO:STEP`` or a list.
        seeds: How many of each control by chance.
        tolerance: As of ``search_rewind``.
        choose_by: ``best``, or ``without-loss``: the fewest bytes.
        write: Write the chosen checkpoint here.
        dry_run: Only say what it would cost; one evaluation of each split is timed.
        budget: The most evaluations (``200``), or the most time that they may take (``30m``).
        data: A folder with a folder of files for each domain.
        limit: Items of each task at most, in each split.
        shots: Solved examples before each question.
        device: ``auto`` is CUDA where there is one.
        dtype: As of ``diffract.evaluate``.
        tokenizer: Where it is not beside the tuned model.
        architecture: A JSON file that describes the model.
        force: Replace an existing run folder, and the checkpoint.
        progress: Called with evaluations done, all of them, and what is done now.

    Returns:
        The tables of the run; of a dry run the estimate.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    wanted, at = parse_rules(rules), parse_fractions(fractions)
    how = How(eval, data, limit, shots, device, dtype, tokenizer, architecture)
    asked = Asked(seeds, tolerance, choose_by, budget, output, write, dry_run, force, progress)
    return run_search(base, tuned, how, asked, lambda stage, start: TruncateSearch(stage, start, wanted, at, seeds))


@dataclass
class TruncateSearch:
    """A search over what is kept of a change.

    Attributes:
        stage: The live model.
        base: What it was tuned from, in memory.
        rules: Which say what is kept.
        at: Fractions that are dropped.
        seeds: How many of each control by chance.
    """

    stage: Stage
    base: torch.nn.Module
    rules: tuple[TruncationRule, ...]
    at: tuple[float, ...]
    seeds: int

    def __post_init__(self) -> None:
        bench = self.stage.live.bench
        self.truncater = Truncater(self.base, matrix_changes_of(bench, bench.other(self.base)))
        self.kind: str = "search truncate"
        self.sketches: list[Sketch] = truncation_sketches(self.rules, self.seeds, self.at)

    @property
    def effects(self) -> int:
        """How many single units it measures."""
        return 0

    @property
    def ends(self) -> list[State]:
        """All of the change dropped, rules that make one state, and the base."""
        single = [s for s in self.sketches if s.labels["rule"] in SINGLE]
        dropped = Sketch({"rule": "drop", "seed": 0}, (0.0, 1.0))
        return [*(self.truncater.point(s, 1.0).state for s in [dropped, *single]), self.truncater.whole()]

    def settings(self) -> dict[str, Any]:
        """Return its settings as a manifest keeps them."""
        return {"rules": list(self.rules), "fractions": list(self.at)}

    def far(self, row: Mapping[str, Any]) -> float:
        """Say how far a chosen point goes: how few bytes it takes."""
        return -row["bytes"]

    def run(self, scorer: Scorer, plan: Plan, tolerance: float | None) -> Found[TruncateTables]:
        """Measure curves, and choose."""
        curves = build(self.sketches, plan, self.truncater.point)
        points, chosen = measure(scorer, self.sketches, curves, plan, tolerance)
        base = [{"rule": "base", **row} for split in SPLITS for row in scorer.rows(split, self.truncater.whole())]
        tables = TruncateTables(
            points=frame(points + base, ON_TRUNCATION | QUALITY),
            choice=frame(chosen, TRUNCATION_CHOICE),
            items=scorer.items().select(*ITEMS),
        )
        return Found(tables, chosen)
