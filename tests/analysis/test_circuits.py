"""Circuits of attention heads in scans and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import diffract
from diffract.errors import SelectionError
from diffract.metrics import GROUPS
from tiny_llama import llama_tensors

HEADS, KV_HEADS, SIZE = 4, 2, 8


def weights(model: Path, layer: int, projection: str) -> np.ndarray:
    with diffract.open(model) as checkpoint:
        return checkpoint.read(f"model.layers.{layer}.self_attn.{projection}_proj.weight").double().numpy()


def multiplied_out(model: Path, layer: int, kind: str, head: int) -> np.ndarray:
    """The d x d product, its largest singular values."""
    own, kv = slice(head * SIZE, (head + 1) * SIZE), slice(head // 2 * SIZE, (head // 2 + 1) * SIZE)
    if kind == "qk":
        product = weights(model, layer, "q")[own].T @ weights(model, layer, "k")[kv]
    else:
        product = weights(model, layer, "o")[:, own] @ weights(model, layer, "v")[kv]
    return np.linalg.svd(product, compute_uv=False)[:SIZE]


def test_spectra_are_those_of_the_products(family: tuple[Path, Path]) -> None:
    base, _ = family
    run = diffract.scan(base, circuits=True, cache=False)
    rows = run.metrics.filter(run.metrics["projection"].is_in(["qk", "ov"]))
    assert len(rows) == 2 * 2 * HEADS
    assert rows["head"].to_list() == [*range(HEADS)] * 4
    assert rows["kv_head"].to_list() == [0, 0, 1, 1] * 4
    assert set(zip(rows["rows"], rows["cols"], strict=True)) == {(32, 32)}
    for row in rows.iter_rows(named=True):
        want = multiplied_out(base, row["layer"], row["projection"], row["head"])
        values = run.spectra.filter(name=row["name"], quantity="sigma")["values"][0].to_numpy()
        # Cholesky factors of Gram matrices whose condition is below 100: eps times its square, and room
        assert np.abs(values - want).max() <= 1e-10 * want[0]
        assert row["spectral_norm"] == pytest.approx(want[0], rel=1e-10)
        assert row["frobenius_norm"] == pytest.approx(np.linalg.norm(want), rel=1e-10)
        assert row["entry_std"] is None
        assert row["status"] == "ok"


def test_rotations_within_a_head_do_not_change_circuits(write_model: Callable[..., Path]) -> None:
    tensors = {name: value.double().float() for name, value in llama_tensors(0).items()}
    turn = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1)).double()).Q
    turned = dict(tensors)
    for layer in range(2):
        for p, count in (("q", HEADS), ("k", KV_HEADS)):
            name = f"model.layers.{layer}.self_attn.{p}_proj.weight"
            turned[name] = (torch.block_diag(*[turn] * count) @ tensors[name].double()).float()
    one, other = (
        diffract.scan(write_model(name, found), circuits=True, select="attn", cache=False).metrics
        for name, found in (("plain", tensors), ("turned", turned))
    )
    rows = one["projection"] == "qk"
    # float32 rounds the turned weights to 6e-8
    np.testing.assert_allclose(other.filter(rows)["nuclear_norm"], one.filter(rows)["nuclear_norm"], rtol=1e-6)


def test_a_comparison_has_those_of_every_model_and_its_own_numbers_are_the_same(family: tuple[Path, Path]) -> None:
    base, tuned = family
    run = diffract.compare(base, tuned, circuits=True)
    without = diffract.compare(base, tuned)
    circuits = run.metrics["projection"].is_in(["qk", "ov"])
    assert run.metrics.filter(~circuits).equals(without.metrics)
    assert run.metrics.filter(circuits).group_by("model").len()["len"].to_list() == [16, 16]
    alone = diffract.scan(tuned, circuits=True)
    same = ["name", "spectral_norm", "nuclear_norm", "effective_rank"]
    assert (
        run.metrics.filter(circuits, model="tuned")
        .select(same)
        .equals(alone.metrics.filter(alone.metrics["projection"].is_in(["qk", "ov"])).select(same))
    )


def test_metrics_that_mean_nothing_of_a_product_are_null(family: tuple[Path, Path]) -> None:
    meant = ["nuclear_norm", "effective_rank", "pl_alpha", "peak_count"]
    metrics = ["shape", "random_matrix", *meant]
    run = diffract.scan(family[0], metrics=metrics, circuits=True, select="layers 0, attn", cache=False)
    rows = run.metrics.filter(run.metrics["projection"].is_in(["qk", "ov"]))
    for group in ("shape", "random_matrix"):
        for m in GROUPS[group]:
            assert rows[m.name].is_null().all(), m.name
    for name in meant:
        assert rows[name].is_not_null().all(), name


def test_circuits_need_heads(family: tuple[Path, Path]) -> None:
    with pytest.raises(SelectionError, match="circuits need attention blocks"):
        diffract.scan(family[0], circuits=True, heads=False)
    with pytest.raises(SelectionError, match="circuits need attention blocks"):
        diffract.scan(family[0], circuits=True, select="mlp")


def test_a_head_with_nan_has_no_circuit(write_model: Callable[..., Path]) -> None:
    tensors = llama_tensors(0)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = torch.nan
    run = diffract.scan(write_model("hole", tensors), circuits=True, cache=False)
    rows = run.metrics.filter(projection="qk", layer=0)
    assert rows["status"].to_list() == ["non_finite", "ok", "ok", "ok"]
    assert rows["spectral_norm"].is_null().to_list() == [True, False, False, False]


def test_model_level_means_leave_circuits_out(family: tuple[Path, Path]) -> None:
    run = diffract.scan(family[0], metrics="pl_alpha", circuits=True, cache=False)
    matrices = run.metrics.filter(~run.metrics["projection"].is_in(["qk", "ov"]))
    assert run.models["pl_alpha_count"][0] == matrices["pl_alpha"].count() < run.metrics["pl_alpha"].count()
    assert run.models["pl_alpha_mean"][0] == pytest.approx(matrices["pl_alpha"].mean(), rel=1e-12)
    assert "alpha_hat_mean" not in run.models.columns
