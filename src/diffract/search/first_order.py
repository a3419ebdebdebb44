"""What rewinding a head would gain, predicted from one backward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import log

import torch
from torch import Tensor

from diffract.edits.bench import Other
from diffract.edits.draft import everything
from diffract.edits.parts import Part, Units
from diffract.edits.planning import both
from diffract.search.samples import Batch, Sample


def first_order_gains(model: torch.nn.Module, base: Other, units: Units, sample: Sample) -> dict[str, float]:
    """Return for each head the gain in bits per byte that the loss's slope promises, positive where rewinding helps.

    With L(W) the bits that the model W needs for the sample, by its bytes, the first-order change of rewinding the
    parts P of a head is sum over P of <dL/dW[P], W0[P] - W1[P]> / owners(P), and the gain is its negative. A part with
    several owners, such as a shared key-value head, is split among them, so that the gains of all heads add up to the
    first-order gain of rewinding them all. Exact in the limit of small changes; curvature is left out.

    Args:
        model: W1, in evaluation mode; its gradients are empty afterwards.
        base: W0.
        units: The heads.
        sample: Text.

    Source: the first-order term of Taylor's formula, as in Molchanov et al. 2017.
    """
    by_tensor: dict[str, list[Part]] = defaultdict(list)
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
                if slope is not None:
                    _add_gains(gains, by_tensor[name], slope, _change(base, name, parameter))
    return gains


def sum_of_bits(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Return the bits that a model needs for the tokens of a batch that count."""
    output = model(input_ids=batch.ids[:, :-1], attention_mask=batch.known.long(), use_cache=False)
    logits, targets = output.logits[batch.scored], batch.ids[:, 1:][batch.scored]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, targets, reduction="sum") / log(2)


@contextmanager
def gradients_of(model: torch.nn.Module, wanted: Iterable[Tensor]) -> Iterator[None]:
    """Ask for the gradients of some parameters alone."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = {id(parameter) for parameter in wanted}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in chosen)
        with torch.enable_grad():
            yield
    finally:
        for parameter, asked in before.items():
            parameter.requires_grad_(asked)


def _change(base: Other, name: str, parameter: Tensor) -> Tensor:
    """Return W0 - W1 of a tensor where it lies, in 32 bits or more."""
    start, end = both(base.read(name, everything(tuple(parameter.shape))).to(parameter.device), parameter.detach())
    return start - end


def _add_gains(gains: dict[str, float], parts: Sequence[Part], slope: Tensor, change: Tensor) -> None:
    along = slope.to(change.dtype) * change
    for part in parts:
        share = -float(along[part.place].sum(dtype=torch.float64)) / len(part.owners)
        for owner in part.owners:
            gains[owner] += share
