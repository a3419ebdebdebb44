"""What is written appears whole or not at all, and its manifest tells the truth."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import diffract
from diffract.checkpoints.files import LocalFile
from diffract.checkpoints.header import HEADER_LIMIT
from diffract.cli.main import app
from diffract.edits import Interpolate, Merge, Rewind, Truncate, apply
from diffract.errors import DiffractError, RunError
from diffract.store import whole_folder
from edit_cases import assert_same, edited, read, save_pair
from tiny_llama import llama_tensors

KILLED = """
import os, signal, sys
from diffract.edits import apply

def progress(done, total, what):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

apply({"model": sys.argv[1], "steps": [{"interpolate": {"with": sys.argv[2], "at": 0.5}}],
       "output": {"shard_size": 4000}}, sys.argv[3], progress=progress)
"""


def half(base: Path) -> Interpolate:
    return Interpolate(other=base, at=0.5)


def test_shards_are_those_that_loaders_expect(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "qwen2", torch.bfloat16)
    edited(tmp_path / "whole", tuned, half(base))
    edited(tmp_path / "out", tuned, half(base), output={"shard_size": "4KB"})
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 5
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for file in files:
        held = load_file(file)
        assert sum(tensor.nbytes for tensor in held.values()) <= 4000 or len(held) == 1
        assert all(index["weight_map"][name] == file.name for name in held)
    assert_same(read(tmp_path / "out"), read(tmp_path / "whole"))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read(tmp_path / "out").values())
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert_same({name: loaded[name] for name in index["weight_map"]}, read(tmp_path / "out"))


def test_everything_beside_the_weights_comes_along(write_model: Callable[..., Path], tmp_path: Path) -> None:
    """Code, pooling and tokenizers in folders; what is too large for a settings file is named in the manifest."""
    model = write_model("tuned", llama_tensors(0))
    for name in ("helper.py", "1_Pooling/config.json", "tekken.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(f'{{"name": "{name}"}}')
    with (model / "corpus.txt").open("wb") as file:
        file.truncate(HEADER_LIMIT + 1)
    made = apply({"model": str(model)}, tmp_path / "out")
    for name in ("helper.py", "1_Pooling/config.json", "tekken.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    assert list(made.manifest["left_out"]) == ["corpus.txt"]
    assert not (tmp_path / "out" / "corpus.txt").exists()


def test_a_dtype_is_stated_in_every_section_that_states_one(write_model: Callable[..., Path], tmp_path: Path) -> None:
    model = write_model("tuned", llama_tensors(0))
    config = json.loads((model / "config.json").read_text()) | {
        "torch_dtype": "bfloat16",
        "speech_config": {"torch_dtype": "bfloat16", "rate": 8},
        "vision_config": {"dtype": "bfloat16", "deeper": {"torch_dtype": "bfloat16"}},
        "other_config": {"rate": 8},
    }
    (model / "config.json").write_text(json.dumps(config))
    apply({"model": str(model), "output": {"dtype": "float32"}}, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["dtype"] == "float32"
    assert "torch_dtype" not in found
    assert found["speech_config"] == {"rate": 8, "dtype": "float32"}
    assert found["vision_config"] == {"dtype": "float32", "deeper": {"dtype": "float32"}}
    assert found["other_config"] == {"rate": 8}


@pytest.mark.parametrize(
    ("values", "stored", "dtype", "fault"),
    [
        ([1e5, 1.0], torch.bfloat16, "float16", "1 of 2 values become infinite: the largest is 99840"),
        ([1e39, 1.0], torch.float64, "float32", "1 of 2 values become infinite"),
        ([1e-9, -1e-9], torch.float32, "float16", "all 2 values become zero: the largest is 1e-09"),
    ],
)
def test_casts_that_lose_values_are_refused(values: list, stored: torch.dtype, dtype: str, fault: str, tmp_path: Path):
    save_file({"w": torch.tensor([values], dtype=stored)}, tmp_path / "model.safetensors")
    recipe = {"model": str(tmp_path / "model.safetensors"), "output": {"dtype": dtype}}
    with pytest.raises(DiffractError, match=f"'w', written as {dtype}: {fault}"):
        apply(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_infinities_and_zeros_that_are_there_are_kept(tmp_path: Path) -> None:
    held = torch.tensor([[math.inf, -math.inf, math.nan, 1e-9], [0.0, 0.0, 0.0, 0.0]])
    save_file({"w": held, "zero": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    apply({"model": str(tmp_path / "model.safetensors"), "output": {"dtype": "float16"}}, tmp_path / "out")
    assert_same(read(tmp_path / "out"), {"w": held.half(), "zero": torch.zeros(2, 2).half()})


@pytest.fixture
def three_shards(tmp_path: Path) -> tuple[Path, Path]:
    """A base and a tuned model of three files each."""
    base, tuned = save_pair(tmp_path / "one", "qwen2", torch.bfloat16)
    for name, model in (("base", base), ("tuned", tuned)):
        total = sum(tensor.nbytes for tensor in read(model).values())
        apply({"model": str(model), "output": {"shard_size": total * 2 // 5}}, tmp_path / name)
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) == 3
    return tmp_path / "base", tmp_path / "tuned"


FEW_HEADS = {"heads": ["L0.h0"]}


@pytest.mark.parametrize("shares", [True, False])
def test_what_does_not_change_is_not_written_again(
    shares: bool, three_shards: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file system with reflinks only changed rows are written; without, all is; the tensors are the same."""
    base, tuned = three_shards
    wanted = edited(tmp_path / "plain", tuned, Rewind(to=base, **FEW_HEADS)).manifest
    shared: list[str] = []

    def cloned(file: LocalFile, path: Path) -> bool:  # stands for FICLONE, which few file systems have
        if shares:
            shared.append(path.name)
            file.copied(path)
        return shares

    monkeypatch.setattr(LocalFile, "cloned", cloned)
    found = edited(tmp_path / "out", tuned, Rewind(to=base, **FEW_HEADS)).manifest
    assert_same(read(tmp_path / "out"), read(tmp_path / "plain"))
    assert found["outputs"] == wanted["outputs"]
    assert diffract.verify(tmp_path / "out", replay=True).faults == []
    total = sum(tensor.nbytes for tensor in read(tuned).values())
    before, after = read(tuned), read(tmp_path / "out")
    rows = {n: (before[n] != after[n]).reshape(len(before[n]), -1).any(1) for n in before}
    changed = sum(int(rows[n].sum()) * before[n][0].nbytes for n in before)
    assert found["written_bytes"] == (changed if shares else total)
    assert 0 < changed < total / 4
    assert len(shared) == (4 if shares else 0)  # one to find out, and the three files


def test_linked_files_are_the_very_files_of_the_model(three_shards: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = three_shards
    digests = {file.name: file.read_bytes() for file in tuned.iterdir() if file.is_file()}
    found = edited(tmp_path / "out", tuned, Rewind(to=base, heads=["L0.h0"]), output={"link": True}).manifest
    edited(tmp_path / "plain", tuned, Rewind(to=base, heads=["L0.h0"]))
    assert_same(read(tmp_path / "out"), read(tmp_path / "plain"))
    same = [file.name for file in (tmp_path / "out").glob("*.safetensors") if file.samefile(tuned / file.name)]
    assert 0 < len(same) < 3
    assert {file.name: file.read_bytes() for file in tuned.iterdir() if file.is_file()} == digests
    assert found["written_bytes"] < sum(tensor.nbytes for tensor in read(tuned).values())


def test_an_output_without_room_is_refused_before_it_is_written(
    write_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model("tuned", llama_tensors(0))
    monkeypatch.setattr("diffract.edits.write.free_bytes", lambda folder: 100)
    with pytest.raises(RunError, match=r"are to be written, and 100 B are free"):
        apply({"model": str(model)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes(dtype: str, write_model: Callable[..., Path], tmp_path: Path) -> None:
    """Floating point alone is converted, from what was computed and not from its rounding; configs say so."""
    base, tuned = llama_tensors(0), llama_tensors(1, llama_tensors(0))
    for tensors in (base, tuned):
        tensors["steps"], tensors["mask"] = torch.arange(3), torch.tensor([True, False])
    origin, model = write_model("base", base), write_model("tuned", tuned, torch_dtype="bfloat16")
    edited(tmp_path / "out", model, half(origin), output={"dtype": dtype})
    found, kind = read(tmp_path / "out"), getattr(torch, dtype)
    wanted = {
        n: ((t.double() + base[n].double()) / 2).to(kind) if t.is_floating_point() else t for n, t in tuned.items()
    }
    assert_same(found, wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype
    assert "torch_dtype" not in config
    assert diffract.verify(tmp_path / "out", replay=True).faults == []


def test_a_configuration_for_what_was_in_memory(tmp_path: Path) -> None:
    """A module's config is written; a mapping has none."""
    base, tuned = save_pair(tmp_path, "llama")
    model = tf.AutoModelForCausalLM.from_pretrained(tuned)
    edited(tmp_path / "module", model, half(base))
    assert json.loads((tmp_path / "module" / "config.json").read_text())["model_type"] == "llama"
    edited(tmp_path / "folder", tuned, half(base))
    assert_same(read(tmp_path / "module"), read(tmp_path / "folder"))
    tf.AutoModelForCausalLM.from_pretrained(tmp_path / "module")
    edited(tmp_path / "mapping", read(tuned))
    assert not (tmp_path / "mapping" / "config.json").exists()


def test_a_full_disk_leaves_nothing(family: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = family
    written, real = 0, os.pwrite

    def full_later(file: int, data: bytes, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data, offset)

    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(os, "pwrite", full_later)
    with pytest.raises(RunError, match=r"cannot write to .*: No space left on device\. Make room"):
        edited(tmp_path / "out", tuned, half(base))
    assert written > 20_000
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    monkeypatch.setattr(os, "pwrite", real)
    edited(tmp_path / "out", tuned, half(base))
    assert diffract.verify(tmp_path / "out").faults == []


def test_an_interruption_leaves_nothing(family: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = family

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = sorted(path.name for path in tmp_path.iterdir())
    recipe = {"model": tuned, "steps": [{"interpolate": {"with": base, "at": 0.5}}]}
    with pytest.raises(KeyboardInterrupt):
        apply(recipe, tmp_path / "out", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_killed_process_leaves_nothing_that_loads(family: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = map(str, family)
    out = tmp_path / "made" / "out"
    ended = subprocess.run([sys.executable, "-c", KILLED, tuned, base, str(out)], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (draft,) = out.parent.iterdir()
    assert not out.exists()
    assert draft.name.startswith("out.tmp-")
    assert any(draft.iterdir())
    with pytest.raises(diffract.CheckpointError, match="holds no weights"):
        diffract.open(draft)
    with pytest.raises(ValueError, match="Unrecognized model"):
        tf.AutoModelForCausalLM.from_pretrained(draft)
    edited(out, tuned, half(Path(base)), output={"shard_size": 4000})
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert diffract.verify(out, replay=True).faults == []


def test_what_somebody_else_is_writing_is_left_alone(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as draft:
        with whole_folder(tmp_path / "out") as other:
            assert other != draft
            (other / "manifest.json").write_text("{}")
        assert draft.is_dir()
        (tmp_path / "out" / "manifest.json").unlink()


def test_existing_folders(family: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = family
    edited(tmp_path / "out", tuned)
    with pytest.raises(RunError, match=r"exists\. Choose another name, or pass --force"):
        edited(tmp_path / "out", base)
    with pytest.raises(RunError, match=r"no manifest\.json of diffract.*--force does not replace it"):
        apply({"model": tuned}, base, force=True)
    assert_same(read(tmp_path / "out"), read(tuned))
    apply({"model": base}, tmp_path / "out", force=True)
    assert_same(read(tmp_path / "out"), read(base))


def test_a_model_over_itself(family: tuple[Path, Path], tmp_path: Path) -> None:
    """What is replaced is read until the end."""
    base, tuned = family
    edited(tmp_path / "out", tuned)
    recipe = {"model": tmp_path / "out", "steps": [{"interpolate": {"with": base, "at": 0.5}}]}
    apply(recipe, tmp_path / "out", force=True)
    edited(tmp_path / "fresh", tuned, half(base))
    assert_same(read(tmp_path / "out"), read(tmp_path / "fresh"))


def test_progress_comes_to_the_end(family: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = family
    seen: list[tuple[float, float, str]] = []
    recipe = {"model": tuned, "steps": [{"interpolate": {"with": base, "at": 0.5}}]}
    apply(recipe, tmp_path / "out", progress=lambda *said: seen.append(said))
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for tensor in read(tuned).values())
    assert {what for _, _, what in seen} == set(read(tuned))


def test_the_manifest_tells_the_truth(family: tuple[Path, Path], tmp_path: Path) -> None:
    """Digests of inputs are of what was read: the base in part, the model whole."""
    base, tuned = family
    done = edited(tmp_path / "out", tuned, Rewind(to=base, heads="L1.h2"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {key: manifest[key] for key in done.manifest} == dict(done.manifest)
    with diffract.open(tmp_path / "out") as out, diffract.open(base) as origin, diffract.open(tuned) as model:
        assert manifest["outputs"] == {".": {name: out.digest(name) for name in out}}
        assert manifest["inputs"][str(tuned)] == {name: model.digest(name) for name in model}
        touched = {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qo"}
        assert manifest["inputs"][str(base)] == {name: origin.digest(name) for name in origin if name in touched}
    assert manifest["diffract"] == diffract.__version__
    assert manifest["torch"] == torch.__version__
    assert manifest["steps"][0]["summary"]["names"] == ["L1.h2"]
    assert set(manifest["files"]) == {"config.json", "recipe.yaml", "README.md"}
    verdict = diffract.verify(tmp_path / "out", replay=True)
    assert (verdict.tensors, verdict.inputs, verdict.faults) == (len(read(tuned)), len(read(tuned)) + 2, [])


def spoil_tensor(out: Path, _: Path) -> None:
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 0x10
    path.write_bytes(data)


def spoil_input(_: Path, base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][16, 0] += 1
    save_file(tensors, base / "model.safetensors")


def add_tensor(out: Path, _: Path) -> None:
    tensors = load_file(out / "model.safetensors")
    save_file({**tensors, "more": torch.ones(2)}, out / "model.safetensors")


SPOILED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a flipped bit": (spoil_tensor, "is not what it was"),
    "a changed recipe": (lambda out, _: (out / "recipe.yaml").write_text("model: x"), "file 'recipe.yaml' is not"),
    "a changed input": (spoil_input, "base, tensor 'model.layers.1.self_attn.q_proj.weight' is not what it was"),
    "a missing file": (lambda out, _: (out / "config.json").unlink(), "file 'config.json' is missing"),
    "an extra tensor": (add_tensor, "tensor 'more' is not in the manifest"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_what_was_spoiled_is_found(kind: str, family: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = family
    edited(tmp_path / "out", tuned, Rewind(to=base, heads="L1.h2"))
    spoil, message = SPOILED[kind]
    spoil(tmp_path / "out", base)
    faults = diffract.verify(tmp_path / "out").faults
    assert len(faults) == 1
    assert message in faults[0]


def test_an_input_that_is_gone_cannot_be_checked(family: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = family
    edited(tmp_path / "out", tuned, half(base))
    (base / "model.safetensors").unlink()
    found = diffract.verify(tmp_path / "out")
    assert found.faults == []
    assert "input" in found.unchecked[0]


@pytest.mark.parametrize("part", ["outputs", "files"])
def test_a_manifest_cannot_lead_outside(part: str, family: tuple[Path, Path], tmp_path: Path) -> None:
    out = edited(tmp_path / "out", family[1]).folder
    manifest = json.loads((out / "manifest.json").read_text())
    manifest[part]["../../secret"] = {} if part == "outputs" else "0"
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(diffract.CheckpointError, match="outside of it"):
        diffract.verify(out)


EMPTY = {"kind": "diffract edit", "format": 1, "outputs": {}, "inputs": {}, "files": {}}


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '{"kind": "another"}', json.dumps({**EMPTY, "format": 99})),
        *(json.dumps({**EMPTY, key: value}) for key in ("outputs", "inputs", "files") for value in (3, {"a": 3})),
    ],
)
def test_other_manifests_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DiffractError):
        diffract.verify(tmp_path)


def test_replay_finds_a_lie(family: tuple[Path, Path], tmp_path: Path) -> None:
    """A recipe that says something else than what was done; files and digests are all as they were."""
    base, tuned = family
    edited(tmp_path / "out", tuned, Rewind(to=base, heads="L1.h2"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["recipe"]["steps"][0]["rewind"]["heads"] = "L1.h3"
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert diffract.verify(tmp_path / "out").faults == []
    faults = diffract.verify(tmp_path / "out", replay=True).faults
    assert sorted(faults) == sorted(
        f"tensor 'model.layers.1.self_attn.{part}_proj.weight': the recipe gives another one today" for part in "qo"
    )


STEPS = {
    "rewind": lambda base, other: [Rewind(to=base, fraction=0.5, order="reference", reference=other)],
    "random": lambda base, other: [Rewind(to=base, fraction=0.3, order="random", seed=7, kv="majority")],
    "dare": lambda base, other: [Merge(base=base, models={"x": other}, method="dare-ties", seed=3, weights={"x": 2})],
    "two": lambda base, other: [Truncate(base=base, energy=0.9), Interpolate(other=other, at=0.3)],
    "groups": lambda base, other: [Interpolate(other=other, at=-0.5, groups={"mlp": 1.5}, method="slerp")],
}


@pytest.mark.parametrize("kind", STEPS)
def test_the_recipe_in_an_output_gives_it_again(kind: str, family: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = family
    other = tmp_path / "other"
    edited(other, tuned, Interpolate(other=base, at=-0.7, select="mlp, attn.q"))
    one = edited(tmp_path / "one", tuned, *STEPS[kind](base, other), output={"shard_size": "10KB"})
    two = apply(tmp_path / "one" / "recipe.yaml", tmp_path / "two")
    assert one.manifest == two.manifest
    assert (tmp_path / "one" / "recipe.yaml").read_bytes() == (tmp_path / "two" / "recipe.yaml").read_bytes()
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}


def test_what_was_in_memory_is_named_as_that(tmp_path: Path) -> None:
    """A recipe of mappings and modules cannot be applied again; it says what they were and holds none of them."""
    base, tuned = save_pair(tmp_path, "llama")
    model = tf.AutoModelForCausalLM.from_pretrained(tuned)
    edited(tmp_path / "out", model, Merge(base=read(base), models={"x": read(tuned)}))
    plain = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert plain["model"] == "LlamaForCausalLM"
    assert plain["steps"] == [{"merge": {"models": {"x": "dict"}, "base": "dict"}}]
    verdict = diffract.verify(tmp_path / "out")
    assert verdict.faults == []
    assert len(verdict.unchecked) == 3


def test_what_is_no_number_in_an_account(write_model: Callable[..., Path], tmp_path: Path) -> None:
    """A change that holds NaN in a vector, which no adapter carries: its norm is unknown, and nothing fails."""
    base = llama_tensors(0)
    tuned = llama_tensors(1, base)
    tuned["model.layers.0.input_layernorm.weight"][3] = math.nan
    model, origin = write_model("tuned", tuned), write_model("base", base)
    edited(tmp_path / "lora", model, export={"lora": {"base": origin, "rank": 2}})
    (row,) = (
        row
        for row in json.loads((tmp_path / "lora" / "manifest.json").read_text())["steps"][-1]["rows"]
        if row["name"] == "model.layers.0.input_layernorm.weight"
    )
    assert row["change"] is None


@pytest.mark.parametrize("kind", ["truncate", "laser", "svf", "lora", "pissa"])
def test_a_matrix_that_is_not_finite_is_named(kind: str, write_model: Callable[..., Path], tmp_path: Path) -> None:
    base = llama_tensors(0)
    tuned = llama_tensors(1, base)
    tuned["model.layers.1.mlp.up_proj.weight"][3, 4] = math.inf
    model, origin = write_model("tuned", tuned), write_model("base", base)
    settings = {
        "truncate": {"base": origin, "drop": 0.5},
        "laser": {"keep": 0.5, "select": "mlp"},
        "svf": {"z": 2, "select": "mlp"},
        "lora": {"base": origin},
        "pissa": {"rank": 2},
    }[kind]
    recipe = {"export": {kind: settings}} if kind in ("lora", "pissa") else {"steps": [{kind: settings}]}
    with pytest.raises(diffract.CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight': expected finite"):
        apply({"model": model, **recipe}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_equals_an_input_says_so(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "qwen2", torch.bfloat16)

    def same_as(name: str, at: float) -> list[str]:
        return edited(tmp_path / name, tuned, Interpolate(other=base, at=at)).manifest["same_weights_as"]

    assert [same_as("a", 0.0), same_as("b", 1.0), same_as("c", 0.5)] == [[str(tuned)], [str(base)], []]
    shown = CliRunner().invoke(app, ["interpolate", *map(str, (tuned, base)), "--at", "1", "-o", str(tmp_path / "d")])
    assert shown.stdout.startswith(f"THE SAME WEIGHTS as {base}: every tensor that was written is equal to the bit.\n")
