"""Edits in memory are those that files get, bit for bit, and leave no trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from diffract.edits import Interpolate, Laser, LiveModel, Merge, Rewind, Scale, Svf, Truncate
from diffract.edits.draft import BLOCK_BYTES
from diffract.edits.factors import as_table
from diffract.errors import CheckpointError, DiffractError, SelectionError
from edit_cases import Tensors, as_module, assert_same, edit, family_pair, read
from tiny_llama import LLAMA, llama_tensors

SAMPLES = Path(__file__).parents[2] / "samples" / "tiny-olmo2"

FACTORS = {"L0.mlp.up": torch.tensor(0.3), "L1.attn.q": torch.tensor(1.5)}

Kinds = dict[str, Callable[[Any, Any], Any]]

MERGES: Kinds = {
    f"merge {method}": lambda base, other, method=method: Merge(
        models={"other": other}, base=base, method=method, scale=0.7
    )
    for method in ("task-arithmetic", "dare", "ties", "dare-ties", "tsv", "iso-c")
}

KINDS: Kinds = {
    "rewind": lambda base, _: Rewind(to=base, fraction=0.5),
    "rewind half": lambda base, _: Rewind(to=base, fraction=0.5, amount=0.5, order="random"),
    "rewind tensors": lambda base, _: Rewind(to=base, fraction=0.3, unit="tensor"),
    "rewind reference": lambda base, other: Rewind(to=base, fraction=0.5, order="reference", reference=other),
    "truncate": lambda base, _: Truncate(base=base, rank=3),
    "truncate at random": lambda base, _: Truncate(base=base, drop=0.5, side="random", seed=3),
    "truncate heads": lambda base, _: Truncate(base=base, drop=0.5, per="head", select="attn"),
    "interpolate": lambda _, other: Interpolate(other=other, at=0.3),
    "interpolate groups": lambda _, other: Interpolate(other=other, at=0.3, groups={"layers 1": 0.9, "attn.q": 0}),
    "interpolate selection": lambda _, other: Interpolate(other=other, at=0.3, select="attn.k, mlp.up"),
    "slerp": lambda _, other: Interpolate(other=other, at=0.3, method="slerp"),
    "merge linear": lambda _, other: Merge(models={"other": other}, method="linear", weights={"other": 3}),
    "merge slerp": lambda _, other: Merge(models={"other": other}, method="slerp"),
    **MERGES,
    "laser": lambda *_: Laser(keep=0.5, select="mlp"),
    "scale": lambda base, _: Scale(base=base, factors=as_table(FACTORS)),
    "svf": lambda *_: Svf(z=1.5, select="attn.v, mlp.down"),
}


def trio(family: str, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """A base, a model, and another model."""
    base, tuned = family_pair(family, dtype)
    _, other = family_pair(family, dtype, scale=0.08)
    return base, tuned, other


def in_memory(model: torch.nn.Module, *steps: Any) -> Tensors:
    """What the steps make of a model, which is afterwards what it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with LiveModel(model).edited(*steps):
        found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_same(model.state_dict(), before)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned, other = trio("qwen2", dtype)
    step = KINDS[kind](base, other)
    found = in_memory(tuned, step)
    assert any(not torch.equal(found[name], tensor) for name, tensor in tuned.state_dict().items())
    assert_same(found, edit(tmp_path / "out", tuned, step))


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "falcon_grouped", "phi3", "opt"])
@pytest.mark.parametrize("kind", ["rewind half", "truncate", "merge dare-ties", "merge tsv", "slerp"])
def test_every_layout(kind: str, family: str, tmp_path: Path) -> None:
    """Transposed, tied, fused and stacked tensors."""
    base, tuned, other = trio(family, torch.bfloat16)
    step = KINDS[kind](base, other)
    assert_same(in_memory(tuned, step), edit(tmp_path / "out", tuned, step))


@pytest.mark.parametrize(
    "kinds",
    [
        ("truncate", "rewind"),
        ("rewind half", "interpolate"),
        ("merge ties", "rewind reference"),
        ("slerp", "merge dare"),
        ("laser", "svf", "interpolate groups"),
    ],
    ids=str,
)
def test_steps_after_each_other(kinds: tuple[str, ...], tmp_path: Path) -> None:
    """What one makes the next one sees, not rounded in between: not what two runs would give."""
    base, tuned, other = trio("olmo2", torch.bfloat16)
    steps = [KINDS[kind](base, other) for kind in kinds]
    assert_same(in_memory(tuned, *steps), edit(tmp_path / "out", tuned, *steps))


def large() -> Tensors:
    """A llama whose embedding takes three blocks, and whose projections take two."""
    tensors, generator = llama_tensors(0), torch.Generator().manual_seed(5)
    rows = int(2.5 * BLOCK_BYTES) // (32 * 2)
    tensors["model.embed_tokens.weight"] = torch.randn(rows, 32, generator=generator).bfloat16()
    return tensors


@pytest.mark.parametrize(
    "kind", ["merge dare", "merge ties", "slerp", "interpolate", "rewind tensors", "truncate", "merge task-arithmetic"]
)
def test_tensors_of_several_blocks(kind: str, tmp_path: Path) -> None:
    base = large()
    generator = torch.Generator().manual_seed(6)
    noise = [{n: torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(2)]
    tuned, other = ({n: (base[n].float() + 0.05 * x[n]).bfloat16() for n in base} for x in noise)
    step = KINDS[kind](base, other)
    (tmp_path / "model").mkdir()
    save_file(tuned, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    found = in_memory(as_module(tuned), step)
    assert_same(found, edit(tmp_path / "out", tmp_path / "model", step))


def test_undone_after_an_exception() -> None:
    base, tuned, _ = trio("gpt2", torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}

    def evaluate() -> None:
        with LiveModel(tuned).edited(Rewind(to=base, fraction=0.5)):
            assert any(not torch.equal(tensor, before[name]) for name, tensor in tuned.state_dict().items())
            raise RuntimeError("meanwhile")

    with pytest.raises(RuntimeError, match="meanwhile"):
        evaluate()
    assert_same(tuned.state_dict(), before)


def test_nested_and_repeated() -> None:
    base, tuned, other = trio("llama", torch.bfloat16)
    live, start = LiveModel(tuned), {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    with live.edited(Rewind(to=base, fraction=0.5)):
        outer = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
        with live.edited(Interpolate(other=other, at=0.5)):
            inner = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
        assert_same(tuned.state_dict(), outer)
    assert_same(tuned.state_dict(), start)
    assert_same(in_memory(tuned, Rewind(to=base, fraction=0.5)), outer)
    live.apply(Rewind(to=base, fraction=0.5))
    live.apply(Interpolate(other=other, at=0.5))
    assert_same(tuned.state_dict(), inner)


@pytest.mark.parametrize("how", ["edited", "apply"])
def test_a_step_that_does_not_fit_changes_nothing(how: str) -> None:
    base, tuned, _ = trio("llama", torch.float32)
    wrong, _ = family_pair("mistral")
    broken = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    broken["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    first = Interpolate(other=base, at=0.5)
    for second, error in [
        (Rewind(to=base, heads="L7.h0"), SelectionError),
        (Interpolate(other=wrong, at=0.5), CheckpointError),
        (Truncate(base=broken, drop=0.5), DiffractError),  # found while it computes
    ]:
        live = LiveModel(tuned)
        with pytest.raises(error):
            live.apply(first, second) if how == "apply" else live.edited(first, second).__enter__()
        assert_same(tuned.state_dict(), before)


def test_tied_tensors_change_once_and_together() -> None:
    base, tuned, _ = trio("gpt2", torch.float32)
    assert tuned.lm_head.weight.data_ptr() == tuned.transformer.wte.weight.data_ptr()
    with LiveModel(tuned).edited(Interpolate(other=base, at=1)):
        assert_same(tuned.state_dict(), base.state_dict())
        assert tuned.lm_head.weight is tuned.transformer.wte.weight


def test_tied_by_value_in_memory_of_their_own(write_model: Callable[..., Path]) -> None:
    tensors = llama_tensors(0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    module = as_module(tensors, tie_word_embeddings=True)
    base = {name: tensor * 2 for name, tensor in tensors.items()}
    found = in_memory(module, Interpolate(other=base, at=1))
    assert_same(found, base)


def test_gradients_and_training_go_on() -> None:
    """Parameters stay the same objects, ask for gradients as before, and train on where they are."""
    base, tuned, _ = trio("llama", torch.float32)
    live, parameter = LiveModel(tuned), tuned.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        parameter.mul_(2)
    trained = parameter.detach().clone()
    with live.edited(Interpolate(other=base, at=1)):
        assert torch.equal(parameter, base.model.layers[0].mlp.up_proj.weight)
        assert parameter.requires_grad
    assert torch.equal(parameter, trained)
    assert parameter.is_leaf
    assert parameter.grad_fn is None


def test_the_base_may_be_a_folder(tmp_path: Path) -> None:
    base, tuned, _ = trio("llama", torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    found = in_memory(tuned, Rewind(to=tmp_path / "base", fraction=1, unit="tensor"))
    assert_same(found, read(tmp_path / "base"))


def test_only_what_a_head_consists_of_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a head: no more entries are copied than the head has."""
    model, base = (tf.AutoModelForCausalLM.from_pretrained(SAMPLES / name) for name in ("math", "base"))
    copied = []
    plain = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *a: (copied.append(self.numel()), plain(self, *a))[1])
    with LiveModel(model).edited(Rewind(to=base, heads="L2.h3")):
        assert sum(copied) == 2 * 16 * 128 + 16  # q and o, and the head's part of the queries' norm
