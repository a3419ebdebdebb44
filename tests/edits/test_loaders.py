"""What edits write, as transformers and PEFT load it; logits equal those of models that were edited by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import Tensor

import diffract
from diffract.edits import Lora, Merge, Pissa, Recipe, Rewind, Truncate, apply

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks

SAMPLES = Path(__file__).parents[2] / "samples" / "tiny-olmo2"
BASE, MATH, CODE = (str(SAMPLES / name) for name in ("base", "math", "code"))
TOKENS = torch.arange(24)[None] * 37 % 1024


def load(reference: str | Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(reference).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS).logits.float()


def write(folder: Path, *steps: Any, model: str = MATH, **recipe: Any) -> Path:
    apply(Recipe(model=model, steps=steps, **recipe), folder)
    return folder


def test_a_head_rewound_by_hand(tmp_path: Path) -> None:
    """Heads of 16 rows; k and v are shared by four heads, so that only whole groups take them along."""
    model, base = load(MATH), load(BASE)
    own, other = model.model.layers[1].self_attn, base.model.layers[1].self_attn
    with torch.no_grad():
        for head in (2, 4, 5, 6, 7):
            rows = slice(16 * head, 16 * head + 16)
            own.q_proj.weight[rows] = other.q_proj.weight[rows]
            own.q_norm.weight[rows] = other.q_norm.weight[rows]
            own.o_proj.weight[:, rows] = other.o_proj.weight[:, rows]
        for name in ("k_proj", "v_proj", "k_norm"):
            getattr(own, name).weight[16:32] = getattr(other, name).weight[16:32]
    step = Rewind(to=BASE, heads="L1.h2,L1.h4,L1.h5,L1.h6,L1.h7")
    assert torch.equal(logits(load(write(tmp_path / "out", step))), logits(model))


def test_a_change_truncated_by_hand(tmp_path: Path) -> None:
    model, base = load(MATH), load(BASE)
    with torch.no_grad():
        for own, other in zip(model.model.layers, base.model.layers, strict=True):
            w1, w0 = own.mlp.up_proj.weight, other.mlp.up_proj.weight
            U, S, Vh = torch.linalg.svd(w1.double() - w0.double(), full_matrices=False)
            w1.copy_(w0.double() + (U[:, :5] * S[:5]) @ Vh[:5])
    found = load(write(tmp_path / "out", Truncate(base=BASE, rank=5, select="mlp.up")))
    # the Gram matrix's error is far below bf16's rounding, but an entry between two bf16 values may go either way
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=0.05)
    pairs = zip(found.model.layers, model.model.layers, strict=True)
    same = torch.cat([(a.mlp.up_proj.weight == b.mlp.up_proj.weight).flatten() for a, b in pairs])
    assert same.float().mean() > 0.999


def test_task_arithmetic_by_hand(tmp_path: Path) -> None:
    model, base, code = load(MATH), load(BASE), load(CODE)
    with torch.no_grad():
        for w, w0, w2 in zip(model.parameters(), base.parameters(), code.parameters(), strict=True):
            w.copy_(w0.double() + 0.5 * (w.double() - w0.double()) + 0.25 * (w2.double() - w0.double()))
    step = Merge(base=BASE, models={"code": CODE}, called="math", weights={"math": 0.5, "code": 0.25})
    found = load(write(tmp_path / "out", step))
    same = torch.cat([(a == b).flatten() for a, b in zip(found.parameters(), model.parameters(), strict=True)])
    assert same.float().mean() > 0.9999  # float32 sums, rounded once, may fall on the other side of a tie
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=0.05)


def test_tokenizer_and_settings_are_the_tuned_models(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    model = load(MATH)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tuned)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tuned / name).write_bytes((SAMPLES / "math" / name).read_bytes())
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    (tuned / "optimizer.pt").write_bytes(b"not ours")
    out = write(tmp_path / "out", Rewind(to=BASE, fraction=0.5), model=str(tuned))
    assert tf.GenerationConfig.from_pretrained(out).max_new_tokens == 7
    assert tf.AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"
    assert not (out / "optimizer.pt").exists()


def linear_weights(model: Any) -> dict[str, Tensor]:
    return {n: m.weight.data for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n}


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [({"rank": "full"}, None), ({"rank": 3}, {3}), ({"rank": "auto"}, None), ({"energy": 0.8}, None)],
    ids=["full", "fixed", "auto", "energy"],
)
def test_base_and_adapter_miss_what_is_said(settings: dict, ranks: set[int] | None, tmp_path: Path) -> None:
    edited = apply(Recipe(model=MATH, export=Lora(base=BASE, **settings)), tmp_path / "adapter")
    base = tf.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64)
    merged = linear_weights(PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload())
    tuned = linear_weights(load(MATH))
    rows = {row["name"].removesuffix(".weight"): row for row in edited.manifest["steps"][-1]["rows"]}
    assert len(tuned) == 28
    for name, weight in tuned.items():
        error = float((weight.double() - merged[name].double()).norm())
        # PEFT multiplies in float32: 1e-6 of the change
        assert error == pytest.approx(rows[name]["error"], abs=3e-6 * rows[name]["change"])
        if settings == {"rank": "full"}:
            assert error < 3e-6 * rows[name]["change"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == config["rank_pattern"]
    if ranks:
        assert {row["rank"] for row in rows.values() if "rank" in row} == ranks
        assert config["rank_pattern"] == {}
    reasons = {name: row["left"] for name, row in rows.items() if "left" in row}
    assert "embedding" in reasons["model.embed_tokens"] or "tied" in reasons["model.embed_tokens"]
    assert "vector" in reasons["model.norm"]
    with diffract.open(tmp_path / "adapter") as opened, diffract.open(BASE) as plain:
        assert opened.names == plain.names


def test_conv1d_adapts_as_it_is_stored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"n_embd": 32, "n_head": 4, "n_layer": 12, "vocab_size": 50, "n_positions": 16}
    base = tf.GPT2LMHeadModel(tf.GPT2Config(**small, bos_token_id=None, eos_token_id=None)).eval()
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, p in base.named_parameters():
            if p.ndim == 2 and ".h." in name:
                p.add_(0.01 * torch.randn_like(p))
    base.save_pretrained(tmp_path / "tuned")
    export = Lora(base=str(tmp_path / "base"), energy=0.5)
    edited = apply(Recipe(model=str(tmp_path / "tuned"), export=export), tmp_path / "adapter")
    rows = {row["name"]: row for row in edited.manifest["steps"][-1]["rows"] if "rank" in row}
    assert len({row["rank"] for row in rows.values()}) > 1
    loaded = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    merged = dict(PeftModel.from_pretrained(loaded, tmp_path / "adapter").merge_and_unload().named_parameters())
    tuned = dict(base.named_parameters())
    for name, row in rows.items():  # h.1 and h.11 among them: a pattern of one must not mean the other
        error = float((tuned[name].double() - merged[name].double()).detach().norm())
        assert error == pytest.approx(row["error"], abs=1e-5 * row["change"] + 1e-6)  # merged in float32


def test_residual_and_adapter_are_the_model(tmp_path: Path) -> None:
    apply(Recipe(model=MATH, export=Pissa(rank=8)), tmp_path / "out")
    residual = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "residual", dtype=torch.float32)
    assert not torch.equal(logits(residual), logits(load(MATH)))
    merged = linear_weights(PeftModel.from_pretrained(residual, tmp_path / "out" / "adapter").merge_and_unload())
    for name, weight in linear_weights(load(MATH)).items():
        # the residual is rounded to bf16, 2^-9 of its entries
        torch.testing.assert_close(merged[name], weight.float(), rtol=0, atol=float(weight.abs().max()) * 2**-8)
    with diffract.open(tmp_path / "out" / "adapter") as opened, diffract.open(MATH) as plain:
        name = "model.layers.0.mlp.up_proj.weight"
        torch.testing.assert_close(opened[name].float(), plain[name].float(), rtol=0, atol=0.01)
