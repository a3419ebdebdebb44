"""What rewinding heads would do, predicted without measuring each: from one backward or one forward pass."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffract.edits.bench import Other
from diffract.edits.draft import everything, together
from diffract.edits.heads import TensorPart, Units
from diffract.errors import SelectionError, printable
from diffract.search.sample import Sample, gradients_of, sum_of_bits


def first_order_gains(
    model: torch.nn.Module, base: Other, units: Units, sample: Sample, *, way_back: float = 0.0
) -> dict[str, float]:
    """Return for each head the gain in bits per byte that the loss's slope promises, positive where rewinding helps.

    With L(W) the bits that the model W needs for the sample, by its bytes, the first-order change of rewinding the
    parts P of a head is sum over P of <dL/dW[P], W0[P] - W1[P]> / owners(P), and the gain is its negative. A part with
    several owners, such as a shared key-value head, is split among them, so that the gains of all heads add up to the
    first-order gain of rewinding them all. Exact in the limit of small changes; curvature is left out.

    Args:
        model: The tuned model W1, in evaluation mode; its gradients are empty afterwards.
        base: The base W0.
        units: The heads.
        sample: The text that the loss is of.
        way_back: How far all parts of the model are on their way from W1 to W0 already, below 1: the slope is taken
            there, along all of the way.

    Source: the first-order term of Taylor's formula, as in Molchanov et al. 2017.
    """
    by_tensor: dict[str, list[TensorPart]] = defaultdict(list)
    for part in units.parts:
        by_tensor[part.tensor].append(part)
    gains = dict.fromkeys(units.names, 0.0)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {name: parameters[name] for name in by_tensor}
    with gradients_of(model, wanted.values()):
        for batch in sample.batches:
            bits = sum_of_bits(model, batch)
            found = torch.autograd.grad(bits / sample.size_bytes, list(wanted.values()), allow_unused=True)
            for (name, parameter), slope in zip(wanted.items(), found, strict=True):
                if slope is None:
                    continue
                start = base.read(name, everything(tuple(parameter.shape))).to(parameter.device)
                start, end = together(start, parameter.detach())
                along = slope.to(start.dtype) * (start - end)
                for part in by_tensor[name]:
                    # Summed in 64 bits: the terms have both signs and nearly cancel.
                    share = -float(along[part.place].sum(dtype=torch.float64)) / len(part.owners) / (1 - way_back)
                    for owner in part.owners:
                        gains[owner] += share
    return gains


def activation_changes(model: torch.nn.Module, base: Other, units: Units, sample: Sample) -> dict[str, float]:
    """Return for each head the root of the mean over tokens of the sum over its parts of ||D[P] x||^2.

    x is what the part's projection got as input in the tuned model, D = W1 - W0; of an output projection D[P] and x
    are the head's columns. The square of a part with several owners is divided by their number, as in ``head_delta``,
    of which this is the analogue with real input in place of white noise.

    Args:
        model: The tuned model W1, in evaluation mode.
        base: The base W0.
        units: The heads.
        sample: The text that is the input.

    Raises:
        SelectionError: The input of a projection cannot be seen.
    """
    by_tensor: dict[str, list[TensorPart]] = defaultdict(list)
    for part in units.parts:
        if part.counts:
            by_tensor[part.tensor].append(part)
    squares = dict.fromkeys(units.names, 0.0)
    seen: set[str] = set()

    def look(name: str, module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.add(name)
        weight = module.weight.detach()
        change = weight.float() - base.read(name, everything(tuple(weight.shape))).to(weight.device).float()
        x = inputs[0][batch.known].float()  # of the batch that runs: hooks are called from within the loop below
        for part in by_tensor[name]:
            rows, cols = part.place
            # Other modules than Linear, such as GPT-2's Conv1D, store their weight as (in, out).
            linear = isinstance(module, torch.nn.Linear)
            found = x[:, cols] @ change[part.place].T if linear else x[:, rows] @ change[part.place]
            square = float(torch.linalg.vector_norm(found, dtype=torch.float64).square())
            squares.update((owner, squares[owner] + square / len(part.owners)) for owner in part.owners)

    with ExitStack() as hooks, torch.no_grad():
        for name in by_tensor:
            module = model.get_submodule(name.rpartition(".")[0])
            hooks.callback(module.register_forward_pre_hook(partial(look, name)).remove)
        for batch in sample.batches:
            model(input_ids=batch.ids[:, :-1], attention_mask=batch.known.long(), use_cache=False)
    if unseen := [name for name in by_tensor if name not in seen]:
        raise SelectionError(f"order activation: the input of {printable(unseen[0])} cannot be seen. Leave it out.")
    tokens = sum(int(batch.known.sum()) for batch in sample.batches)
    return {name: (value / tokens) ** 0.5 for name, value in squares.items()}
