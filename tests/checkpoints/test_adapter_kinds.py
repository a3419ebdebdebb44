"""Every kind of adapter that PEFT saves, over models of transformers: its own merge, and its own logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file

import diffract
from diffract.checkpoints import open_checkpoint
from diffract.checkpoints.open import open_adapter_parts
from diffract.edits.adapter_audit import audit
from diffract.errors import CheckpointError, SelectionError

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's advice on tied weights and on settings of single layers

SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
GPT2 = {
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "vocab_size": 20,
    "n_positions": 8,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""PEFT adds in float32: a few roundings of values around 1."""


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=tied)).to(dtype)


def gpt2(*, tied: bool = True) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, tie_word_embeddings=tied))


def tuned(folder: Path, model: tf.PreTrainedModel, config: Any, *, resize: int = 0, **how: Any) -> torch.nn.Module:
    """Write a base and an adapter of it, moved in everything that is trained; return PEFT's model."""
    model.save_pretrained(folder / "base")
    if resize:
        model.resize_token_embeddings(resize)
    model.config._name_or_path = model.name_or_path = str(folder / "base")
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.copy_(parameter * (1 + step) if "magnitude" in name else parameter + step)
    config.base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(str(folder / "adapter"), **how)
    return adapted.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 10)[None]).logits


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": list(targets), **options})


MIXED = lora("attn.c_proj", "c_attn", "lm_head")
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "whole modules": (llama(), lora("q_proj", modules_to_save=["lm_head", "input_layernorm"]), {}),
    "embedding": (llama(), lora("q_proj", "embed_tokens"), {}),
    "head": (llama(), lora("q_proj", "lm_head"), {}),
    "tokens": (llama(), lora("q_proj", trainable_token_indices=[3, 7]), {}),
    "tokens of both ends": (
        llama(),
        lora("v_proj", trainable_token_indices={"lm_head": [3, 5], "embed_tokens": [1]}),
        {},
    ),
    "tokens alone": (llama(), TrainableTokensConfig(token_indices=[0, 19]), {}),
    "tokens, tied": (llama(tied=True), lora("q_proj", trainable_token_indices=[3, 7]), {}),
    "DoRA": (llama(), lora("q_proj", "up_proj", use_dora=True), {}),
    "DoRA, an embedding": (llama(), lora("embed_tokens", use_dora=True, use_rslora=True), {}),
    "DoRA, stored (in, out)": (gpt2(), lora("c_attn", "c_proj", use_dora=True), {}),
    "PiSSA, not converted": (llama(), lora("q_proj", "up_proj", "down_proj", init_lora_weights="pissa"), {}),
    "PiSSA, stored (in, out)": (gpt2(), lora("c_attn", init_lora_weights="pissa", use_rslora=True), {}),
    "PiSSA and DoRA": (llama(), lora("q_proj", "up_proj", init_lora_weights="pissa", use_dora=True), {}),
    "OLoRA, not converted": (llama(), lora("q_proj", "up_proj", "down_proj", init_lora_weights="olora"), {}),
    "biases of LoRA": (gpt2(), lora("c_attn", "c_fc", lora_bias=True), {}),
    "all biases": (gpt2(), lora("c_attn", bias="all"), {}),
    "own biases": (gpt2(), lora("c_attn", bias="lora_only"), {}),
    "both ways of storing": (gpt2(tied=False), MIXED, {}),
    "a larger vocabulary": (llama(), lora("q_proj"), {"resize": 23, "save_embedding_layers": True}),
    "a larger vocabulary, adapted": (llama(), lora("embed_tokens", "lm_head"), {"resize": 23}),
    "a larger vocabulary, tied": (llama(tied=True), lora("q_proj"), {"resize": 23, "save_embedding_layers": True}),
    "patterns": (llama(), lora("q_proj", "up_proj", rank_pattern={"layers.0.mlp.up_proj": 2}, use_rslora=True), {}),
    "a tied embedding, whole": (llama(tied=True), lora("q_proj", modules_to_save=["embed_tokens"]), {}),
    "both tied ends, whole": (llama(tied=True), lora("q_proj", modules_to_save=["embed_tokens", "lm_head"]), {}),
}
UNTIED = {
    "a tied embedding": (llama(tied=True), lora("q_proj", "embed_tokens"), {}),
    "a tied head": (llama(tied=True), lora("q_proj", "lm_head"), {}),
}
"""PEFT's own merge changes both ends here, which its own model does not."""


@pytest.mark.parametrize("kind", [*KINDS, *UNTIED])
def test_equals_what_peft_makes_of_it(kind: str, tmp_path: Path) -> None:
    model, config, how = (KINDS | UNTIED)[kind]
    adapted = tuned(tmp_path, model, config, **how)
    expected = logits(adapted)
    diffract.apply({"model": str(tmp_path / "adapter"), "steps": []}, tmp_path / "merged")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), expected, **CLOSE)
    if kind in UNTIED:
        return
    merged = adapted.merge_and_unload().state_dict()
    with open_checkpoint(tmp_path / "adapter") as found:
        assert set(found) <= set(merged)
        for name in found:
            torch.testing.assert_close(found[name], merged[name], **CLOSE)
            if name in found.unrounded:
                rows = found.read_unrounded(name, (1, 3))  # a product of fewer rows may be summed in another order
                torch.testing.assert_close(rows, found.read_unrounded(name)[1:3], rtol=1e-13, atol=1e-13)


MOE = {**SIZES, **HEADS, "num_hidden_layers": 2, "num_local_experts": 3}
NUMBERED = {**SIZES, **HEADS, "num_experts": 3, "num_experts_per_tok": 2}
PARAMETERS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "apart in files": (tf.MixtralConfig(**MOE), "mlp.experts", {}),
    "apart, named alike": (
        tf.Qwen3MoeConfig(**NUMBERED, moe_intermediate_size=12),
        "mlp.experts",
        {"use_rslora": True},
    ),
    "stored (in, out)": (tf.GptOssConfig(**MOE, head_dim=8), "mlp.experts", {}),
    "stored (in, out), square": (tf.GptOssConfig(**{**MOE, "intermediate_size": 16}, head_dim=8), "mlp.experts", {}),
    "taken for (out, in)": (
        tf.Llama4TextConfig(**MOE, intermediate_size_mlp=24, head_dim=8, pad_token_id=0, eos_token_id=2),
        "feed_forward.experts",
        {},
    ),
}
"""Models with stacked experts, and where in a layer these are."""


@pytest.mark.parametrize("kind", PARAMETERS)
def test_factors_over_stacked_experts_equal_what_peft_makes_of_them(kind: str, tmp_path: Path) -> None:
    """Both parameters of a module, and a weight by its name, in files that keep experts apart or together."""
    config, experts, options = PARAMETERS[kind]
    torch.manual_seed(0)
    targets = [f"{experts}.gate_up_proj", f"{experts}.down_proj", "v_proj.weight"]
    model = tf.AutoModelForCausalLM.from_config(config)
    adapted = tuned(tmp_path, model, lora("q_proj", target_parameters=targets, **options))
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    expected, base = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "base"))
    with open_checkpoint(tmp_path / "adapter") as found:
        assert set(found) == set(expected)
        assert set(found.unrounded) == {name for name in base if not torch.equal(base[name], expected[name])}
        for name in found:
            torch.testing.assert_close(found[name], expected[name], **CLOSE)
            torch.testing.assert_close(found.read(name, (1, 2)), expected[name][1:2], **CLOSE)


def test_parameters_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    """Parameters of one shape, square ones alone, ranks that divide nothing, and such that the base does not have."""
    down, up = "mlp.experts.down_proj", "mlp.experts.up_proj"
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "../base"}
    for at, (shapes, changes, message) in enumerate(
        (
            ({down: (3, 4, 6)}, {"r": 4}, "6 rows for the experts of a parameter, and adapter_config.json says rank 4"),
            ({down: (3, 4, 6)}, {"rank_pattern": {"up_proj": 3}}, "says several ranks, so that their number"),
            ({down: (3, 4, 6)}, {"alpha_pattern": {"up_proj": 3}}, "different scales, and the file does not tell"),
            ({down: (3, 4, 6), up: (3, 4, 6)}, {}, r"does not tell what changes what\. Merge it"),
            ({down: (3, 4, 5)}, {}, r"make \(3, 4, 6\)\. Of such .* holds layers.0.mlp.experts.down_proj \(3, 4, 5\)"),
            ({}, {}, "holds none, which does not tell"),
        )
    ):
        for part in ("base", "adapter"):
            (tmp_path / str(at) / part).mkdir(parents=True)
        tensors = {f"layers.0.{name}": torch.zeros(shape) for name, shape in shapes.items()}
        save_file({"x": torch.zeros(2), **tensors}, tmp_path / str(at) / "base" / "model.safetensors")
        factors = {"A": torch.zeros(6, 6), "B": torch.zeros(4, 6)}
        prefix, folder = "base_model.model.layers.0.mlp.experts", tmp_path / str(at) / "adapter"
        save_file({f"{prefix}.lora_{s}.weight": t for s, t in factors.items()}, folder / "adapter_model.safetensors")
        config = {**settings, "target_parameters": [down, up], **changes}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(folder)


def test_factors_that_hold_a_part_of_the_base_are_no_change(tmp_path: Path) -> None:
    """A comparison sees what training did; an audit, which knows no base, says that it cannot."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    adapted: Any = get_peft_model(model, lora("q_proj", init_lora_weights="pissa"))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(str(tmp_path / "adapter"))
    with open_checkpoint(tmp_path / "adapter") as found, open_checkpoint(tmp_path / "base") as base:
        for name in found.factors:
            torch.testing.assert_close(found[name], base[name], rtol=0, atol=1e-6)  # factors of float32
            assert found.factors[name]().B.shape == (16, 6)
    with pytest.raises(SelectionError, match="'pissa' took out of the base too, so that they alone do not tell"):
        audit(tmp_path / "adapter")


def test_what_is_not_bound_any_more_is_said(tmp_path: Path) -> None:
    tuned(tmp_path, llama(tied=True), lora("lm_head"))
    with open_checkpoint(tmp_path / "adapter") as found:
        assert found.config["tie_word_embeddings"] is False
        assert "one of two ends that its base ties" in found.notes[-1]
        assert list(found.unrounded) == ["lm_head.weight"]


def test_a_small_change_of_bfloat16_is_whole_until_it_is_rounded(tmp_path: Path) -> None:
    """In files of float32, in a rewind to the base and back, and over another base: nothing passes through bfloat16."""
    torch.manual_seed(3)
    adapted = tuned(tmp_path, llama(dtype=torch.bfloat16), lora("q_proj"))
    name = "model.layers.0.self_attn.q_proj.weight"
    base = load_file(tmp_path / "base" / "model.safetensors")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: t * 0.01 if "lora_B" in n else t for n, t in load_file(file).items()}, file)
    module = adapted.base_model.model.model.layers[0].self_attn.q_proj
    B, A = (load_file(file)[f"base_model.model.{name[:-7]}.lora_{side}.weight"].double() for side in "BA")
    change = module.scaling["default"] * B @ A
    recipe = {"model": str(tmp_path / "adapter"), "steps": [], "output": {"dtype": "float32"}}
    diffract.apply(recipe, tmp_path / "wide")
    wide = load_file(tmp_path / "wide" / "model.safetensors")[name]
    assert torch.equal(wide, (base[name].double() + change).float())
    moved = {"interpolate": {"other": str(tmp_path / "adapter"), "at": 1}}
    diffract.apply({**recipe, "model": str(tmp_path / "base"), "steps": [moved]}, tmp_path / "moved")
    assert torch.equal(load_file(tmp_path / "moved" / "model.safetensors")[name], wide)
    live = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with diffract.edits.LiveModel(live).edited(diffract.edits.Interpolate(other=str(tmp_path / "adapter"), at=1)):
        assert torch.equal(live.state_dict()[name], wide)
    assert diffract.verify(tmp_path / "wide", replay=True).faults == []


def test_blocks_of_rows_read_the_factors_once(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    gpt2().save_pretrained(tmp_path / "base")
    adapted: Any = get_peft_model(gpt2(), lora("c_attn", use_dora=True, init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(str(tmp_path / "adapter"))
    with open_checkpoint(tmp_path / "adapter") as found:
        name = next(name for name in found if name.endswith("c_attn.weight"))
        whole = found.read_unrounded(name)
        factors = [
            i.size_bytes for n, i in open_adapter_parts(tmp_path / "adapter").weights.infos.items() if ".0." in n
        ]
    with open_checkpoint(tmp_path / "adapter") as found:
        reads.clear()
        rows = [found.read_unrounded(name, (row, row + 1)) for row in range(len(whole))]
        torch.testing.assert_close(torch.cat(rows), whole, rtol=1e-12, atol=0)  # a product of one row sums otherwise
        assert sum(got for _, got in reads) == sum(factors) + 2 * found.info(name).size_bytes


def test_several_adapters_are_asked_for_by_name(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    adapted: Any = get_peft_model(model, lora("q_proj", init_lora_weights=False), adapter_name="one")
    adapted.add_adapter("two", lora("v_proj", init_lora_weights=False))
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(str(tmp_path / "both"))
    with pytest.raises(
        CheckpointError, match=r"holds several adapters: one, two. Say which by its folder, or its name after #"
    ):
        open_checkpoint(tmp_path / "both")
    with open_checkpoint(f"{tmp_path / 'both'}#two") as found, open_checkpoint(tmp_path / "both" / "two") as same:
        assert set(found.factors) == {f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)}
        assert found.digest(next(iter(found.factors))) == same.digest(next(iter(found.factors)))
    (tmp_path / "whole").mkdir()
    save_file({n: t.contiguous() for n, t in adapted.state_dict().items()}, tmp_path / "whole" / "model.safetensors")
    (tmp_path / "whole" / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    config = (tmp_path / "both" / "two" / "adapter_config.json").read_text()
    (tmp_path / "whole" / "adapter_config.json").write_text(config)
    with pytest.raises(CheckpointError, match="several adapters lie together: one, two"):
        open_checkpoint(tmp_path / "whole")
    with open_checkpoint(f"{tmp_path / 'whole'}#two") as found, open_checkpoint(tmp_path / "both" / "two") as same:
        for name in same:
            assert torch.equal(found[name], same[name])


def mlx_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    llama().save_pretrained(folder / "base")
    (folder / "mlx").mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "mlx" / "adapters.safetensors")
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}, "model": "../base", **config}
    (folder / "mlx" / "adapter_config.json").write_text(json.dumps(settings))
    return folder / "mlx"


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_of_mlx_lm(kind: str, tmp_path: Path) -> None:
    """Factors (in, r) and (r, out), scaled as stated; of an embedding (tokens, r) and (r, width)."""
    generator = torch.Generator().manual_seed(2)
    q, e = "model.layers.1.self_attn.q_proj", "model.embed_tokens"
    shapes = {f"{q}.lora_a": (16, 2), f"{q}.lora_b": (2, 16), f"{e}.lora_a": (20, 2), f"{e}.lora_b": (2, 16)}
    held = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    if kind == "dora":
        held |= {f"{m}.m": torch.rand(16, generator=generator) + 1 for m in (q, e)}
    folder = mlx_adapter(tmp_path, held, fine_tune_type=kind)
    base = load_file(tmp_path / "base" / "model.safetensors")
    expected = {q: base[f"{q}.weight"] + 20 * (held[f"{q}.lora_a"] @ held[f"{q}.lora_b"]).T}
    expected[e] = base[f"{e}.weight"] + 20 * held[f"{e}.lora_a"] @ held[f"{e}.lora_b"]
    if kind == "dora":
        expected[q] *= (held[f"{q}.m"] / expected[q].norm(dim=1))[:, None]
        expected[e] *= held[f"{e}.m"] / expected[e].norm(dim=0)
    with open_checkpoint(folder) as found:
        for module, weight in expected.items():
            torch.testing.assert_close(found[f"{module}.weight"], weight, **CLOSE)
        assert set(found.unrounded) == {f"{module}.weight" for module in expected}


def test_settings_of_mlx_lm_are_checked(tmp_path: Path) -> None:
    q = "model.layers.1.self_attn.q_proj"
    held = {f"{q}.lora_a": torch.ones(16, 2), f"{q}.lora_b": torch.ones(2, 16)}
    for change, message in (
        ({"lora_parameters": {"rank": 4, "scale": 1.0}}, "have rank 2, and adapter_config.json says 4"),
        ({"lora_parameters": {"rank": 2}}, "expected numbers in lora_parameters.scale"),
        ({"fine_tune_type": "prefix"}, "fine_tune_type 'prefix', expected lora, dora, full"),
        ({"fine_tune_type": "dora"}, "has no magnitudes"),
        ({"model": None}, "names no base model"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(mlx_adapter(folder, held, **change))


def test_names_of_a_model_that_sees(tmp_path: Path) -> None:
    """Files call the language model otherwise than the modules that an adapter is trained on; towers stay apart."""
    parts = {"language_model.model": (8, 8), "vision_tower.vision_model.encoder": (8, 8)}
    names = {part: f"{part}.layers.0.self_attn.q_proj.weight" for part in parts}
    base = {name: torch.randn(8, 8) for name in names.values()}
    base |= {"language_model.model.embed_tokens.weight": torch.randn(20, 8)}
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **HEADS, "head_dim": 4}}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "../base"}
    stems = {"language_model.model": "model.language_model", "vision_tower.vision_model.encoder": "model.vision_tower"}
    for part, stem in stems.items():
        folder = tmp_path / part
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        factors = {
            f"base_model.model.{stem}.layers.0.self_attn.q_proj.lora_{side}.weight": torch.randn(shape)
            for side, shape in (("A", (2, 8)), ("B", (8, 2)))
        }
        save_file(factors, folder / "adapter_model.safetensors")
    with open_checkpoint(tmp_path / "language_model.model") as found:
        assert list(found.factors) == [names["language_model.model"]]
    with pytest.raises(CheckpointError, match=r"vision_tower.*does not hold. Pass --adapter-base"):
        open_checkpoint(tmp_path / "vision_tower.vision_model.encoder")
