"""A recipe without steps, and steps that come to nothing, give every byte back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import diffract
from diffract.edits import Interpolate, Rewind, Truncate
from edit_cases import assert_bits, assert_same, edit, family_pair, read, save_pair
from families import FAMILIES
from tiny_llama import llama_tensors

STRANGE = [0xFFC1, 0x7FA5, 0x8000, 0x0001, 0xFF80, 0x7F80]
"""bf16: a negative and a signalling NaN with payloads, -0, the least subnormal, both infinities."""


def odd_tensors() -> dict[str, torch.Tensor]:
    """A llama with everything that is no plain weight beside it."""
    tensors = llama_tensors(0)
    tensors["model.norm.weight"] = torch.tensor(STRANGE * 8, dtype=torch.uint16)[:32].view(torch.bfloat16)
    tensors["steps"] = torch.tensor(12345678901234, dtype=torch.int64)
    tensors["mask"] = torch.tensor([True, False, True])
    tensors["bytes"] = torch.arange(256).to(torch.uint8)
    tensors["half"] = torch.randn(3, 5, generator=torch.Generator().manual_seed(3)).half()
    tensors["wide"] = torch.randn(4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    tensors["small"] = torch.randn(4, 4, generator=torch.Generator().manual_seed(5)).to(torch.float8_e4m3fn)
    tensors["nothing"] = torch.zeros(0, 7)
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back(family: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if sorted(FAMILIES).index(family) % 2 else torch.float32
    _, tuned = family_pair(family, dtype)
    tuned.save_pretrained(tmp_path / "model")
    assert_same(edit(tmp_path / "out", tmp_path / "model"), read(tmp_path / "model"))


def test_every_dtype_comes_back(write_model: Callable[..., Path], tmp_path: Path) -> None:
    assert_same(edit(tmp_path / "out", write_model("model", odd_tensors())), odd_tensors())


@pytest.mark.parametrize(
    "source", ["sharded", "bin", "sharded bin", "npz", "file", "mapping", "module", "tied mapping", "tied bin"]
)
def test_every_source_comes_back(source: str, tmp_path: Path) -> None:
    base, _ = family_pair("gpt2" if "tied" in source else "llama", torch.float32)
    state = {name: tensor.detach() for name, tensor in base.state_dict().items()}
    model, folder = tmp_path / "model", tmp_path / "model"
    folder.mkdir()
    if source == "sharded":
        base.save_pretrained(folder, max_shard_size="10KB")
        assert len(list(folder.glob("*.safetensors"))) > 3
    elif source == "sharded bin":
        names = list(state)
        for number, part in enumerate((names[::2], names[1::2]), 1):
            torch.save({name: state[name] for name in part}, folder / f"pytorch_model-{number:05d}-of-00002.bin")
    elif source.endswith("bin"):
        torch.save(state, folder / "pytorch_model.bin")
    elif source == "npz":
        np.savez(model := folder / "model.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    elif source == "file":
        base.save_pretrained(folder)
        model = folder / "model.safetensors"
    else:
        model = base if source == "module" else state
    assert_same(edit(tmp_path / "out", model), state)


def test_tied_tensors_are_written_under_both_names(tmp_path: Path) -> None:
    base, tuned = family_pair("gpt2")
    found = edit(tmp_path / "out", tuned, Interpolate(other=base, at=0.5))
    assert_bits(found["lm_head.weight"], found["transformer.wte.weight"])
    assert not torch.equal(found["lm_head.weight"], tuned.state_dict()["lm_head.weight"])


def test_stored_twice_but_declared_tied(write_model: Callable[..., Path], tmp_path: Path) -> None:
    """Only where the bytes confirm it are two stored tensors one."""
    tensors = llama_tensors(0)
    tied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    assert_same(edit(tmp_path / "a", write_model("tied", tied, tie_word_embeddings=True)), tied)
    assert_same(edit(tmp_path / "b", write_model("not", tensors, tie_word_embeddings=True)), tensors)


@pytest.mark.parametrize(
    "nothing", [{"rewind": {"fraction": 0}}, {"interpolate": {"at": 0}}, {"truncate": {"drop": 0}}], ids=str
)
def test_steps_that_come_to_nothing(nothing: dict, family: tuple[Path, Path], tmp_path: Path) -> None:
    """Truncation computes in float32, which holds bf16 exactly."""
    base, tuned = family
    (name, settings), *_ = nothing.items()
    key = {"rewind": "to", "interpolate": "with", "truncate": "base"}[name]
    assert_same(edit(tmp_path / "out", tuned, {name: settings | {key: base}}), read(tuned))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_the_way_back_is_the_base(family: str, tmp_path: Path) -> None:
    """By tensors and by interpolation everything, transposed, fused, tied and expert tensors too."""
    base, tuned = save_pair(tmp_path, family, torch.bfloat16)
    assert_same(edit(tmp_path / "rewound", tuned, Rewind(to=base, unit="tensor", fraction=1)), read(base))
    assert_same(edit(tmp_path / "end", tuned, Interpolate(other=base, at=1)), read(base))


def test_truncating_nothing_of_float32_is_exact(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "qwen3")
    assert_same(edit(tmp_path / "out", tuned, Truncate(base=base, drop=0)), read(tuned))


def test_truncating_everything_is_the_base_in_matrices_alone(family: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = family
    found, start, end = edit(tmp_path / "out", tuned, Truncate(base=base, drop=1)), read(base), read(tuned)
    assert_same(found, {name: start[name] if start[name].ndim == 2 else end[name] for name in start})


def test_what_no_edit_can_change_follows_the_model(write_model: Callable[..., Path], tmp_path: Path) -> None:
    base, tuned = odd_tensors(), odd_tensors()
    base |= {"mask": ~base["mask"], "bytes": base["bytes"].flip(0)}
    model = write_model("tuned", tuned)
    found = edit(tmp_path / "out", model, Rewind(to=write_model("base", base), unit="tensor", fraction=1))
    assert_same(found, odd_tensors())


def test_configuration_and_recipe_stand_beside(family: tuple[Path, Path], tmp_path: Path) -> None:
    edit(tmp_path / "out", family[1])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "manifest.json", "recipe.yaml", "README.md"}
    assert (tmp_path / "out" / "config.json").read_bytes() == (family[1] / "config.json").read_bytes()
    assert diffract.verify(tmp_path / "out", replay=True).faults == []
