"""Per-head slices against the heads that transformers' own modules make, for every family.

One token at position 0 is fed, where rotary embeddings are the identity. Norms of queries and keys scale them, so
those are compared by direction; values and outputs exactly.
"""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import diffract
from diffract.matrices import Layout, Matrix, cut, lay_out
from families import FAMILIES, build

RECORDED = [f for f in FAMILIES if not f.startswith(("falcon", "bloom", "t5", "deepseek"))]
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}  # float64 products of length 32 in another order


def product(layout: Layout, matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    """x W^T for one matrix."""
    return x @ cut(layout.checkpoint.read(matrix.tensor), [matrix])[0].mT


def heads_of(layout: Layout, layer: int, part: str) -> list[Matrix]:
    block, _, projection = part.rpartition(".")
    return [m for m in layout.matrices if (m.layer, m.block, m.projection) == (layer, block, projection)]


def bias_heads(module: torch.nn.Module, suffixes: tuple[str, ...]) -> bool:
    return any(name.endswith(suffixes) for name, _ in module.named_parameters())


def zero_biases(model: torch.nn.Module) -> torch.nn.Module:
    """Biases are no part of a matrix."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model


def same_direction(a: torch.Tensor, b: torch.Tensor) -> None:
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    assert cosine > 1 - 1e-9


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    calls: list[dict] = []

    def attention(module, query, key, value, mask, **_):
        torch.manual_seed(len(calls))
        output = torch.randn(query.shape[0], query.shape[2], query.shape[1], value.shape[-1], dtype=query.dtype)
        calls.append({"module": module, "q": query, "k": key, "v": value, "output": output})
        return output, None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "record", attention)
    return calls


def attention_modules(model: torch.nn.Module, output_suffix: tuple[str, ...]) -> list[tuple[torch.nn.Module, list]]:
    """Hook every module whose name ends so; return it with its (input, output) pairs."""
    found = []
    for name, module in model.named_modules():
        if name.endswith(output_suffix):
            seen: list = []
            module.register_forward_hook(lambda _, i, o, seen=seen: seen.append((i[0], o)))
            found.append((module, seen))
    return found


INPUTS = ("self_attn.q_proj", "self_attn.qkv_proj", "attn.c_attn", "attention.query_key_value", "self.query")
OUTPUTS = ("self_attn.o_proj", "attn.c_proj", "attention.dense", "self_attn.out_proj", "attention.output.dense")


@pytest.mark.parametrize("family", RECORDED)
def test_heads_are_those_of_the_module(family: str, record: list[dict]) -> None:
    model = zero_biases(build(family))
    model.config._attn_implementation = "record"
    model.config._experts_implementation = "eager"  # the grouped kernel knows no float64
    inputs, outputs = attention_modules(model, INPUTS), attention_modules(model, OUTPUTS)
    layout = lay_out(diffract.open(model))
    with torch.no_grad():
        model(input_ids=torch.tensor([[7]]))
    assert len(record) == len(inputs) == len(outputs) == 2
    for layer, call in enumerate(record):
        x = inputs[layer][1][0][0]
        for part in "qkv":
            matrices = heads_of(layout, layer, f"attn.{part}")
            heads = call[part].shape[1]
            if part != "q" and len(matrices) < heads:  # some modules repeat keys and values before they attend
                call[part] = call[part][:, :: heads // len(matrices)]
            assert len(matrices) == call[part].shape[1]
            for i, matrix in enumerate(matrices):
                got, expected = product(layout, matrix, x)[0], call[part][0, i]
                same_direction(got, expected)
                if part == "v":
                    torch.testing.assert_close(got, expected, **TOLERANCE)
        o = heads_of(layout, layer, "attn.o")
        total = sum(product(layout, m, call["output"][:, :, m.head]) for m in o)
        torch.testing.assert_close(total, outputs[layer][1][0][1].reshape(total.shape), **TOLERANCE)


@pytest.mark.parametrize("family", ["falcon_multi_query", "falcon_grouped", "falcon_full", "bloom"])
def test_interleaved_heads_are_those_of_the_module(family: str) -> None:
    model = zero_biases(build(family))
    layout = lay_out(diffract.open(model))
    x = torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layer, block in enumerate(model.transformer.h):
        attention = block.self_attention
        fused = attention.query_key_value(x)
        split = attention._reshape(fused) if family == "bloom" else attention._split_heads(fused)
        by_head = [t.transpose(1, 2) if family == "bloom" else t for t in split]  # (batch, token, head, size)
        group = 4 // len(heads_of(layout, layer, "attn.k"))
        for part, heads in zip("qkv", by_head, strict=True):
            matrices = heads_of(layout, layer, f"attn.{part}")
            step = group if part != "q" and heads.shape[2] == 4 else 1  # falcon repeats keys and values
            assert len(matrices) == len(range(0, heads.shape[2], step))
            for i, matrix in enumerate(matrices):
                torch.testing.assert_close(product(layout, matrix, x), heads[:, :, i * step], **TOLERANCE)
        joined = torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        o = heads_of(layout, layer, "attn.o")
        total = sum(product(layout, m, h) for m, h in zip(o, joined.split(8, dim=-1), strict=True))
        torch.testing.assert_close(total, attention.dense(joined), **TOLERANCE)


@pytest.mark.parametrize("family", ["t5", "t5_gated"])
def test_encoder_decoder_heads(family: str) -> None:
    model = build(family)
    layout = lay_out(diffract.open(model))
    x = torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = [
        ("encoder.attn", model.encoder, 0),
        ("decoder.attn", model.decoder, 0),
        ("decoder.cross_attn", model.decoder, 1),
    ]
    for block, stack, place in places:
        for layer, module in enumerate(stack.block):
            sub = module.layer[place]
            attention = sub.SelfAttention if place == 0 else sub.EncDecAttention
            for part in "qkv":
                whole = getattr(attention, part)(x).view(1, 3, attention.n_heads, attention.key_value_proj_dim)
                for i, matrix in enumerate(heads_of(layout, layer, f"{block}.{part}")):
                    torch.testing.assert_close(product(layout, matrix, x), whole[:, :, i], **TOLERANCE)
            joined = torch.randn(1, 3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            heads = zip(heads_of(layout, layer, f"{block}.o"), joined.split(12, dim=-1), strict=True)
            torch.testing.assert_close(sum(product(layout, m, h) for m, h in heads), attention.o(joined), **TOLERANCE)


def test_latent_attention_is_cut_where_it_leaves_the_latent_space() -> None:
    model = build("deepseek_v3")
    layout = lay_out(diffract.open(model))
    attention = model.model.layers[0].self_attn
    joined = torch.randn(1, 3, 4 * 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    heads = zip(heads_of(layout, 0, "attn.o"), joined.split(6, dim=-1), strict=True)
    torch.testing.assert_close(sum(product(layout, m, h) for m, h in heads), attention.o_proj(joined), **TOLERANCE)
    latent = torch.randn(1, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    queries = attention.q_b_proj(latent).view(1, 3, 4, 12)
    keys, values = attention.kv_b_proj(latent[..., :8]).view(1, 3, 4, 14).split((8, 6), dim=-1)
    for part, whole, x in (("q", queries, latent), ("k", keys, latent[..., :8]), ("v", values, latent[..., :8])):
        matrices = heads_of(layout, 0, f"attn.{part}")
        assert [m.head for m in matrices] == [0, 1, 2, 3]
        for i, m in enumerate(matrices):
            torch.testing.assert_close(product(layout, m, x), whole[:, :, i], **TOLERANCE)
    for part in ("q_a", "kv_a"):
        (whole,) = heads_of(layout, 0, f"attn.{part}")
        assert whole.head is None
        assert whole.is_whole
    assert "latent" in layout.architecture.note


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3"])
def test_experts_in_memory_and_on_disk_are_the_same(family: str, tmp_path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    with diffract.open(tmp_path) as saved:
        disk, memory = lay_out(saved), lay_out(diffract.open(model))
        assert {m.name for m in disk.matrices} == {m.name for m in memory.matrices}
        stored = {m.name: m for m in disk.matrices}
        experts = [m for m in memory.matrices if m.expert is not None]
        assert {m.expert for m in experts} == {0, 1, 2, 3}
        for m in experts:
            other = stored[m.name]
            a = cut(memory.checkpoint.read(m.tensor), [m])[0]
            torch.testing.assert_close(a, cut(disk.checkpoint.read(other.tensor), [other])[0], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_is_in_exactly_one_named_matrix(family: str, tmp_path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    for reference in (model, tmp_path):
        with diffract.open(reference) as checkpoint:
            layout = lay_out(checkpoint)
            names = [m.name for m in layout.matrices]
            assert len(names) == len(set(names))
            for entry in layout.entries.values():
                if entry.matrices:
                    assert layout.architecture.place(entry.info.name) is not None, entry.info.name
                    count = torch.zeros(entry.info.shape)
                    for m in entry.matrices:
                        cut(count, [m])[0].add_(1)
                    assert bool((count == 1).all()), entry.info.name


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_grouped"])
def test_query_heads_know_their_key_value_head(family: str) -> None:
    layout = lay_out(diffract.open(build(family)))
    queries, keys = heads_of(layout, 0, "attn.q"), heads_of(layout, 0, "attn.k")
    group = len(queries) // len(keys)
    assert [m.kv_head for m in queries] == [m.head // group for m in queries]
    assert sorted({m.kv_head for m in queries}) == [m.kv_head for m in keys]
