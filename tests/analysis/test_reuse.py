"""What the cache may hand out, and adapters against their merged weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors.torch import save_file

import diffract
from diffract.analysis import work
from diffract.errors import DiffractWarning
from diffract.metrics import CATALOG
from tiny_llama import llama_tensors


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of matrices in each call that computes something."""
    calls: list[int] = []
    real = work.single_facts

    def counted(stack, *rest):
        calls.append(stack.count)
        return real(stack, *rest)

    monkeypatch.setattr(work, "single_facts", counted)
    return calls


def test_a_second_scan_computes_nothing(family: tuple[Path, Path], computed: list[int]) -> None:
    first = diffract.scan(family[0])
    assert sum(computed) == first.metrics.height
    computed.clear()
    again = diffract.scan(family[0])
    assert computed == []
    for name in ("metrics", "spectra", "models", "tensors"):
        assert_frame_equal(getattr(first, name), getattr(again, name), check_exact=True)


def test_only_a_changed_tensor_is_computed_again(family: tuple[Path, Path], computed: list[int]) -> None:
    diffract.scan(family[0])
    computed.clear()
    tensors = llama_tensors(0)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, family[0] / "model.safetensors")
    diffract.scan(family[0])
    assert computed == [1]


def test_a_new_version_of_a_metric_is_computed(
    family: tuple[Path, Path], computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    diffract.scan(family[0], metrics=["stable_rank"])
    computed.clear()
    diffract.scan(family[0], metrics=["stable_rank"])
    assert computed == []
    newer = dataclasses.replace(CATALOG["stable_rank"], version=99, function=lambda squares, top: squares * 0 + 7)
    monkeypatch.setitem(CATALOG, "stable_rank", newer)
    run = diffract.scan(family[0], metrics=["stable_rank"])
    assert sum(computed) == run.metrics.height
    assert set(run.metrics["stable_rank"]) == {7.0}


def test_other_slices_of_a_tensor_are_other_results(family: tuple[Path, Path], computed: list[int]) -> None:
    whole = diffract.scan(family[0])
    computed.clear()
    part = diffract.scan(family[0], select="attn.q, heads 1 2")
    assert sum(computed) == 2 * 2
    expected = whole.metrics.filter(projection="q").filter(whole.metrics.filter(projection="q")["head"].is_in([1, 2]))
    assert_frame_equal(part.metrics, expected, rel_tol=1e-12)  # stacks of another size may round otherwise
    uncut = diffract.scan(family[0], heads=False, select="attn.q")
    assert uncut.metrics["rows"].to_list() == [32, 32]


def test_no_cache_writes_nothing(family: tuple[Path, Path], own_cache: Path) -> None:
    diffract.scan(family[0], cache=False)
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_a_damaged_result_is_computed_again(family: tuple[Path, Path], own_cache: Path, keep: int) -> None:
    first = diffract.scan(family[0])
    for path in own_cache.glob("results/*/*"):
        path.write_bytes(path.read_bytes()[:keep])
    assert_frame_equal(first.metrics, diffract.scan(family[0]).metrics, check_exact=True)


def test_without_a_cache_that_can_be_made_work_goes_on(
    family: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DIFFRACT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(DiffractWarning, match="--no-cache") as told:
        found = diffract.scan(family[0])
    assert len(told) == 1
    assert_frame_equal(found.metrics, diffract.scan(family[0], cache=False).metrics)


def test_an_adapter_equals_its_merged_weights(write_model, tmp_path: Path) -> None:
    tensors = {name: value.float() for name, value in llama_tensors(0).items()}
    base = write_model("base", tensors)
    generator = torch.Generator().manual_seed(3)
    folder, saved, merged = tmp_path / "lora", {}, dict(tensors)
    folder.mkdir()
    for layer in range(2):
        for p, rows in (("q", 32), ("v", 16), ("o", 32)):
            module = f"model.layers.{layer}.self_attn.{p}_proj"
            A, B = torch.randn(4, 32, generator=generator), torch.randn(rows, 4, generator=generator)
            saved |= {f"base_model.model.{module}.lora_{s}.weight": t for s, t in (("A", A), ("B", B))}
            merged[f"{module}.weight"] = (tensors[f"{module}.weight"].double() + 2 * B.double() @ A.double()).float()
    save_file(saved, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    run = diffract.compare(base, f"a={folder}", f"b={write_model('merged', merged)}")
    one, other = (run.metrics.filter(model=m) for m in ("a", "b"))
    assert one["name"].to_list() == other["name"].to_list()
    # merged weights are rounded to float32: relative 6e-8 of the weights, which are no larger than the change
    for name in ("frobenius_norm", "stable_rank", "delta_frobenius", "delta_spectral", "delta_stable_rank",
                 "value_share", "spectral_shift_share"):  # fmt: skip
        a, b = (t[name].cast(float).fill_null(-1).to_numpy() for t in (one, other))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9, err_msg=name)
    assert (one.filter(projection="q")["delta_frobenius"] > 1).all()
