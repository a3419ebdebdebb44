"""The recipe of a study: which family of checkpoints, how it is judged, and which findings are tested on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from diffract.errors import RecipeError, printable
from diffract.settings import STRICT
from diffract.train.recipe import MixPart

Share = Annotated[float, Field(ge=0, le=1)]


class Pretraining(BaseModel):
    """Where the bases come from: trained here, or given."""

    model_config = STRICT

    train: dict[str, Any] | None = None
    """A training recipe without data; its checkpoints are the bases."""
    given: dict[int, str] | None = None
    """Instead of training: checkpoints by the number of tokens that they have seen."""
    budgets: list[int] | None = None
    """Token counts whose checkpoints are trained on; all by default. The others are only looked at."""

    @model_validator(mode="after")
    def _check(self) -> Pretraining:
        if (self.train is None) == (self.given is None):
            raise ValueError("expected either train or given")
        known = self.tokens
        if unknown := [b for b in self.budgets or [] if b not in known]:
            raise ValueError(f"budget {unknown[0]} is none of the checkpoints ({', '.join(map(str, known))})")
        return self

    @property
    def tokens(self) -> list[int]:
        """Token counts of all checkpoints, rising."""
        if self.given is not None:
            return sorted(self.given)
        assert self.train is not None
        return sorted({*self.train.get("checkpoints", []), self.train.get("tokens", 0)})

    @property
    def chosen(self) -> list[int]:
        """Token counts that continual pre-training begins from, rising."""
        return sorted(self.budgets) if self.budgets else self.tokens


class Continual(BaseModel):
    """Continual pre-training: the same from every budget, in every domain."""

    model_config = STRICT

    train: dict[str, Any]
    """A training recipe without model, mix and data."""
    domains: dict[str, MixPart]
    """What each domain is trained on."""
    replay: dict[str, MixPart] = {}
    """What is mixed in everywhere, such as a tenth of the pre-training mix."""


class Quality(BaseModel):
    """How checkpoints are judged."""

    model_config = STRICT

    tasks: dict[str, str]
    """For each domain, the task that measures it, as diffract eval has it: math=word-problems:1-2."""
    further: list[str] = []
    """Tasks that are reported beside these, such as gsm:1."""
    limit: Annotated[int | None, Field(ge=1)] = None
    """Items of each task and split, at most."""
    tolerance: Annotated[float, Field(ge=0)] = 0.01
    """How much worse still counts as without loss, and how high a barrier may be, in a task's unit."""


class Paths(BaseModel):
    """How finely paths between models are measured."""

    model_config = STRICT

    steps: Annotated[int, Field(ge=3)] = 11
    """Points of a path, with both ends."""
    limit: Annotated[int | None, Field(ge=1)] = None
    """Items of each task at most."""


class SearchSettings(BaseModel):
    """How finely rewinding, truncation and paths are searched."""

    model_config = STRICT

    fractions: list[Share] = [i / 8 for i in range(9)]
    """Shares of heads that are rewound, and of directions that are dropped."""
    orders: list[str] = ["greedy", "reference", "magnitude", "random", "first-order", "activation"]
    """Orders in which heads are rewound."""
    seeds: Annotated[int, Field(ge=1)] = 3
    """Random orders, and random directions."""
    limit: Annotated[int | None, Field(ge=1)] = None
    """Items of the target's task in each split, at most."""
    paths: Paths = Paths()
    """Paths between models."""


LAUNCHERS = ("torchrun", "accelerate")
"""What may stand first in ``launch``."""

_SETTING = re.compile(
    r"launch|--?[a-z][\w-]*(=[\w.:-]+)?|[\d.:]+|[\w-]+\.ya?ml|auto|gpu|cpu|no|bf16|fp16|fp8|localhost"
)
_STARTS = ("-m", "--module", "--no_python", "--no-python", "--run-path", "--run_path", "--entrypoint", "--main")
"""Options that take a program, or make one of the word behind them."""


class StudyRecipe(BaseModel):
    """A study."""

    model_config = STRICT

    name: str
    """What the study is called."""
    about: str
    """What is asked, and of which models, in a sentence or two."""
    target: str
    """The domain whose quality the findings on budgets, rewinding and truncation are about."""
    reference: str
    """The domain whose changes tell what is not specific to the target."""
    pretraining: Pretraining
    """The bases."""
    continual: Continual
    """What is trained from them."""
    quality: Quality
    """How they are judged."""
    search: SearchSettings = SearchSettings()
    """How finely edits are searched."""
    findings: list[str] | None = None
    """What is tested; everything by default, which ``load_study`` fills in with the names of the catalog."""
    data: str | None = None
    """The folder that names of files are relative to, itself relative to the recipe; --data replaces it."""
    jobs: Annotated[int, Field(ge=1)] = 1
    """Training runs side by side."""
    threads: Annotated[int | None, Field(ge=1)] = None
    """Threads of each training run and of everything else; PyTorch's own number by default."""
    launch: list[str] = []
    """What stands before a training command, such as [accelerate, launch, --num_processes, 8]."""

    def check_launch(self, allow: Sequence[str]) -> None:
        """Refuse to start a program of the recipe's choice, but for the usual launchers with usual settings.

        Args:
            allow: Permissions; ``launch`` is the one for any program.

        Raises:
            RecipeError: It is another program, or settings that start one.
        """
        program, *rest = self.launch or [""]
        harmless = all(_SETTING.fullmatch(word) and not word.startswith(_STARTS) for word in rest)
        if self.launch and not (program in LAUNCHERS and harmless) and "launch" not in allow:
            raise RecipeError(
                f"launch: {printable(' '.join(self.launch))!r} starts a program of the recipe's choice; without "
                f"permission only {' and '.join(LAUNCHERS)} are started, with options and numbers. If you trust the "
                "recipe, pass --allow launch."
            )

    @model_validator(mode="after")
    def _check(self) -> StudyRecipe:
        for role, domain in (("target", self.target), ("reference", self.reference)):
            if domain not in self.continual.domains:
                raise ValueError(f"{role} {domain!r} is none of the domains ({', '.join(self.continual.domains)})")
        if missing := [d for d in self.continual.domains if d not in self.quality.tasks]:
            raise ValueError(f"domain {missing[0]!r} has no task in quality.tasks")
        return self

    def data_folder(self, recipe: Path, wanted: str | Path | None = None) -> Path | None:
        """Return where files are: what is wanted, or what the recipe says, relative to the recipe."""
        if wanted is not None:
            return Path(wanted)
        return recipe.parent / self.data if self.data else None
