"""Edited checkpoints as transformers loads them, against models that are edited by hand in torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf

from diffract.edits import Merge, Rewind, Truncate
from edit_cases import Tensors, edited, read, save_pair

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SHARD = 20_000


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def load(folder: Path) -> torch.nn.Module:
    return tf.AutoModelForCausalLM.from_pretrained(folder)


def rewound(start: Tensors, end: Tensors, _: Tensors) -> Tensors:
    """Head 3 of layer 0, with its own queries and output alone: it shares its keys and values with head 2."""
    found = {name: tensor.clone() for name, tensor in end.items()}
    stem = "model.layers.0.self_attn"
    found[f"{stem}.q_proj.weight"][24:32] = start[f"{stem}.q_proj.weight"][24:32]
    found[f"{stem}.o_proj.weight"][:, 24:32] = start[f"{stem}.o_proj.weight"][:, 24:32]
    if f"{stem}.q_norm.weight" in found:
        found[f"{stem}.q_norm.weight"][24:32] = start[f"{stem}.q_norm.weight"][24:32]
    if f"{stem}.q_proj.bias" in found:
        found[f"{stem}.q_proj.bias"][24:32] = start[f"{stem}.q_proj.bias"][24:32]
    return found


def truncated(start: Tensors, end: Tensors, _: Tensors) -> Tensors:
    def cut(name: str) -> torch.Tensor:
        if end[name].ndim < 2:
            return end[name]
        U, S, Vh = torch.linalg.svd(end[name].double() - start[name].double(), full_matrices=False)
        return (start[name].double() + (U[:, :3] * S[:3]) @ Vh[:3]).to(end[name].dtype)

    return {name: cut(name) for name in end}


def merged(start: Tensors, end: Tensors, other: Tensors) -> Tensors:
    def add(name: str) -> torch.Tensor:
        base, one, two = (tensors[name].double() for tensors in (start, end, other))
        return (base + 0.5 * ((one - base) + 2 * (two - base))).to(end[name].dtype)

    return {name: add(name) for name in end}


STEPS: dict[str, tuple[Callable[[Path, Path], object], Callable[..., Tensors]]] = {
    "rewind": (lambda base, _: Rewind(to=base, heads="L0.h3"), rewound),
    "truncate": (lambda base, _: Truncate(base=base, rank=3), truncated),
    "merge": (lambda base, other: Merge(base=base, models={"x": other}, weights={"x": 2}, scale=0.5), merged),
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2"])
@pytest.mark.parametrize("step", STEPS)
def test_logits_of_a_model_edited_by_hand(step: str, family: str, tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path / "one", family)
    _, other = save_pair(tmp_path / "two", family)
    make, by_hand = STEPS[step]
    edited(tmp_path / "out", tuned, make(base, other), output={"shard_size": SHARD})
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    model, start = load(tuned), logits(load(tuned))
    model.load_state_dict(by_hand(read(base), read(tuned), read(other)))
    found, wanted = logits(load(tmp_path / "out")), logits(model)
    if step == "rewind":
        assert torch.equal(found, wanted)
    # weights agree to one rounding to float32 each (6e-8 of their size): hundreds of products, in two layers
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, start, rtol=1e-2, atol=1e-2)


def test_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama")
    edited(tmp_path / "out", tuned, Rewind(to=base, heads="L0.h0"), output={"dtype": "bfloat16"})
    found = read(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config
    assert load(tmp_path / "out").dtype == torch.bfloat16
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(found[name], read(tuned)[name].bfloat16())


def test_what_belongs_to_the_tuned_model(tmp_path: Path) -> None:
    """Tokenizer, chat template, generation config and licence; nothing else of it, and nothing of the base."""
    base, tuned = save_pair(tmp_path, "llama")
    mine = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"]
    for folder in (base, tuned):
        for name in mine:
            (folder / name).write_text(json.dumps({"from": folder.name}))
        (folder / "training_args.bin").write_bytes(b"x")
        (folder / "README.md").write_text("mine")
    (base / "merges.txt").write_text("base")
    edited(tmp_path / "out", tuned, Rewind(to=base, fraction=0.5))
    for name in [*mine, "config.json"]:
        assert (tmp_path / "out" / name).read_bytes() == (tuned / name).read_bytes()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*mine, "config.json", "model.safetensors", "manifest.json", "recipe.yaml", "README.md"}
    assert "base_model:" in (tmp_path / "out" / "README.md").read_text()


def test_the_sample_generates_with_its_tokenizer(tmp_path: Path) -> None:
    samples = Path(__file__).parents[2] / "samples" / "tiny-olmo2"
    edited(tmp_path / "out", samples / "instructions", Rewind(to=samples / "base", fraction=1, unit="tensor"))
    ours, base = load(tmp_path / "out"), load(samples / "base")
    assert torch.equal(logits(ours), logits(base))
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    text = tf.AutoTokenizer.from_pretrained(tmp_path / "out")("one and two")["input_ids"]
    assert text == tf.AutoTokenizer.from_pretrained(samples / "instructions")("one and two")["input_ids"]
