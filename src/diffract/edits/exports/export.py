"""What a recipe can write instead of a checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffract.edits.bench import Bench
from diffract.edits.draft import Draft
from diffract.edits.output import Output
from diffract.edits.step import Planned, Settings
from diffract.edits.write import Progress

FactorDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        outputs: For each file or folder of weights the digest of each tensor.
        planned: What was decided; it changes nothing.
        model: Folder of the model, to which configuration and tokenizer belong.
        loads_alone: Whether that folder is a whole model with its own configuration.
    """

    outputs: Mapping[str, Mapping[str, str]]
    planned: Planned
    model: Path
    loads_alone: bool


class Export(Settings):
    """One way to write an edited model: its settings are the fields."""

    @abstractmethod
    def write(
        self, bench: Bench, draft: Draft, folder: Path, target: Path, output: Output, progress: Progress | None
    ) -> Exported:
        """Write the model.

        Args:
            bench: The model and the checkpoints beside it.
            draft: The model after all steps.
            folder: Where to write.
            target: What the folder will be called.
            output: How the recipe wants weights to be written.
            progress: Called with work done, all work, and what was just finished.
        """
