"""How much the change of a head changes what it computes from real input."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffract.edits.bench import Other
from diffract.edits.draft import Place, everything
from diffract.edits.parts import Part, Units
from diffract.errors import SelectionError, printable
from diffract.search.samples import Batch, Sample


def activation_changes(model: torch.nn.Module, base: Other, units: Units, sample: Sample) -> dict[str, float]:
    """Return for each head the root of the mean over tokens of the sum over its parts of ||D[P] x||^2.

    x is what the part's projection got as input in the tuned model, D = W1 - W0; of an output projection D[P] and x
    are the head's columns. A part with several owners counts for each of them, as it does in ``head_delta``, of which
    this is the analogue with real input in place of white noise.

    Args:
        model: W1, in evaluation mode.
        base: W0.
        units: The heads.
        sample: Text.

    Raises:
        SelectionError: The input of a projection cannot be seen.
    """
    by_tensor: dict[str, list[Part]] = defaultdict(list)
    for part in units.parts:
        if part.counts:
            by_tensor[part.tensor].append(part)
    squares = dict.fromkeys(units.names, 0.0)
    seen: set[str] = set()
    tokens = sum(int(batch.known.sum()) for batch in sample.batches)
    for batch in sample.batches:

        def take(name: str, change: Tensor, transposed: bool, x: Tensor, batch: Batch = batch) -> None:
            seen.add(name)
            inputs = x[batch.known].float()
            for part in by_tensor[name]:
                square = _square(inputs, change, part.place, transposed)
                squares.update((owner, squares[owner] + square) for owner in part.owners)

        with torch.no_grad(), _watched(model, base, by_tensor, take):
            model(input_ids=batch.ids[:, :-1], attention_mask=batch.known.long(), use_cache=False)
    if unseen := [name for name in by_tensor if name not in seen]:
        raise SelectionError(f"order activation: the input of {printable(unseen[0])} cannot be seen. Leave it out.")
    return {name: (value / tokens) ** 0.5 for name, value in squares.items()}


def _square(inputs: Tensor, change: Tensor, place: Place, transposed: bool) -> float:
    """Return the sum over tokens of ||D[P] x[P]||^2."""
    block = change[place]
    rows, cols = place
    found = inputs[:, rows] @ block if transposed else inputs[:, cols] @ block.T
    return float(torch.linalg.vector_norm(found, dtype=torch.float64).square())


Take = Callable[[str, Tensor, bool, Tensor], None]


@contextmanager
def _watched(model: torch.nn.Module, base: Other, tensors: Any, take: Take) -> Iterator[None]:
    """Have the inputs of projections looked at while the model runs."""
    with ExitStack() as hooks:
        for name in tensors:
            module = model.get_submodule(name.rpartition(".")[0])
            handle = module.register_forward_pre_hook(partial(_look, base, name, take))
            hooks.callback(handle.remove)
        yield


def _look(base: Other, name: str, take: Take, module: Any, inputs: tuple[Tensor, ...]) -> None:
    weight = module.weight.detach()
    change = weight.float() - base.read(name, everything(tuple(weight.shape))).to(weight.device).float()
    take(name, change, not isinstance(module, torch.nn.Linear), inputs[0])
