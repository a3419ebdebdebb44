"""A PEFT LoRA adapter over its base model: the change stays two thin factors until it must be added.

LoRA (Hu et al. 2021): W1 = W0 + s B A with s = alpha / r, or alpha / sqrt(r) where it is rank-stabilised
(Kalajdzievski 2023).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from typing import TYPE_CHECKING, Any

from diffract.checkpoints.checkpoint import Checkpoint, Factors, Range
from diffract.checkpoints.header import TensorInfo
from diffract.errors import CheckpointError, printable

if TYPE_CHECKING:  # headers are read without torch
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

MORE_THAN_FACTORS = (
    *("alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "kasa_config", "layer_replication"),
    *("lora_bias", "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices"),
    *("use_bdlora", "use_dora", "use_qalora"),
)
"""Settings of PEFT under which an adapter is more than two factors per matrix."""

MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations (``init_lora_weights``) that change the base too, so that the factors do not add to it."""


@dataclass(frozen=True)
class Pair:
    """What an adapter holds for one base tensor.

    Attributes:
        A, B: Names of the adapter's tensors.
        scale: What their product is multiplied with.
        transposed: The base stores the matrix as (in, out).
    """

    A: str
    B: str
    scale: float
    transposed: bool


class Adapted:
    """A base's tensors plus low-rank changes, added in float64 and rounded once to the base's dtype."""

    def __init__(self, base: Checkpoint, weights: Checkpoint, pairs: Mapping[str, Pair], *, owns_base: bool) -> None:
        self.base, self.weights, self.pairs, self.owns_base = base, weights, pairs, owns_base

    def read(self, info: TensorInfo, rows: Range | None) -> torch.Tensor:
        """Return entries ``rows`` of the leading axis, merged if the adapter changes the tensor."""
        weight = self.base.read(info.name, rows)
        if info.name not in self.pairs:
            return weight
        factors = self.factors(info.name)
        left = factors.B if rows is None else factors.B[rows[0] : rows[1]]
        return (weight.double() + left @ factors.A).to(weight.dtype)

    def factors(self, name: str) -> Factors:
        """Read the change of a tensor as factors."""
        pair = self.pairs[name]
        left, right = self.weights.read(pair.B).double() * pair.scale, self.weights.read(pair.A).double()
        return Factors(right.T, left.T) if pair.transposed else Factors(left, right)

    def close(self) -> None:
        """Close the adapter's weights, and the base if it was opened for it."""
        self.weights.close()
        if self.owns_base:
            self.base.close()


def open_adapter(
    weights: Checkpoint,
    base: Checkpoint,
    config: Mapping[str, Any],
    *,
    reference: str,
    owns_base: bool = True,
) -> Checkpoint:
    """Return base plus adapter as one checkpoint that keeps the factors; only headers are read.

    Args:
        weights: The adapter's opened weights.
        base: The opened base model.
        config: The adapter's configuration.
        reference: What to call the result.
        owns_base: Whether closing the result closes the base.

    Raises:
        CheckpointError: The adapter is no plain LoRA, or does not fit the base.
    """
    refuse_more_than_factors(config, reference)
    pairs = _pairs(weights, base, config, reference)
    source = Adapted(base, weights, pairs, owns_base=owns_base)
    return replace(
        base,
        reference=reference,
        sources=dict.fromkeys(base.infos, source),
        tied={name: other for name, other in base.tied.items() if name not in pairs and other not in pairs},
        factors={name: partial(source.factors, name) for name in pairs},
        adapter=config,
        base_reference=base.reference,
    )


_FACTOR = re.compile(r"(?:base_model\.model\.)?.+\.lora_[AB]\.(?:[^.]+\.)?weight")


def unmerged(checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> Checkpoint:
    """Return a PEFT model that was saved whole as its base with the adapter's change; any other checkpoint as it is.

    Args:
        checkpoint: What was opened: base and factors side by side, or a plain model.
        config: The adapter's configuration, if it lies beside; only it states the scale of the factors.

    Raises:
        CheckpointError: There are factors, and no configuration.
    """
    factors = [name for name in checkpoint if _FACTOR.fullmatch(name)]
    if not factors:
        return checkpoint
    if config is None:
        raise CheckpointError(
            f"{checkpoint.reference}: holds an adapter that was not merged (LoRA factors such as "
            f"{printable(factors[0])!r}), and their scale is stated nowhere. Put its {CONFIG} beside it, "
            "or save what merge_and_unload() of PEFT returns."
        )
    names = {name: _bare(name) for name in checkpoint if name not in set(factors)}
    base = replace(
        checkpoint,
        infos={new: replace(checkpoint.info(name), name=new) for name, new in names.items()},
        sources={new: checkpoint.sources[name] for name, new in names.items()},
        tied={names[a]: names[b] for a, b in checkpoint.tied.items() if a in names and b in names},
    )
    weights = replace(
        checkpoint,
        infos={name: checkpoint.infos[name] for name in factors},
        sources={name: checkpoint.sources[name] for name in factors},
    )
    found = open_adapter(weights, base, config, reference=checkpoint.reference)
    note = f"An adapter was saved with its base, not merged: {len(found.factors)} matrices are read with its change."
    return replace(found, base_reference=None, notes=(*found.notes, note))


def _bare(name: str) -> str:
    """The name of a tensor in the base alone.

    >>> _bare("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def refuse_more_than_factors(config: Mapping[str, Any], reference: str) -> None:
    """Raise unless an adapter's configuration says that it is plain LoRA."""
    if config.get("peft_type") != "LORA":
        what = f"peft_type {printable(config.get('peft_type'))!r}, expected 'LORA'"
    elif found := next((key for key in MORE_THAN_FACTORS if config.get(key)), None):
        what = f"{found}, which is more than two factors per matrix"
    elif config.get("bias", "none") != "none":
        what = f"trained biases ({printable(config['bias'])!r}), which are more than two factors per matrix"
    elif str(config.get("init_lora_weights")).lower().startswith(MOVES_BASE):
        what = f"init_lora_weights {printable(config['init_lora_weights'])!r}, which changes the base too"
    else:
        return
    raise CheckpointError(f"{reference}: the adapter has {what}. Merge it into its base and open the result.")


def _pairs(weights: Checkpoint, base: Checkpoint, config: Mapping[str, Any], reference: str) -> dict[str, Pair]:
    """Map each adapted base tensor to the adapter's tensors for it."""
    transposed = bool(config.get("fan_in_fan_out", False))
    found: dict[str, Pair] = {}
    for module, (a, b) in _modules(weights, reference).items():
        name = _target(module, base, reference)
        if name in found:
            raise CheckpointError(
                f"{reference}: two adapted modules mean {printable(name)!r} of the base. Fetch it again."
            )
        _check_fit(base.info(name), (weights.info(b), weights.info(a)), transposed=transposed, reference=reference)
        found[name] = Pair(a, b, _scale(config, module, weights.info(a).shape[0], reference), transposed)
    return found


def _modules(weights: Checkpoint, reference: str) -> dict[str, tuple[str, str]]:
    """Map each adapted module to the names of its A and B; every tensor must be one of these."""
    sides: dict[str, dict[str, str]] = {}
    for name in weights:
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight", name)
        if not match:
            raise CheckpointError(
                f"{reference}: unexpected tensor {printable(name)!r} in the adapter, expected lora_A and "
                "lora_B. Merge it into its base and open the result."
            )
        sides.setdefault(match[1], {})[match[2]] = name
    for module, pair in sides.items():
        if len(pair) != 2:
            raise CheckpointError(
                f"{reference}: {printable(module)!r} has lora_{min(pair)} but not the other factor. "
                "The adapter is damaged; fetch it again."
            )
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _target(module: str, base: Checkpoint, reference: str) -> str:
    """The base tensor of a module: exact, or the only one that differs by a prefix such as ``model.``."""
    exact = f"{module}.weight"
    if exact in base:
        return exact
    near = [n for n in base if n.endswith(f".{exact}") or exact.endswith(f".{n}")]
    if len(near) != 1:
        raise CheckpointError(
            f"{reference}: the adapter changes {printable(exact)!r}, which the base {base.reference} "
            "does not hold. Pass --adapter-base MODEL."
        )
    return near[0]


def _scale(config: Mapping[str, Any], module: str, rank: int, reference: str) -> float:
    """PEFT's rule: a key of ``alpha_pattern`` is an expression for a module's name or its last parts."""
    alpha = config.get("lora_alpha", 8)
    patterns = config.get("alpha_pattern") or {}
    try:
        alpha = next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), alpha)
        return float(alpha) / (sqrt(rank) if config.get("use_rslora") else rank)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"{reference}: expected numbers in lora_alpha and alpha_pattern, got "
            f"{printable(config.get('lora_alpha'))} and {printable(patterns)}. Mend {CONFIG}."
        ) from error


def _check_fit(base: TensorInfo, factors: tuple[TensorInfo, TensorInfo], *, transposed: bool, reference: str) -> None:
    """Refuse factors whose product has another shape than the base tensor, and what is no floating point."""
    b, a = factors
    expected = base.shape[::-1] if transposed else base.shape
    matrices = len(a.shape) == len(b.shape) == len(expected) == 2 and a.shape[0] == b.shape[1] > 0
    if not matrices or (b.shape[0], a.shape[1]) != expected:
        raise CheckpointError(
            f"{reference}: the factors of {printable(base.name)!r} are {b.shape} and {a.shape}, the base "
            f"holds {tuple(expected)}. This adapter belongs to another base; pass --adapter-base MODEL."
        )
    if not (base.is_float and a.is_float and b.is_float):
        raise CheckpointError(
            f"{reference}: {printable(base.name)!r} is {base.dtype} and its factors {b.dtype} and {a.dtype}, "
            "expected floating point. Merge it into its base and open the result."
        )
