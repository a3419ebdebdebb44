"""Two models that meet in an edit: what is taken, what stays, and what is refused under which name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import diffract
from diffract.edits import Interpolate, LiveModel, Merge, Rewind, Truncate, preview
from diffract.edits.to_files import apply, verify
from diffract.errors import CheckpointError, SelectionError
from edit_cases import Tensors, as_module, assert_bits, edit, edited, read

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}

ATTENTION = "model.layers.{}.self_attn.{}_proj.weight"


def llama(seed: int = 0, *, layers: int = 2, vocab: int = 40) -> Tensors:
    """Weights of a small Llama by the hub's names."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"model.embed_tokens.weight": (vocab, 32), "lm_head.weight": (vocab, 32), "model.norm.weight": (32,)}
    for i in range(layers):
        sizes |= {ATTENTION.format(i, part): (rows, 32) for part, rows in zip("qkvo", (32, 16, 16, 32), strict=True)}
        sizes |= {f"model.layers.{i}.mlp.{part}_proj.weight": (48, 32) for part in ("gate", "up")}
        sizes |= {f"model.layers.{i}.mlp.down_proj.weight": (32, 48)}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def tuned_from(base: Tensors, scale: float = 0.05, seed: int = 9) -> Tensors:
    """A descendant: noise is added to every tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {name: w + scale * torch.randn(w.shape, generator=generator) for name, w in base.items()}


def saved(folder: Path, tensors: Tensors, tokens: list[str] | None = None, **config: Any) -> Path:
    """Write a checkpoint with its configuration, and a tokenizer where there are tokens."""
    folder.mkdir()
    save_file({name: w.clone() for name, w in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LLAMA | config))
    if tokens is not None:
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return folder


def every_edit(base: Path) -> dict[str, dict[str, Any]]:
    """A recipe of each edit that takes weights from another model."""
    return {
        "rewind": {"steps": [{"rewind": {"to": base, "heads": "L0.h1"}}]},
        "truncate": {"steps": [{"truncate": {"base": base, "drop": 0.5}}]},
        "interpolate": {"steps": [{"interpolate": {"with": base, "at": 0.5}}]},
        "merge": {"steps": [{"merge": {"base": base, "models": {"x": base}, "method": "ties"}}]},
        "tsv": {"steps": [{"merge": {"base": base, "models": {"x": base}, "method": "tsv"}}]},
        "lora": {"export": {"lora": {"base": base, "rank": 2}}},
    }


PARTS_OF_ONE: dict[str, Tensors] = {
    "rotary buffer": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "mask": {"model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)},
    "bias": {"model.layers.1.self_attn.q_proj.bias": torch.ones(32)},
    "classifier": {"score.weight": torch.ones(3, 32)},
    "classifier of layers": {"score.0.weight": torch.ones(8, 32), "score.2.weight": torch.ones(3, 8)},
    "value head": {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)},
    "further tokens, a module": {"mtp.layers.0.eh_proj.weight": torch.ones(32, 64), "mtp.norm.weight": torch.ones(32)},
    "further tokens, a layer": {"model.layers.2.eh_proj.weight": torch.ones(32, 64)}
    | {ATTENTION.format(2, part): torch.ones(rows, 32) for part, rows in zip("qkvo", (32, 16, 16, 32), strict=True)},
    "images": {"vision_tower.encoder.layers.0.q_proj.weight": torch.ones(8, 8)},
}


@pytest.mark.parametrize("kind", PARTS_OF_ONE)
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_parts_that_only_one_has_stop_no_edit(kind: str, side: str, tmp_path: Path) -> None:
    part, base = PARTS_OF_ONE[kind], llama()
    sides = {"base": base, "tuned": tuned_from(base)}
    folders = {name: saved(tmp_path / name, w | (part if name == side else {})) for name, w in sides.items()}
    for name, recipe in every_edit(folders["base"]).items():
        steps = recipe.pop("steps", [])
        done = edited(tmp_path / f"out-{name}", folders["tuned"], *steps, **recipe)
        assert done.manifest["kept"][str(folders["base"])].keys() >= part.keys(), name
        assert any(next(iter(part)) in note for note in done.manifest["notes"]), name
        if name != "lora":
            found = read(tmp_path / f"out-{name}")
            for own in part if side == "tuned" else ():
                assert_bits(found[own], part[own], own)
            assert sorted(found) == sorted(sides["tuned"] | (part if side == "tuned" else {}))
            assert not torch.equal(found[ATTENTION.format(0, "q")], sides["tuned"][ATTENTION.format(0, "q")])


def test_a_head_that_only_the_tuned_model_has_is_asked_for_by_name_alone(tmp_path: Path) -> None:
    base = llama()
    tuned = saved(tmp_path / "tuned", tuned_from(base))
    base.pop("lm_head.weight")
    plain = saved(tmp_path / "base", base)
    found = edit(tmp_path / "out", tuned, {"interpolate": {"with": plain, "at": 1.0}})
    assert_bits(found["lm_head.weight"], read(tuned)["lm_head.weight"])
    assert_bits(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    step = {"interpolate": {"with": plain, "at": 1.0, "select": "unembed"}}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: only in the model.*--allow unmatched"):
        edit(tmp_path / "other", tuned, step)


def test_a_matrix_of_common_layers_must_be_there(tmp_path: Path) -> None:
    base = llama()
    tuned = saved(tmp_path / "tuned", tuned_from(base))
    lost = ATTENTION.format(1, "k")
    del base[lost]
    plain = saved(tmp_path / "base", base)
    whole: dict[str, Any] = {"interpolate": {"with": plain, "at": 1.0}}
    with pytest.raises(CheckpointError, match=rf"{lost}: only in the model.*pass --allow unmatched"):
        edit(tmp_path / "out", tuned, whole)
    found = edit(tmp_path / "allowed", tuned, whole, allow="unmatched")
    assert_bits(found[lost], read(tuned)[lost])
    # what an edit does not ask for need not be there
    edit(tmp_path / "head", tuned, {"rewind": {"to": plain, "heads": "L0.h1"}})
    edit(tmp_path / "mlp", tuned, {"interpolate": {"with": plain, "at": 0.5, "select": "mlp"}})
    with pytest.raises(CheckpointError, match=lost):
        edit(tmp_path / "all heads", tuned, {"rewind": {"to": plain, "fraction": 0.5}})


def test_layers_that_only_the_other_has_are_not_left_out_unseen(tmp_path: Path) -> None:
    long = llama(layers=3)
    short = {name: w for name, w in tuned_from(long).items() if ".layers.2." not in name}
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.\S+: only in the other"):
        edit(tmp_path / "out", short, {"interpolate": {"with": long, "at": 0.5}})


@pytest.mark.parametrize("name", ["rewind", "truncate", "interpolate", "merge", "lora"])
def test_a_stranger_is_refused_by_name(name: str, tmp_path: Path) -> None:
    stranger, model = saved(tmp_path / "stranger", llama(1)), saved(tmp_path / "model", llama(0))
    recipe = every_edit(stranger)[name]
    steps = recipe.pop("steps", [])
    with pytest.raises(CheckpointError, match=r"a stranger, .*over 8 matrices.*pass --allow strangers\.$"):
        edited(tmp_path / "out", model, *steps, **recipe)
    with pytest.raises(CheckpointError, match="Did you mean 'strangers'"):
        edited(tmp_path / "out", model, *steps, **recipe, allow="stranger")
    done = edited(tmp_path / "out", model, *steps, **recipe, allow=["strangers"])
    assert done.manifest["recipe"]["allow"] == "strangers"


def test_a_permission_that_nothing_asks_for_is_said_and_one_that_never_can_is_refused(tmp_path: Path) -> None:
    base = llama()
    model, tuned = saved(tmp_path / "base", base), saved(tmp_path / "tuned", tuned_from(base), rms_norm_eps=1e-5)
    step = {"interpolate": {"with": str(tuned), "at": 0.5}}
    said = "Nothing to allow: strangers, rms_norm_eps, rope_theta."
    allow = ["strangers", "rms_norm_eps", "rope_theta"]  # rms_norm_eps is a key of one of the two alone
    done = edited(tmp_path / "out", model, step, allow=allow)
    assert done.manifest["notes"][-1] == said
    assert done.manifest["kept"] == {}  # all was taken from the other: no entry says nothing
    assert preview({"model": str(model), "steps": [step], "allow": allow}).notes[-1] == said
    for name, near in (("stranger", "Did you mean 'strangers'"), ("no_such_key", "Known: strangers, tokenizers")):
        with pytest.raises(SelectionError, match=f"unknown permission '{name}'.*{near}"):
            edited(tmp_path / "other", model, step, allow=name)
        with pytest.raises(SelectionError, match="unknown permission"):  # without another model nothing can be allowed
            preview({"model": str(model), "steps": [{"laser": {"select": "mlp.up", "keep": 0.5}}], "allow": name})
        with pytest.raises(SelectionError, match="unknown permission"):
            LiveModel(as_module(base, **LLAMA), allow=[name]).apply(Interpolate(other=as_module(base, **LLAMA), at=1.0))
        for compare in (diffract.compare, diffract.heads, diffract.trajectory):
            with pytest.raises(SelectionError, match=rf"permission.*{name}"):
                compare(model, tuned, allow=[name])
    assert not (tmp_path / "other").exists()


def test_one_error_has_all_reasons_of_all_models(tmp_path: Path) -> None:
    base = llama()
    math = saved(tmp_path / "math", tuned_from(base))
    code = saved(tmp_path / "code", tuned_from(base, seed=3), rms_norm_eps=1e-3)
    scaling = {"rope_type": "linear", "factor": 4.0}
    long = saved(tmp_path / "long", llama(5), rope_theta=5e5, rope_scaling=scaling)
    merge = Merge(models={"code": str(code), "long": str(long)}, method="linear")
    with pytest.raises(CheckpointError) as caught:
        edited(tmp_path / "out", str(math), merge)
    text = str(caught.value)
    # code alone states rms_norm_eps: what the others' library took is not known, and no reason to refuse
    assert "rms_norm_eps" not in text
    assert "rope_theta 10000.0 against 500000.0" in text
    assert text.endswith("pass --allow strangers --allow rope_theta --allow rope_scaling.")
    with pytest.raises(CheckpointError, match=r"pass --allow rope_theta\.$"):
        edited(tmp_path / "out", str(math), merge, allow="strangers,rope_scaling")
    allowed = ("strangers", "rope_theta", "rope_scaling")
    assert preview({"model": str(math), "steps": [{"merge": merge}]}, allow=allowed).changed
    done = apply({"model": str(math), "steps": [merge]}, tmp_path / "out", allow=allowed)
    assert done.manifest["recipe"]["allow"] == ",".join(allowed)
    assert not verify(tmp_path / "out", replay=True).faults


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rope_theta": 5e5}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"sliding_window": 16}, "sliding_window"),
        ({"head_dim": 8, "num_key_value_heads": 4}, "num_key_value_heads"),
    ],
)
def test_keys_that_change_the_computation_are_refused(change: dict[str, Any], name: str, tmp_path: Path) -> None:
    base = llama()
    if name == "num_key_value_heads":
        for i in range(2):
            base |= {ATTENTION.format(i, part): torch.randn(32, 32) for part in "kv"}
    plain = saved(tmp_path / "base", base, **(change if name == "num_key_value_heads" else {}))
    other: dict[str, Any] = (
        {"num_key_value_heads": 2, "head_dim": 16, "num_attention_heads": 2} if name.startswith("num") else change
    )
    tuned = saved(tmp_path / "tuned", tuned_from(base), **other)
    step = {"interpolate": {"with": plain, "at": 0.5}}
    with pytest.raises(CheckpointError, match=rf"--allow {name}\b"):
        edit(tmp_path / "out", tuned, step)


@pytest.mark.parametrize(
    "change",
    [
        {"torch_dtype": "bfloat16"},
        {"transformers_version": "9", "use_cache": False},
        {"news_of_a_library": True},
        {"rope_theta": 10_000},
        {"quantization_config": {"quant_method": "none"}},
    ],
    ids=str,
)
def test_keys_that_do_not_are_not(change: dict[str, Any], tmp_path: Path) -> None:
    base = llama()
    plain, tuned = saved(tmp_path / "base", base), saved(tmp_path / "tuned", tuned_from(base), **change)
    edit(tmp_path / "out", tuned, {"interpolate": {"with": plain, "at": 0.5}})


def test_the_same_weights_and_weights_alone_are_not_refused(tmp_path: Path) -> None:
    base = llama()
    plain, long = saved(tmp_path / "base", base), saved(tmp_path / "long", base, rope_theta=5e5)
    done = edited(tmp_path / "out", long, {"interpolate": {"with": plain, "at": 0.5}})
    assert str(plain) in done.manifest["same_weights_as"]
    edit(tmp_path / "alone", long, {"interpolate": {"with": tuned_from(base), "at": 0.5}})


def test_ties_are_refused_where_a_head_of_its_own_has_no_place(tmp_path: Path) -> None:
    base = llama()
    untied = saved(tmp_path / "untied", tuned_from(base))
    del base["lm_head.weight"]
    tied = saved(tmp_path / "tied", base, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="pass --allow tie_word_embeddings"):
        edit(tmp_path / "out", tied, {"interpolate": {"with": untied, "at": 1.0}})
    found = edit(tmp_path / "out", untied, {"interpolate": {"with": tied, "at": 1.0}})
    assert_bits(found["lm_head.weight"], base["model.embed_tokens.weight"])


def test_what_is_read_to_judge_is_no_input(tmp_path: Path) -> None:
    base = llama()
    plain, tuned = saved(tmp_path / "base", base), saved(tmp_path / "tuned", tuned_from(base))
    done = edited(tmp_path / "out", tuned, {"rewind": {"to": plain, "heads": "L0.h1"}})
    assert set(done.manifest["inputs"][str(plain)]) == {ATTENTION.format(0, part) for part in "qo"}


def test_a_live_model_refuses_and_allows_alike() -> None:
    model, other = as_module(llama(0), **LLAMA), as_module(llama(1), **LLAMA)
    with pytest.raises(CheckpointError, match="strangers"):
        LiveModel(model).apply(Rewind(to=other, heads="L0.h1"))  # type: ignore[arg-type]
    LiveModel(model, allow=["strangers"]).apply(Interpolate(other=other, at=1.0))
    assert_bits(
        dict(model.named_parameters())["model.norm.weight"], dict(other.named_parameters())["model.norm.weight"]
    )


TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize(("ours", "theirs"), [(43, 40), (40, 43)])
@pytest.mark.parametrize("name", ["interpolate", "merge", "tsv", "truncate"])
def test_common_rows_of_a_grown_vocabulary(name: str, ours: int, theirs: int, tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(43)]
    base = llama(vocab=theirs)
    grown = tuned_from({n: torch.cat([w, torch.randn(9, 32)])[:ours] if n in TABLES else w for n, w in base.items()})
    plain = saved(tmp_path / "base", base, words[:theirs], vocab_size=theirs)
    tuned = saved(tmp_path / "tuned", grown, words[:ours], vocab_size=ours)
    step: dict[str, Any] = every_edit(plain)[name]["steps"][0]
    if name == "interpolate":
        step["interpolate"]["at"] = 1.0
    done = edited(tmp_path / "out", tuned, step)
    found = read(tmp_path / "out")
    for table in TABLES:
        assert_bits(found[table][40:], grown[table][40:], table)
        assert not torch.equal(found[table][:40], grown[table][:40])
        if name == "interpolate":
            assert_bits(found[table][:40], base[table][:40], table)
    assert done.manifest["kept"][str(plain)] == dict.fromkeys(TABLES, "rows from 40 on stay as they are in the model")
    assert not any("position" in note for note in done.manifest["notes"])
    with pytest.raises(CheckpointError, match=r"another number of tokens in .*--vocabulary common"):
        edit(tmp_path / "refused", tuned, step, vocabulary="refuse")


def test_slerp_turns_by_the_angle_of_the_common_rows(tmp_path: Path) -> None:
    base = llama()
    longer = {name: torch.cat([w, torch.full((5, 32), 1e3)]) if name in TABLES else w for name, w in base.items()}
    tuned = tuned_from(base, 0.5)
    step = {"interpolate": {"with": longer, "at": 0.3, "method": "slerp"}}
    found, same = (edit(tmp_path / f"{i}", tuned, s) for i, s in enumerate((step, step | {
        "interpolate": step["interpolate"] | {"with": base}})))  # fmt: skip
    for table in TABLES:
        assert_bits(found[table], same[table], table)


def test_rows_of_tokens_that_only_one_knows_are_not_common(tmp_path: Path) -> None:
    """Rows that fill a table up to a round number are no token's until a tuned model takes them."""
    base, words = llama(vocab=48), [f"w{i}" for i in range(42)]
    plain = saved(tmp_path / "base", base, words[:40])
    tuned = tuned_from({n: w[:42] if n in TABLES else w for n, w in base.items()})
    folder = saved(tmp_path / "tuned", tuned, words)
    found = edit(tmp_path / "out", folder, {"interpolate": {"with": plain, "at": 1.0}})
    assert_bits(found[TABLES[0]], torch.cat([base[TABLES[0]][:40], tuned[TABLES[0]][40:]]))


def test_without_tokenizers_rows_are_paired_by_position_and_that_is_said(tmp_path: Path) -> None:
    base = llama()
    longer = {n: torch.cat([w, torch.ones(3, 32)]) if n in TABLES else w for n, w in tuned_from(base).items()}
    done = edited(tmp_path / "out", longer, {"interpolate": {"with": base, "at": 1.0}})
    assert "the first 40 rows are paired" in done.manifest["notes"][-1]
    assert "by their position alone" in done.manifest["notes"][-1]


def test_tokenizers_that_contradict_each_other(tmp_path: Path) -> None:
    base, words = llama(), [f"w{i}" for i in range(40)]
    plain = saved(tmp_path / "base", base, words)
    tuned = saved(tmp_path / "tuned", tuned_from(base), [*words[:38], "w39", "w38"])
    step: dict[str, Any] = {"interpolate": {"with": plain, "at": 0.5}}
    with pytest.raises(CheckpointError, match=r"in 2 of 40 cases, first 38: 'w39' against 'w38'.*--allow tokenizers"):
        edit(tmp_path / "out", tuned, step)
    edit(tmp_path / "allowed", tuned, step, allow="tokenizers")
    # rows of tokens play no part in these
    edit(tmp_path / "heads", tuned, {"rewind": {"to": plain, "heads": "L0.h1"}})
    edit(tmp_path / "mlp", tuned, {"interpolate": {"with": plain, "at": 0.5, "select": "mlp"}})


@pytest.mark.parametrize(
    "order", [[1, 0, 2], [0, 0, 1, 2], [0, 2], [0, 1, 2, 1, 2]], ids=["moved", "doubled", "dropped", "stacked"]
)
def test_layers_in_other_places_are_paired_with_what_they_come_from(order: list[int], tmp_path: Path) -> None:
    base = llama(layers=3)
    source, tuned = tuned_from(base), {name: w for name, w in tuned_from(base).items() if ".layers." not in name}
    for place, i in enumerate(order):
        own = {name: w for name, w in source.items() if f".layers.{i}." in name}
        tuned |= {name.replace(f".layers.{i}.", f".layers.{place}."): w for name, w in own.items()}
    folder = saved(tmp_path / "tuned", tuned, num_hidden_layers=len(order))
    plain = saved(tmp_path / "base", base, num_hidden_layers=3)
    allow = "" if len(order) == 3 else "num_hidden_layers"
    done = edited(tmp_path / "out", folder, {"rewind": {"to": plain, "fraction": 1.0}}, allow=allow)
    assert any("Layers are paired with those of" in note for note in done.manifest["notes"])
    found = read(tmp_path / "out")
    for place, i in enumerate(order):
        for part in "qkvo":
            assert_bits(found[ATTENTION.format(place, part)], base[ATTENTION.format(i, part)])
    whole: dict[str, Any] = {"interpolate": {"with": plain, "at": 1.0}}
    if order == [0, 2]:
        with pytest.raises(CheckpointError, match=r"model\.layers\.1\.\S+: only in the other.*--allow unmatched"):
            edit(tmp_path / "whole", folder, whole, allow=allow)
    else:
        assert_bits(
            edit(tmp_path / "whole", folder, whole, allow=allow)["model.norm.weight"], base["model.norm.weight"]
        )


def test_heads_in_other_places_are_refused_without_a_way_around(tmp_path: Path) -> None:
    base = llama()
    tuned = tuned_from(base)
    for i in range(2):
        turned = [w.reshape(-1, 8, 32).flip(0).reshape(-1, 32) for w in (tuned[ATTENTION.format(i, p)] for p in "qkv")]
        tuned |= {ATTENTION.format(i, part): w for part, w in zip("qkv", turned, strict=True)}
        out = tuned[ATTENTION.format(i, "o")].reshape(32, -1, 8).flip(1).reshape(32, -1)
        tuned[ATTENTION.format(i, "o")] = out
        tuned |= {f"model.layers.{i}.mlp.{part}_proj.weight": tuned[f"model.layers.{i}.mlp.{part}_proj.weight"].flip(0)
                  for part in ("gate", "up")}  # fmt: skip
        down = f"model.layers.{i}.mlp.down_proj.weight"
        tuned[down] = tuned[down].flip(1)
    with pytest.raises(CheckpointError, match=r"stand in other places.*take the checkpoint that has them") as caught:
        edit(tmp_path / "out", tuned, Truncate(base=base, drop=0.5), allow="strangers,unmatched")
    assert "pass --allow" not in str(caught.value)
