"""What an adapter holds, module by module, and what its configuration says of it; nothing here knows a base.

Two writers are read, PEFT and mlx-lm. LoRA (Hu et al. 2021): W1 = W0 + s B A with s = alpha / r, or alpha / sqrt(r)
where it is rank-stabilised (Kalajdzievski 2023); mlx-lm states s itself. DoRA (Liu et al. 2024): each output of W0 +
s B A is given the norm that the adapter holds for it. Beside these, whole tensors: modules that were trained whole,
embeddings of a changed vocabulary, biases, and single rows of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import TYPE_CHECKING, Any

from diffract.checkpoints.checkpoint import Checkpoint
from diffract.checkpoints.header import TensorInfo
from diffract.errors import CheckpointError, printable

if TYPE_CHECKING:  # headers are read without torch
    import torch

CONFIG = "adapter_config.json"
WEIGHTS, TORCH_WEIGHTS, MLX_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors"
FILES = (WEIGHTS, TORCH_WEIGHTS, MLX_WEIGHTS)
"""What an adapter's factors may be called, the preferred name first."""

OTHER_SUMS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config"),
    *("use_bdlora", "use_qalora", "velora_config"),
)
"""Settings of PEFT under which a weight is another function of the factors, or of other tensors."""

TAKEN = ("pissa", "olora")
"""Initialisations (``init_lora_weights``) that take what factors begin with out of the base, which tells it again."""

MOVES_BASE = ("pissa_niter", "corda", "loftq", "lora_ga")
"""Initialisations that change the base too, by draws or by data that nobody has kept."""

TOKENS = "TRAINABLE_TOKENS"
"""PEFT's method that trains rows of an embedding and nothing else."""

_UNSTATED = object()

MLX_KINDS = ("lora", "dora", "full")
"""What mlx-lm calls the ways of tuning; all of them are read."""

MERGE = "Merge it into its base with the library that wrote it, and open the result."


@dataclass(frozen=True)
class Settings:
    """An adapter's configuration, of which nothing is left that changes the meaning of its tensors unread.

    Attributes:
        raw: What its file says.
        where: What to call the adapter in messages.
    """

    raw: Mapping[str, Any]
    where: str

    @property
    def mlx(self) -> bool:
        """Whether mlx-lm wrote it: its file names no method of PEFT."""
        return "peft_type" not in self.raw and ("fine_tune_type" in self.raw or "lora_parameters" in self.raw)

    @property
    def dora(self) -> bool:
        """Whether there must be magnitudes."""
        return self.raw.get("fine_tune_type") == "dora" if self.mlx else bool(self.raw.get("use_dora"))

    @property
    def taken(self) -> str:
        """How factors were taken out of the base's weights before training, of `TAKEN`; empty where none were."""
        told = str(self.raw.get("init_lora_weights")).lower()
        return told if told in TAKEN and not self.mlx else ""

    @property
    def base(self) -> object:
        """What it says that its base is."""
        return self.raw.get("model" if self.mlx else "base_model_name_or_path")

    def rank(self, module: str) -> int | None:
        """Return the rank that is stated for a module, ``None`` where none is."""
        if self.mlx:
            return int(self._number(self._mlx("rank"), "lora_parameters.rank"))
        stated = self._pattern("rank_pattern", module, self.raw.get("r", _UNSTATED))
        return None if stated is _UNSTATED else int(self._number(stated, "r and rank_pattern"))

    def scale(self, module: str, rank: int) -> float:
        """Return what the product of a module's factors, of this rank, is multiplied with."""
        if self.mlx:
            return self._number(self._mlx("scale"), "lora_parameters.scale")
        alpha = self._pattern("alpha_pattern", module, self.raw.get("lora_alpha", 8))
        return self._number(alpha, "lora_alpha and alpha_pattern") / (
            sqrt(rank) if self.raw.get("use_rslora") else rank
        )

    def tokens(self, module: str) -> list[int]:
        """Return the rows of an embedding that were trained."""
        found = self.raw.get("token_indices" if self.raw.get("peft_type") == TOKENS else "trainable_token_indices")
        if isinstance(found, Mapping):
            found = next((rows for key, rows in found.items() if f".{module}".endswith(f".{key}")), None)
        if not isinstance(found, list) or not all(isinstance(row, int) and row >= 0 for row in found):
            raise CheckpointError(
                f"{self.where}: expected the numbers of the trained tokens of {printable(module)!r} in {CONFIG}, got "
                f"{printable(found)}. Mend it."
            )
        return found

    def parameters(self, module: str) -> tuple[str, ...]:
        """Return the names of what was adapted instead of a module: parameters, of which it has one or more."""
        named = self.raw.get("target_parameters")
        split = [n.rpartition(".") for n in (named if isinstance(named, list) else ()) if isinstance(n, str)]
        return tuple(f"{module}.{last}" for stem, _, last in split if stem and f".{module}".endswith(f".{stem}"))

    def saved_whole(self, module: str) -> bool:
        """Whether a module is among those that were trained as they are."""
        names = self.raw.get("modules_to_save") or ()
        return any(f".{name}." in f".{module}." for name in names if isinstance(name, str))

    def _mlx(self, key: str) -> object:
        parameters = self.raw.get("lora_parameters")
        return parameters.get(key) if isinstance(parameters, Mapping) else None

    def _pattern(self, key: str, module: str, otherwise: object) -> object:
        """PEFT's rule: a key is an expression for a module's name or its last parts, and the first that fits counts."""
        patterns = self.raw.get(key) or {}
        try:
            return next((v for k, v in patterns.items() if _fits(k, module)), otherwise)
        except (TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{self.where}: expected numbers by expression in {key}, got {printable(patterns)}. Mend {CONFIG}."
            ) from error

    def _number(self, value: object, what: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or (what.count("rank") and value < 1):
            raise CheckpointError(
                f"{self.where}: expected numbers in {what} of {CONFIG}, got {printable(value)}. Mend it."
            )
        return float(value)


def read_settings(config: Mapping[str, Any], where: str) -> Settings:
    """Return an adapter's configuration.

    Raises:
        CheckpointError: Another library wrote it, or its tensors mean what is not read.
    """
    found = Settings(config, where)
    if found.mlx:
        kind = config.get("fine_tune_type", "lora")
        what = "" if kind in MLX_KINDS else f"fine_tune_type {printable(kind)!r}, expected {', '.join(MLX_KINDS)}"
    elif config.get("peft_type") not in ("LORA", TOKENS):
        what = f"peft_type {printable(config.get('peft_type'))!r}, expected 'LORA' or {TOKENS!r}"
    elif key := next((key for key in OTHER_SUMS if config.get(key)), None):
        what = f"{key}: its weights are no sum of the base and two factors"
    elif str(config.get("init_lora_weights")).lower().startswith(MOVES_BASE):
        what = f"init_lora_weights {printable(config['init_lora_weights'])!r}, which changes the base too"
    else:
        what = ""
    if what:
        raise CheckpointError(f"{where}: the adapter has {what}. {MERGE}")
    return found


@dataclass(frozen=True)
class LoraParts:
    """A low-rank change of a module's weight.

    Attributes:
        module: What the adapter calls the module.
        A, B: Its factors as they are stored.
        scale: What their product is multiplied with.
        turned: They are stored (in, r) and (r, out), as mlx-lm does, not (r, in) and (out, r).
        embedding: The module is an embedding, whose weight is always stored (in, out).
        magnitude: Name of DoRA's magnitudes, (out,).
        parameters: Names of what it may be added to, where that is a parameter and not the module's weight; the base
            tells which, and then it is one.
        experts: Matrices in that parameter: A is (experts r, in), B is (out, r experts) with the expert innermost.
        swapped: That parameter is stored (experts, in, out).
        cut: Of all experts this one, and of its output these rows, from and to: a tensor of its own in the base.
    """

    module: str
    A: TensorInfo
    B: TensorInfo
    scale: float
    turned: bool = False
    embedding: bool = False
    magnitude: str | None = None
    parameters: tuple[str, ...] = ()
    experts: int = 1
    swapped: bool = False
    cut: tuple[int, int, int] | None = None

    @property
    def weight(self) -> str:
        """What the adapter calls the tensor that it changes."""
        return self.parameters[0] if len(self.parameters) == 1 else f"{self.module}.weight"

    @property
    def rank(self) -> int:
        """Columns of B, of one expert."""
        if self.parameters:
            return self.A.shape[0] // self.experts
        return self.A.shape[1 if self.turned and len(self.A.shape) == 2 else -2 if self.turned else 0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the product: (out, in), with a leading axis of experts, or with axes of a convolution behind."""
        a, b = self.A.shape, self.B.shape
        if self.cut:
            return (self.cut[2] - self.cut[1], a[1])
        if self.experts > 1:
            return (self.experts, a[1], b[0]) if self.swapped else (self.experts, b[0], a[1])
        if self.turned:
            return (b[1], a[0]) if len(a) == 2 else (a[0], b[1], a[2])
        return (b[0], *a[1:])

    def read(self, weights: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
        """Return B, (out, r), the scale included, and A, (r, in), in float64; of experts a stack of each.

        The names are those of a product that lies as it is stored: where that is (in, out), B is the factor of inputs.
        """
        A, B = weights.read(self.A.name).double(), weights.read(self.B.name).double() * self.scale
        if self.experts > 1:
            A, B = A.unflatten(0, (self.experts, -1)), B.unflatten(1, (-1, self.experts)).permute(2, 0, 1)
            if self.cut:
                expert, first, last = self.cut
                return B[expert, first:last], A[expert]
            return (A.mT, B.mT) if self.swapped else (B, A)
        if self.turned and A.ndim == 2:
            return B.mT, A.mT
        return (B, A) if self.turned else (B.flatten(1), A.flatten(1))


@dataclass(frozen=True)
class Adapter:
    """An opened adapter.

    Attributes:
        settings: Its configuration.
        weights: Its tensors.
        low_rank: Low-rank changes by module.
        whole: Tensors that stand in the place of the base's, by the base's name without a prefix.
        tokens: Names of rows of embeddings, by module.
        biases: Names of what is added to biases, with the scale of the factors, by module.
    """

    settings: Settings
    weights: Checkpoint
    low_rank: dict[str, LoraParts] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)


_NAME = r"(?:\.(?P<name>(?!weight$|bias$)[^.]+))?"
"""An adapter's own name, which stands in the names of a whole model's tensors and not in its own file."""

_PEFT = {
    "A": rf"lora_A{_NAME}\.weight",
    "B": rf"lora_B{_NAME}\.weight",
    "bias": rf"lora_B{_NAME}\.bias",
    "embedding_A": rf"lora_embedding_A{_NAME}",
    "embedding_B": rf"lora_embedding_B{_NAME}",
    "magnitude": rf"lora_magnitude_vector{_NAME}(?:\.weight)?",
    "tokens": rf"(?:token_adapter\.)?trainable_tokens_delta{_NAME}",
}
_MLX = {"A": "lora_a", "B": "lora_b", "magnitude": "m"}

_SLOTS = {
    mlx: {slot: re.compile(rf"(?P<module>.+?)\.{form}") for slot, form in forms.items()}
    for mlx, forms in ((False, _PEFT), (True, _MLX))
}

_PLAIN = re.compile(r"(\w|\\?\.)*")


def _fits(expression: str, module: str) -> bool:
    """Whether an expression stands for a module's name or its last parts.

    Whoever publishes an adapter writes them. One like ``(a+)+`` takes Python's engine more than a lifetime; that of
    Polars takes time in proportion to the name, but has to compile each, which plain names are spared.
    """
    whole = rf"^(.*\.)?({expression})$"
    if _PLAIN.fullmatch(expression):
        return re.match(whole, module) is not None
    import polars as pl  # here, since headers are read without it

    try:
        return bool(pl.Series([module]).str.contains(whole).item())
    except pl.exceptions.ComputeError as error:
        raise ValueError(f"{printable(expression)!r} is no expression") from error


_FACTOR = re.compile(r".+\.(lora_[AB]\.([^.]+\.)?weight|lora_embedding_[AB](\.[^.]+)?|lora_[ab])")

_SAVED = re.compile(r"\.modules_to_save(?:\.(?P<name>[^.]+)(?=\.))?")


def is_factor(name: str) -> bool:
    """Whether a tensor, by its name, is a factor of an adapter."""
    return _FACTOR.fullmatch(name) is not None


def module_name(name: str) -> str:
    """Return a name without what PEFT puts before and into it.

    >>> module_name("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")


def read_adapter(weights: Checkpoint, settings: Settings, *, name: str | None = None) -> Adapter:
    """Sort an adapter's tensors, and check what its configuration says against them; only headers are read.

    Args:
        weights: Its opened tensors.
        settings: Its configuration.
        name: Which adapter is meant, where the tensors of several lie together.

    Raises:
        CheckpointError: Tensors are empty, missing or of another rank than is stated, or several adapters lie together.
    """
    where, found = settings.where, Adapter(settings, weights)
    empty = [n for n, info in weights.infos.items() if not info.entries]
    if empty:
        raise CheckpointError(
            f"{where}: {len(empty)} tensors of the adapter are empty, first {printable(empty[0])!r} of shape "
            f"{weights.info(empty[0]).shape}: it was saved under DeepSpeed ZeRO-3 or FSDP without gathering its parts. "
            "Save it again from gathered weights; with this file nothing can be done."
        )
    slots: dict[str, dict[str, str]] = {}
    for stored, (slot, module, _) in _of_one(weights, settings, name).items():
        if slot == "whole":
            taken = found.whole.setdefault(module, stored)
        elif slot in ("tokens", "bias"):
            taken = (found.tokens if slot == "tokens" else found.biases).setdefault(module, stored)
        else:
            taken = slots.setdefault(module, {}).setdefault(slot, stored)
        if taken != stored:
            raise CheckpointError(
                f"{where}: {printable(taken)!r} and {printable(stored)!r} are the same part of one module. Is this one "
                "adapter? Save it again."
            )
    for module, parts in slots.items():
        found.low_rank[module] = _low_rank(module, parts, found)
    for module in found.biases:
        if module not in found.low_rank:
            raise CheckpointError(f"{where}: {printable(module)!r} has a bias of LoRA but no factors. Save it again.")
    return found


def _of_one(weights: Checkpoint, settings: Settings, name: str | None) -> dict[str, tuple[str, str, str]]:
    """Return slot, module and adapter of each tensor, of those that belong to one adapter."""
    sorted_: dict[str, tuple[str, str, str]] = {}
    for stored in weights:
        plain = stored.removeprefix("base_model.model.")
        matches = ((slot, form.fullmatch(plain)) for slot, form in _SLOTS[settings.mlx].items())
        slot, match = next(((slot, m) for slot, m in matches if m), ("whole", None))
        own = match.groupdict().get("name") if match else (m := _SAVED.search(plain)) and m["name"]
        module = match["module"] if match else _SAVED.sub("", plain)
        bare = module.replace(".base_layer", "")
        if match is None or not settings.parameters(bare):
            module = module_name(f"{module}.").removesuffix(".")
        sorted_[stored] = slot, module, own or ""
    names = sorted({own for _, _, own in sorted_.values()} - {""})
    if name is None and len(names) > 1:
        raise CheckpointError(
            f"{settings.where}: several adapters lie together: {', '.join(map(printable, names))}. Say which by its "
            f"name after #, such as {settings.where}#{printable(names[0])}."
        )
    if name is not None and name not in names:
        known = ", ".join(map(printable, names)) or "one without a name"
        raise CheckpointError(f"{settings.where}: no adapter {printable(name)!r}; there is {known}.")
    return {stored: part for stored, part in sorted_.items() if part[2] in ("", name or part[2])}


def _low_rank(module: str, parts: Mapping[str, str], adapter: Adapter) -> LoraParts:
    """Return a module's factors, of the rank that is stated."""
    settings, weights, where = adapter.settings, adapter.weights, adapter.settings.where
    embedding = "embedding_A" in parts or "embedding_B" in parts
    keys = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    missing = [key for key in keys if key not in parts]
    if missing:
        raise CheckpointError(
            f"{where}: {printable(module)!r} has {', '.join(sorted(parts))} but not {missing[0]} of its factors. The "
            "adapter is damaged; fetch it again."
        )
    if ("magnitude" in parts) != settings.dora:
        held, told = ("magnitudes of DoRA", "none") if "magnitude" in parts else ("no magnitudes", "that it is DoRA")
        raise CheckpointError(f"{where}: {printable(module)!r} has {held}, and {CONFIG} says {told}. Mend it.")
    a, b = (weights.info(parts[key]) for key in keys)
    if not (a.is_float and b.is_float):
        raise CheckpointError(
            f"{where}: the factors of {printable(module)!r} are {b.dtype} and {a.dtype}, expected floating point. "
            f"{MERGE}"
        )
    turned = settings.mlx
    found = LoraParts(module, a, b, scale=1.0, turned=turned, embedding=embedding, magnitude=parts.get("magnitude"))
    stacked = turned and len(a.shape) == 3
    inner = (b.shape[2 if stacked else 0 if turned else 1]) if len(b.shape) == len(a.shape) >= 2 else None
    if inner is None or inner != found.rank or (stacked and a.shape[0] != b.shape[0]):
        raise CheckpointError(
            f"{where}: the factors of {printable(module)!r} are {b.shape} and {a.shape}, which have no product. "
            "The adapter is damaged; fetch it again."
        )
    if parameters := settings.parameters(module.replace(".base_layer", "")):
        return _of_parameter(replace(found, parameters=parameters), adapter)
    if (told := settings.rank(module)) not in (None, found.rank):
        raise CheckpointError(
            f"{where}: the factors of {printable(module)!r} have rank {found.rank}, and {CONFIG} says {told}, so that "
            "their scale cannot be known. Mend r, rank_pattern and the alphas as they were in training, or merge the "
            "adapter where it is in memory."
        )
    outputs = found.shape[-2] if stacked else found.shape[0]
    if found.magnitude and weights.info(found.magnitude).entries != outputs:
        shape = weights.info(found.magnitude).shape
        raise CheckpointError(f"{where}: {printable(module)!r} has {outputs} outputs, and magnitudes of shape {shape}.")
    return replace(found, scale=settings.scale(module, found.rank))


def _of_parameter(parts: LoraParts, adapter: Adapter) -> LoraParts:
    """Return factors over one of some parameters, with experts and scale, which must be the same for all of them."""
    settings, rows = adapter.settings, parts.A.shape[0]
    if settings.taken:
        raise CheckpointError(
            f"{settings.where}: {printable(parts.module)!r} has factors of a parameter, which PEFT does not take out "
            f"of the base as init_lora_weights {settings.taken!r} says. {MERGE}"
        )
    ranks = {settings.rank(name) for name in parts.parameters}
    rank = ranks.pop()
    if ranks or rank is None or rows % rank:
        told = "several ranks" if ranks else f"rank {rank}"
        raise CheckpointError(
            f"{settings.where}: the factors of {printable(parts.module)!r} have {rows} rows for the experts of a "
            f"parameter, and {CONFIG} says {told}, so that their number cannot be known. {MERGE}"
        )
    scales = {settings.scale(name, rank) for name in parts.parameters}
    if len(scales) > 1:
        raise CheckpointError(
            f"{settings.where}: alpha_pattern gives the parameters of {printable(parts.module)!r} different scales, "
            f"and the file does not tell them apart. {MERGE}"
        )
    return replace(parts, experts=rows // rank, scale=scales.pop())
