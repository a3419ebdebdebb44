"""What a recipe can write instead of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffract.edits.bench import Bench
from diffract.edits.draft import Draft
from diffract.edits.exports.peft import Factors, Module
from diffract.edits.output import Output
from diffract.edits.planning import Planned
from diffract.settings import Progress


@dataclass(frozen=True)
class Split:
    """A model split into an adapter and what it lies over.

    Attributes:
        planned: Changes of each adapted tensor, on whose way the adapter's factors are found.
        modules: What is adapted, in the model's order.
        factors: By tensor, as soon as its change has been computed.
    """

    planned: Planned
    modules: list[Module]
    factors: dict[str, Factors] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """Where an export is written.

    Attributes:
        folder: The folder to fill.
        path: What it will be called when it is whole.
        output: How the recipe wants weights to be written.
        progress: Called with work done, all work, and what was just finished.
    """

    folder: Path
    path: Path
    output: Output
    progress: Progress | None = None


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        outputs: For each file or folder of weights the digest of each tensor.
        model: The folder that tokenizer and the like belong to.
        loads_alone: Whether that folder is a whole model with its own configuration.
    """

    outputs: Mapping[str, Mapping[str, str]]
    model: Path
    loads_alone: bool


@dataclass(frozen=True)
class Exporter:
    """One way to write an edited model.

    Attributes:
        plan: Returns how the model, after all steps, is split: from settings, bench and draft.
        write: Writes that: from settings, bench, draft, what ``plan`` returned, and where to.
    """

    plan: Callable[[Any, Bench, Draft], Split]
    write: Callable[[Any, Bench, Draft, Split, Target], Exported]
