"""An adapter over its base model: the change stays what the adapter holds, and is rounded once, where it is added."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from diffract.checkpoints.adapted import Adapted, AdaptedTensor
from diffract.checkpoints.adapter_parameters import Parameters
from diffract.checkpoints.adapter_parts import (
    CONFIG,
    MERGE,
    Adapter,
    LoraParts,
    is_factor,
    module_name,
    read_adapter,
    read_settings,
)
from diffract.checkpoints.checkpoint import Checkpoint
from diffract.checkpoints.header import TensorInfo
from diffract.errors import ArchitectureError, CheckpointError, printable

if TYPE_CHECKING:  # a model without adapter is read without what describes architectures
    from diffract.architectures import Architecture

_TOWER = re.compile(r"vision|visual|image|audio|speech")
"""What the parts of a model are called that have layers of the same names as its language model."""

ANOTHER = "This adapter belongs to another base; pass --adapter-base MODEL."


def open_adapter(adapter: Adapter, base: Checkpoint, *, owns_base: bool = True) -> Checkpoint:
    """Return base plus adapter as one checkpoint that keeps the factors; only headers are read.

    Args:
        adapter: The opened adapter.
        base: The opened base model.
        owns_base: Whether closing the result closes the base.

    Raises:
        CheckpointError: The adapter does not fit the base.
    """
    fitted = _Fitted(adapter, base)
    fitted.fit()
    changes = fitted.changes
    source = Adapted(base, adapter.weights, changes, owns_base)
    infos = {**base.infos, **{name: change.info for name, change in changes.items()}}
    config = _new_config(base, infos, fitted)
    companions = base.companions
    if config != base.config:  # the base's own file would say what is no longer true
        companions = {name: read for name, read in companions.items() if name != "config.json"}
    factored = {
        name: partial(source.factors, name)
        for name, change in changes.items()
        if change.low_rank is not None and change.start == (base, name) and len(change.info.shape) == 2
        if change.low_rank.magnitude is None
    }
    return replace(
        base,
        reference=adapter.settings.where,
        infos=infos,
        sources=dict.fromkeys(infos, source),
        config=config,
        companions=companions,
        tied={a: b for a, b in base.tied.items() if not {a, b} & changes.keys() or _alike(changes, a, b)},
        factors=factored,
        unrounded={
            **{name: partial(base.read_unrounded, name) for name in base.unrounded},
            **{name: partial(source.unrounded, name) for name in changes},
        },
        adapter=adapter.settings.raw,
        base_reference=base.reference,
        notes=(*base.notes, *fitted.notes),
    )


def _alike(changes: Mapping[str, AdaptedTensor], one: str, two: str) -> bool:
    """Whether an adapter does the same to two tensors: trained tokens are those of both ends of the model."""
    a, b = changes.get(one), changes.get(two)
    return a is not None and b is not None and a.rows is not None and a.rows == b.rows


def _new_config(base: Checkpoint, infos: Mapping[str, TensorInfo], fitted: _Fitted) -> Mapping[str, Any]:
    """Return the base's configuration as it is true of the result: its vocabulary, and whether its ends are tied."""
    config: dict[str, Any] = json.loads(json.dumps(dict(base.config))) if base.config else {}
    sections = [config, *(config[key] for key in ("text_config",) if isinstance(config.get(key), dict))]
    for section in sections:
        if fitted.untied and (section is config or "tie_word_embeddings" in section):
            section["tie_word_embeddings"] = False
        for name in fitted.resized:
            if section.get("vocab_size") == base.info(name).shape[0]:
                section["vocab_size"] = infos[name].shape[0]
    return config if config != base.config else base.config


@dataclass
class _Fitted:
    """What an adapter's modules are in a base: `fit` finds one after another.

    Attributes:
        adapter: The adapter.
        base: The base.
        changes: What becomes of each tensor.
        notes: What a reader should know.
        resized: Tensors that have another number of rows than in the base.
        untied: Whether tensors that were one are two.
    """

    adapter: Adapter
    base: Checkpoint
    changes: dict[str, AdaptedTensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    untied: bool = False

    def fit(self) -> None:
        """Find what becomes of each tensor."""
        self.where = self.adapter.settings.where
        self.architecture = _architecture(self.base)
        self.bare: dict[str, list[str]] = {}
        for name in self.base:
            self.bare.setdefault(self.architecture.bare.get(name, name), []).append(name)
        self.places = self._places()
        parameters = Parameters(self.base, self.architecture, self.places)
        self.adapter = replace(self.adapter, low_rank=parameters.settle(self.adapter.low_rank, self.where))
        for name, stored in self.adapter.whole.items():
            self._replace(name, stored)
        flag = self._flag()
        for low_rank in self.adapter.low_rank.values():
            self._add(low_rank, flag)
        for module, stored in self.adapter.biases.items():
            self._shift(module, stored)
        self._untie()
        for module, stored in self.adapter.tokens.items():
            self._put_rows(module, stored)

    def _places(self) -> dict[str, str]:
        """Map what the adapter calls a tensor to what the base calls it, for all that it holds.

        Names are equal, or equal behind a prefix: a model with a head, or one that sees, calls its body otherwise than
        its files do. All names must then lose the same prefix or a beginning of it.
        """
        from diffract.architectures.names import outer_prefixes

        names = [*self.adapter.whole, *(f"{module}.weight" for module in self.adapter.tokens)]
        names += [name for parts in self.adapter.low_rank.values() for name in parts.parameters or (parts.weight,)]
        names += [f"{module}.bias" for module in self.adapter.biases]
        found, lost = {}, {}
        for name in names:
            if name in self.base:
                found[name] = name
                continue
            starts = (0, *(i + 1 for i, letter in enumerate(name) if letter == "."))
            start = next((at for at in starts if len(self.bare.get(name[at:], ())) == 1), None)
            if start is not None and not _TOWER.search(name[:start]):
                found[name], lost[name] = self.bare[name[start:]][0], name[:start]
        outer = outer_prefixes(max(lost.values(), key=len, default=""))
        return {name: own for name, own in found.items() if lost.get(name, "") in outer}

    def _ties(self, name: str) -> tuple[str, list[str]]:
        """Return the tensor of the base that a tensor is tied to, and what shares it and is not stored."""
        spec, ties = self.architecture.spec, self.architecture.ties
        pairs = spec.tied.items() if spec is not None and ties else ()
        for source, target in pairs:
            held = next(iter(self.bare.get(target, ())), None)
            if held is not None and not self.bare.get(source):
                if name.removeprefix(spec.prefix if spec else "") == source:
                    return held, []
                if name == held:
                    return name, [s for s, t in pairs if t == target and not self.bare.get(s)]
        return "", []

    def _replace(self, name: str, stored: str) -> None:
        """Take a tensor of the adapter instead of the base's."""
        info, own = self.adapter.weights.info(stored), self.places.get(name)
        module = name.rpartition(".")[0]
        if own is None:
            twin, _ = self._ties(name)
            if not (twin or self.adapter.settings.saved_whole(module) or module in self.adapter.low_rank):
                raise CheckpointError(
                    f"{self.where}: unexpected tensor {printable(stored)!r} in the adapter, neither a factor nor one "
                    f"of the base {self.base.reference}. {MERGE}"
                )
            self.untied |= bool(twin)
            if not twin:
                self.notes.append(f"The adapter adds {printable(name)}, which its base does not hold.")
            own = name
        else:
            old = self.base.info(own)
            if info.shape != old.shape:
                if len(info.shape) != len(old.shape) or not info.shape or info.shape[1:] != old.shape[1:]:
                    raise CheckpointError(
                        f"{self.where}: {printable(stored)!r} has shape {info.shape}, {printable(own)!r} of the base "
                        f"{old.shape}. {ANOTHER}"
                    )
                self.resized.append(own)
                self.notes.append(
                    f"The adapter has {info.shape[0]} rows of {printable(own)}, its base {old.shape[0]}: its own count."
                )
            info = replace(info, dtype=old.dtype if old.is_float and info.is_float else info.dtype)
        if own in self.changes:
            self._refuse_two(own)
        self.changes[own] = AdaptedTensor(replace(info, name=own), (self.adapter.weights, stored))

    def _refuse_two(self, name: str) -> NoReturn:
        raise CheckpointError(
            f"{self.where}: two adapted modules mean {printable(name)!r} of the base. Is this one adapter? Save it "
            "again."
        )

    def _start(self, name: str) -> tuple[str, AdaptedTensor]:
        """Return what a tensor is called in the result, and what it is before anything is added to it.

        Raises:
            CheckpointError: The base does not hold it.
        """
        own = self.places.get(name) or name
        if own in self.changes:
            return own, self.changes[own]
        if own in self.base:
            return own, AdaptedTensor(self.base.info(own), (self.base, own))
        twin, _ = self._ties(name)
        if twin:
            self.untied = True
            return name, AdaptedTensor(replace(self.base.info(twin), name=name), (self.base, twin))
        raise CheckpointError(
            f"{self.where}: the adapter changes {printable(name)!r}, which the base {self.base.reference} does not "
            "hold. Pass --adapter-base MODEL."
        )

    def _flag(self) -> bool | None:
        """Return whether square matrices of an unknown model are stored (in, out): the one word for all of them.

        PEFT keeps that of the last module. Where oblong matrices of the adapter deny it, nothing is known.
        """
        flag = bool(self.adapter.settings.raw.get("fan_in_fan_out"))
        for low_rank in self.adapter.low_rank.values():
            own, shape = self.places.get(low_rank.weight), low_rank.shape
            known = low_rank.embedding or low_rank.parameters
            if own is not None and not known and len(shape) == len(set(shape)) == 2:
                stored = self.base.info(own).shape
                if (stored == shape[::-1]) != flag and stored in (shape, shape[::-1]):
                    return None
        return flag

    def _add(self, low_rank: LoraParts, flag: bool | None) -> None:
        """Add the product of factors to a weight."""
        name = low_rank.weight
        own, start = self._start(name)
        if start.low_rank is not None:
            self._refuse_two(own)
        shape, product = start.info.shape, low_rank.shape
        turnable = len(product) == 2 and not low_rank.parameters  # shapes have told how a parameter lies
        fits, fits_turned = shape == product, turnable and shape == product[::-1]
        if not (fits or fits_turned) or (low_rank.embedding and not fits_turned):
            raise CheckpointError(
                f"{self.where}: the factors of {printable(name)!r} make {product}, the base holds {shape}. {ANOTHER}"
            )
        if not start.info.is_float:
            raise CheckpointError(
                f"{self.where}: {printable(name)!r} is {start.info.dtype} in the base, expected floating point. Pass "
                "--adapter-base with the model as it was before it was quantised."
            )
        place = self.architecture.place(own)
        if low_rank.embedding or fits != fits_turned:
            transposed = fits_turned
        elif place is not None:
            transposed = place.role.transposed or place.role.part[0].startswith("embed")
        elif flag is not None:
            transposed = flag
        else:
            raise CheckpointError(
                f"{self.where}: {printable(name)!r} is square, and nothing tells whether it is stored (in, out): "
                f"fan_in_fan_out of {CONFIG} is one word for all, which other matrices deny. {MERGE}"
            )
        taken = self.adapter.settings.taken
        if taken and (low_rank.embedding or len(shape) != 2 or (taken == "olora" and transposed)):
            raise CheckpointError(
                f"{self.where}: {printable(name)!r} is no linear layer stored (out, in), and init_lora_weights "
                f"{taken!r} means nothing for it in PEFT. {MERGE}"
            )
        self.changes[own] = replace(start, low_rank=low_rank, transposed=transposed, taken=taken)

    def _shift(self, module: str, stored: str) -> None:
        """Add to a bias what the second factor has of its own."""
        own, start = self._start(f"{module}.bias")
        shape = self.adapter.weights.info(stored).shape
        if shape != start.info.shape:
            raise CheckpointError(
                f"{self.where}: {printable(stored)!r} has shape {shape}, the base's bias {start.info.shape}. {ANOTHER}"
            )
        self.changes[own] = replace(start, shift=(stored, self.adapter.low_rank[module].scale))

    def _untie(self) -> None:
        """Give what shared a tensor that is changed alone a copy of its own, of what the base has."""
        architectures = self.base.config.get("architectures") or ["Model"]
        if str(architectures[0]).endswith("Model"):
            return
        for name in list(self.changes):
            if name not in self.base:
                continue
            for other in self._ties(name)[1]:
                self.untied = True
                if other not in self.changes:
                    self.changes[other] = AdaptedTensor(replace(self.base.info(name), name=other), (self.base, name))
        if self.untied:
            self.notes.append(
                "The adapter changes one of two ends that its base ties: here they are two tensors, as when it was "
                "trained; loaders that merge it into tied weights change both."
            )

    def _put_rows(self, module: str, stored: str) -> None:
        """Put trained tokens into an embedding, and into what is tied to it."""
        numbers, info = self.adapter.settings.tokens(module), self.adapter.weights.info(stored)
        own, start = self._start(f"{module}.weight")
        shape = start.info.shape
        if info.shape != (len(numbers), *shape[1:]) or len(set(numbers)) != len(numbers):
            raise CheckpointError(
                f"{self.where}: {CONFIG} names {len(set(numbers))} tokens of {printable(module)!r}, whose weight has "
                f"shape {shape}, and the adapter holds {info.shape}. {ANOTHER}"
            )
        if numbers and max(numbers) >= shape[0]:
            raise CheckpointError(
                f"{self.where}: token {max(numbers)} of {printable(module)!r} is outside of its {shape[0]} rows. "
                f"{ANOTHER}"
            )
        self.changes[own] = replace(start, rows=(numbers, stored))
        for one, two in self.base.tied.items():
            if own in (one, two):
                twin = two if own == one else one
                self.changes[twin] = replace(start, info=self.base.info(twin), rows=(numbers, stored))


def _architecture(base: Checkpoint) -> Architecture:
    """Return what is known of a base's names; a model that nothing describes has adapters too."""
    from diffract.architectures import resolve

    shapes = {name: info.shape for name, info in base.infos.items()}
    try:
        return resolve(base.config, shapes)
    except ArchitectureError:
        return resolve({}, shapes)


def unmerged(checkpoint: Checkpoint, config: Mapping[str, Any] | None, *, name: str | None = None) -> Checkpoint:
    """Return a model that was saved whole with an adapter in it as its base with the change; any other as it is.

    Args:
        checkpoint: What was opened: base and factors side by side, or a plain model.
        config: The adapter's configuration, if it lies beside; only it states the scale of the factors.
        name: Which adapter is meant, where there are several.

    Raises:
        CheckpointError: There are factors, and no configuration.
    """
    factors = [stored for stored in checkpoint if is_factor(stored)]
    if not factors:
        return checkpoint
    if config is None:
        raise CheckpointError(
            f"{checkpoint.reference}: holds an adapter that was not merged (LoRA factors such as "
            f"{printable(factors[0])!r}), and their scale is stated nowhere. Put its {CONFIG} beside it, "
            "or save what merge_and_unload() of PEFT returns."
        )
    parts = {n for n in checkpoint if ".lora_" in n or ".modules_to_save." in n or "trainable_tokens_delta" in n}
    names = {n: module_name(n) for n in checkpoint if n not in parts}
    base = replace(
        checkpoint,
        infos={new: replace(checkpoint.info(n), name=new) for n, new in names.items()},
        sources={new: checkpoint.sources[n] for n, new in names.items()},
        tied={names[a]: names[b] for a, b in checkpoint.tied.items() if a in names and b in names},
    )
    weights = replace(
        checkpoint,
        infos={n: checkpoint.infos[n] for n in checkpoint if n in parts},
        sources={n: checkpoint.sources[n] for n in checkpoint if n in parts},
    )
    settings = read_settings(config, checkpoint.reference)
    found = open_adapter(read_adapter(weights, settings, name=name), base)
    note = f"An adapter was saved with its base, not merged: {len(found.unrounded)} tensors are read with its change."
    return replace(found, base_reference=None, notes=(*found.notes, note))
