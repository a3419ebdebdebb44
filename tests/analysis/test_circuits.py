"""Circuits of attention heads in scans and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import diffract
import families
from diffract.analysis.circuits import HeldCircuits, circuit_tasks
from diffract.checkpoints import open_checkpoint
from diffract.errors import ArchitectureError, SelectionError
from diffract.matrices import lay_out
from diffract.metrics import GROUPS
from diffract.metrics.agreement import best_match_chance, cosine_chance
from tiny_llama import llama_tensors

HEADS, KV_HEADS, SIZE = 4, 2, 8


def weights(model: Path, layer: int, projection: str) -> np.ndarray:
    with diffract.open(model) as checkpoint:
        return checkpoint.read(f"model.layers.{layer}.self_attn.{projection}_proj.weight").double().numpy()


def composed(model: Path, layer: int, kind: str, head: int) -> np.ndarray:
    """The d x d product."""
    own, kv = slice(head * SIZE, (head + 1) * SIZE), slice(head // 2 * SIZE, (head // 2 + 1) * SIZE)
    if kind == "qk":
        return weights(model, layer, "q")[own].T @ weights(model, layer, "k")[kv]
    return weights(model, layer, "o")[:, own] @ weights(model, layer, "v")[kv]


def test_spectra_are_those_of_the_products(family: tuple[Path, Path]) -> None:
    base, _ = family
    run = diffract.scan(base, circuits=True, cache=False)
    rows = run.metrics.filter(run.metrics["projection"].is_in(["qk", "ov"]))
    assert len(rows) == 2 * 2 * HEADS
    assert rows["head"].to_list() == [*range(HEADS)] * 4
    assert rows["kv_head"].to_list() == [0, 0, 1, 1] * 4
    assert set(zip(rows["rows"], rows["cols"], strict=True)) == {(32, 32)}
    for row in rows.iter_rows(named=True):
        want = np.linalg.svd(composed(base, row["layer"], row["projection"], row["head"]), compute_uv=False)[:SIZE]
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


def circuits(run: diffract.Run, model: str = "tuned") -> Any:
    rows = run.metrics["projection"].is_in(["qk", "ov"]) & (run.metrics["model"] == model)
    return run.metrics.filter(rows)


def test_numbers_of_a_pair_are_those_of_the_maps_multiplied_out(family: tuple[Path, Path]) -> None:
    metrics = ["change", "agreement", "angles", "profile", "spectral_shape"]
    run = diffract.compare(
        *family, metrics=metrics, select="layers 1, attn", circuits=True, noise="none", nulls="some", cache=False
    )
    rows = circuits(run)
    assert len(rows) == 2 * HEADS
    for row in rows.iter_rows(named=True):
        place = row["layer"], row["projection"], row["head"]
        C0, C1 = (composed(model, *place) for model in family)
        (U0, S0, V0), (U1, S1, V1) = (np.linalg.svd(C) for C in (C0, C1))
        D, h = C1 - C0, SIZE
        left, right = np.abs(U0.T @ U1)[:h, :h], np.abs(V0 @ V1.T)[:h, :h]
        squares, changed = (D**2).sum(), np.linalg.svd(D, compute_uv=False)
        diagonal = np.diag(U0.T @ D @ V0.T)[:h]
        want = {
            "delta_frobenius": np.sqrt(squares),
            "delta_relative": np.sqrt(squares / (C0**2).sum()),
            "delta_spectral": changed[0],
            "delta_stable_rank": squares / changed[0] ** 2,
            "value_share": (diagonal**2).sum() / squares,
            "spectral_shift_share": ((S1 - S0) ** 2).sum() / squares,
            "sigma_change_relative": np.linalg.norm(S1 - S0) / np.linalg.norm(S0),
            "scale_change": (D * C0).sum() / (C0**2).sum(),
            "left_agreement_mean": np.diag(left).mean(),
            "right_best_match_mean": right.max(1).mean(),
            "left_subspace_8": (left**2).sum() / h,
            "intruders": (left.max(0) < 0.5).sum(),
            # chance is that of d = 32 dimensions, with h = 8 vectors to choose among
            "left_agreement_chance": cosine_chance(32),
            "right_best_match_chance": best_match_chance(32, h),
            "left_subspace_8_chance": h / 32,
            "value_share_chance": 1 / 32,
        }
        found = {name: row[name] for name in want}
        assert found == pytest.approx(want, rel=1e-8), row["name"]  # own sigmas by Gram matrices, agreement by LAPACK
    without = [name for name in rows.columns if rows[name].is_null().all()]
    entries = {"delta_changed_share", "delta_rounding_floor", "peak_enrichment", "peak_enrichment_pvalue"}
    of_pairs = {m.name for group in GROUPS.values() for m in group if m.pair}
    assert of_pairs & set(without) == entries | {f"energy_tenth_{k}" for k in range(1, 11)} | BEYOND_RANK


BEYOND_RANK = {f"{side}_{what}_32{end}" for side in ("left", "right") for what in ("subspace", "angle")
               for end in ("", "_chance")}  # fmt: skip
"""A circuit of heads of eight dimensions has no 32 directions."""


def test_circuits_are_no_part_of_what_a_model_as_a_whole_changed(family: tuple[Path, Path]) -> None:
    run, without = (diffract.compare(*family, circuits=asked, noise="some") for asked in (True, False))
    same = [name for name in run.models.columns if name != "matrices"]
    assert run.models.select(same).equals(without.models.select(same))
    assert run.heads.equals(without.heads)
    noise = [name for name in run.metrics.columns if name.endswith("_noise")]
    assert circuits(run).select(noise).null_count().row(0) == (16,) * len(noise)


ONE = {"num_hidden_layers": 1}


def test_noise_in_the_factors_has_the_chance_level_in_singular_values(write_model: Callable[..., Path]) -> None:
    heads, h, d = 32, 8, 64
    generator = np.random.default_rng(0)

    def block() -> dict[str, torch.Tensor]:
        return {
            f"model.layers.0.self_attn.{p}_proj.weight": torch.from_numpy(
                generator.standard_normal((d, heads * h) if p == "o" else (heads * h, d))
            )
            for p in "qkvo"
        }

    base, noise = block(), block()
    tuned = {name: value + 1e-4 * noise[name] for name, value in base.items()}
    config = {"num_attention_heads": heads, "num_key_value_heads": heads, "hidden_size": d, "head_dim": h} | ONE
    models = (write_model(name, tensors, **config) for name, tensors in (("base", base), ("tuned", tuned)))
    run = diffract.compare(*models, circuits=True, metrics="change")
    share = circuits(run)["value_share"].mean()
    assert share == pytest.approx(1 / d, rel=0.2)  # one circuit scatters by 0.48 of it, 64 by 0.06


NORMED = ("qwen3", "qwen3_moe", "olmo2", "olmo3", "olmoe", "gemma3", "persimmon")


def persimmon() -> Any:
    torch.manual_seed(0)
    config = transformers.PersimmonConfig(**families.SMALL, **families.NO_TOKENS)
    return transformers.PersimmonForCausalLM(config).double().eval()


@pytest.mark.parametrize("family_name", NORMED)
def test_factors_are_proportional_to_what_the_live_model_scores(family_name: str, tmp_path: Path) -> None:
    model = families.build(family_name) if family_name in families.FAMILIES else persimmon()
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if "q_norm" in name or "k_norm" in name or "q_layernorm.w" in name or "k_layernorm.w" in name:
            value.data = torch.rand(value.shape, generator=generator, dtype=value.dtype) + 0.5
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    model.save_pretrained(tmp_path)
    layout = lay_out(open_checkpoint(tmp_path))
    (task,) = [t for t in circuit_tasks([layout]) if t.circuits[0].projection == "qk" and t.circuits[0].layer == 0]
    factors = HeldCircuits(layout.checkpoint, task, None).factors(torch.device("cpu"))
    size = factors.left.shape[1]
    x = torch.randn(1, 1, factors.left.shape[2], generator=generator, dtype=torch.float64)
    if family_name == "persimmon":
        fused = attention._split_heads(attention.query_key_value(x))[:2]
        live = [getattr(attention, f"{p}_layernorm")(one)[0, 0] for p, one in zip("qk", fused, strict=True)]
    else:
        live = []
        for p in "qk":
            projected, norm = getattr(attention, f"{p}_proj")(x), getattr(attention, f"{p}_norm")
            per_head = norm.weight.shape[0] == size
            live.append((norm(projected.view(-1, size)) if per_head else norm(projected)[0]).view(-1, size))
    for own, of_model in zip((factors.left, factors.right), live, strict=True):
        cosines = torch.cosine_similarity(own @ x[0, 0], of_model.detach())
        np.testing.assert_allclose(cosines, 1.0, atol=1e-12)


NORM = {"model_type": "qwen3"} | ONE


def test_what_norms_take_out_does_not_show(
    normed_tensors: dict[str, torch.Tensor], write_model: Callable[..., Path]
) -> None:
    """Queries twice as large, or with half the gain, are scored alike where a norm follows them."""
    tuned = {name: value * (2.0 if "q_proj" in name else 0.5 if "k_norm" in name else 1.0)
             for name, value in normed_tensors.items()}  # fmt: skip
    models = (write_model(name, own, **NORM) for name, own in (("base", normed_tensors), ("tuned", tuned)))
    run = diffract.compare(*models, circuits=True, cache=False)
    rows = circuits(run).filter(projection="qk")
    assert rows["delta_relative"].to_list() == [0.0] * 4
    for name in ("frobenius_norm", "spectral_norm", "nuclear_norm", "delta_frobenius", "delta_spectral"):
        assert rows[name].is_null().all(), name
    assert rows["stable_rank"].is_not_null().all()
    assert circuits(run).filter(projection="ov")["frobenius_norm"].is_not_null().all()


@pytest.fixture
def normed_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
    shapes |= {"q_norm": (8,), "k_norm": (8,)}
    return {
        f"model.layers.0.self_attn.{name}.weight": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def test_gains_that_nothing_describes_are_left_out_and_said(
    normed_tensors: dict[str, torch.Tensor], write_model: Callable[..., Path]
) -> None:
    model = write_model("model", normed_tensors, **ONE)
    run = diffract.scan(model, circuits=True, cache=False)
    assert any("circuits are without their gains" in warning for warning in run.manifest["warnings"])
    assert circuits(run, "model").filter(projection="qk")["frobenius_norm"].is_null().all()


def test_gains_of_another_length_are_refused(
    normed_tensors: dict[str, torch.Tensor], write_model: Callable[..., Path]
) -> None:
    normed_tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(7)
    with pytest.raises(ArchitectureError, match=r"q_norm.weight.* expected 8"):
        diffract.scan(write_model("model", normed_tensors, **NORM), circuits=True, cache=False)
