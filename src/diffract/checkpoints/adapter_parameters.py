"""Factors over parameters instead of modules (PEFT's ``target_parameters``), as the stacked experts of a layer are.

An adapter names the module alone, once per parameter: its own factors, then those behind ``base_layer``, and so on.
Which parameter is whose, and which of its axes is the output, differs between versions of PEFT; the base's shapes tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from diffract.checkpoints.adapter_parts import MERGE, LoraParts
from diffract.checkpoints.checkpoint import Checkpoint
from diffract.errors import CheckpointError, printable, some

if TYPE_CHECKING:  # a model without adapter is read without what describes architectures
    from diffract.architectures import Architecture

FUSED = {"gate_up_proj": ("mlp.gate", "mlp.up"), "down_proj": ("mlp.down",)}
"""What transformers stacks of a layer's experts where files hold each alone; fused parts lie one after another."""


@dataclass(frozen=True)
class Parameters:
    """The parameters of a base that an adapter may mean.

    Attributes:
        base: The base.
        architecture: What is known of its names.
        places: What it calls what the adapter calls otherwise.
    """

    base: Checkpoint
    architecture: Architecture
    places: Mapping[str, str]

    def settle(self, low_rank: Mapping[str, LoraParts], where: str) -> dict[str, LoraParts]:
        """Return low-rank changes that are each of one tensor: of which parameter it is, and how it lies there.

        Args:
            low_rank: Changes by module; those of modules stay as they are.
            where: What to call the adapter in messages.

        Raises:
            CheckpointError: The base has none of the parameters, or several that a change may be of, or one whose
                axes are equally long so that nothing tells the output.
        """
        settled = {module: parts for module, parts in low_rank.items() if not parts.parameters}
        levels: dict[str, list[LoraParts]] = {}
        for parts in low_rank.values():
            if parts.parameters:
                levels.setdefault(parts.module.replace(".base_layer", ""), []).append(parts)
        for module, wrappers in levels.items():
            held = {name: shape for name in wrappers[0].parameters if (shape := self._shape(name))}
            fits = [[name for name, shape in held.items() if _lies(parts, shape)] for parts in wrappers]
            names = [found[0] for found in fits if len(found) == 1]
            if len(set(names)) != len(wrappers):
                shapes = some([f"{printable(name)} {shape}" for name, shape in held.items()]) if held else "none"
                raise CheckpointError(
                    f"{where}: the factors of parameters of {printable(module)!r} make "
                    f"{', '.join(str(parts.shape) for parts in wrappers)}. Of such parameters the base "
                    f"{self.base.reference} holds {shapes}, which does not tell what changes what. {MERGE} For another "
                    "base pass --adapter-base MODEL."
                )
            ways = [_lies(parts, held[name]) for parts, name in zip(wrappers, names, strict=True)]
            # A module stores in one way: its oblong parameters tell that of a square one.
            told = set().union(*(lies for lies in ways if len(lies) == 1))
            for parts, name, lies in zip(wrappers, names, ways, strict=True):
                swapped = lies if len(lies) == 1 else told
                if len(swapped) != 1:
                    raise CheckpointError(
                        f"{where}: the matrices of {printable(name)!r} are square, and nothing tells which axis is the "
                        f"output: versions of PEFT differ. {MERGE}"
                    )
                one = replace(parts, parameters=(name,), swapped=swapped == {True})
                settled |= {name: one} if name in self.places else self._split(one)
        return settled

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter, which may lie in the base expert by expert; ``()`` if it is not there."""
        if name in self.places:
            return self.base.info(self.places[name]).shape
        stacks = self._stacks(name)
        shapes = [{self.base.info(tensor).shape for tensor in experts.values()} for experts in stacks]
        if not stacks or any(sorted(experts) != list(range(len(stacks[0]))) for experts in stacks):
            return ()
        if any(len(s) != 1 for s in shapes) or len({s[1:] for (s,) in shapes}) != 1:
            return ()
        return (len(stacks[0]), sum(s[0] for (s,) in shapes), *next(iter(shapes[0]))[1:])

    def _stacks(self, name: str) -> list[dict[int, str]]:
        """Return the tensors, by expert, that a parameter is stacked of: of each of its fused parts in order."""
        stem, _, last = name.rpartition(".")
        layer = re.search(r"\.(\d+)\.", stem)
        return [self._experts.get((int(layer[1]), part), {}) for part in FUSED.get(last, ())] if layer else []

    @cached_property
    def _experts(self) -> dict[tuple[int, str], dict[int, str]]:
        """Tensors of single experts by layer, part and number."""
        found: dict[tuple[int, str], dict[int, str]] = {}
        for name in self.base:
            place = self.architecture.place(name)
            if place is None or place.layer is None or place.expert is None or place.role.transposed:
                continue
            for part in place.role.part:
                found.setdefault((place.layer, part), {})[place.expert] = name
        return found

    def _split(self, parts: LoraParts) -> dict[str, LoraParts]:
        """Return the change of a stack as those of the tensors of its experts."""
        found, start = {}, 0
        for experts in self._stacks(parts.weight):
            end = start + self.base.info(experts[0]).shape[0]
            found |= {name: replace(parts, parameters=(name,), cut=(i, start, end)) for i, name in experts.items()}
            start = end
        return found


def _lies(parts: LoraParts, shape: tuple[int, ...]) -> set[bool]:
    """Return how factors may lie in a parameter: with the output before the input, ``False``, or behind, ``True``."""
    ways = (False, True) if parts.experts > 1 else (False,)
    return {swapped for swapped in ways if replace(parts, swapped=swapped).shape == shape}
