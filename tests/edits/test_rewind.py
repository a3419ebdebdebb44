"""Rewinding heads, against slices that are computed here by hand; every other byte stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import diffract
from diffract.edits import Rewind
from diffract.errors import SelectionError
from edit_cases import Tensors, as_module, assert_bits, assert_same, edit, edited, read, save_pair
from tiny_llama import llama_tensors

SAMPLES = Path(__file__).parents[2] / "samples" / "tiny-olmo2"
Span = tuple[str, tuple[slice, ...], set[int]]
"""Tensor, where in it, and the query heads that it belongs to."""

ALL = slice(None)
HEADS = 4


def at(number: int, size: int, first: int = 0) -> slice:
    return slice(first + number * size, first + (number + 1) * size)


def separate(stem: str, names: str, d: int, *, heads: int = HEADS, kv: int = 2, biases: bool = False) -> Iterator[Span]:
    """Projections with a tensor each, (out, in)."""
    q, k, v, o = (f"{stem}.{name}" for name in names.split())
    group = heads // kv
    for h in range(heads):
        yield f"{q}.weight", (at(h, d), ALL), {h}
        yield f"{o}.weight", (ALL, at(h, d)), {h}
        if biases:
            yield f"{q}.bias", (at(h, d),), {h}
    for g in range(kv):
        for name in (k, v):
            yield f"{name}.weight", (at(g, d), ALL), set(range(g * group, (g + 1) * group))
            if biases:
                yield f"{name}.bias", (at(g, d),), set(range(g * group, (g + 1) * group))


def head_norms(stem: str, d: int, *, heads: int = HEADS, kv: int = 2) -> Iterator[Span]:
    """Norms over all heads together, as OLMo 2 has them: each head has its part."""
    yield from ((f"{stem}.q_norm.weight", (at(h, d),), {h}) for h in range(heads))
    group = heads // kv
    yield from ((f"{stem}.k_norm.weight", (at(g, d),), set(range(g * group, (g + 1) * group))) for g in range(kv))


def common_norms(stem: str) -> Iterator[Span]:
    """One norm for each head of a layer, the same for all, as Qwen 3 has it."""
    yield from ((f"{stem}.{name}_norm.weight", (ALL,), set(range(HEADS))) for name in "qk")


def per_head(stem: str, out: str, d: int, *, bias: bool) -> Iterator[Span]:
    """Fused head by head: q, k and v of one head, then those of the next."""
    for h in range(HEADS):
        yield f"{stem}.weight", (at(h, 3 * d), ALL), {h}
        yield f"{out}.weight", (ALL, at(h, d)), {h}
        if bias:
            yield f"{stem}.bias", (at(h, 3 * d),), {h}


def per_part(stem: str, out: str, d: int, kv: int) -> Iterator[Span]:
    """Fused part by part: q of all heads, then k, then v."""
    group = HEADS // kv
    for h in range(HEADS):
        yield f"{stem}.weight", (at(h, d), ALL), {h}
        yield f"{out}.weight", (ALL, at(h, d)), {h}
    for g in range(kv):
        for first in (HEADS * d, (HEADS + kv) * d):
            yield f"{stem}.weight", (at(g, d, first), ALL), set(range(g * group, (g + 1) * group))


def per_group(stem: str, out: str, d: int) -> Iterator[Span]:
    """Fused group by group: q of two heads, their k, their v."""
    for h in range(HEADS):
        yield f"{stem}.weight", (at(h % 2, d, h // 2 * 4 * d), ALL), {h}
        yield f"{out}.weight", (ALL, at(h, d)), {h}
    for g in range(2):
        yield f"{stem}.weight", (at(0, 2 * d, g * 4 * d + 2 * d), ALL), {2 * g, 2 * g + 1}


def conv1d(stem: str, d: int) -> Iterator[Span]:
    """GPT-2: stored (in, out), q, k and v side by side."""
    for h in range(HEADS):
        for part in range(3):
            yield f"{stem}.c_attn.weight", (ALL, at(h, d, part * HEADS * d)), {h}
            yield f"{stem}.c_attn.bias", (at(h, d, part * HEADS * d),), {h}
        yield f"{stem}.c_proj.weight", (at(h, d), ALL), {h}


LLAMA, NEOX = "model.layers.1.self_attn", "gpt_neox.layers.1.attention"
FALCON, BERT = "transformer.h.1.self_attention", "bert.encoder.layer.1.attention"
NAMES = "q_proj k_proj v_proj o_proj"
QKV = "query_key_value"

SPANS: dict[str, list[Span]] = {
    "llama": [*separate(LLAMA, NAMES, 8)],
    "mistral": [*separate(LLAMA, NAMES, 12)],
    "qwen2": [*separate(LLAMA, NAMES, 8, biases=True)],
    "olmo2": [*separate(LLAMA, NAMES, 8), *head_norms(LLAMA, 8)],
    "olmoe": [*separate(LLAMA, NAMES, 8), *head_norms(LLAMA, 8)],
    "qwen3": [*separate(LLAMA, NAMES, 12), *common_norms(LLAMA)],
    "gemma3": [*separate(LLAMA, NAMES, 12), *common_norms(LLAMA)],
    "phi3": [*per_part(f"{LLAMA}.qkv_proj", f"{LLAMA}.o_proj", 8, 2)],
    "gpt2": [*conv1d("transformer.h.1.attn", 8)],
    "gpt_neox": [*per_head(f"{NEOX}.{QKV}", f"{NEOX}.dense", 8, bias=True)],
    "falcon_multi_query": [*per_part(f"{FALCON}.{QKV}", f"{FALCON}.dense", 8, 1)],
    "falcon_grouped": [*per_group(f"{FALCON}.{QKV}", f"{FALCON}.dense", 8)],
    "falcon_full": [*per_head(f"{FALCON}.{QKV}", f"{FALCON}.dense", 8, bias=False)],
    "bloom": [*per_head(f"transformer.h.1.self_attention.{QKV}", "transformer.h.1.self_attention.dense", 8, bias=True)],
    "bert": [*separate(BERT, "self.query self.key self.value output.dense", 8, kv=4, biases=True)],
    "opt": [
        *separate("model.decoder.layers.1.self_attn", "q_proj k_proj v_proj out_proj", 8, kv=4, biases=True),
    ],
}


def gone(owners: set[int], heads: set[int], kv: str = "all") -> bool:
    """Whether a part with these owners goes when these heads do."""
    count = len(owners & heads)
    if len(owners) == 1:
        return count == 1
    return {"all": count == len(owners), "majority": 2 * count > len(owners), "never": False}[kv]


def expected(spans: list[Span], tuned: Tensors, base: Tensors, heads: set[int], kv: str = "all") -> Tensors:
    found = {name: tensor.clone() for name, tensor in tuned.items()}
    for name, place, owners in spans:
        if gone(owners, heads, kv):
            found[name][place] = base[name][place]
    return found


def names_of(heads: set[int], layer: int = 1) -> str:
    return ", ".join(f"L{layer}.h{head}" for head in sorted(heads))


@pytest.mark.parametrize("family", SPANS)
def test_heads_of_every_layout(family: str, tmp_path: Path) -> None:
    """One head, a whole group, and a whole layer."""
    base, tuned = save_pair(tmp_path, family, torch.bfloat16)
    start, end = read(base), read(tuned)
    for heads in ({1}, {0, 1}, {0, 1, 2, 3}):
        found = edit(tmp_path / f"out{len(heads)}", tuned, Rewind(to=base, heads=names_of(heads)))
        wanted = expected(SPANS[family], end, start, heads)
        assert_same(found, wanted)
        assert any(not torch.equal(wanted[name], end[name]) for name in end)


@pytest.mark.parametrize("kv", ["all", "majority", "never"])
@pytest.mark.parametrize("heads", [{0, 1, 2}, {4, 5}, {4, 5, 6, 7}, {0, 4, 5, 6}], ids=str)
def test_shared_heads_of_the_sample(kv: str, heads: set[int], tmp_path: Path) -> None:
    """Four query heads of 16 rows share one key-value head; norms of queries and keys are cut alike."""
    stem = "model.layers.2.self_attn"
    spans = [*separate(stem, NAMES, 16, heads=8), *head_norms(stem, 16, heads=8)]
    step = Rewind(to=str(SAMPLES / "base"), heads=names_of(heads, 2), kv=kv)
    done = edited(tmp_path / "out", SAMPLES / "math", step)
    wanted = expected(spans, read(SAMPLES / "math"), read(SAMPLES / "base"), heads, kv)
    assert_same(read(tmp_path / "out"), wanted)
    summary = done.manifest["steps"][0]["summary"]
    shared = sum(gone(owners, heads, kv) for _, _, owners in spans if len(owners) > 1)
    assert (summary["rewound"], summary["of"]) == (len(heads), 32)
    assert (summary["shared parts rewound"], summary["shared parts"]) == (shared, 4 * 2 * 3)


def test_half_way_by_hand(tmp_path: Path) -> None:
    """bf16: half the sum has few bits more than its terms, so that float32 holds it and one rounding is left."""
    base, tuned = save_pair(tmp_path, "llama", torch.bfloat16)
    start, end = read(base), read(tuned)
    half = {name: ((start[name].double() + end[name].double()) / 2).bfloat16() for name in start}
    found = edit(tmp_path / "out", tuned, Rewind(to=base, heads="L1.h0,L1.h1", amount=0.5))
    assert_same(found, expected(SPANS["llama"], end, half, {0, 1}))
    found = edit(tmp_path / "whole", tuned, Rewind(to=base, unit="tensor", fraction=1, amount=0.5))
    assert_same(found, half)


@pytest.mark.parametrize("amount", [0.0, -0.5, 1.5])
def test_beyond_the_base_and_nowhere(amount: float, tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama")
    start, end = read(base), read(tuned)
    name = "model.layers.0.mlp.up_proj.weight"
    found = edit(tmp_path / "out", tuned, Rewind(to=base, unit="tensor", fraction=1, amount=amount))[name]
    wanted = (1 - amount) * end[name].double() + amount * start[name].double()
    # float64 arithmetic, then one rounding to float32: half a unit in the last place, and the float64's own
    assert torch.allclose(found.double(), wanted, rtol=2**-24 * 1.001, atol=1e-12)
    if amount == 0:
        assert_bits(found, end[name])


@pytest.mark.parametrize("amount", [1.0, 0.5])
def test_what_lies_beside_a_head_keeps_every_bit(
    amount: float, write_model: Callable[..., Path], tmp_path: Path
) -> None:
    """NaN with their sign and payload too, whatever the arithmetic of the head that moves."""
    base = llama_tensors(0)
    tuned = llama_tensors(1, base)
    name = "model.layers.1.self_attn.q_proj.weight"
    strange = torch.tensor([0xFFC1, 0x7FA5, 0x8000, 0xFFC0], dtype=torch.uint16).repeat(8).view(torch.bfloat16)
    tuned[name][20] = strange  # in head 2
    model, origin = write_model("tuned", tuned), write_model("base", base)
    found = edit(tmp_path / "out", model, Rewind(to=origin, heads="L1.h0", amount=amount))
    assert_bits(found[name][8:], tuned[name][8:])
    with diffract.LiveModel(module := as_module(tuned)).edited(Rewind(to=base, heads="L1.h0", amount=amount)):
        assert_same(module.state_dict(), found)


UNITS: dict[str, tuple[str, str, Callable[[str], bool]]] = {
    "matrix": ("mlp.up", "llama", lambda name: name.endswith("mlp.up_proj.weight")),
    "tensor": ("layers 1", "llama", lambda name: ".1." in name and "norm" not in name),
    "head": ("layers 0, attn", "olmo2", lambda name: ".0.self_attn." in name),
    "expert": ("layers 1", "qwen3_moe", lambda name: "layers.1." in name and ".experts." in name),
}


@pytest.mark.parametrize("unit", UNITS)
def test_units_and_selections(unit: str, tmp_path: Path) -> None:
    """Fraction 1 takes all that is selected, of its kind, and nothing else."""
    select, family, belongs = UNITS[unit]
    base, tuned = save_pair(tmp_path, family)
    start, end = read(base), read(tuned)
    wanted = {name: start[name] if belongs(name) else end[name] for name in end}
    assert any(belongs(name) for name in end)
    assert_same(edit(tmp_path / "out", tuned, Rewind(to=base, unit=unit, fraction=1, select=select)), wanted)


def test_one_expert_of_a_stack(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "mixtral")
    start, end = read(base), read(tuned)
    found = edit(tmp_path / "out", tuned, Rewind(to=base, unit="expert", heads="L1.e2"))
    changed = [name for name in end if not torch.equal(found[name], end[name])]
    assert changed
    for name in changed:
        assert ".1." in name
        whole: Tensor = end[name].clone()
        if whole.ndim == 3:
            whole[2] = start[name][2]
        else:
            assert "experts.2." in name
            whole = start[name]
        assert_bits(found[name], whole, name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": "L9.h0"}, "no 'L9.h0' in this model, expected names from L0.h0 to L1.h3"),
        ({"heads": " , "}, "the list names nothing"),
        ({"fraction": 0.5, "unit": "expert"}, "no expert among what is selected"),
        ({"fraction": 0.5, "select": "mlp"}, "no head among what is selected"),
    ],
)
def test_what_is_not_there(settings: dict, message: str, family: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match=message):
        edit(tmp_path / "out", family[1], {"rewind": {"to": family[0], **settings}})
    assert not (tmp_path / "out").exists()


def test_heads_of_latent_attention_are_what_leads_out_of_the_latent_space(tmp_path: Path) -> None:
    """Four heads: 12 rows each of q_b, 8 and 6 of kv_b, 6 columns of o."""
    base, tuned = save_pair(tmp_path, "deepseek_v3")
    start, end = read(base), read(tuned)
    found = edit(tmp_path / "out", tuned, Rewind(to=base, heads="L1.h1"))
    module = "model.layers.1.self_attn"
    spans = {f"{module}.q_b_proj.weight": (12, 24), f"{module}.kv_b_proj.weight": (14, 28)}
    wanted = {name: tensor.clone() for name, tensor in end.items()}
    for name, (first, last) in spans.items():
        wanted[name][first:last] = start[name][first:last]
    wanted[f"{module}.o_proj.weight"][:, 6:12] = start[f"{module}.o_proj.weight"][:, 6:12]
    assert_same(found, wanted)


def test_heads_of_two_attentions(tmp_path: Path) -> None:
    """T5's decoder attends twice; names tell which."""
    base, tuned = save_pair(tmp_path, "t5")
    start, end = read(base), read(tuned)
    spans = [*separate("decoder.block.1.layer.1.EncDecAttention", "q k v o", 12, kv=4)]
    names = sorted(
        edited(tmp_path / "all", tuned, Rewind(to=base, fraction=1)).manifest["steps"][0]["summary"]["names"]
    )
    cross = [name for name in names if name.startswith("L1.") and "cross" in name]
    assert (len(names), len(cross)) == (24, 4)
    found = edit(tmp_path / "out", tuned, Rewind(to=base, heads=cross[2]))
    assert_same(found, expected(spans, end, start, {2}))
