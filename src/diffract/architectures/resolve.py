"""From a checkpoint's configuration to the architecture that reads its tensor names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from diffract.architectures.spec import ConditionalKey, Key, Keys, Role, Spec, builtin_specs, load_spec
from diffract.errors import ArchitectureError, printable


@dataclass(frozen=True)
class Dimensions:
    """What slicing needs to know; ``None`` where the configuration is silent.

    Attributes:
        layers: Number of layers.
        width: Width of the residual stream.
        heads: Query heads per layer.
        kv_heads: Key-value heads per layer.
        head_dim: Rows of one head.
    """

    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        assert self.heads and self.kv_heads
        return self.heads // self.kv_heads


class ConfigReader:
    """Looks up keys in a configuration, a nested section first, the spec's defaults last."""

    def __init__(self, spec: Spec, config: Mapping[str, Any]) -> None:
        sections = [config.get(name) for name in spec.config.section]
        self._layers = [*(s for s in sections if isinstance(s, Mapping)), config, spec.defaults]

    def number(self, key: Key) -> int | None:
        """Return the value of a key, of a sum of keys, or the number itself; ``None`` when one is absent."""
        if isinstance(key, int):
            return key
        parts = [self._lookup(part.strip()) for part in key.split("+")]
        if any(p is None for p in parts):
            return None
        values = [p for p in parts if isinstance(p, int) and not isinstance(p, bool)]  # JSON's true is an int, too
        if len(values) < len(parts):
            raise ArchitectureError(f"config.json: expected whole numbers for {key!r}, got {parts!r}.")
        return sum(values)

    def first(self, keys: Keys) -> int | None:
        """Return the first alternative that has a value."""
        for key in keys:
            if isinstance(key, ConditionalKey):
                found = self.number(key.use) if self._lookup(key.when) else None
            else:
                found = self.number(key)
            if found is not None:
                return found
        return None

    def _lookup(self, key: str) -> Any:
        for layer in self._layers:
            value: Any = layer
            for step in key.split("."):
                value = value.get(step) if isinstance(value, Mapping) else None
            if value is not None:
                return value
        return None


def read_dimensions(spec: Spec, config: Mapping[str, Any]) -> Dimensions:
    """Read the dimensions of a model.

    Raises:
        ArchitectureError: A value is no positive whole number, heads are no multiple of kv heads, or the width
            is no multiple of the heads while no head size is stated.
    """
    settings = ConfigReader(spec, config)
    keys = spec.config
    heads, width = settings.first(keys.heads), settings.first(keys.width)
    kv_heads = settings.first(keys.kv_heads) or heads
    head_dim = settings.first(keys.head_dim)
    found = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "width": width}
    for name, value in found.items():
        if value is not None and value < 1:
            raise ArchitectureError(f"config.json: expected a positive number of {name}, got {value}.")
    if heads and kv_heads and heads % kv_heads:
        raise ArchitectureError(
            f"config.json: {heads} query heads cannot share {kv_heads} key-value heads evenly. "
            "Correct the config, or pass --no-heads to take whole matrices."
        )
    if head_dim is None and heads and width:
        head_dim = _divide(width, heads)
    return Dimensions(settings.first(keys.layers), width, heads, kv_heads=kv_heads, head_dim=head_dim)


def _divide(width: int, heads: int) -> int:
    if width % heads:
        raise ArchitectureError(
            f"config.json states no head_dim, and width {width} is no multiple of {heads} heads. "
            "Add head_dim to the config, or pass --no-heads to take whole matrices."
        )
    return width // heads


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor stands in the model.

    Attributes:
        role: What it is.
        layer: Layer number, if its name holds one.
        expert: Expert number, if its name holds one.
        head: Head number, if each head has a tensor of its own.
    """

    role: Role
    layer: int | None = None
    expert: int | None = None
    head: int | None = None


@dataclass(frozen=True)
class Architecture:
    """A spec bound to one model's configuration.

    Attributes:
        family: The spec's name; ``generic`` when nothing describes the model.
        dimensions: Head counts and widths.
        note: What a reader should know about this reading of the model.
    """

    family: str
    dimensions: Dimensions = field(default_factory=Dimensions)
    note: str = ""
    spec: Spec | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def place(self, name: str) -> TensorPlace | None:
        """Return what the tensor of this name is, or ``None`` for a name that no template fits."""
        if self.spec is None:
            return None
        for bare in _bare_names(self.spec, name):
            for template, role in self.spec.tensors.items():
                if match := _compile(template).fullmatch(bare):
                    return TensorPlace(role, **{k: int(v) for k, v in match.groupdict().items()})
        return None

    def head_dims(self, role: Role) -> tuple[int | None, ...]:
        """Return the head size of each part of a role."""
        if not role.head_dim or self.spec is None:
            return (self.dimensions.head_dim,) * len(role.part)
        settings = ConfigReader(self.spec, self.config)
        return tuple(settings.number(key) for key in role.head_dim)

    def tied_to(self, name: str, names: Iterable[str]) -> str | None:
        """Return the tensor that ``name`` is declared to share its values with, if it is among ``names``."""
        if self.spec is None:
            return None
        bare = _bare_names(self.spec, name)
        targets = [target for source, target in self.spec.tied.items() if source in bare]
        if not targets:  # nearly always: looking through all names for each of them would be quadratic
            return None
        return next((n for n in names for t in targets if t in _bare_names(self.spec, n)), None)


def resolve(config: Mapping[str, Any], *, spec_file: str | Path | None = None) -> Architecture:
    """Choose the architecture of a model.

    Args:
        config: The model's config.json, empty if it has none.
        spec_file: A user's own architecture file; it wins over ``model_type``.

    Returns:
        The architecture; the generic one (every 2-D tensor is one matrix) if nothing describes the model.

    Raises:
        ArchitectureError: The file is wrong, or the configuration contradicts itself.
    """
    if spec_file is not None:
        return _bind(load_spec(spec_file), config)
    model_type = config.get("model_type")
    known = {t: spec for spec in builtin_specs().values() for t in spec.model_types}
    if isinstance(model_type, str) and model_type in known:
        return _bind(known[model_type], config)
    reason = (
        f"model_type {printable(model_type)!r} is not known"
        if model_type
        else "there is no config.json with a model_type"
    )
    return Architecture(
        "generic",
        note=f"Generic mode, because {reason}: every 2-D tensor is one matrix, no heads. "
        "Pass --architecture FILE to describe it.",
    )


def _bind(spec: Spec, config: Mapping[str, Any]) -> Architecture:
    return Architecture(spec.family, read_dimensions(spec, config), spec.note, spec=spec, config=config)


def require_heads(architecture: Architecture) -> Dimensions:
    """Return the dimensions, or raise if they do not say how many heads there are."""
    dimensions = architecture.dimensions
    if dimensions.heads and dimensions.head_dim:
        return dimensions
    keys = architecture.spec.config if architecture.spec else None
    raise ArchitectureError(
        f"the config of this {architecture.family} model states no head counts "
        f"(looked for {', '.join(map(str, keys.heads)) if keys else 'none'}). "
        "Add them to config.json, pass --architecture FILE with defaults, or --no-heads to take whole matrices."
    )


@cache
def _compile(template: str) -> re.Pattern[str]:
    pieces = re.split(r"(\{layer\}|\{expert\}|\{head\})", template)
    return re.compile("".join(f"(?P<{p[1:-1]}>[0-9]{{1,6}})" if p.startswith("{") else re.escape(p) for p in pieces))


def _bare_names(spec: Spec, name: str) -> list[str]:
    """Return the name as it is and without each prefix it begins with."""
    return [name, *(name.removeprefix(p) for p in spec.prefixes if p and name.startswith(p))]
