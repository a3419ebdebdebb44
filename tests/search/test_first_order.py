"""The slope of the loss along each head's way back, against finite differences of a float64 model."""

from __future__ import annotations

from math import log

import pytest
import torch

from diffract.edits import LiveModel, Rewind
from diffract.edits.heads import Units, find_units
from diffract.search.predictions import Batch, Sample, first_order_gains, sum_of_bits
from edit_cases import family_pair

STEP = 3e-3
CLOSE = 2e-5
"""Third derivatives, of order 1 here, times the step squared; and as much again, as the norms of these models compute
in float32: 6e-8 by the step. The slopes are 0.1."""


def sample(model: torch.nn.Module, *, padded: bool = False) -> Sample:
    """Two sequences, of the second of which only the end counts; with padding after the first."""
    ids = torch.randint(0, 50, (2, 13), generator=torch.Generator().manual_seed(5))
    known, scored = torch.ones(2, 12, dtype=torch.bool), torch.ones(2, 12, dtype=torch.bool)
    scored[1, :6] = False
    if padded:
        known[0, 9:] = scored[0, 9:] = False
    return Sample((Batch(ids, known, scored),), 37)


def bits_per_byte(model: torch.nn.Module, text: Sample) -> float:
    with torch.no_grad():
        return sum(float(sum_of_bits(model, batch)) for batch in text.batches) / text.size_bytes


def slope(model: torch.nn.Module, base: torch.nn.Module, text: Sample, units: Units, names: list[str]) -> float:
    """-dL/dt of going back by t, central differences; shared parts go with their owners alone."""
    found = []
    for amount in (STEP, -STEP):
        with LiveModel(model).edited(Rewind(to=base, heads=",".join(names), amount=amount)):
            found.append(bits_per_byte(model, text))
    return (found[1] - found[0]) / (2 * STEP)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "olmo2"])
def test_gains_are_slopes_of_the_loss(family: str) -> None:
    base, tuned = family_pair(family, torch.float64)
    live, text = LiveModel(tuned), sample(tuned, padded=True)
    units = find_units(live.bench, "head", None)
    gains = first_order_gains(tuned, live.bench.other(base), units, text)
    assert list(gains) == list(units.names)
    whole = slope(tuned, base, text, units, list(units.names))
    assert abs(whole) > 1e-3
    assert sum(gains.values()) == pytest.approx(whole, abs=CLOSE)
    if family == "gpt2":  # no head shares anything but what all share: each alone is its own slope
        for name in units.names[:2]:
            assert gains[name] == pytest.approx(slope(tuned, base, text, units, [name]), abs=CLOSE)


def test_shared_parts_are_split_among_their_owners() -> None:
    """Of a group of two heads, going back together moves the shared slices too; each head's gain has half of that."""
    base, tuned = family_pair("llama", torch.float64)
    live, text = LiveModel(tuned), sample(tuned)
    units = find_units(live.bench, "head", None)
    gains = first_order_gains(tuned, live.bench.other(base), units, text)
    together = slope(tuned, base, text, units, ["L0.h0", "L0.h1"])
    assert gains["L0.h0"] + gains["L0.h1"] == pytest.approx(together, abs=CLOSE)
    alone = [slope(tuned, base, text, units, [name]) for name in ("L0.h0", "L0.h1")]
    shared = together - sum(alone)
    assert gains["L0.h0"] == pytest.approx(alone[0] + shared / 2, abs=CLOSE)


def test_a_step_in_the_direction_of_the_loss_gains_what_is_promised() -> None:
    """A change that is a tiny step up the slope of the loss is worth undoing, by its own squared length."""
    base, _ = family_pair("llama", torch.float64)
    text, size = sample(base), 1e-3
    parameters = {name: p for name, p in base.named_parameters() if "self_attn" in name}
    up = torch.autograd.grad(sum_of_bits(base, text.batches[0]) / text.size_bytes, list(parameters.values()))
    _, tuned = family_pair("llama", torch.float64)
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for (name, _), way in zip(parameters.items(), up, strict=True):
            tuned.get_parameter(name).add_(size * way)
    live = LiveModel(tuned)
    gains = first_order_gains(tuned, live.bench.other(base), find_units(live.bench, "head", None), text)
    promised = size * sum(float(way.square().sum()) for way in up)
    assert sum(gains.values()) == pytest.approx(promised, rel=0.02)  # curvature over a small step


def test_the_model_is_left_as_it_was() -> None:
    base, tuned = family_pair("llama", torch.float64)
    frozen = tuned.get_parameter("model.layers.0.self_attn.q_proj.weight")
    frozen.requires_grad_(False)
    before = {name: p.clone() for name, p in tuned.state_dict().items()}
    live = LiveModel(tuned)
    first_order_gains(tuned, live.bench.other(base), find_units(live.bench, "head", None), sample(tuned))
    assert all(torch.equal(p, before[name]) for name, p in tuned.state_dict().items())
    assert all(p.grad is None for p in tuned.parameters())
    assert [name for name, p in tuned.named_parameters() if not p.requires_grad] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]


def test_bits_are_counted_where_they_count() -> None:
    _, tuned = family_pair("llama", torch.float64)
    text = sample(tuned, padded=True)
    (batch,) = text.batches
    with torch.no_grad():
        rows = [tuned(input_ids=batch.ids[:1, :9]).logits[0], tuned(input_ids=batch.ids[1:, :12]).logits[0, 6:]]
    targets = [batch.ids[0, 1:10], batch.ids[1, 7:13]]
    nats = [-r.log_softmax(-1)[torch.arange(len(t)), t].sum() for r, t in zip(rows, targets, strict=True)]
    assert bits_per_byte(tuned, text) * 37 * log(2) == pytest.approx(float(sum(nats)), rel=1e-12)  # float64 sums of 15
