"""Edits of loaded models: equal to files bit for bit, and undone to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import diffract
from diffract.edits import Interpolate, Laser, LiveModel, Merge, Recipe, Rewind, Svf, Truncate, apply
from diffract.errors import DiffractError

SAMPLES = Path(__file__).parents[2] / "samples" / "tiny-olmo2"
BASE, MATH, CODE = (str(SAMPLES / name) for name in ("base", "math", "code"))
UP = "model.layers.0.mlp.up_proj.weight"

MERGES = ("linear", "slerp", "task-arithmetic", "dare", "ties", "dare-ties", "tsv", "iso-c")
STEPS = {
    "rewind": [Rewind(to=BASE, fraction=0.3, order="reference", reference=CODE)],
    "soft rewind": [Rewind(to=BASE, fraction=0.3, amount=0.3)],
    "truncate": [Truncate(base=BASE, energy=0.7)],
    "by head": [Truncate(base=BASE, drop=0.5, per="head", select="attn")],
    "interpolate": [Interpolate(other=CODE, at=0.3, groups={"mlp": 0.9})],
    "slerp": [Interpolate(other=CODE, at=0.3, method="slerp")],
    "laser": [Laser(keep=0.3, select="mlp.down")],
    "svf": [Svf(z=1.2, select="attn")],
    "three": [Rewind(to=BASE, heads="L0.h1"), Truncate(base=BASE, drop=0.5), Interpolate(other=CODE, at=0.1)],
    **{method: [Merge(base=BASE, models={"code": CODE}, method=method)] for method in MERGES},
}


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value.view(torch.int16), other[name].view(torch.int16)), name


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
def test_files_and_live_models_agree(steps: list, tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(MATH)
    before = state(model)
    apply(Recipe(model=MATH, steps=steps), tmp_path / "out")
    expected = state(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert any(not torch.equal(expected[name], before[name]) for name in before)
    with LiveModel(model).edited(*steps):
        assert_equal(state(model), expected)
    assert_equal(state(model), before)
    LiveModel(model).apply(*steps)
    assert_equal(state(model), expected)


@pytest.mark.parametrize("method", MERGES)
def test_tensors_of_many_blocks_agree(method: str, tmp_path: Path) -> None:
    """Entries for one and a half blocks of files."""
    generator = torch.Generator().manual_seed(0)
    models = [{"w": torch.randn(1600, 500, generator=generator).bfloat16()} for _ in range(3)]
    step = Merge(base=models[0], models={"b": models[2]}, method=method)
    edited = apply(Recipe(model=models[1], steps=[step]), tmp_path / "out")
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(models[1]["w"].clone())
    with LiveModel(module).edited(step), diffract.open(edited.folder) as written:
        assert torch.equal(written["w"].view(torch.int16), module.w.data.view(torch.int16))
    assert torch.equal(module.w.data, models[1]["w"])


def test_an_error_in_the_block_undoes_all_the_same() -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(MATH)
    before = state(model)
    with pytest.raises(ZeroDivisionError), LiveModel(model).edited(*STEPS["three"]):
        raise ZeroDivisionError
    assert_equal(state(model), before)


def test_a_step_that_fails_changes_nothing() -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(MATH)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = torch.nan
    before = state(model)
    with pytest.raises(DiffractError, match="finite"):
        LiveModel(model).apply(Svf(z=0.5, select="mlp.up"))
    assert_equal(state(model), before)


def test_only_what_a_head_consists_of_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a head: no more entries are copied than the head has."""
    model, base = (tf.AutoModelForCausalLM.from_pretrained(m) for m in (MATH, BASE))
    copied = []
    plain = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *a: (copied.append(self.numel()), plain(self, *a))[1])
    with LiveModel(model).edited(Rewind(to=base, heads="L2.h3")):
        assert sum(copied) == 2 * 16 * 128 + 16  # q and o, and the head's part of the queries' norm
