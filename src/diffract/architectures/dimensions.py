"""Head counts and widths of a model, read from its configuration and never guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffract.architectures.spec import Choice, Key, Keys, Spec
from diffract.errors import ArchitectureError


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


class Settings:
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
        values = [p for p in parts if isinstance(p, int) and not isinstance(p, bool)]
        if len(values) < len(parts):
            raise ArchitectureError(f"config.json: expected whole numbers for {key!r}, got {parts!r}.")
        return sum(values)

    def first(self, keys: Keys) -> int | None:
        """Return the first alternative that has a value."""
        for key in keys:
            if isinstance(key, Choice):
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
    settings = Settings(spec, config)
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
    return Dimensions(settings.first(keys.layers), width, heads, kv_heads, head_dim)


def _divide(width: int, heads: int) -> int:
    if width % heads:
        raise ArchitectureError(
            f"config.json states no head_dim, and width {width} is no multiple of {heads} heads. "
            "Add head_dim to the config, or pass --no-heads to take whole matrices."
        )
    return width // heads
