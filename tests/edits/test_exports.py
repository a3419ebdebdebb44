"""Adapters that PEFT loads: what base and adapter make together, and what is said to be missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import diffract
from diffract.edits import Lora, Pissa, Rewind
from diffract.errors import RecipeError, SelectionError
from edit_cases import Tensors, assert_bits, assert_same, edited, family_pair, moved, read, save_pair

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT asks transformers by an old name
)

ROUNDING = 2.0**-24
"""Of float32, relative: factors are stored in it."""


def rows_of(folder: Path) -> dict[str, dict]:
    steps = json.loads((folder / "manifest.json").read_text())["steps"]
    return {row["name"]: row for row in steps[-1]["rows"]}


def summed(folder: Path, name: str) -> Tensor:
    """B A of one module, float64, alpha equal to the rank."""
    stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    factors = load_file(folder / "adapter_model.safetensors")
    return factors[f"{stem}B.weight"].double() @ factors[f"{stem}A.weight"].double()


def with_peft(base: Path, adapter: Path, auto: type = tf.AutoModelForCausalLM) -> tuple[torch.nn.Module, Tensors]:
    """The adapter over the base as PEFT loads it, and all weights after merging."""
    model = PeftModel.from_pretrained(auto.from_pretrained(base), adapter).merge_and_unload()
    return model, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def add_rank_two(layer: torch.nn.Module) -> None:
    """A change that stands out of the noise in every matrix of a layer."""
    generator = torch.Generator().manual_seed(9)
    for parameter in layer.parameters():
        if parameter.ndim == 2:
            left, right = (torch.randn(n, 2, generator=generator) for n in parameter.shape)
            parameter.add_(left @ right.mT)


def linear_layers(model: torch.nn.Module) -> set[str]:
    """Weights of linear layers, but for what is an embedding too, and GPT-NeoX's head, which has two names."""
    embedding = model.get_input_embeddings().weight
    neox = model.config.model_type == "gpt_neox"
    kinds = (torch.nn.Linear, tf.pytorch_utils.Conv1D)
    found = {f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name for name, weight in found.items() if weight is not embedding and not (neox and "lm_head" in name)}


def worst(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2", "phi3", "gpt2", "gpt_neox", "falcon_grouped"])
def test_full_rank_is_the_tuned_model(family: str, tmp_path: Path) -> None:
    """Linear weights to rounding: factors of size sqrt(sigma) are rounded to float32, and so is their sum."""
    base, tuned = save_pair(tmp_path, family)
    start, end = read(base), read(tuned)
    edited(tmp_path / "lora", tuned, export={"lora": {"base": base, "rank": "full"}})
    rows = rows_of(tmp_path / "lora")
    carried = {name for name, row in rows.items() if "left" not in row}
    _, merged = with_peft(base, tmp_path / "lora")
    again = read(tmp_path / "lora")
    assert carried == linear_layers(family_pair(family)[1])
    for name in end:
        if name not in carried:
            assert_bits(merged["lm_head.weight" if name == "embed_out.weight" else name], start[name], name)
            assert_bits(again[name], start[name], name)
            continue
        # entries of B and A are at most sqrt(sigma_1); M products, each off by two roundings, and the sum's own
        change = torch.linalg.matrix_norm((end[name] - start[name]).double(), 2)
        bound = ROUNDING * (3 * min(end[name].shape) * float(change) + 2 * float(end[name].abs().max()))
        assert worst(merged[name], end[name]) < bound
        assert worst(again[name], end[name]) < bound
        assert not torch.equal(start[name], end[name])


@pytest.mark.parametrize(
    "settings",
    [{"rank": 3}, {"rank": "3"}, {"rank": "auto"}, {}, {"energy": 0.6}, {"rule": "mp-edge"}, {"rank": 1000}],
    ids=str,
)
def test_the_stated_error_is_what_is_missing(settings: dict, tmp_path: Path) -> None:
    base, tuned = (model.to(torch.float32) for model in family_pair("llama"))
    add_rank_two(tuned.model.layers[0])
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    start, end = read(tmp_path / "base"), read(tmp_path / "tuned")
    export = {"lora": {"base": tmp_path / "base", **settings}}
    done = edited(tmp_path / "lora", tmp_path / "tuned", export=export, allow="strangers")  # a change of weights' size
    again, ranks, missed = read(tmp_path / "lora"), [], 0.0
    for name, row in rows_of(tmp_path / "lora").items():
        delta = (end[name].double() - start[name].double()).numpy()
        assert row["change"] == pytest.approx(np.linalg.norm(delta), rel=1e-12)  # float64 sums in another order
        if "left" in row:
            assert row["error"] == row["change"]
            continue
        ranks.append(row["rank"])
        sigmas = np.linalg.svd(delta, compute_uv=False)
        best = np.sqrt((sigmas[row["rank"] :] ** 2).sum())
        # the best approximation of its rank (Eckart-Young), but for the factors' rounding to float32
        assert row["error"] == pytest.approx(best, rel=1e-6, abs=4 * ROUNDING * np.sqrt(len(sigmas)) * sigmas.sum())
        kept = summed(tmp_path / "lora", name).numpy() if row["rank"] else 0
        assert row["error"] == pytest.approx(np.linalg.norm(delta - kept), rel=1e-9, abs=1e-12)
        assert worst(again[name], start[name] + torch.tensor(kept)) <= ROUNDING * float(end[name].abs().max()) * 4
        missed += row["error"] ** 2
        if "energy" in settings:
            shares = np.cumsum(sigmas**2) / (sigmas**2).sum()
            assert row["rank"] == int((shares < 0.6).sum()) + 1
        if isinstance(settings.get("rank"), int):
            assert row["rank"] == min(settings["rank"], *delta.shape)
    assert done.manifest["steps"][-1]["summary"]["error"] == pytest.approx(missed**0.5, rel=1e-9)
    if settings.get("rank") == "auto" or settings in ({}, {"rule": "mp-edge"}):
        assert 2 in ranks  # what was put in
        assert 0 in ranks  # and nothing where there is noise alone


def test_ranks_of_layers_whose_names_begin_alike(tmp_path: Path) -> None:
    """Layers 1 and 11: PEFT reads keys of patterns as expressions for the end of a name."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_hidden_layers=12, vocab_size=20, pad_token_id=None))
    base.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    wanted = {1: 1, 11: 5, 0: 2, 10: 3}
    with torch.no_grad():
        for layer, rank in wanted.items():
            weight = base.model.layers[layer].mlp.up_proj.weight
            weight += 0.1 * torch.randn(12, rank, generator=generator) @ torch.randn(rank, 16, generator=generator)
    base.save_pretrained(tmp_path / "tuned")
    edited(tmp_path / "lora", tmp_path / "tuned", export={"lora": {"base": tmp_path / "base", "energy": 0.999999}})
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    names = {layer: f"model.layers.{layer}.mlp.up_proj" for layer in wanted}
    assert config["r"] == config["lora_alpha"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"] == {names[n]: r for n, r in wanted.items() if r != 5}
    assert sorted(config["target_modules"]) == sorted(names.values())
    _, merged = with_peft(tmp_path / "base", tmp_path / "lora")
    again, end = read(tmp_path / "lora"), read(tmp_path / "tuned")
    for name in end:
        # a change of 1e-6 of its energy is missing at most, and entries of it are below 1
        assert worst(merged[name], end[name]) < 2e-3
        assert worst(again[name], merged[name]) < 1e-6


def test_what_is_left_out_says_why(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "qwen3_moe", tie_word_embeddings=False)
    done = edited(tmp_path / "lora", tuned, export={"lora": {"base": base, "rank": 2}})
    left = {name: row["left"] for name, row in rows_of(tmp_path / "lora").items() if "left" in row}
    assert "embedding" in left["model.embed_tokens.weight"]
    assert "vector" in left["model.layers.0.self_attn.q_norm.weight"]
    experts = [name for name in read(tuned) if ".experts." in name or name.endswith("mlp.gate.weight")]
    assert experts
    assert all("expert" in left[name] or "no weight of a linear layer" in left[name] for name in experts)
    held = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert not any("experts" in name or "embed" in name or "norm" in name for name in held)
    summary = done.manifest["steps"][-1]["summary"]
    assert summary["changed tensors left out"] == len(left)
    _, merged = with_peft(base, tmp_path / "lora")
    assert_bits(merged["model.embed_tokens.weight"], read(base)["model.embed_tokens.weight"])


def test_tied_embeddings_are_left_out(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "gpt2")
    edited(tmp_path / "lora", tuned, export={"lora": {"base": base, "rank": 2}})
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    assert len(config["target_modules"]) == 2 * 4
    row = rows_of(tmp_path / "lora")["transformer.wte.weight"]
    assert "tied" in row["left"] or "embedding" in row["left"]


def test_head_and_conv1d_beside_each_other(tmp_path: Path) -> None:
    """One setting says for all modules whether they are stored (in, out); each is read as its layer is stored."""
    base, tuned = save_pair(tmp_path, "gpt2", tie_word_embeddings=False)
    for folder, seed in ((base, 1), (tuned, 2)):
        model = tf.AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        moved(model.lm_head, 0.1, seed=seed)
        shutil.rmtree(folder)
        model.save_pretrained(folder)
    assert "lm_head.weight" in read(tuned)
    edited(tmp_path / "lora", tuned, export={"lora": {"base": base, "rank": "full"}})
    again, end, start = read(tmp_path / "lora"), read(tuned), read(base)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):  # PEFT corrects it layer by layer, and says so
        _, merged = with_peft(base, tmp_path / "lora")
    rows = rows_of(tmp_path / "lora")
    for name, row in rows.items():
        wanted = start[name] if "left" in row else end[name]
        assert worst(again[name], wanted) < 1e-5  # float32 rounding of a change of norm below 10
        if "left" not in row:
            assert worst(merged[name], wanted) < 1e-5
    assert "left" not in rows["lm_head.weight"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_factors_have_the_dtype_that_was_asked_for(dtype: str, tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama", torch.bfloat16)
    edited(tmp_path / "lora", tuned, export={"lora": {"base": base, "dtype": dtype, "rank": 4}})
    held = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {getattr(torch, dtype)}
    start, end = read(base), read(tuned)
    for name, row in rows_of(tmp_path / "lora").items():
        if "left" not in row:
            delta = end[name].double() - start[name].double()
            assert row["error"] == pytest.approx(float((delta - summed(tmp_path / "lora", name)).norm()), rel=1e-9)


def test_steps_come_before_the_export(tmp_path: Path) -> None:
    """What is rewound is in no adapter."""
    base, tuned = save_pair(tmp_path, "llama")
    step = Rewind(to=base, unit="matrix", fraction=1, select="layers 0")
    edited(tmp_path / "lora", tuned, step, export={"lora": {"base": base, "rank": "full"}})
    held = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert not any("layers.0" in name for name in held)
    assert any("layers.1" in name for name in held)


def test_selected_matrices_alone(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama")
    edited(tmp_path / "lora", tuned, export={"lora": {"base": base, "rank": 2, "select": "layers 1, attn.q"}})
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(base)


def test_nothing_to_write(tmp_path: Path) -> None:
    base, _ = save_pair(tmp_path, "llama")
    with pytest.raises(SelectionError, match="keeps no direction of any matrix"):
        edited(tmp_path / "lora", base, export={"lora": {"base": base, "rank": "full"}})
    with pytest.raises(SelectionError, match="no linear layer"):
        edited(tmp_path / "lora", base, export={"lora": {"base": base, "select": "embed"}})
    assert not (tmp_path / "lora").exists()


def test_adapter_and_companions(tmp_path: Path) -> None:
    """Tokenizer and the like are the tuned model's; a configuration would make the folder look like a model."""
    base, tuned = save_pair(tmp_path, "llama")
    (tuned / "tokenizer.json").write_text("{}")
    edited(tmp_path / "lora", tuned, export={"lora": {"base": base, "rank": 1}})
    names = {path.name for path in (tmp_path / "lora").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert "config.json" not in names
    assert "library_name: peft" in (tmp_path / "lora" / "README.md").read_text()
    assert diffract.verify(tmp_path / "lora").faults == []
    with pytest.raises(RecipeError, match="only whole checkpoints can be replayed"):
        diffract.verify(tmp_path / "lora", replay=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_pissa_is_the_model_split(family: str, tmp_path: Path) -> None:
    base, _ = save_pair(tmp_path, family)
    whole = read(base)
    edited(tmp_path / "out", base, export={"pissa": {"rank": 4}})
    residual = read(tmp_path / "out" / "residual")
    _, merged = with_peft(tmp_path / "out" / "residual", tmp_path / "out" / "adapter")
    split = [name for name in whole if not torch.equal(residual[name], whole[name])]
    assert len(split) >= 2 * 4
    for name in whole:
        if name not in split:
            assert_bits(merged[name], whole[name], name)
            continue
        # the residual's rounding to float32, that of the sum, and PEFT's product of four terms in float32
        assert worst(merged[name], whole[name]) < 8 * ROUNDING * float(whole[name].abs().max())
        U, S, Vh = np.linalg.svd(whole[name].double().numpy(), full_matrices=False)
        rest = (U[:, 4:] * S[4:]) @ Vh[4:]
        assert np.abs(residual[name].double().numpy() - rest).max() < 16 * ROUNDING * S[0]
    assert diffract.verify(tmp_path / "out").faults == []


def test_pissa_goes_on_from_its_adapter(tmp_path: Path) -> None:
    """Opened, moved elsewhere, and edited further."""
    base, _ = save_pair(tmp_path, "llama", torch.bfloat16)
    edited(tmp_path / "out", base, export={"pissa": {"rank": 4, "dtype": "bfloat16"}})
    again, whole = read(tmp_path / "out" / "adapter"), read(base)
    for name in whole:
        # the residual is rounded to bf16 (half a unit of 2^-8), and so is the sum
        assert worst(again[name], whole[name]) <= 2**-8 * float(whole[name].abs().max())
    found = edited(tmp_path / "back", tmp_path / "out" / "adapter")
    assert_same(read(tmp_path / "back"), again)
    assert len(found.manifest["inputs"]) == 1


def test_a_rank_beyond_the_matrix(tmp_path: Path) -> None:
    base, _ = save_pair(tmp_path, "llama")
    edited(tmp_path / "out", base, export={"pissa": {"rank": 1000, "select": "attn.k"}})
    residual, whole = read(tmp_path / "out" / "residual"), read(base)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert float(residual[name].abs().max()) < 16 * ROUNDING * float(whole[name].abs().max())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Lora(base="b", rank=2, energy=0.5), "one of rank, energy and rule"),
        (lambda: Lora(base="b", energy=1.5), "energy: expected a share"),
        (lambda: Lora(base="b", rank=0), "expected a whole number from 1, auto or full"),
        (lambda: Pissa(rank=0), "greater than or equal to 1"),
    ],
)
def test_impossible_ranks(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
