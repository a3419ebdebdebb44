"""What a configuration says of a model: widths and counts of heads, and where a tensor stands in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffract.architectures.spec import ConditionalKey, Key, Keys, Role, Spec
from diffract.errors import ArchitectureError

TEXT_SECTIONS = ("text_config", "language_config", "llm_config")
"""Where configurations of larger models keep that of the language model in them."""


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
        named, texts = (
            [section for name in names if isinstance(section := config.get(name), Mapping)]
            for names in (spec.config.section, TEXT_SECTIONS)
        )
        # beside a language model's own section the outer one speaks of other parts, save for what is said nowhere else
        self._layers = [*named, *(texts or [config]), spec.defaults]

    def number(self, key: Key) -> int | None:
        """Return the value of a key, of a sum of keys, or the number itself; ``None`` when one is absent."""
        if isinstance(key, int):
            return key
        parts = [self.value(part.strip()) for part in key.split("+")]
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
                found = self.number(key.use) if self.value(key.when) else None
            else:
                found = self.number(key)
            if found is not None:
                return found
        return None

    def value(self, key: str) -> Any:
        """Return what stands under a key; ``None`` where nothing does."""
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
        if width % heads:
            raise ArchitectureError(
                f"config.json states no head_dim, and width {width} is no multiple of {heads} heads. "
                "Add head_dim to the config, or pass --no-heads to take whole matrices."
            )
        head_dim = width // heads
    return Dimensions(settings.first(keys.layers), width, heads, kv_heads=kv_heads, head_dim=head_dim)


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor stands in the model.

    Attributes:
        role: What it is.
        layer: Layer number, if its name holds one.
        expert: Expert number, if its name holds one.
        head: Head number, if each head has a tensor of its own.
        dimensions: Head counts that hold here.
        sizes: Head size of each part of the role; 0 where a part has none of its own.
    """

    role: Role
    layer: int | None = None
    expert: int | None = None
    head: int | None = None
    dimensions: Dimensions = field(default_factory=Dimensions)
    sizes: tuple[int, ...] = ()
