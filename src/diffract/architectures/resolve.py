"""From a checkpoint's configuration to the architecture that reads its tensor names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from diffract.architectures.spec import ConfigReader, Dimensions, Role, Spec, builtin_specs, load_spec, read_dimensions
from diffract.errors import ArchitectureError, printable


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
            for pattern, role in _patterns(self.spec):
                if match := pattern.fullmatch(bare):
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
    return Architecture(spec.family, read_dimensions(spec, config), spec.note, spec, config)


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


def _patterns(spec: Spec) -> list[tuple[re.Pattern[str], Role]]:
    return [(_compile(template), role) for template, role in spec.tensors.items()]


@cache
def _compile(template: str) -> re.Pattern[str]:
    pieces = re.split(r"(\{layer\}|\{expert\}|\{head\})", template)
    return re.compile("".join(f"(?P<{p[1:-1]}>[0-9]{{1,6}})" if p.startswith("{") else re.escape(p) for p in pieces))


def _bare_names(spec: Spec, name: str) -> list[str]:
    """Return the name as it is and without each prefix it begins with."""
    return [name, *(name.removeprefix(p) for p in spec.prefixes if p and name.startswith(p))]
