"""From a checkpoint's configuration and names to the architecture that reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from diffract.architectures.dimensions import (
    TEXT_SECTIONS,
    ConfigReader,
    Dimensions,
    TensorPlace,
    read_dimensions,
)
from diffract.architectures.names import Fit, Templates, fit_names, outer_prefixes, unwrapped
from diffract.architectures.spec import Spec, builtin_specs, load_spec
from diffract.architectures.structure import HEAD_KEYS, NO_COUNT, Reading, Shapes, read_structure
from diffract.errors import ArchitectureError, printable

ENOUGH = 0.5
"""Part of the matrices that a family must describe to be recognised by names alone."""


@dataclass(frozen=True)
class Architecture:
    """How the tensors of one checkpoint are read.

    Attributes:
        family: The spec's name; ``structure`` where structure alone says which tensor is which, ``generic`` where
            nothing does.
        dimensions: Head counts and widths.
        note: What a reader should know about this reading of the model.
        spec: What describes the family, if something does.
        config: The configuration that was read.
        places: What each described tensor is, by name.
        bare: Every name without the words of wrappers and the model's prefix: what two checkpoints of one family share.
    """

    family: str
    dimensions: Dimensions = field(default_factory=Dimensions)
    note: str = ""
    spec: Spec | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[str, TensorPlace] = field(default_factory=dict)
    bare: Mapping[str, str] = field(default_factory=dict)

    def place(self, name: str) -> TensorPlace | None:
        """Return what the tensor of this name is, or ``None`` for one that nothing describes."""
        return self.places.get(name)

    @property
    def ties(self) -> bool:
        """Whether the model shares its embedding with its output, by its configuration or its family's habit."""
        own = ConfigReader(self.spec or Spec(family="generic", tensors={}), self.config).value("tie_word_embeddings")
        return bool(self.config.get("tie_word_embeddings", own))

    def tied_to(self, name: str, names: Iterable[str]) -> str | None:
        """Return the tensor that ``name`` is declared to share its values with, if it is among ``names``."""
        if self.spec is None or not self.ties:
            return None
        bare = self.bare.get(name, name)
        targets = {target for source, target in self.spec.tied.items() if bare in (source, self.spec.prefix + source)}
        if not targets:  # nearly always: looking through all names for each of them would be quadratic
            return None
        return next((n for n in names if self.bare.get(n, n).removeprefix(self.spec.prefix) in targets), None)


def resolve(
    config: Mapping[str, Any], shapes: Shapes | None = None, *, spec_file: str | Path | None = None
) -> Architecture:
    """Choose the architecture of a model, and say what each of its tensors is.

    A family is told by ``model_type``, that of the language model in a larger one, by ``architectures``, or, where the
    configuration is silent, by names that fit it. What it does not describe is read by structure.

    Args:
        config: The model's config.json, empty if it has none.
        shapes: Shape of every tensor, by name.
        spec_file: A user's own architecture file; it wins, and what it leaves out is left out. One that has defaults
            alone states what the configuration does not, such as the number of heads.

    Returns:
        The architecture; the generic one (every 2-D tensor is one matrix) if nothing describes the model.

    Raises:
        ArchitectureError: The file is wrong or fits no tensor, the configuration contradicts itself or claims more
            heads than there are rows, or tensors are of two families.
    """
    shapes = shapes or {}
    plain = {name: unwrapped(name) for name in shapes}
    if spec_file is not None:
        own = load_spec(spec_file)
        if own.defaults and not own.tensors:
            return resolve({**own.defaults, **config}, shapes)
        prefix, fits = fit_names(Templates(own.tensors), plain.values())
        if shapes and not fits:
            raise ArchitectureError(
                f"architecture file {str(spec_file)!r} fits no tensor: it has {next(iter(own.tensors), 'none')!r}, the "
                f"checkpoint {printable(next(iter(shapes)))!r}. Mend its names, or leave it out."
            )
        return _bind(own, config, plain, fits=fits, prefix=prefix)
    matrices = {plain[name]: shape for name, shape in shapes.items() if len(shape) > 1}
    told = _told_family(config)
    spec = told or (None if config.get("model_type") else _fitting_family(matrices))
    prefix, fits = fit_names(_templates(spec.family), plain.values()) if spec else (_trunk(matrices), {})
    if told:
        _refuse_two_families(told, config, [name for name in matrices if name not in fits])
    if spec and (fits or not shapes):
        known = _bind(spec, config, plain, fits=fits, prefix=prefix)
        if not told and not known.dimensions.heads:
            known = _without_heads(known)
    else:
        known = _bind(Spec(family="generic", tensors={}), config, plain, prefix=_trunk(matrices))
        known = replace(known, spec=None, dimensions=Dimensions())
    left = {name: shape for name, shape in shapes.items() if name not in known.places}
    return _with_structure(known, read_structure(left, known.bare, config, alone=not known.places), config)


def _told_family(config: Mapping[str, Any]) -> Spec | None:
    """Return the family that a configuration names."""
    texts = [section for name in TEXT_SECTIONS if isinstance(section := config.get(name), Mapping)]
    types = {t: spec for spec in builtin_specs().values() for t in spec.model_types}
    # The configuration itself first: a model that sees pictures too names its language model within.
    for section in (config, *texts):
        if spec := types.get(str(section.get("model_type"))):
            return spec
    # Classes are called LlamaForCausalLM, types llama: without endings and signs they are the same word.
    by_word = {re.sub(r"\W|_", "", name).casefold(): spec for name, spec in types.items()}
    for name in config.get("architectures") or ():
        word = re.sub(r"(For[A-Z]|LMHead|Model|PreTrained).*", "", str(name)).casefold()
        if spec := by_word.get(word):
            return spec
    return None


def _fitting_family(shapes: Shapes) -> Spec | None:
    """Return the family that describes most of the tensors; of several alike the one that assumes least."""
    found = {f: len(fit_names(_templates(f), shapes)[1]) for f in builtin_specs()}
    # a family with a note reads the same names in an unusual way
    order = sorted(builtin_specs().values(), key=lambda s: (-found[s.family], bool(s.note), len(s.defaults), s.family))
    return order[0] if shapes and found[order[0].family] >= ENOUGH * len(shapes) else None


def _refuse_two_families(spec: Spec, config: Mapping[str, Any], left: list[str]) -> None:
    """Refuse a checkpoint in which a second model lies beside the one that its configuration describes."""
    if any(isinstance(value, Mapping) and "model_type" in value for value in config.values()):
        return  # a larger model, whose other parts may be of any family
    for family in builtin_specs():
        _, fits = fit_names(_templates(family), left)
        parts = {part for fit in fits.values() for part in fit.role.part}
        if {"embed.embed", "attn.q", "attn.o"} <= parts and len(fits) >= ENOUGH * len(left):
            raise ArchitectureError(
                f"tensors of two families lie together: {spec.family}, as config.json says, and {family}, first "
                f"{printable(next(iter(fits)))!r}. Open the files of one model alone."
            )


def _bind(
    spec: Spec,
    config: Mapping[str, Any],
    plain: Mapping[str, str],
    *,
    fits: Mapping[str, Fit] | None = None,
    prefix: str = "",
) -> Architecture:
    """Say by a spec what the tensors of one model are."""
    dimensions, settings = read_dimensions(spec, config), ConfigReader(spec, config)
    sizes = {
        name: tuple(
            (settings.number(key) if key is not None else dimensions.head_dim) or 0
            for key in role.head_dim or (None,) * len(role.part)
        )
        for name, role in spec.tensors.items()
    }
    places = {}
    for name, own in plain.items():
        if fits and (fit := fits.get(own)):
            places[name] = TensorPlace(fit.role, **fit.numbers, dimensions=dimensions, sizes=sizes[fit.template])
    begins = [begin for begin in outer_prefixes(prefix) if begin]
    bare = {n: own.removeprefix(next(filter(own.startswith, begins), "")) for n, own in plain.items()}
    return Architecture(spec.family, dimensions, spec.note, spec=spec, config=config, places=places, bare=bare)


def _without_heads(known: Architecture) -> Architecture:
    """Take projections whole where names tell the family and nothing tells the number of heads."""
    # what is fused cannot be taken apart without it
    alone = {name: place for name, place in known.places.items() if len(place.role.part) == 1 or place.role.stacked}
    whole = {n: replace(p, role=p.role.model_copy(update={"whole": True})) for n, p in alone.items()}
    assert known.spec is not None
    keys = known.spec.config
    note = f"Names are those of {known.family}; nothing states a number of heads, so that projections stay whole."
    note += f" {_how_to_state({str(keys.heads[0]): 'HEADS', str(keys.width[0]): 'WIDTH'})}"
    return replace(known, places=whole, note=note)


def _how_to_state(values: Mapping[str, str]) -> str:
    """Say by a line to copy how a user states what a configuration does not."""
    text = ", ".join(f'"{key}": {value}' for key, value in values.items())
    line = f"""echo '{{"family": "own", "defaults": {{{text}}}}}' > own.json"""
    return f"Pass --architecture own.json, made by this line with your {' and '.join(values.values())}: {line}"


def _with_structure(known: Architecture, reading: Reading, config: Mapping[str, Any]) -> Architecture:
    """Add what structure says, and tell a reader how the model is read."""
    places = {**known.places, **reading.places}
    notes = [known.note] if known.note else []
    if reading.whole:
        path, reason = next(iter(reading.whole.items()))
        notes += [
            f"{len(reading.whole)} attention modules are not cut into heads, first {printable(path)}: {reason}.",
            "Pass --architecture FILE to describe them."
            if reason != NO_COUNT
            else _how_to_state({HEAD_KEYS[0]: "HEADS"}),
        ]
    if known.spec is not None:
        return replace(known, places=places, note=" ".join(notes))
    if reading.dimensions.heads:
        return replace(known, family="structure", dimensions=reading.dimensions, places=places, note=" ".join(notes))
    model_type = config.get("model_type")
    told = "there is no config.json with a model_type"
    reason = f"model_type {printable(model_type)!r} is not known" if model_type else told
    generic = f"Generic mode, because {reason}: every 2-D tensor is one matrix, no heads. "
    advice = "" if reading.whole else "Pass --architecture FILE to describe it."
    return replace(known, places=places, note=(generic + advice + " ".join(notes)).strip())


def _trunk(names: Iterable[str]) -> str:
    """Return the words that all names of layers, and all names beside these, begin with: ``model.`` or nothing."""
    prefix, names = "", list(names)
    while True:
        own = [name.removeprefix(prefix).split(".") for name in names if name.startswith(prefix)]
        first = {words[0] for words in own if any(word.isdigit() for word in words)}
        if len(first) != 1 or not any(words[0] in first and len(words) > 2 for words in own):
            return prefix
        (word,) = first
        if word.isdigit() or any(words[0] == word and words[1].isdigit() for words in own):
            return prefix
        if prefix and any(words[0] != word for words in own):
            return prefix
        prefix += f"{word}."


@cache
def _templates(family: str) -> Templates:
    return Templates(builtin_specs()[family].tensors)


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
