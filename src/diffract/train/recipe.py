"""The settings of a training run, as its recipe has them; validated without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from diffract.errors import DiffractError, RecipeError
from diffract.settings import STRICT, read_recipe, validated

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

RATE_FROM_SCRATCH, RATE_OF_CONTINUATION = 4.0e-3, 4.0e-4

BYTES_AND_END = 257
"""The smallest vocabulary: every byte, and the end of a text."""


Text = Annotated[
    Annotated[str, Field(min_length=1)],
    BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value),
]


class ModelSettings(BaseModel):
    """Which model is trained: a new one, or one that goes on."""

    model_config = STRICT

    config: dict[str, Any] | None = None
    """A new model: model_type and fields of its config under transformers' own names."""
    init: Text | None = None
    """A model that goes on with all its parameters: a folder, or org/name@revision on the hub."""

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        if (self.config is None) == (self.init is None):
            raise ValueError("expected either a config or an init")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("the config needs a model_type such as olmo2, llama or gpt2")
        return self


class TokenizerTraining(BaseModel):
    """A byte-level BPE tokenizer that is trained on the mix."""

    model_config = STRICT

    vocabulary: Annotated[int, Field(ge=BYTES_AND_END)]
    """Tokens of the tokenizer at most: all bytes, the end of a text, and merges."""


class TokenizerSettings(BaseModel):
    """Where the tokenizer comes from."""

    model_config = STRICT

    train: TokenizerTraining | None = None
    """Train one on the mix."""
    path: Text | None = None
    """Take one that is there: a folder, or org/name@revision on the hub."""

    @model_validator(mode="after")
    def _check(self) -> TokenizerSettings:
        if (self.train is None) == (self.path is None):
            raise ValueError("expected either train or a path")
        return self


class MixPart(BaseModel):
    """One part of the mix."""

    model_config = STRICT

    sources: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Files, folders, stdlib, word-problems or datasets:org/name, as docs/train.md lists them."""
    share: Positive = 1.0
    """Share of the rows of all batches; the shares of all parts are divided by their sum."""


class Schedule(BaseModel):
    """How the learning rate goes over the run; warmup and decay are shares of all steps."""

    model_config = STRICT

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd (warm up, stay, decay along a line), cosine, or constant."""
    warmup: Share = 0.05
    """The rate rises along a line over this share of the steps."""
    decay: Share = 0.2
    """Of wsd alone: the rate falls along a line over this share of the steps, the last ones."""
    floor: Share = 0.1
    """Of wsd and cosine: the last step has this share of the rate."""

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup and decay are {self.warmup + self.decay:g} of the steps, expected 1 at most")
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(BaseModel):
    """The settings of AdamW."""

    model_config = STRICT

    rate: Positive | None = None
    """Highest learning rate; 4.0e-3 by default for a new model, 4.0e-4 for one that goes on."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the running means of gradients and of their squares."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """How much matrices decay; vectors, such as the weights of norms, do not."""
    clip: Positive | None = 1.0
    """The gradient is shortened to this norm; null leaves it as it is."""


class TrainRecipe(BaseModel):
    """A training run."""

    model_config = STRICT

    model: ModelSettings
    """Which model is trained."""
    tokenizer: (
        Annotated[
            TokenizerSettings,
            # a path alone is short for settings
            BeforeValidator(lambda value: {"path": value} if isinstance(value, str | Path) else value),
        ]
        | None
    ) = None
    """Where the tokenizer comes from; by default it is that of model.init."""
    data: Text | None = None
    """The folder that names of files in sources are relative to."""
    mix: Annotated[dict[str, MixPart], Field(min_length=1)]
    """What the model is trained on, by name."""
    context: Annotated[int, Field(ge=2)] = 256
    """Tokens of a window."""
    batch_tokens: Count = 4096
    """Tokens of a step, all devices together."""
    micro_batch: Count | None = None
    """Windows that a device computes at once; all by default, and halved when memory does not suffice."""
    tokens: Count
    """Tokens to train on, rounded up to whole steps."""
    checkpoints: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Tokens after which a checkpoint is written, besides the end, rounded up to whole steps; 0 is the beginning."""
    schedule: Schedule = Schedule()
    """How the rate goes over the run."""
    optimizer: Optimizer = Optimizer()
    """AdamW's settings."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """What products are computed in: auto is bf16 where a GPU has it, else float32. Weights are float32 always."""
    save_dtype: Literal["bfloat16", "float32"] | None = None
    """What checkpoints are stored in; by default as the init is, float32 for a new model."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the new weights, of the order of the text, and of dropout."""
    threads: Count | None = None
    """torch's threads on a CPU; as they are by default."""
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where losses are sent to, besides log.jsonl."""
    state_every: Count = 200
    """Steps after each of which the run can be taken up again."""

    @model_validator(mode="after")
    def _check(self) -> TrainRecipe:
        if self.model.init is None and self.tokenizer is None:
            raise ValueError("a new model needs a tokenizer: {train: {vocabulary: 2048}}, or the path of one")
        if self.batch_tokens % self.context:
            raise ValueError(f"batch_tokens {self.batch_tokens} is no multiple of the context, {self.context}")
        if late := [count for count in self.checkpoints if count > self.tokens]:
            raise ValueError(f"a checkpoint at {late[0]:,} tokens comes after the end, {self.tokens:,}")
        return self

    @property
    def rows(self) -> int:
        """Windows of a step."""
        return self.batch_tokens // self.context

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return -(-self.tokens // self.batch_tokens)

    @property
    def stops(self) -> tuple[int, ...]:
        """Steps after which a checkpoint is written, in order; the last is the end."""
        return tuple(sorted({*(-(-count // self.batch_tokens) for count in self.checkpoints), self.steps}))

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        usual = RATE_FROM_SCRATCH if self.model.init is None else RATE_OF_CONTINUATION
        return self.optimizer.rate or usual

    @property
    def shares(self) -> dict[str, float]:
        """Share of each part of the mix; they sum to 1."""
        whole = sum(part.share for part in self.mix.values())
        return {name: part.share / whole for name, part in self.mix.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return all settings as plain values."""
        return self.model_dump(mode="json")


def load_train_recipe(recipe: TrainRecipe | Mapping[str, Any] | str | Path) -> TrainRecipe:
    """Return a validated recipe.

    Args:
        recipe: A recipe, its settings, or the YAML file that it stands in.

    Raises:
        RecipeError: The recipe cannot be read, or says what cannot be; the message holds the path in it.
    """
    if isinstance(recipe, TrainRecipe):
        return recipe
    if isinstance(recipe, Mapping):
        return validated(TrainRecipe, recipe, "recipe")
    if not isinstance(recipe, str | Path):
        raise RecipeError(f"expected a recipe, its settings or a file, got {type(recipe).__name__}.")
    return validated(TrainRecipe, read_recipe(recipe, "model, mix and tokens"), str(recipe))


PACKAGES = ("accelerate", "tokenizers", "transformers")


def require_extra() -> None:
    """Raise unless what training needs is installed.

    Raises:
        DiffractError: A package is missing; the message says how to install it.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise DiffractError(f"training needs {', '.join(missing)}: pip install 'diffract-llm[train]'.")


def rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """Return the share of the highest rate that a step has.

    With w = round(warmup * steps) and d = round(decay * steps), the steps 0, ..., w - 1 have (step + 1) / w. After
    them ``constant`` has 1; ``wsd`` has 1 and in the last d steps 1 - (1 - floor) t with t = 1/d, ..., 1; ``cosine``
    has floor + (1 - floor) (1 + cos(pi t)) / 2 with t = 1/(steps - w), ..., 1. So the last step has the floor.

    Args:
        schedule: The kind of the schedule and its shares.
        step: The number of the step, counted from 0.
        steps: How many steps the whole run has.

    Source:
        Warm-up, stable, decay: Hu et al. 2024 (MiniCPM), with the linear decay of Hägele et al. 2024. Cosine:
        Loshchilov & Hutter 2017.

    >>> [rate_factor(Schedule(warmup=0.2, decay=0.4, floor=0.0), s, 5) for s in range(5)]
    [1.0, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "cosine":
        done = (step + 1 - warmup) / (steps - warmup)
        return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * done)) / 2
    decay = min(round(schedule.decay * steps), steps - warmup) if schedule.kind == "wsd" else 0
    done = max(0.0, (step + 1 - steps + decay) / decay) if decay else 0.0
    return 1 - (1 - schedule.floor) * done
