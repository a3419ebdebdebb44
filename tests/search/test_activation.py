"""Changes weighted by real input, against each projection's slices written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffract.edits import LiveModel
from diffract.edits.heads import find_units
from diffract.errors import SelectionError
from diffract.search.predictions import Batch, Sample, activation_changes
from edit_cases import family_pair


def sample() -> Sample:
    ids = torch.randint(0, 50, (2, 13), generator=torch.Generator().manual_seed(5))
    known = torch.ones(2, 12, dtype=torch.bool)
    known[0, 9:] = False
    other = torch.randint(0, 50, (1, 8), generator=torch.Generator().manual_seed(6))
    whole = torch.ones(1, 7, dtype=torch.bool)
    return Sample((Batch(ids, known, known), Batch(other, whole, whole)), 40)


def inputs_of(model: torch.nn.Module, name: str, text: Sample) -> Tensor:
    """What a module was given, at all tokens that are no padding."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    with torch.no_grad():
        for batch in text.batches:
            model(input_ids=batch.ids[:, :-1], attention_mask=batch.known.long())
    handle.remove()
    return torch.cat([x[batch.known] for x, batch in zip(seen, text.batches, strict=True)])


def llama(base: Any, tuned: Any, text: Sample, head: int) -> float:
    """Four heads of 8, of which two share keys and values."""
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
    parts = [x @ d["q"][rows].T, x @ d["k"][shared].T, x @ d["v"][shared].T, z[:, rows] @ d["o"][:, rows].T]
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
def test_every_head(family: str, by_hand: Callable[..., float]) -> None:
    base, tuned = family_pair(family)
    live, text = LiveModel(tuned), sample()
    found = activation_changes(tuned, live.bench.other(base), find_units(live.bench, "head", None), text)
    for head in range(4):
        expected = by_hand(base, tuned, text, head)
        assert expected > 0.01
        assert found[f"L1.h{head}"] == pytest.approx(expected, rel=1e-5)  # sums of a few hundred float32 products


def test_a_model_that_did_not_change_has_none() -> None:
    base, _ = family_pair("llama")
    live = LiveModel(base)
    found = activation_changes(base, live.bench.other(base), find_units(live.bench, "head", None), sample())
    assert set(found.values()) == {0.0}


def test_input_that_cannot_be_seen_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = family_pair("llama")
    live = LiveModel(tuned)
    monkeypatch.setattr(tuned, "forward", lambda **_: None)
    with pytest.raises(SelectionError, match=r"order activation: the input of model\.layers\.0\..* cannot be seen"):
        activation_changes(tuned, live.bench.other(base), find_units(live.bench, "head", None), sample())
