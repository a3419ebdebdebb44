"""Tensors are paired by the part that they are, whatever a wrapper or another version calls them."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffract

SIZES = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32}


def folder(path: Path, prefix: str, scale: float, more: dict[str, torch.Tensor], config: dict) -> Path:
    generator = torch.Generator().manual_seed(0)
    body = {f"layers.0.self_attn.{n}.weight": torch.randn(s, generator=generator) for n, s in SIZES.items()}
    tensors = {
        f"{prefix}{n}": t * scale for n, t in (body | {"layers.0.input_layernorm.weight": torch.ones(32)}).items()
    }
    path.mkdir()
    save_file(tensors | more, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "prefixes"),
    [
        ({"model_type": "gemma3", "text_config": CONFIG}, ("language_model.model.", "model.language_model.")),
        (CONFIG | {"model_type": "llama"}, ("model.", "")),
        (CONFIG | {"model_type": "llama"}, ("model.", "module.model.")),
        (CONFIG | {"model_type": "brand_new"}, ("model.", "base_model.model.model.")),
    ],
)
def test_prefixes_do_not_keep_tensors_apart(config: dict, prefixes: tuple[str, str], tmp_path: Path) -> None:
    base = folder(tmp_path / "base", prefixes[0], 1, {}, config)
    tuned = folder(tmp_path / "tuned", prefixes[1], 1.01, {}, config)
    run = diffract.compare(base, tuned, cache=False)
    assert run.metrics["delta_relative"].drop_nulls().len() == 12
    assert run.models["delta_relative"].to_list()[-1] == pytest.approx(0.01, rel=1e-4)  # float32 products
    assert diffract.heads(base, tuned, cache=False).heads["status"].unique().to_list() == ["ok"]


def test_a_head_of_one_task_alone_is_listed(tmp_path: Path) -> None:
    config = CONFIG | {"model_type": "llama"}
    base = folder(tmp_path / "base", "model.", 1, {}, config)
    tuned = folder(tmp_path / "tuned", "model.", 1.01, {"classifier.weight": torch.ones(3, 32)}, config)
    run = diffract.compare(base, tuned, cache=False)
    found = dict(run.tensors.filter(model="tuned").select("tensor", "outcome").iter_rows())
    assert found["classifier.weight"] == "unmatched"


def numbers(length: int, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(length)]


def single_experts() -> dict[str, torch.Tensor]:
    stem = "model.layers.0.mlp.experts.{}.{}_proj.weight"
    found = {stem.format(e, p): t for p in ("gate", "up") for e, t in enumerate(numbers(4, 24, 32, seed=len(p)))}
    return found | {stem.format(e, "down"): t for e, t in enumerate(numbers(4, 32, 24))}


def stacked_experts() -> dict[str, torch.Tensor]:
    single, stem = single_experts(), "model.layers.0.mlp.experts.{}.{}_proj.weight"
    both = [torch.cat([single[stem.format(e, p)] for p in ("gate", "up")]) for e in range(4)]
    down = [single[stem.format(e, "down")] for e in range(4)]
    return {f"model.layers.0.mlp.experts.{n}": torch.stack(t) for n, t in (("gate_up_proj", both), ("down_proj", down))}


def split_projections() -> dict[str, torch.Tensor]:
    return dict(zip(("gate_proj", "up_proj"), numbers(2, 24, 32), strict=True))


PAIRS = {
    "experts": ({"model_type": "qwen3_moe"}, single_experts(), stacked_experts()),
    "feed-forward": (
        {"model_type": "phi3"},
        {f"model.layers.0.mlp.{name}.weight": t for name, t in split_projections().items()},
        {"model.layers.0.mlp.gate_up_proj.weight": torch.cat([*split_projections().values()])},
    ),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", PAIRS)
def test_the_same_matrices_in_other_tensors_are_paired(case: str, turned: bool, tmp_path: Path) -> None:
    """By two checkpoints with one tensor for each matrix, or one for several of them."""
    config, one, other = PAIRS[case]
    base = folder(tmp_path / "base", "model.", 1, other if turned else one, CONFIG | config)
    moved = {name: 1.5 * value for name, value in (one if turned else other).items()}
    tuned = folder(tmp_path / "tuned", "model.", 1.5, moved, CONFIG | config)
    run = diffract.compare(base, tuned, metrics="change", cache=False)
    rows = run.metrics.filter(model="tuned")
    assert set(rows["status"]) == {"ok"}
    assert rows["delta_relative"].to_list() == pytest.approx([0.5] * len(rows), rel=1e-6)  # float32 products
    assert rows["name"].sort().to_list() == run.metrics.filter(model="base")["name"].sort().to_list()
    assert not run.manifest["warnings"]


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    stem = "layers.0.self_attn.{}_proj.weight"
    qkv = torch.cat([tensors[stem.format(p)] for p in "qkv"])
    return {stem.format("qkv"): qkv, stem.format("o"): tensors[stem.format("o")]}


@pytest.fixture
def fused_and_split(tmp_path: Path) -> tuple[Path, Path]:
    """A base with fused projections, and a model with split ones that are 1.5 times as large."""
    config = CONFIG | {"model_type": "llama"}
    tuned = folder(tmp_path / "tuned", "", 1.5, {}, config)
    own = load_file(tuned / "model.safetensors")
    base = folder(tmp_path / "base", "", 1, {}, config | {"model_type": "phi3"})
    norm = {"layers.0.input_layernorm.weight": torch.ones(32)}
    save_file({n: t / 1.5 for n, t in fused(own).items()} | norm, base / "model.safetensors")
    return base, tuned


def test_fused_and_split_projections_are_paired_head_by_head(fused_and_split: tuple[Path, Path]) -> None:
    for pair in (fused_and_split, fused_and_split[::-1]):
        heads = diffract.heads(*pair, cache=False).heads
        assert set(heads["status"]) == {"ok"}
        wanted = 0.5 if pair == fused_and_split else 1 / 3
        assert heads["head_delta_relative"].to_list() == pytest.approx([wanted] * 4, rel=1e-6)  # float32 products
        whole = diffract.compare(*pair, heads=False, metrics="change", cache=False)
        assert whole.metrics.filter(model=pair[1].name)["delta_relative"].null_count() == 0


@pytest.mark.parametrize("turned", [False, True])
def test_biases_of_fused_and_split_projections_are_compared(turned: bool, tmp_path: Path) -> None:
    """By queries, keys and values of 32, 16 and 16 rows, whose biases are moved by 0.5, 0.25 and 0."""
    biases = dict(zip("qkv", (t.abs() for n in (32, 16, 16) for t in numbers(1, n)), strict=True))
    moved = {"q": biases["q"] + 0.5, "k": biases["k"] + 0.25, "v": biases["v"]}
    weights = {p: numbers(1, n, 32, seed=n)[0] for p, n in (("q", 32), ("k", 16), ("v", 16))}
    split = {f"{p}_proj.{kind}": t for kind, own in (("weight", weights), ("bias", biases)) for p, t in own.items()}
    joined = {"qkv_proj.weight": torch.cat([*weights.values()]), "qkv_proj.bias": torch.cat([*moved.values()])}
    one = tmp_path / "split", CONFIG | {"model_type": "llama"}, split
    other = tmp_path / "fused", CONFIG | {"model_type": "phi3"}, joined
    for path, config, tensors in (one, other):
        path.mkdir()
        save_file({f"model.layers.0.self_attn.{n}": t for n, t in tensors.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config))
    pair = (other[0], one[0]) if turned else (one[0], other[0])
    vectors = diffract.compare(*pair, metrics="change", cache=False).tables["vectors"]
    assert set(vectors["status"]) == {"ok"}
    found = dict(vectors.select("tensor", "delta").iter_rows())
    squares = {"q": 32 * 0.5**2, "k": 16 * 0.25**2, "v": 0}
    wanted = {"qkv_proj": sum(squares.values())} if turned else {f"{p}_proj": square for p, square in squares.items()}
    assert found == {
        f"model.layers.0.self_attn.{name}.bias": pytest.approx(square**0.5, abs=1e-6) for name, square in wanted.items()
    }


def test_edits_take_weights_from_other_tensors(fused_and_split: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = fused_and_split
    recipe = diffract.Recipe.model_validate(
        {"model": str(base), "allow": ["model_type"], "steps": [{"interpolate": {"with": str(tuned), "at": 1}}]}
    )
    out = tmp_path / "out"
    diffract.apply(recipe, out)
    found, wanted = load_file(out / "model.safetensors"), fused(load_file(tuned / "model.safetensors"))
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_attention_of_three_storages_is_one_attention(tmp_path: Path) -> None:
    """By q, k, v one after another stored (in, out), head by head, and alone: all matrices and biases are equal."""
    w, b = (dict(zip("qkvo", numbers(4, *shape), strict=True)) for shape in ((32, 32), (32,)))
    joined = {"weight": torch.cat([w[p] for p in "qkv"]).T, "bias": torch.cat([b[p] for p in "qkv"])}
    by_head = {n: torch.stack([t[p].unflatten(0, (4, 8)) for p in "qkv"], 1) for n, t in (("weight", w), ("bias", b))}
    alone = zip("qkvo", ("q_proj", "k_proj", "v_proj", "out_proj"), strict=True)
    models = {
        "gpt2": {f"h.0.attn.c_attn.{n}": t for n, t in joined.items()}
        | {"h.0.attn.c_proj.weight": w["o"].T, "h.0.attn.c_proj.bias": b["o"]},
        "gpt_neox": {f"layers.0.attention.query_key_value.{n}": t.flatten(0, 2) for n, t in by_head.items()}
        | {"layers.0.attention.dense.weight": w["o"], "layers.0.attention.dense.bias": b["o"]},
        "opt": {f"decoder.layers.0.self_attn.{n}.{k}": t[p] for p, n in alone for k, t in (("weight", w), ("bias", b))},
    }
    config = CONFIG | {"n_head": 4, "n_embd": 32, "num_key_value_heads": 4}
    for kind, tensors in models.items():
        (tmp_path / kind).mkdir()
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / kind / "model.safetensors")
        (tmp_path / kind / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    for base, tuned in permutations(models, 2):
        run = diffract.compare(tmp_path / base, tmp_path / tuned, metrics="change", cache=False)
        assert run.metrics.filter(model=tuned)["delta_relative"].to_list() == [0.0] * 16, (base, tuned)
        assert set(run.tables["vectors"]["delta"]) == {0.0}, (base, tuned)
        assert set(run.tables["vectors"]["tensor"]) == {n for n in models[base] if n.endswith("bias")}


def test_edits_take_biases_from_other_tensors(tmp_path: Path) -> None:
    """An edit moves the rows of a fused bias with those of its weight, to what split ones hold."""
    weights, biases = numbers(4, 32, 32), numbers(4, 32)
    config = CONFIG | {"num_key_value_heads": 4}
    stem = "model.layers.0.self_attn"
    own = {"qkv_proj.weight": torch.zeros(96, 32), "qkv_proj.bias": torch.zeros(96), "o_proj.weight": weights[3]}
    split = {f"{p}_proj.weight": w for p, w in zip("qkvo", weights, strict=True)}
    split |= {f"{p}_proj.bias": b for p, b in zip("qkv", biases, strict=False)}
    for name, kind, tensors in (("base", "phi3", own), ("tuned", "llama", split)):
        (tmp_path / name).mkdir()
        save_file({f"{stem}.{n}": t for n, t in tensors.items()}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    step = {"rewind": {"to": str(tmp_path / "tuned"), "heads": ["L0.h1"]}}
    allow = ["model_type", "strangers"]
    recipe = {"model": str(tmp_path / "base"), "allow": allow, "steps": [step]}
    diffract.apply(diffract.Recipe.model_validate(recipe), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{stem}.qkv_proj.bias"].view(3, 4, 8)
    assert torch.equal(found[:, 1], torch.stack(biases[:3]).view(3, 4, 8)[:, 1])
    assert not found[:, [0, 2, 3]].any()


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_is_measured_beside_one_of_its_own(stored: bool, tmp_path: Path) -> None:
    config = CONFIG | {"model_type": "llama"}
    (table,) = numbers(1, 50, 32)
    twice = {"model.embed_tokens.weight": table} | ({"lm_head.weight": table.clone()} if stored else {})
    base = folder(tmp_path / "base", "model.", 1, twice, config | {"tie_word_embeddings": True})
    own = {"model.embed_tokens.weight": table, "lm_head.weight": table * 1.25}
    tuned = folder(tmp_path / "tuned", "model.", 1, own, config | {"tie_word_embeddings": False})
    for pair, wanted in (((base, tuned), 0.25), ((tuned, base), 0.2)):
        run = diffract.compare(*pair, metrics="change", cache=False)
        row = run.metrics.filter(model=pair[1].name, name="unembed").row(0, named=True)
        assert (row["status"], row["delta_relative"]) == ("ok", pytest.approx(wanted, rel=1e-6))
        parameters = dict(run.models.select("model", "parameters").iter_rows())
        assert parameters["tuned"] - parameters["base"] == 50 * 32


def with_tokens(
    path: Path, rows: int, tokens: list[str] | None, *, tied: bool = False, head: int | None = None
) -> Path:
    """A model with an embedding, perhaps a head, the rows of which differ from the base's by 10%, and a vocabulary."""
    embed, unembed = numbers(2, 12, 32, seed=5)
    scale = 1 if path.name == "base" else 1.1
    more = {"model.embed_tokens.weight": torch.cat([embed, torch.ones(9, 32)])[:rows] * scale}
    if head:
        more["lm_head.weight"] = torch.cat([unembed, torch.ones(9, 32)])[:head] * scale
    found = folder(path, "model.", scale, more, CONFIG | {"model_type": "llama", "tie_word_embeddings": tied})
    if tokens is not None:
        (found / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return found


TOKENS = [f"t{i}" for i in range(14)]


@pytest.mark.parametrize("known", [True, False])
def test_common_rows_of_a_vocabulary_that_grew_are_compared(known: bool, tmp_path: Path) -> None:
    base = with_tokens(tmp_path / "base", 10, TOKENS[:10] if known else None, head=10)
    tuned = with_tokens(tmp_path / "tuned", 12, TOKENS[:12] if known else None, head=12)
    run = diffract.compare(base, tuned, cache=False)
    rows = {row["name"]: row for row in run.metrics.filter(model="tuned").iter_rows(named=True)}
    for name in ("embed", "unembed"):
        assert (rows[name]["rows"], rows[name]["status"]) == (10, "ok")
        assert rows[name]["delta_relative"] == pytest.approx(0.1, rel=1e-4)  # float32 products
    notes = dict(run.tensors.filter(model="tuned").select("tensor", "note").iter_rows())
    assert notes["lm_head.weight"] == "the first 10 of 12 rows, which all models have"
    by_position = any("no tokenizer lies beside both models" in text for text in run.manifest["warnings"])
    assert by_position is not known


def test_rows_of_other_tokens_are_not_compared(tmp_path: Path) -> None:
    """Of several models each is paired by what its own tokenizer says; those with other tokens are analysed alone."""
    base = with_tokens(tmp_path / "base", 12, TOKENS[:12])
    less = with_tokens(tmp_path / "less", 11, TOKENS[:11])
    other = with_tokens(tmp_path / "other", 13, TOKENS[:13][::-1])
    run = diffract.compare(base, less, other, cache=False)
    rows = {(row["model"], row["name"]): row for row in run.metrics.iter_rows(named=True)}
    assert (rows["base", "embed"]["rows"], rows["less", "embed"]["status"]) == (11, "ok")
    assert (rows["other", "embed"]["rows"], rows["other", "embed"]["status"]) == (13, "unpaired")
    outcomes = dict(run.tensors.filter(model="other").select("tensor", "outcome").iter_rows())
    assert outcomes["model.embed_tokens.weight"] == "resized"


def test_the_head_that_a_tied_base_shares_is_compared_in_the_common_rows(tmp_path: Path) -> None:
    base = with_tokens(tmp_path / "base", 10, TOKENS[:10], tied=True)
    tuned = with_tokens(tmp_path / "tuned", 12, TOKENS[:12], head=12)
    run = diffract.compare(base, tuned, cache=False)
    embed, unembed = (w[:10].double() for w in numbers(2, 12, 32, seed=5))
    found = dict(run.metrics.filter(model="tuned").select("name", "delta_relative").iter_rows())
    assert found["embed"] == pytest.approx(0.1, rel=1e-4)  # float32 products
    expected = (1.1 * unembed - embed).norm() / embed.norm()
    assert found["unembed"] == pytest.approx(expected.item(), rel=1e-6)  # float32 storage


def test_a_series_pairs_common_rows_too(tmp_path: Path) -> None:
    with_tokens(tmp_path / "base", 10, TOKENS[:10])
    with_tokens(tmp_path / "tuned", 12, TOKENS[:12])
    run = diffract.trajectory(tmp_path / "base", tmp_path / "tuned", by="given", cache=False)
    found = run.metrics.filter(name="embed")
    assert found["delta_relative"].drop_nulls().to_list() == [pytest.approx(0.1, rel=1e-4)]  # float32 products
