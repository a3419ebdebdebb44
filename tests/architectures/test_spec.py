"""Architecture files: every key is read, unknown ones are refused, wrong configurations get one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import diffract
from diffract.architectures import builtin_specs, load_spec, resolve
from diffract.architectures import spec as spec_module
from diffract.checkpoints import TensorInfo
from diffract.matrices import lay_out, slice_tensor

ROOT = Path(__file__).parents[2]
OWN_GPT = ROOT.parent / "shared" / "data" / "checkpoints" / "own_gpt"
CONFIG = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
Q = "model.layers.0.self_attn.q_proj.weight"


def test_all_families_are_there() -> None:
    assert set(builtin_specs()) == {
        *("deberta", "diffllama", "gpt_bigcode", "gpt_oss", "llama4", "modernbert", "mpt", "persimmon", "qwen3_next"),
        *("olmo", "olmo2", "olmo3", "llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox"),
        *("falcon", "opt", "bloom", "bert", "roberta", "t5", "mixtral", "olmoe", "qwen3_moe", "deepseek_v3"),
    }
    types = [t for s in builtin_specs().values() for t in s.model_types]
    assert len(types) == len(set(types))


@pytest.mark.parametrize(
    "model", [spec_module.Spec, spec_module.Role, spec_module.ConfigKeys, spec_module.ConditionalKey]
)
def test_every_key_is_read_by_code(model: type) -> None:
    code = "".join(p.read_text() for p in (ROOT / "src/diffract").rglob("*.py"))
    for key in model.model_fields:
        assert f".{key}" in code, key


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"colour": 1}, "colour"),
        ({"tensors": {"w": {"part": "attn.q", "packed": 1}}}, "tensors.w.packed"),
        ({"config": {"n_heads": "x"}}, "config.n_heads"),
    ],
)
def test_unknown_keys_are_refused(tmp_path: Path, change: dict, where: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"family": "x", "tensors": {"w": {"part": "attn.q"}}} | change))
    with pytest.raises(diffract.ArchitectureError, match=where):
        load_spec(file)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("{")
    with pytest.raises(diffract.ArchitectureError, match="no JSON"):
        load_spec(file)
    with pytest.raises(diffract.ArchitectureError, match="cannot read"):
        load_spec(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"num_attention_heads": 3, "num_key_value_heads": 2}, "cannot share"),
        (CONFIG | {"num_attention_heads": 5, "num_key_value_heads": 5}, "no multiple of 5 heads"),
        (CONFIG | {"num_attention_heads": -4}, "positive"),
        (CONFIG | {"num_attention_heads": "four"}, "whole numbers"),
    ],
)
def test_a_contradictory_config_is_refused(config: dict, message: str) -> None:
    with pytest.raises(diffract.ArchitectureError, match=message):
        resolve(config)


def test_missing_head_counts_are_refused_where_heads_are_wanted() -> None:
    architecture = resolve({"model_type": "llama", "hidden_size": 32}, {Q: (32, 32)})
    with pytest.raises(diffract.ArchitectureError, match="num_attention_heads"):
        slice_tensor(TensorInfo(Q, (32, 32), "F32"), architecture)
    (whole,) = slice_tensor(TensorInfo(Q, (32, 32), "F32"), architecture, heads=False)
    assert whole.name == "L0.attn.q"


def test_a_shape_that_contradicts_the_config_is_refused() -> None:
    with pytest.raises(diffract.ArchitectureError, match="40 rows"):
        slice_tensor(TensorInfo(Q, (40, 32), "F32"), resolve(CONFIG, {Q: (40, 32)}))


def test_generic_mode_says_so() -> None:
    layout = lay_out(
        diffract.open(
            {
                "a": np.ones((3, 4)),
                "experts": np.ones((2, 3, 4)),
                "conv": np.ones((2, 3, 4)),
                "what": np.ones((2, 3, 4)),
                "c": np.ones(5),
            }
        )
    )
    assert [m.name for m in layout.matrices] == ["a", "experts[0]", "experts[1]", "conv"]
    assert layout.entries["what"].outcome == "not_matrix"
    assert layout.architecture.family == "generic"
    assert "Generic mode" in layout.warnings[0]
    assert layout.entries["c"].outcome == "vector"


def test_ten_thousands_of_names_resolve_quickly() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj.weight" for i in range(50) for j in range(200)]
    architecture = resolve({**CONFIG, "model_type": "qwen3_moe", "head_dim": 8}, dict.fromkeys(names, (8, 32)))
    assert all(architecture.place(name) is not None for name in names)


@pytest.mark.skipif(not OWN_GPT.is_dir(), reason="the shared checkpoints are not beside this checkout")
def test_a_users_architecture_reads_separate_matrices_per_head() -> None:
    example = ROOT / "docs" / "examples" / "own_gpt.json"
    with diffract.open(OWN_GPT / "pretrained.safetensors") as checkpoint:
        layout = lay_out(checkpoint, spec_file=example)
        heads = [m for m in layout.matrices if m.layer == 0 and m.projection == "q"]
        assert [m.head for m in heads] == [0, 1, 2, 3]
        assert heads[0].shape == (16, 64)
        assert [m.head for m in layout.matrices if m.layer == 1 and m.projection == "o"] == [0, 1, 2, 3]
        assert not [e.info.name for e in layout.entries.values() if e.matrices and e.matrices[0].block == "other"]


def test_half_a_character_is_no_name(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text('{"family": "own\\ud800", "tensors": {}}')
    with pytest.raises(diffract.ArchitectureError, match="no JSON in UTF-8"):
        load_spec(tmp_path / "own.json")
