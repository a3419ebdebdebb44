"""Which part of a training state is the model: found by structure, with everything else set aside and named."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffract.errors import CheckpointError, printable

MODELS = (
    *("model", "state_dict", "model_state_dict", "model_state", "module", "params", "parameters", "weights"),
    *("net", "network", "policy", "app"),
)
"""Keys under which training code puts the weights."""

AVERAGE = re.compile(r"(.*[_.])?(ema|swa|averaged?|shadow)([_.].*)?", re.ASCII)
"""Keys of averages of the weights."""

TRAINING = re.compile(
    r"optim|opt_|opt$|lr_|scheduler|schedule|scaler|grad|rng|random|callbacks|loops|amp$|sampler|dataloader|loss"
)
"""How keys begin that are no weights."""

ROLES = re.compile(
    r"(teacher|student|generator|discriminator|actor|critic|policy|reference|ref|target|online|best|last)"
    r"(_?(model|net|network|policy|state_dict))?"
)
"""Keys of models that are trained, or kept, side by side."""

MOMENTS = re.compile(
    r"(^|\.)(optimizers?|optim|optimizer_states?|optimizer_state_dict)\."
    r"|\.(exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|square_avg|fp32_param|master_param)$"
)
"""Names of optimizer states among flat names."""

OPTIMIZER, MEAN, NUMBER = "state of the training", "moving average of the weights", "number of the training state"
"""Why something is set aside."""

DEEP = 8
"""Wrappers in each other that are taken off."""


@dataclass(frozen=True)
class Found:
    """A training state, taken apart.

    Attributes:
        tensors: The model's tensors by name.
        set_aside: The others, each with its reason.
    """

    tensors: list[tuple[str, Any]]
    set_aside: list[tuple[str, Any, str]] = field(default_factory=list)


def find_model(tree: Any, is_tensor: Callable[[Any], bool], where: str, *, part: str | None = None) -> Found:
    """Return the model of a training state, and what was set aside.

    A mapping that holds tensors of one or more axes is a model, whatever lies in it further down. Above it are
    wrappers: of what they hold, optimizer states and averages are set aside, and one model must be left.

    Args:
        tree: Nested mappings.
        is_tensor: Whether a leaf is a tensor.
        where: What to call it in messages.
        part: The key, or keys joined by dots, of the part that is wanted.

    Raises:
        CheckpointError: It cannot be decided which part is the model, or there is no such part.
    """
    if isinstance(tree, Mapping) and "param_groups" in tree:
        raise CheckpointError(f"{where!r} holds the state of an optimizer, no model. Open the file of the model.")
    aside: list[tuple[str, Any, str]] = []
    node, path = tree, ""
    for key in part.split(".") if part else ():
        if not isinstance(node, Mapping) or key not in node:
            known = ", ".join(printable(k, 40) for k in node) if isinstance(node, Mapping) else "nothing"
            raise CheckpointError(f"{where!r} has no part {printable(part)!r}; at {printable(key)!r} there is {known}.")
        node, path = node[key], f"{path}{key}."
    for _ in range(DEEP):
        if not isinstance(node, Mapping) or any(
            is_tensor(value) and value.ndim and not TRAINING.match(str(key)) for key, value in node.items()
        ):
            break
        held = {key: value for key, value in node.items() if any(_leaves(value, is_tensor))}
        chosen = _choose(held, node, f"{where!r}" + (f", {path[:-1]}" if path else ""), is_tensor)
        if chosen is None:
            break
        for key, value in held.items():
            if key != chosen:
                reason = (
                    NUMBER
                    if is_tensor(value) and not value.ndim
                    else MEAN
                    if AVERAGE.fullmatch(str(key))
                    else OPTIMIZER
                )
                aside += [(f"{path}{name}", leaf, reason) for name, leaf in _leaves(value, is_tensor, str(key))]
        node, path = node[chosen], f"{path}{chosen}."
    leaves = list(_leaves(node, is_tensor)) if isinstance(node, Mapping) else []
    reasons = {name: _flat_reason(name, leaf) for name, leaf in leaves}
    if all(reasons.values()):  # an average alone is the model
        reasons = {name: OPTIMIZER if MOMENTS.search(name) else "" for name in reasons}
    aside += [(name, leaf, reasons[name]) for name, leaf in leaves if reasons[name]]
    return Found([(name, leaf) for name, leaf in leaves if not reasons[name]], aside)


def _flat_reason(name: str, leaf: Any) -> str:
    """Say why a tensor among flat names is no weight of the model; nothing where it is one."""
    if MOMENTS.search(name):
        return OPTIMIZER
    first = name.partition(".")[0]
    if AVERAGE.fullmatch(first):
        return MEAN if leaf.ndim else NUMBER
    return ""


def _choose(
    held: Mapping[Any, Any], node: Mapping[Any, Any], where: str, is_tensor: Callable[[Any], bool]
) -> Any | None:
    """Return the key of the model among what a wrapper holds, or ``None`` where it is no wrapper."""
    branches = {key: value for key, value in held.items() if not is_tensor(value)}
    training = {
        key
        for key, value in branches.items()
        if TRAINING.match(str(key)) or (isinstance(value, Mapping) and ("param_groups" in value or "exp_avg" in value))
    }
    averages = {key for key in branches if AVERAGE.fullmatch(str(key))} - training
    models = [key for key in branches if key not in training and key not in averages]
    plain = not training and not averages and len(node) == len(models) and not set(models) & set(MODELS)
    if plain and not (len(models) > 1 and all(ROLES.fullmatch(str(key)) for key in models)):
        return None  # nested parameters: nothing lies beside them
    candidates = models or sorted(averages, key=str)
    if not candidates:
        return None
    if len(candidates) > 1:
        names = ", ".join(printable(key, 40) for key in candidates)
        raise CheckpointError(
            f"{where} holds several models: {names}. Say which one is wanted by its key after #, such as "
            f"FILE#{printable(candidates[0], 40)}."
        )
    chosen = candidates[0]
    for key in averages - {chosen}:
        _check_average(branches[chosen], branches[key], (f"{where}, {printable(key, 40)}", is_tensor))
    return chosen


def _check_average(model: Any, average: Any, said: tuple[str, Callable[[Any], bool]]) -> None:
    where, is_tensor = said
    shapes = {name: tuple(leaf.shape) for name, leaf in _leaves(model, is_tensor)}
    for name, leaf in _leaves(average, is_tensor):
        if tuple(leaf.shape) != shapes.get(name, tuple(leaf.shape)):
            raise CheckpointError(
                f"{where}: {printable(name)!r} has shape {tuple(leaf.shape)}, in the model {shapes[name]}. An average "
                "has the model's shapes: name the one that is wanted by its key after #."
            )


def _leaves(value: Any, is_tensor: Callable[[Any], bool], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors below a value, keys joined by dots."""
    if is_tensor(value):
        yield prefix, value
    elif isinstance(value, Mapping | list | tuple):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(inner, is_tensor, f"{prefix}.{key}" if prefix else str(key))
