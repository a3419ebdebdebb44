"""Scans and comparisons of whole checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors.torch import save_file

import diffract
from diffract import tables
from diffract.analysis import work
from tiny_llama import llama_tensors

Q = "model.layers.0.self_attn.q_proj.weight"


def test_one_array_is_one_row() -> None:
    w = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    run = diffract.scan({"w": w})
    sigmas = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    assert run.metrics.height == 1
    row = run.metrics.row(0, named=True)
    # float64 Gram matrices: eps sigma_1^2 / sigma, far below
    assert row["nuclear_norm"] == pytest.approx(sigmas.sum(), rel=1e-12)
    assert row["stable_rank"] == pytest.approx((sigmas**2).sum() / sigmas[0] ** 2, rel=1e-12)
    assert (row["status"], row["method"], row["rows"], row["cols"]) == ("ok", "gram", 6, 9)
    np.testing.assert_allclose(run.spectra["values"][0].to_numpy(), sigmas, rtol=1e-12)


def test_of_many_tensors_each_keeps_its_own_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves are laid out some tensors at a time; rows stay in file order, the quantities of a tensor together."""
    monkeypatch.setattr("diffract.analysis.tables.TOGETHER", 3)
    noise = np.random.default_rng(0)
    arrays = {f"w{i}": noise.standard_normal((3 + i % 4, 7)) for i in range(8)}
    run = diffract.scan(arrays)
    assert run.metrics["name"].to_list() == list(arrays)
    assert run.spectra["name"].unique(maintain_order=True).to_list() == list(arrays)
    for name, w in arrays.items():
        found = run.spectra.filter(name=name, quantity="sigma")["values"][0].to_numpy()
        # of float64 Gram matrices of well-conditioned ones, a factor of the condition number above their precision
        np.testing.assert_allclose(found, np.linalg.svd(w, compute_uv=False), rtol=1e-11)


def test_every_head_has_its_own_numbers(family: tuple[Path, Path]) -> None:
    base, tuned = family
    run = diffract.compare(base, tuned)
    heads = run.metrics.filter(model="tuned", projection="q", layer=1).sort("head")
    assert heads["head"].to_list() == [0, 1, 2, 3]
    assert heads["kv_head"].to_list() == [0, 0, 1, 1]
    with diffract.open(base) as one, diffract.open(tuned) as other:
        name = "model.layers.1.self_attn.q_proj.weight"
        before, after = one[name].double().numpy(), other[name].double().numpy()
    for head, row in enumerate(heads.iter_rows(named=True)):
        rows = slice(8 * head, 8 * head + 8)
        d = after[rows] - before[rows]
        u0, s0, v0 = np.linalg.svd(before[rows], full_matrices=False)
        u1, s1, _ = np.linalg.svd(after[rows], full_matrices=False)
        squares = (d**2).sum()
        # all of these are quotients of float64 sums whose terms are known to about 1e-13
        assert row["delta_relative"] == pytest.approx(np.sqrt(squares / (before[rows] ** 2).sum()), rel=1e-10)
        assert row["value_share"] == pytest.approx((np.diag(u0.T @ d @ v0.T) ** 2).sum() / squares, rel=1e-8)
        assert row["spectral_shift_share"] == pytest.approx(((s1 - s0) ** 2).sum() / squares, rel=1e-8)
        assert row["left_agreement_mean"] == pytest.approx(np.abs(np.diag(u0.T @ u1)).mean(), rel=1e-8)
        assert row["delta_changed_share"] == pytest.approx((d != 0).mean())


def test_no_heads_takes_whole_matrices(family: tuple[Path, Path]) -> None:
    run = diffract.scan(family[0], heads=False, select="attn.q, attn.k")
    assert run.metrics["name"].to_list() == ["L0.attn.k", "L0.attn.q", "L1.attn.k", "L1.attn.q"]


def test_selection_reads_nothing_else(family: tuple[Path, Path]) -> None:
    run = diffract.scan(family[0], select="layers 1, attn.o")
    assert run.metrics["name"].to_list() == [f"L1.attn.o.h{i}" for i in range(4)]
    assert run.models["digest"][0] is None
    with pytest.raises(diffract.SelectionError, match=r"attn\.q"):
        diffract.scan(family[0], select="attn.qq")


def test_identical_checkpoints_have_no_change(family: tuple[Path, Path]) -> None:
    run = diffract.compare(family[0], family[0])
    rows = run.metrics.filter(model=run.models["model"][1])
    assert set(rows["delta_frobenius"]) == {0.0}
    assert rows["value_share"].null_count() == rows.height
    assert run.models["head_top10_share"].null_count() == 2


def test_bad_matrices_get_a_status(write_model) -> None:
    tensors = llama_tensors(0)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    tensors["extra"] = torch.ones(1, 7)
    tensors["steps"] = torch.ones(3, 3, dtype=torch.int64)
    base = write_model("base", tensors)
    run = diffract.compare(base, write_model("tuned", llama_tensors(1, tensors) | {"extra": torch.ones(1, 7)}),
                           allow_unmatched=True)  # fmt: skip
    rows = {(r["model"], r["name"]): r for r in run.metrics.iter_rows(named=True)}
    assert rows["base", "L0.mlp.up"]["status"] == "non_finite"
    assert rows["base", "L0.mlp.up"]["frobenius_norm"] is None
    assert rows["tuned", "L0.mlp.up"]["delta_frobenius"] is None
    zero = rows["base", "L1.mlp.up"]
    assert (zero["status"], zero["frobenius_norm"], zero["stable_rank"]) == ("zero", 0.0, None)
    assert rows["tuned", "L1.mlp.up"]["left_agreement_mean"] is None
    assert rows["base", "extra"]["effective_rank"] == pytest.approx(1.0)
    outcomes = {r["tensor"]: r["outcome"] for r in run.tensors.filter(model="base").iter_rows(named=True)}
    assert outcomes["steps"] == "not_float"
    assert outcomes["model.layers.0.input_layernorm.weight"] == "vector"
    assert any("NaN or Inf" in w for w in run.manifest["warnings"])


def test_pairing_says_what_became_of_every_tensor(write_model) -> None:
    tensors = llama_tensors(0)
    other = llama_tensors(1, tensors)
    other["model.embed_tokens.weight"] = torch.randn(60, 32).bfloat16()
    other[Q] = other[Q].float()
    del other["lm_head.weight"]
    run = diffract.compare(write_model("base", tensors), write_model("tuned", other))
    outcomes = {(r["model"], r["tensor"]): r["outcome"] for r in run.tensors.iter_rows(named=True)}
    assert outcomes["tuned", "model.embed_tokens.weight"] == outcomes["base", "model.embed_tokens.weight"] == "analysed"
    assert outcomes["base", "lm_head.weight"] == "unmatched"
    assert outcomes["tuned", Q] == "retyped"
    rows = {(r["model"], r["name"]): r for r in run.metrics.iter_rows(named=True)}
    assert rows["base", "unembed"]["status"] == "unpaired"
    assert rows["tuned", "embed"]["delta_frobenius"] > 0
    assert rows["tuned", "L0.attn.q.h0"]["delta_frobenius"] > 0


def test_more_than_embeddings_unmatched_is_refused(write_model) -> None:
    tensors = llama_tensors(0)
    fewer = {k: v for k, v in llama_tensors(1, tensors).items() if k != Q}
    base, tuned = write_model("base", tensors), write_model("tuned", fewer)
    with pytest.raises(diffract.CheckpointError, match="--allow-unmatched"):
        diffract.compare(base, tuned)
    run = diffract.compare(base, tuned, allow_unmatched=True)
    assert run.tensors.filter(tensor=Q)["outcome"].to_list() == ["unmatched"]


def test_different_widths_are_refused(write_model) -> None:
    base = write_model("base", llama_tensors(0))
    wider = {k: torch.randn(*(2 * s for s in v.shape)).bfloat16() for k, v in llama_tensors(0).items()}
    other = write_model("wide", wider, hidden_size=64, intermediate_size=96)
    with pytest.raises(diffract.CheckpointError, match="share no tensor of one name and shape"):
        diffract.compare(base, other, allow_unmatched=True)


def test_declared_ties_are_checked(write_model) -> None:
    tensors = llama_tensors(0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    run = diffract.scan(write_model("tied", tensors, tie_word_embeddings=True))
    assert run.tensors.filter(tensor="lm_head.weight")["outcome"].to_list() == ["tied"]
    assert "unembed" not in run.metrics["name"].to_list()
    run = diffract.scan(write_model("lying", llama_tensors(0), tie_word_embeddings=True))
    assert "unembed" in run.metrics["name"].to_list()
    assert any("the stored values differ" in w for w in run.manifest["warnings"])


def test_several_descendants_have_names(family: tuple[Path, Path]) -> None:
    base, tuned = family
    run = diffract.compare(base, f"math={tuned}", str(tuned))
    assert run.models["model"].to_list() == ["base", "math", "tuned"]
    math, other = (run.metrics.filter(model=m).drop("model") for m in ("math", "tuned"))
    assert_frame_equal(math, other)
    with pytest.raises(diffract.SelectionError, match="two checkpoints are called"):
        diffract.compare(base, f"math={tuned}", f"math={tuned}")


def test_an_adapter_is_its_product(family: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = family
    folder = tmp_path / "adapter"
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    A, B = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    run = diffract.compare(base, folder)
    rows = run.metrics.filter(model="adapter", projection="q", layer=0).sort("head")
    delta = (0.5 * B.double() @ A.double()).numpy()
    for head, row in enumerate(rows.iter_rows(named=True)):
        sigmas = np.linalg.svd(delta[8 * head : 8 * head + 8], compute_uv=False)
        assert row["delta_spectral"] == pytest.approx(sigmas[0], rel=1e-10)
        assert row["delta_frobenius"] == pytest.approx(np.sqrt((sigmas**2).sum()), rel=1e-10)
    curve = run.spectra.filter(model="adapter", name="L0.attn.q.h0", quantity="delta_sigma")["values"][0]
    assert len(curve) == 2  # of the factors, not of their rounded sum
    assert set(run.metrics.filter(model="adapter", projection="k")["delta_frobenius"]) == {0.0}


def test_vectors_are_saved_and_reconstruct(family: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = family
    run = diffract.scan(base, select="layers 0, attn.q", vectors=True, output=tmp_path / "run")
    loaded = diffract.load_run(tmp_path / "run")
    with diffract.open(base) as checkpoint:
        w = checkpoint.read(Q, (8, 16)).double()
    U, Vh = (loaded.vectors[f"base/L0.attn.q.h1.{side}"].double() for side in ("U", "Vh"))
    S = torch.tensor(loaded.spectra.filter(name="L0.attn.q.h1", quantity="sigma")["values"][0].to_list())
    # vectors are kept in float32
    torch.testing.assert_close(U * S @ Vh, w, rtol=0, atol=1e-5)
    assert_frame_equal(run.metrics, loaded.metrics)


@pytest.mark.parametrize("device", ["tpu", "cuda:0"])
def test_an_absent_device_is_refused(device: str) -> None:
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(diffract.SelectionError, match="device"):
        diffract.scan({"w": np.eye(3)}, device=device)


# The plan


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("this was not needed")


def test_frobenius_norm_alone_runs_no_solver(family: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("eigh", "eigvalsh", "svd", "svdvals", "qr"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    run = diffract.scan(family[0], metrics=["frobenius_norm"], cache=False)
    assert run.metrics["frobenius_norm"].null_count() == 0
    assert run.spectra.height == 0
    run = diffract.compare(*family, metrics=["delta_relative", "delta_changed_share"], cache=False)
    assert run.metrics.filter(model="tuned")["delta_relative"].null_count() == 0


def test_the_rounding_floor_is_that_of_the_coarser_dtype(write_model: Callable[..., Path]) -> None:
    """A bf16 copy of a model differs from it by the rounding, whichever of both is the base."""
    generator = torch.Generator().manual_seed(0)
    fine = {name: torch.randn(value.shape, generator=generator) for name, value in llama_tensors(0).items()}
    models = [write_model("fine", fine), write_model("coarse", {name: t.bfloat16() for name, t in fine.items()})]
    for pair in (models, models[::-1]):
        rows = diffract.compare(*pair, metrics="change", cache=False).metrics.filter(model=pair[1].name)
        ratio = (rows["delta_frobenius"] / rows["delta_rounding_floor"]).drop_nulls()
        assert ratio.len() == len(rows)
        assert ratio.is_between(0.75, 1.25).all()  # roots of sums of 256 and more squares


@pytest.mark.parametrize("metrics", ["change", "delta_relative,delta_frobenius", "agreement,delta_relative"])
def test_the_change_of_a_model_comes_with_that_of_its_matrices(family: tuple[Path, Path], metrics: str) -> None:
    expected = diffract.compare(*family, cache=False).models["delta_relative"][1]
    run = diffract.compare(*family, metrics=metrics, cache=False)
    assert run.models["delta_relative"][1] == pytest.approx(expected, rel=1e-12)
    assert run.heads.height == (0 if "agreement" in metrics else 8)  # heads are summed from delta_frobenius
    assert run.heads["head_delta_relative"].null_count() == 0


def test_values_need_no_vectors(family: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("eigh", "svd"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    diffract.scan(family[0], cache=False)
    diffract.compare(*family, metrics=["delta_stable_rank", "spectral_shift_share"], cache=False)


# Cache and resume


def numbers(run: diffract.Run) -> list[pl.DataFrame]:
    return [run.metrics, run.spectra, run.models, run.tensors]


def same(one: diffract.Run, other: diffract.Run) -> None:
    """To the last bit."""
    for a, b in zip(numbers(one), numbers(other), strict=True):
        assert_frame_equal(a, b, check_exact=True)


def test_what_is_known_is_not_computed_again(family: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = diffract.compare(*family)
    monkeypatch.setattr(work, "pair_facts", refuse)
    same(first, diffract.compare(*family))
    with pytest.raises(AssertionError, match="not needed"):
        diffract.compare(*family, metrics=["delta_frobenius"])
    with pytest.raises(AssertionError, match="not needed"):
        diffract.compare(*family, method="exact")
    with pytest.raises(AssertionError, match="not needed"):
        diffract.compare(*family, cache=False)


def test_changed_weights_never_meet_old_results(family: tuple[Path, Path]) -> None:
    base, _ = family
    before = diffract.scan(base)
    tensors = llama_tensors(0)
    tensors[Q][0, 0] += 1
    save_file(tensors, base / "model.safetensors")
    after = diffract.scan(base)
    same(after, diffract.scan(base, cache=False))
    assert before.metrics["frobenius_norm"].to_list() != after.metrics["frobenius_norm"].to_list()


DRIVER = """
    import sys, time
    import diffract
    from diffract.analysis import work
    slow = work.pair_facts
    def slowly(*args, **kwargs):
        time.sleep(0.15)
        return slow(*args, **kwargs)
    work.pair_facts = slowly
    print("ready", flush=True)
    diffract.compare(sys.argv[1], sys.argv[2])
"""


def test_a_killed_run_continues_to_the_same_result(family: tuple[Path, Path], own_cache: Path) -> None:
    undisturbed = diffract.compare(*family, cache=False)
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), *map(str, family)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if stored(own_cache) >= 4:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    done = stored(own_cache)
    assert 4 <= done < 64  # 16 tensors, a base, a pair, its correlation and its noise each: killed in the middle
    same(undisturbed, diffract.compare(*family))
    assert stored(own_cache) == 64


def stored(cache: Path) -> int:
    return sum(not path.suffix for path in cache.glob("results/*/*"))


def test_two_runs_at_once_share_a_cache(family: tuple[Path, Path]) -> None:
    code = "import diffract,sys; print(diffract.compare(*sys.argv[1:]).metrics['delta_frobenius'].sum())"
    command = [sys.executable, "-c", code, *map(str, family)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
    answers = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert answers[0] == answers[1] != ""


# Run folders


def test_a_run_folder_comes_back_whole(family: tuple[Path, Path], tmp_path: Path) -> None:
    run = diffract.compare(*family)
    folder = run.save(tmp_path / "run")
    assert sorted(p.name for p in folder.iterdir()) == [
        *(
            "configuration.parquet",
            "heads.parquet",
            "manifest.json",
            "metrics.parquet",
            "models.parquet",
            "report.html",
            "spectra.parquet",
            "tensors.parquet",
            "tokens.parquet",
            "vectors.parquet",
        )
    ]
    same(run, diffract.load_run(folder))
    with pytest.raises(diffract.RunError, match="--force"):
        run.save(folder)
    run.save(folder, force=True)
    stranger = tmp_path / "photos"
    stranger.mkdir()
    (stranger / "cat.png").write_bytes(b"x")
    with pytest.raises(diffract.RunError, match=r"no manifest\.json of diffract"):
        run.save(stranger, force=True)
    assert (stranger / "cat.png").is_file()


def test_a_full_disk_leaves_the_old_run(family: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    run = diffract.scan(family[0])
    folder = run.save(tmp_path / "run")
    before = (folder / "manifest.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables, "write", full)
    with pytest.raises(diffract.RunError, match="No space left"):
        run.save(folder, force=True)
    with pytest.raises(diffract.RunError, match="No space left"):
        run.save(tmp_path / "other")
    assert [p.name for p in tmp_path.glob("*run*")] == ["run"]
    assert not (tmp_path / "other").exists()
    assert (folder / "manifest.json").read_bytes() == before


def test_a_damaged_run_is_named(family: tuple[Path, Path], tmp_path: Path) -> None:
    folder = diffract.scan(family[0]).save(tmp_path / "run")
    (folder / "metrics.parquet").write_bytes(b"PAR1")
    with pytest.raises(diffract.RunError, match="damaged"):
        diffract.load_run(folder)
    (folder / "metrics.parquet").unlink()
    with pytest.raises(diffract.RunError, match=r"metrics\.parquet"):
        diffract.load_run(folder)


def test_a_tuned_checkpoint_without_config_is_read_as_the_base(family: tuple[Path, Path]) -> None:
    base, tuned = family
    want = diffract.compare(base, tuned, cache=False).metrics
    (tuned / "config.json").unlink()
    found = diffract.compare(base, tuned, cache=False)
    assert found.metrics.equals(want)
    assert any("read as the base is" in text for text in found.manifest["warnings"])
    assert found.metrics.filter(model="tuned", projection="q")["head"].to_list() == [0, 1, 2, 3] * 2


def test_singular_vectors_are_the_same_bytes_each_time(family: tuple[Path, Path], tmp_path: Path) -> None:
    """Threads finish in another order each time; what is written keeps that of the matrices."""
    written = set()
    for number in range(4):
        diffract.scan(family[0], vectors=True, output=tmp_path / str(number))
        (file,) = (tmp_path / str(number) / "vectors").rglob("*.safetensors")
        written.add(file.read_bytes())
    assert len(written) == 1
