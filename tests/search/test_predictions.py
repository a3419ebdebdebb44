"""What cheap orders go by: slopes against finite differences of a float64 model, real input against slices by hand."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from diffract.edits import LiveModel, Rewind
from diffract.edits.heads import Units, change_norms, find_units
from diffract.errors import SelectionError
from diffract.search.predictions import activation_changes, first_order_gains
from diffract.search.sample import Batch, Sample, sum_of_bits
from edit_cases import everything_of, family_pair

BLOCK = "model.layers.0.self_attn"

STEP = 3e-3
CLOSE = 2e-5
"""Third derivatives, of order 1 here, times the step squared; and as much again, as the norms of these models compute
in float32: 6e-8 by the step. The slopes are 0.1."""


def batch(seed: int, rows: int, length: int, *, padded: bool = False) -> Batch:
    """Sequences, all of whose tokens count; with padding after the first."""
    ids = torch.randint(0, 50, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    known = torch.ones(rows, length, dtype=torch.bool)
    if padded:
        known[0, 9:] = False
    return Batch(ids, known, known.clone())


def scored_sample(*, padded: bool = False) -> Sample:
    """Two sequences, of the second of which only the end counts."""
    found = batch(5, 2, 12, padded=padded)
    found.scored[1, :6] = False
    return Sample((found,), 37)


def input_sample() -> Sample:
    return Sample((batch(5, 2, 12, padded=True), batch(6, 1, 7)), 40)


def bits_per_byte(model: torch.nn.Module, text: Sample) -> float:
    with torch.no_grad():
        return sum(float(sum_of_bits(model, part)) for part in text.batches) / text.size_bytes


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
    live, text = LiveModel(tuned), scored_sample(padded=True)
    units = find_units(live.bench, "head", None)
    gains = first_order_gains(tuned, everything_of(live, base), units, text)
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
    live, text = LiveModel(tuned), scored_sample()
    units = find_units(live.bench, "head", None)
    gains = first_order_gains(tuned, everything_of(live, base), units, text)
    together = slope(tuned, base, text, units, ["L0.h0", "L0.h1"])
    assert gains["L0.h0"] + gains["L0.h1"] == pytest.approx(together, abs=CLOSE)
    alone = [slope(tuned, base, text, units, [name]) for name in ("L0.h0", "L0.h1")]
    shared = together - sum(alone)
    assert gains["L0.h0"] == pytest.approx(alone[0] + shared / 2, abs=CLOSE)


def test_on_the_way_back_the_slope_is_that_of_the_place_along_all_of_the_way() -> None:
    base, tuned = family_pair("llama", torch.float64)
    live, text, other = LiveModel(tuned), scored_sample(), everything_of(LiveModel(tuned), base)
    units = find_units(live.bench, "head", None)
    with live.edited(Rewind(to=base, heads=units.names, amount=0.25)):
        gains = first_order_gains(tuned, other, units, text, way_back=0.25)
    found = []
    for amount in (0.25 + STEP, 0.25 - STEP):
        with live.edited(Rewind(to=base, heads=units.names, amount=amount)):
            found.append(bits_per_byte(tuned, text))
    assert sum(gains.values()) == pytest.approx((found[1] - found[0]) / (2 * STEP), abs=CLOSE)


def test_alone_a_head_moves_what_it_shares_with_none() -> None:
    """Queries and output of the two heads of a group; what both share stays, so that it counts for neither."""
    base, tuned = family_pair("llama", torch.float64)
    live, text, other = LiveModel(tuned), scored_sample(), everything_of(LiveModel(tuned), base)
    units = find_units(live.bench, "head", None)
    gains = first_order_gains(tuned, other, units.alone(), text)
    norms = change_norms(units.alone(), live.bench.draft().blocks, other)
    for name in units.names[:2]:
        assert gains[name] == pytest.approx(slope(tuned, base, text, units, [name]), abs=CLOSE)
        number = int(name.removeprefix("L0.h"))
        change = {
            p: tuned.state_dict()[f"{BLOCK}.{p}_proj.weight"] - base.state_dict()[f"{BLOCK}.{p}_proj.weight"]
            for p in "qo"
        }
        size = len(change["q"]) // cast(Any, tuned).config.num_attention_heads
        own = slice(number * size, (number + 1) * size)
        assert norms[name] ** 2 == pytest.approx(
            float(change["q"][own].square().sum() + change["o"][:, own].square().sum())
        )


def test_a_step_in_the_direction_of_the_loss_gains_what_is_promised() -> None:
    """A change that is a tiny step up the slope of the loss is worth undoing, by its own squared length."""
    base, _ = family_pair("llama", torch.float64)
    text, size = scored_sample(), 1e-3
    parameters = {name: p for name, p in base.named_parameters() if "self_attn" in name}
    up = torch.autograd.grad(sum_of_bits(base, text.batches[0]) / text.size_bytes, list(parameters.values()))
    _, tuned = family_pair("llama", torch.float64)
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for (name, _), way in zip(parameters.items(), up, strict=True):
            tuned.get_parameter(name).add_(size * way)
    live = LiveModel(tuned)
    gains = first_order_gains(tuned, everything_of(live, base), find_units(live.bench, "head", None), text)
    promised = size * sum(float(way.square().sum()) for way in up)
    assert sum(gains.values()) == pytest.approx(promised, rel=0.02)  # curvature over a small step


def test_the_model_is_left_as_it_was() -> None:
    base, tuned = family_pair("llama", torch.float64)
    frozen = tuned.get_parameter("model.layers.0.self_attn.q_proj.weight")
    frozen.requires_grad_(False)
    before = {name: p.clone() for name, p in tuned.state_dict().items()}
    live = LiveModel(tuned)
    first_order_gains(tuned, everything_of(live, base), find_units(live.bench, "head", None), scored_sample())
    assert all(torch.equal(p, before[name]) for name, p in tuned.state_dict().items())
    assert all(p.grad is None for p in tuned.parameters())
    assert [name for name, p in tuned.named_parameters() if not p.requires_grad] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]


def test_bits_are_counted_where_they_count() -> None:
    _, tuned = family_pair("llama", torch.float64)
    text = scored_sample(padded=True)
    (own,) = text.batches
    with torch.no_grad():
        rows = [tuned(input_ids=own.ids[:1, :9]).logits[0], tuned(input_ids=own.ids[1:, :12]).logits[0, 6:]]
    targets = [own.ids[0, 1:10], own.ids[1, 7:13]]
    nats = [-r.log_softmax(-1)[torch.arange(len(t)), t].sum() for r, t in zip(rows, targets, strict=True)]
    assert bits_per_byte(tuned, text) * 37 * log(2) == pytest.approx(float(sum(nats)), rel=1e-12)  # float64 sums of 15


def inputs_of(model: torch.nn.Module, name: str, text: Sample) -> Tensor:
    """What a module was given, at all tokens that are no padding."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    with torch.no_grad():
        for part in text.batches:
            model(input_ids=part.ids[:, :-1], attention_mask=part.known.long())
    handle.remove()
    return torch.cat([x[part.known] for x, part in zip(seen, text.batches, strict=True)])


def llama(base: Any, tuned: Any, text: Sample, head: int) -> float:
    """Four heads of 8, of which two share keys and values, half of their squares each."""
    stem, rows, shared = (
        "model.layers.1.self_attn",
        slice(8 * head, 8 * head + 8),
        slice(8 * (head // 2), 8 * (head // 2) + 8),
    )
    d = {
        p: tuned.get_parameter(f"{stem}.{p}_proj.weight") - base.get_parameter(f"{stem}.{p}_proj.weight")
        for p in "qkvo"
    }
    x, z = inputs_of(tuned, f"{stem}.q_proj", text), inputs_of(tuned, f"{stem}.o_proj", text)
    halves = [x @ d[p][shared].T / 2**0.5 for p in "kv"]
    parts = [x @ d["q"][rows].T, *halves, z[:, rows] @ d["o"][:, rows].T]
    return float(torch.cat(parts, dim=1).detach().square().sum(1).mean().sqrt())


def gpt2(base: Any, tuned: Any, text: Sample, head: int) -> float:
    """Fused, and stored as (in, out)."""
    stem, own = "transformer.h.1.attn", slice(8 * head, 8 * head + 8)
    d = {
        p: tuned.get_parameter(f"{stem}.{p}.weight") - base.get_parameter(f"{stem}.{p}.weight")
        for p in ("c_attn", "c_proj")
    }
    x, z = inputs_of(tuned, f"{stem}.c_attn", text), inputs_of(tuned, f"{stem}.c_proj", text)
    parts = [x @ d["c_attn"][:, 32 * i + 8 * head : 32 * i + 8 * head + 8] for i in range(3)]
    parts.append(z[:, own] @ d["c_proj"][own])
    return float(torch.cat(parts, dim=1).detach().square().sum(1).mean().sqrt())


@pytest.mark.parametrize(("family", "by_hand"), [("llama", llama), ("gpt2", gpt2)])
def test_activation_changes_of_every_head(family: str, by_hand: Callable[..., float]) -> None:
    base, tuned = family_pair(family)
    live, text = LiveModel(tuned), input_sample()
    found = activation_changes(tuned, everything_of(live, base), find_units(live.bench, "head", None), text)
    for head in range(4):
        expected = by_hand(base, tuned, text, head)
        assert expected > 0.01
        assert found[f"L1.h{head}"] == pytest.approx(expected, rel=1e-5)  # sums of a few hundred float32 products


def test_a_model_that_did_not_change_has_none() -> None:
    base, _ = family_pair("llama")
    live = LiveModel(base)
    found = activation_changes(base, everything_of(live, base), find_units(live.bench, "head", None), input_sample())
    assert set(found.values()) == {0.0}


def test_input_that_cannot_be_seen_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = family_pair("llama")
    live = LiveModel(tuned)
    monkeypatch.setattr(tuned, "forward", lambda **_: None)
    with pytest.raises(SelectionError, match=r"order activation: the input of model\.layers\.0\..* cannot be seen"):
        activation_changes(tuned, everything_of(live, base), find_units(live.bench, "head", None), input_sample())
