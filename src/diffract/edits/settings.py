"""The settings of every edit, as recipes and the command line have them; validated without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

from diffract.edits.rule import NoiseRule, Rule, Side
from diffract.errors import printable
from diffract.settings import STRICT

Unit = Literal["head", "matrix", "expert", "tensor"]
Shared = Literal["all", "majority", "never"]
Order = Literal["reference", "magnitude", "random", "greedy"]
Method = Literal["linear", "slerp", "task-arithmetic", "dare", "ties", "dare-ties", "tsv", "iso-c"]
FactorDtype = Literal["float32", "bfloat16", "float16"]

WITHOUT_BASE = ("linear", "slerp")
"""Merges that need no common base."""

OF_MATRICES = ("tsv", "iso-c")
"""Merges that are defined for matrices; other tensors get the mean change."""

WITH_ELECTION = ("ties", "dare-ties")
"""Merges in which models vote on signs."""


def _split(value: object) -> object:
    """Read ``0.1,0.5`` as the command line has it."""
    return value.split(",") if isinstance(value, str) else value


Band = Annotated[tuple[float, float], BeforeValidator(_split)]

Finite = Annotated[float, Field(allow_inf_nan=False)]


def _reference(value: object) -> object:
    """A path becomes text; mappings, modules and open checkpoints stay what they are."""
    if isinstance(value, str) and not value:
        raise ValueError("expected a checkpoint, got an empty text")
    return str(value) if isinstance(value, Path) else value


def _rank(value: object) -> object:
    """Read a rank; one message instead of one for each kind that it could have been."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if number in ("auto", "full") or (isinstance(number, int) and not isinstance(number, bool) and number >= 1):
        return number
    raise ValueError(f"expected a whole number from 1, auto or full, got {printable(value)!r}")


Rank = Annotated[Annotated[int, Field(ge=1)] | Literal["auto", "full"], BeforeValidator(_rank)]


def describe(reference: object) -> str:
    """Name a checkpoint in a manifest."""
    return reference if isinstance(reference, str) else printable(type(reference).__name__)


Model = Annotated[
    Any,
    BeforeValidator(_reference),
    PlainSerializer(describe, when_used="json"),
    WithJsonSchema({"type": "string"}),
]
"""A checkpoint: what ``diffract.open`` takes; text in a recipe."""


class Settings(BaseModel):
    """A part of a recipe: its settings are the fields, each with its meaning below it.

    Attributes:
        name: What it is called in recipes and on the command line.
    """

    model_config = STRICT

    name: ClassVar[str] = ""


class Rewind(Settings):
    """Give chosen attention heads of a tuned model back the base's weights."""

    name: ClassVar[str] = "rewind"

    to: Model
    """The base."""
    fraction: Annotated[float | None, Field(ge=0, le=1)] = None
    """Share of the heads that is rewound, rounded to a whole number of them."""
    heads: str | None = None
    """Heads by name instead, such as L3.h5,L7.h0."""
    order: Order = "magnitude"
    """Which go first: magnitude (least changed), reference (least specific), greedy (best measured) or random."""
    reference: Model | None = None
    """Order reference: a checkpoint of the base tuned on reference text, or its name in the scores file."""
    scores: str | None = None
    """A heads.parquet instead of measuring changes; order greedy: a table of layer, head and effect on quality."""
    domain: str | None = None
    """What the scores file calls the model, where it speaks of several."""
    reverse: bool = False
    """Take the order from its end: a control."""
    seed: int = 0
    """Of order random."""
    amount: Finite = 1.0
    """How far to go back: 1 is the base, 0.5 half way."""
    unit: Unit = "head"
    """What is rewound together: head, matrix, expert or tensor."""
    select: str | None = None
    """Matrices that count, such as 'layers 8-, attn'; all by default."""
    kv: Shared = "all"
    """When shared key-value heads go: with all of their query heads, with the majority, or never."""

    @model_validator(mode="after")
    def _check(self) -> Rewind:
        if (self.heads is None) == (self.fraction is None):
            raise ValueError("expected either a fraction or a list of heads")
        if self.heads is None and self.order == "reference" and self.reference is None:
            raise ValueError("order reference needs a reference")
        if self.heads is None and self.order == "greedy" and self.scores is None:
            raise ValueError("order greedy needs scores: the effect of each head alone")
        if self.scores is not None and self.unit != "head":
            raise ValueError(f"scores are of heads, expected unit head, got {self.unit}")
        return self


class Truncate(Settings):
    """Keep only some singular directions of the difference between a tuned model and its base."""

    name: ClassVar[str] = "truncate"

    base: Model
    """What the model was tuned from."""
    drop: float | None = None
    """Drop this fraction of the singular directions."""
    rank: int | None = None
    """Keep so many singular directions of each matrix."""
    energy: float | None = None
    """Keep the fewest that hold this share of the squared Frobenius norm."""
    above: float | None = None
    """Keep those whose singular value exceeds this."""
    rule: NoiseRule | None = None
    """Keep what rises above noise: donoho-gavish or mp-edge."""
    band: Band | None = None
    """Keep a band of the spectrum: from and to, as fractions counted from the largest."""
    side: Side = "head"
    """head keeps what the rule picks, tail the rest, random as many by chance, of energy as many as hold it."""
    seed: int = 0
    """Of side random."""
    per: Literal["matrix", "head"] = "matrix"
    """Whether each matrix is truncated as a whole, or each attention head's slice by itself."""
    select: str | None = None
    """Matrices, such as 'layers 8-, attn'; all by default."""

    @model_validator(mode="after")
    def _check(self) -> Truncate:
        self.criterion()
        return self

    def criterion(self) -> Rule:
        """Return the rule that the settings make."""
        return Rule(self.drop, self.rank, self.energy, self.above, self.rule, self.band, self.side)


class Interpolate(Settings):
    """Interpolate between two checkpoints: (1 - a) of the model and a of the other."""

    name: ClassVar[str] = "interpolate"

    other: Annotated[Model, Field(alias="with")]
    """The checkpoint at a = 1."""
    at: Finite
    """The weight a of the other; it may leave 0 to 1."""
    groups: dict[str, Finite] = Field(default_factory=dict)
    """Other weights by selection, such as {'layers 0-7': 0.3, 'mlp': 0.8}; of several that fit the last counts."""
    method: Literal["linear", "slerp"] = "linear"
    """linear, or slerp: along the arc between two tensors."""
    select: str | None = None
    """Matrices that move, such as 'layers 8-, attn'; every tensor by default."""


class Merge(Settings):
    """Merge the model with others: their mean, or their changes against a common base."""

    name: ClassVar[str] = "merge"

    models: Annotated[dict[str, Model], Field(min_length=1)]
    """The others, by name."""
    base: Model | None = None
    """What all were tuned from; linear and slerp need none."""
    called: str = "model"
    """Name of the model that is edited, for weights."""
    method: Method = "task-arithmetic"
    """linear, slerp, task-arithmetic, dare, ties, dare-ties, tsv or iso-c."""
    weights: dict[str, Finite] = Field(default_factory=dict)
    """Weight of each model by name; 1 where nothing is said. linear and slerp divide by their sum."""
    scale: Finite = 1.0
    """What the merged change is multiplied with; linear and slerp have none."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Of ties: share of each change's entries that is kept, the largest."""
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of dare and dare-ties: probability with which an entry of a change is dropped."""
    seed: int = 0
    """Of dare and dare-ties."""
    select: str | None = None
    """Matrices that are merged, such as 'layers 8-, attn'; every tensor by default."""

    @model_validator(mode="after")
    def _check(self) -> Merge:
        names = (self.called, *self.models)
        if self.called in self.models:
            raise ValueError(f"two models are called {self.called!r}")
        if strange := [name for name in self.weights if name not in names]:
            raise ValueError(f"weights: no model is called {strange[0]!r}, expected some of {', '.join(names)}")
        if self.base is None and self.method not in WITHOUT_BASE:
            raise ValueError(f"method {self.method} needs a base")
        if self.method == "slerp" and len(self.models) > 1:
            raise ValueError(f"slerp goes between two models, got {len(names)}")
        if self.method in WITHOUT_BASE and self.scale != 1.0:
            raise ValueError(f"method {self.method} knows no scale: it mixes models, not changes; weights are theirs")
        if self.method in OF_MATRICES and self.weights:
            raise ValueError(f"method {self.method} knows no weights; scale is the weight of all")
        if self.method in WITH_ELECTION and min(self.shares) <= 0:
            raise ValueError(f"method {self.method} expects weights above zero")
        if self.method in WITHOUT_BASE and sum(self.shares) == 0:
            raise ValueError("the weights sum to 0")
        return self

    @property
    def shares(self) -> list[float]:
        """Weights in the order of the models, the edited one first."""
        return [self.weights.get(name, 1.0) for name in (self.called, *self.models)]


class Laser(Settings):
    """LASER: replace chosen weight matrices by their largest singular directions."""

    name: ClassVar[str] = "laser"

    keep: Annotated[float, Field(gt=0, le=1)]
    """Share rho of the singular directions that is kept, rounded down; one at least."""
    select: str
    """Which matrices, such as 'layers 20-, mlp.up'."""


class Svf(Settings):
    """SVF: multiply the singular values of weight matrices with given factors z."""

    name: ClassVar[str] = "svf"

    z: Finite | None = None
    """One factor for all."""
    factors: str | None = None
    """A .safetensors or .npz file with a vector for each matrix, by the matrix's or its tensor's name."""
    select: str | None = None
    """Which matrices, such as 'attn, mlp'; with a file all that it names."""

    @model_validator(mode="after")
    def _check(self) -> Svf:
        if (self.z is None) == (self.factors is None):
            raise ValueError("expected either z or a file of factors")
        if self.z is not None and self.select is None:
            raise ValueError("z for all needs a selection of matrices")
        return self


class Lora(Settings):
    """Write the change against the base as a PEFT LoRA adapter."""

    name: ClassVar[str] = "lora"

    base: Model
    """What the model was tuned from, and what the adapter lies over."""
    rank: Rank | None = None
    """Rank of every matrix, auto for what rises above noise in each (donoho-gavish, the default), or full."""
    energy: float | None = None
    """Instead: the fewest directions that hold this share of each change's squared Frobenius norm."""
    rule: NoiseRule | None = None
    """Instead: what rises above noise, by donoho-gavish or mp-edge."""
    dtype: FactorDtype = "float32"
    """Of the adapter's factors: float32, bfloat16 or float16."""
    select: str | None = None
    """Matrices, such as 'layers 8-, attn'; every linear layer by default."""

    @model_validator(mode="after")
    def _check(self) -> Lora:
        if sum(x is not None for x in (self.rank, self.energy, self.rule)) > 1:
            raise ValueError("expected one of rank, energy and rule")
        self.criterion()
        return self

    def criterion(self) -> Rule:
        """Return the rule that the settings make."""
        if self.rank == "full":
            return Rule(drop=0.0)
        if isinstance(self.rank, int):
            return Rule(rank=self.rank)
        if self.energy is not None:
            return Rule(energy=self.energy)
        return Rule(rule=self.rule or "donoho-gavish")


class Pissa(Settings):
    """Split a model into a PEFT adapter of its principal singular directions and the residual, to train the adapter."""

    name: ClassVar[str] = "pissa"

    rank: Annotated[int, Field(ge=1)] = 16
    """Singular directions of each matrix that go into the adapter."""
    dtype: FactorDtype = "float32"
    """Of the adapter's factors: float32, bfloat16 or float16."""
    select: str | None = None
    """Matrices, such as 'layers 8-, attn'; every linear layer by default."""
