"""Families are told by configuration or names, behind any prefix; what no family describes is read by structure."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import diffract
from diffract.architectures import Architecture, resolve
from diffract.checkpoints import TensorInfo
from diffract.matrices import Matrix, slice_tensor

CONFIG = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
BODY = {
    "embed_tokens.weight": (50, 32),
    **{f"layers.{i}.self_attn.{n}_proj.weight": s for i in (0, 1) for n, s in {"q": (32, 32), "o": (32, 32)}.items()},
    **{f"layers.{i}.self_attn.{n}_proj.weight": (16, 32) for i in (0, 1) for n in "kv"},
    **{f"layers.{i}.mlp.{n}_proj.weight": (48, 32) for i in (0, 1) for n in ("gate", "up")},
    **{f"layers.{i}.mlp.down_proj.weight": (32, 48) for i in (0, 1)},
}
HEAD = {"lm_head.weight": (50, 32)}
PLAIN = {f"model.{n}": s for n, s in BODY.items()} | HEAD


def matrices(config: dict, shapes: dict[str, tuple[int, ...]]) -> list[Matrix]:
    architecture = resolve(config, shapes)
    return [m for n, s in shapes.items() for m in slice_tensor(TensorInfo(n, s, "F32"), architecture)]


def labels(config: dict, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return [m.name for m in matrices(config, shapes)]


def undescribed(architecture: Architecture, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return [n for n in shapes if architecture.place(n) is None]


LLAMA = CONFIG | {"model_type": "llama"}


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "module.", "base_model.model.", "_forward_module.", "_fsdp_wrapped_module.", "policy.", "actor.module."),
        *("model._orig_mod.", "state_dict.net."),
    ],
)
def test_any_prefix_gives_the_labels_of_the_plain_save(prefix: str) -> None:
    assert labels(LLAMA, {prefix + n: s for n, s in PLAIN.items()}) == labels(LLAMA, PLAIN)


def test_words_of_wrappers_inside_names_are_dropped() -> None:
    wrapped = {n.replace("self_attn.", "_orig_mod.self_attn._checkpoint_wrapped_module."): s for n, s in PLAIN.items()}
    assert labels(LLAMA, wrapped) == labels(LLAMA, PLAIN)


def test_a_body_that_was_saved_alone_has_the_same_labels() -> None:
    assert labels(LLAMA, BODY) == [name for name in labels(LLAMA, PLAIN) if name != "unembed"]


@pytest.mark.parametrize("known", ["gemma3", "not_known"])
def test_both_namings_of_a_vision_language_model(known: str) -> None:
    config = {"model_type": known, "text_config": CONFIG | {"model_type": f"{known}_text"}}
    config |= {"vision_config": {"hidden_size": 24, "num_attention_heads": 3}}
    tower = {f"encoder.layers.0.self_attn.{n}.weight": (24, 24) for n in ("q_proj", "k_proj", "v_proj", "out_proj")}
    hub = {f"language_model.model.{n}": s for n, s in BODY.items()} | {"language_model.lm_head.weight": (50, 32)}
    hub |= {f"vision_tower.{n}": s for n, s in tower.items()}
    memory = {f"model.language_model.{n}": s for n, s in BODY.items()} | HEAD
    memory |= {f"model.vision_tower.{n}": s for n, s in tower.items()}
    cut = [m for m in matrices(config, hub) if m.head is not None or m.kv_head is not None]
    there = [m for m in matrices(config, memory) if m.head is not None or m.kv_head is not None]
    assert [m.name for m in cut] == [m.name for m in there]
    assert [m.name for m in cut if m.block == "attn" and m.layer == 0 and m.projection == "q"] == [
        f"L0.attn.q.h{i}" for i in range(4)
    ]
    towers = [m for m in cut if m.block not in ("attn",)]
    assert {(m.shape, m.projection) for m in towers} == {((8, 24), p) for p in "qkv"} | {((24, 8), "o")}
    assert len({m.name for m in cut}) == len(cut)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG | {"architectures": ["LlamaForCausalLM"]},
        CONFIG | {"architectures": ["LlamaForCausalLM"], "model_type": "Yi"},
        CONFIG,
    ],
)
def test_a_family_without_its_model_type(config: dict) -> None:
    assert resolve(config, PLAIN).family == "llama"
    assert labels(config, PLAIN) == labels(LLAMA, PLAIN)


def test_names_without_a_number_of_heads_stay_whole() -> None:
    found = labels({}, PLAIN)
    assert found[:3] == ["embed", "L0.attn.q", "L0.attn.o"]
    assert "projections stay whole" in resolve({}, PLAIN).note


def test_bert_by_its_names_behind_its_prefix_or_not() -> None:
    config = {"hidden_size": 32, "num_attention_heads": 4}
    body = {
        f"encoder.layer.0.attention.{n}.weight": (32, 32)
        for n in ("self.query", "self.key", "self.value", "output.dense")
    } | {"embeddings.word_embeddings.weight": (50, 32)}
    headed = {f"bert.{n}": s for n, s in body.items()} | {"cls.seq_relationship.weight": (2, 32)}
    assert resolve(config, body).family == resolve(config, headed).family == "bert"
    assert labels(config, headed)[:-1] == labels(config, body)
    assert undescribed(resolve(config, headed), headed) == ["cls.seq_relationship.weight"]


def test_a_type_without_a_file_is_read_by_structure() -> None:
    found = resolve(CONFIG | {"model_type": "brand_new"}, PLAIN)
    assert (found.family, found.note) == ("structure", "")
    assert (found.dimensions.heads, found.dimensions.kv_heads, found.dimensions.head_dim) == (4, 2, 8)
    cut = [m.name for m in matrices(CONFIG | {"model_type": "brand_new"}, PLAIN) if m.kv_head is not None]
    assert cut == [m.name for m in matrices(LLAMA, PLAIN) if m.kv_head is not None]


def test_value_heads_of_another_size() -> None:
    shapes = {"a.0.attn.q_proj.weight": (32, 32), "a.0.attn.k_proj.weight": (16, 32)}
    shapes |= {"a.0.attn.v_proj.weight": (10, 32), "a.0.attn.o_proj.weight": (32, 20)}
    found = {m.name: m.shape for m in matrices(CONFIG | {"model_type": "new"}, shapes)}
    assert found["L0.attn.q.h3"] == (8, 32)
    assert found["L0.attn.v.kv1"] == (5, 32)
    assert found["L0.attn.o.h3"] == (32, 5)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"layers.0.self_attn.q_proj.weight": (64, 32)}, "no whole sizes of 4 heads"),
        ({"layers.0.self_attn.lambda_q1": (8,)}, "it holds lambda_q1, too"),
        ({"layers.0.self_attn.k_conv.weight": (16, 1, 4)}, "it holds k_conv.weight, too"),
        ({"layers.0.self_attn.k_proj.weight": (8, 32), "layers.0.self_attn.v_proj.weight": (8, 32)}, "contradicts"),
    ],
)
def test_what_equations_do_not_settle_stays_whole(changed: dict, reason: str) -> None:
    shapes = PLAIN | {f"model.{n}": s for n, s in changed.items()}
    found = resolve(CONFIG | {"model_type": "new"}, shapes)
    assert reason in found.note
    own = [m for m in matrices(CONFIG | {"model_type": "new"}, shapes) if m.layer == 0 and m.block == "attn"]
    assert {m.head for m in own} == {None}
    assert {m.head for m in matrices(CONFIG | {"model_type": "new"}, PLAIN) if m.layer == 1} > {0, 1, 2, 3}


def test_torch_attention_is_cut_where_the_configuration_states_heads() -> None:
    shapes = {
        "encoder.layers.0.self_attn.in_proj_weight": (96, 32),
        "encoder.layers.0.self_attn.out_proj.weight": (32, 32),
        "decoder.layers.0.self_attn.in_proj_weight": (96, 32),
        "decoder.layers.0.self_attn.out_proj.weight": (32, 32),
        "decoder.layers.0.multihead_attn.in_proj_weight": (96, 32),
        "decoder.layers.0.multihead_attn.out_proj.weight": (32, 32),
    }
    found = {m.name: m for m in matrices({"nhead": 4}, shapes)}
    assert len(found) == 3 * 16
    assert found["L0.encoder.attn.k.h1"].rows == (40, 48)
    assert found["L0.decoder.cross_attn.o.h3"].cols == (24, 32)
    whole = [m.name for m in matrices({}, shapes)]
    assert whole[:4] == ["L0.encoder.attn.q", "L0.encoder.attn.k", "L0.encoder.attn.v", "L0.encoder.attn.o"]


@pytest.mark.parametrize("known", [False, True])
def test_the_line_that_an_error_gives_states_the_number_of_heads(known: bool, tmp_path: Path) -> None:
    """By the line itself, run by a shell: for attention that no family describes, and for names of one."""
    torch_attention = {"decoder.layers.0.multihead_attn.in_proj_weight": (96, 32), "linear1.weight": (64, 32)}
    torch_attention |= {"decoder.layers.0.multihead_attn.out_proj.weight": (32, 32), "linear2.weight": (32, 64)}
    bert = {
        f"encoder.layer.0.attention.{n}.weight": (32, 32)
        for n in ("self.query", "self.key", "self.value", "output.dense")
    }
    shapes = bert if known else torch_attention
    note = resolve({}, shapes).note
    line = note[note.index("echo ") :].replace("HEADS", "4").replace("WIDTH", "32")
    subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True)
    found = resolve({}, shapes, spec_file=tmp_path / "own.json")
    assert (found.dimensions.heads, found.dimensions.head_dim) == (4, 8)
    assert labels(dict(found.config), shapes) == labels({"num_attention_heads": 4, "hidden_size": 32}, shapes)
    assert "echo" not in found.note
    # what the configuration states counts
    assert resolve({"num_attention_heads": 2, "hidden_size": 32}, shapes, spec_file=tmp_path / "own.json") != found


def test_gated_queries_and_differential_heads() -> None:
    gated = PLAIN | {f"model.layers.{i}.self_attn.q_proj.weight": (64, 32) for i in (0, 1)}
    found = {m.name: m.rows for m in matrices(CONFIG | {"model_type": "qwen3_next"}, gated) if m.layer == 0}
    assert (found["L0.attn.q.h1"], found["L0.attn.gate.h1"]) == ((16, 24), (24, 32))
    own = matrices(CONFIG | {"model_type": "diffllama"}, PLAIN)
    assert {m.projection for m in own if m.kv_head is not None} == {"q", "k"}


def test_what_a_silent_gemma_is_assumed_to_have() -> None:
    found = resolve({"model_type": "gemma3", "text_config": {"hidden_size": 64}}).dimensions
    assert (found.heads, found.kv_heads, found.head_dim) == (8, 4, 256)
    assert resolve({"model_type": "gemma2"} | CONFIG).ties
    assert not resolve({"model_type": "gemma2", "tie_word_embeddings": False} | CONFIG).ties
    assert not resolve(LLAMA).ties


def test_experts_that_are_stored_in_out() -> None:
    experts = {
        "model.layers.0.mlp.experts.gate_up_proj": (3, 32, 96),
        "model.layers.0.mlp.experts.down_proj": (3, 48, 32),
    }
    oss = {m.name: m.shape for m in matrices(CONFIG | {"model_type": "gpt_oss"}, PLAIN | experts) if m.expert == 2}
    assert oss == {"L0.mlp.gateup.e2": (96, 32), "L0.mlp.down.e2": (32, 48)}
    moved = {n.replace("mlp.", "feed_forward."): s for n, s in experts.items()}
    four = [m for m in matrices(CONFIG | {"model_type": "llama4_text"}, PLAIN | moved) if m.expert == 2]
    assert [(m.name, m.shape) for m in four][:2] == [("L0.mlp.gate.e2", (48, 32)), ("L0.mlp.up.e2", (48, 32))]
    assert (four[1].cols, four[1].transposed) == ((48, 96), True)


def test_more_heads_than_rows_are_refused() -> None:
    with pytest.raises(diffract.ArchitectureError, match=r"claims 64 heads, but the queries of 'layers\.0\.self_attn'"):
        resolve({"model_type": "new", "num_attention_heads": 64}, PLAIN)


def test_two_families_in_one_folder_are_refused() -> None:
    other = {
        f"encoder.layer.0.attention.{n}.weight": (32, 32)
        for n in ("self.query", "self.key", "self.value", "output.dense")
    } | {"embeddings.word_embeddings.weight": (50, 32)}
    with pytest.raises(diffract.ArchitectureError, match=r"two families lie together: llama.* and bert"):
        resolve(LLAMA, PLAIN | other)


def test_a_file_that_fits_no_tensor_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"family": "x", "tensors": {"blocks.{layer}.q": {"part": "attn.q"}}}))
    with pytest.raises(
        diffract.ArchitectureError, match=r"fits no tensor: it has 'blocks.\{layer\}.q', the checkpoint"
    ):
        resolve(CONFIG, PLAIN, spec_file=file)
