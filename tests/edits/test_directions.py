"""Truncation, LASER and SVF of whole models, against NumPy's LAPACK on each matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffract.edits import Laser, Svf, Truncate
from diffract.errors import RecipeError, SelectionError
from edit_cases import Tensors, assert_bits, edit, edited, read, save_pair

Cut = Callable[[np.ndarray], np.ndarray]
PREFIX = "model.layers.1."
QUERY, KEY, OUT, UP = (
    f"{PREFIX}{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")
)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def kept(x: np.ndarray, keep: slice | np.ndarray) -> np.ndarray:
    U, S, Vh = np.linalg.svd(x, full_matrices=False)
    return (U[:, keep] * S[keep]) @ Vh[keep]


def near(found: torch.Tensor, wanted: np.ndarray) -> None:
    """Equal but for the rounding to what is stored, half a unit of the largest entry, and float64's own."""
    unit = torch.finfo(found.dtype).eps / 2
    assert np.abs(array(found) - wanted).max() <= unit * np.abs(wanted).max() * 1.001 + 1e-12


def heads(x: np.ndarray, axis: int, edit_one: Cut) -> np.ndarray:
    """Edit each slice of 8 rows or columns by itself."""
    return np.concatenate([edit_one(part) for part in np.split(x, x.shape[axis] // 8, axis)], axis)


RULES: dict[str, tuple[dict, Callable[[np.ndarray], slice]]] = {
    "drop": ({"drop": 0.25}, lambda S: slice(0, len(S) - math.floor(0.25 * len(S) + 0.5))),
    "tail": ({"drop": 0.25, "side": "tail"}, lambda S: slice(len(S) - math.floor(0.25 * len(S) + 0.5), None)),
    "rank": ({"rank": 3}, lambda S: slice(0, 3)),
    "energy": ({"energy": 0.7}, lambda S: slice(0, int((np.cumsum(S**2) < 0.7 * (S**2).sum()).sum()) + 1)),
    "above": ({"above": 0.4}, lambda S: slice(0, int((S > 0.4).sum()))),
    "band": ({"band": (0.25, 0.5)}, lambda S: slice(math.floor(0.25 * len(S) + 0.5), math.floor(0.5 * len(S) + 0.5))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("per", ["matrix", "head"])
def test_truncate(per: str, rule: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "qwen2", dtype)
    settings, keep = RULES[rule]
    found = edit(tmp_path / "out", tuned, Truncate(base=base, per=per, **settings))
    start, end = read(base), read(tuned)

    def cut(x: np.ndarray) -> np.ndarray:
        return kept(x, keep(np.linalg.svd(x, compute_uv=False)))

    for name in end:
        if end[name].ndim == 1:
            assert_bits(found[name], end[name], name)
            continue
        change = array(end[name]) - array(start[name])
        axis = 0 if any(part in name for part in ("q_proj", "k_proj", "v_proj")) else 1 if "o_proj" in name else None
        wanted = cut(change) if per == "matrix" or axis is None else heads(change, axis, cut)
        near(found[name], array(start[name]) + wanted)


def test_what_each_matrix_kept(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "qwen2")
    done = edited(tmp_path / "out", tuned, Truncate(base=base, energy=0.5, select="mlp, attn.k"))
    start, end, rows = read(base), read(tuned), done.manifest["steps"][0]["rows"]
    names = [name for name in end if ".mlp." in name or "k_proj.weight" in name]
    ranks = {}
    for name in names:
        S = np.linalg.svd(array(end[name]) - array(start[name]), compute_uv=False)
        shares = np.cumsum(S**2) / (S**2).sum()
        ranks[name] = (int((shares < 0.5).sum()) + 1, len(S), float(shares[int((shares < 0.5).sum())]))
    found = sorted((row["kept"], row["of"], row["energy_share"]) for row in rows)
    assert [row[:2] for row in found] == [row[:2] for row in sorted(ranks.values())]
    assert sum(row[2] for row in found) == pytest.approx(sum(rank[2] for rank in ranks.values()), rel=1e-9)
    summary = done.manifest["steps"][0]["summary"]
    assert summary["matrices"] == len(names)
    assert summary["directions kept"] == sum(rank[0] for rank in ranks.values())
    assert summary["of"] == sum(rank[1] for rank in ranks.values())


@pytest.mark.parametrize("rule", ["donoho-gavish", "mp-edge"])
def test_noise_rules_find_what_was_put_in(rule: str, tmp_path: Path) -> None:
    """Two directions far above noise: nothing else stays."""
    generator = torch.Generator().manual_seed(0)
    base = {"w.weight": torch.randn(80, 60, generator=generator)}
    signal = torch.randn(80, 2, generator=generator) @ torch.randn(2, 60, generator=generator)
    tuned = {"w.weight": base["w.weight"] + signal + 0.05 * torch.randn(80, 60, generator=generator)}
    found = edit(tmp_path / "out", tuned, Truncate(base=base, rule=rule))
    change = array(tuned["w.weight"]) - array(base["w.weight"])
    near(found["w.weight"], array(base["w.weight"]) + kept(change, slice(0, 2)))


@pytest.mark.parametrize("family", ["gpt2", "phi3", "falcon_grouped", "mixtral"])
def test_fused_transposed_and_stacked(family: str, tmp_path: Path) -> None:
    """Parts of fused tensors are matrices of their own; an expert of a stack is one."""
    base, tuned = save_pair(tmp_path, family)
    found = edit(tmp_path / "out", tuned, Truncate(base=base, rank=2))
    start, end = read(base), read(tuned)

    def cut(name: str, *index: slice | int) -> None:
        change = array(end[name][index]) - array(start[name][index])
        near(found[name][index], array(start[name][index]) + kept(change, slice(0, 2)))

    if family == "gpt2":
        for part in range(3):
            cut("transformer.h.1.attn.c_attn.weight", slice(None), slice(32 * part, 32 * part + 32))
        cut("transformer.h.1.mlp.c_fc.weight")
    elif family == "phi3":
        for span in (slice(0, 32), slice(32, 48), slice(48, 64)):
            cut("model.layers.1.self_attn.qkv_proj.weight", span)
        cut("model.layers.0.mlp.gate_up_proj.weight", slice(0, 24))
    elif family == "falcon_grouped":
        cut("transformer.h.1.self_attention.dense.weight")
    else:
        experts = sorted(name for name in end if ".experts." in name)
        cut(experts[0], *([2] if end[experts[0]].ndim == 3 and "gate_up" not in experts[0] else []))


@pytest.mark.parametrize(("keep", "count"), [(0.5, 12), (0.29, 6), (0.01, 1), (1, 24)])
def test_laser(keep: float, count: int, tmp_path: Path) -> None:
    """Floor of the share of 24 directions, one at least; what is not selected stays."""
    _, tuned = save_pair(tmp_path, "llama")
    done = edited(tmp_path / "out", tuned, Laser(keep=keep, select="layers 1, mlp.up"))
    found, end = read(tmp_path / "out"), read(tuned)
    near(found[UP], kept(array(end[UP]), slice(0, count)))
    for name in set(end) - {UP}:
        assert_bits(found[name], end[name], name)
    (row,) = done.manifest["steps"][0]["rows"]
    assert (row["kept"], row["of"]) == (count, 24)


def test_svf_by_one_factor(tmp_path: Path) -> None:
    """z for all is the matrix times z."""
    _, tuned = save_pair(tmp_path, "llama")
    found, end = edit(tmp_path / "out", tuned, Svf(z=-1.5, select="layers 1, attn.q")), read(tuned)
    near(found[QUERY], -1.5 * array(end[QUERY]))
    for name in set(end) - {QUERY}:
        assert_bits(found[name], end[name], name)


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_svf_by_a_file(kind: str, tmp_path: Path) -> None:
    """A vector for each matrix that it names; the selection may narrow that."""
    _, tuned = save_pair(tmp_path, "llama")
    generator = torch.Generator().manual_seed(1)
    factors = {QUERY: torch.rand(32, generator=generator), KEY: torch.rand(16, generator=generator)}
    factors[UP] = torch.rand(24, generator=generator).double()
    path = tmp_path / f"z.{kind}"
    if kind == "npz":
        np.savez(path, **{name: z.numpy() for name, z in factors.items()})
    else:
        save_file(factors, path)
    found, end = edit(tmp_path / "out", tuned, Svf(factors=str(path), select="attn")), read(tuned)
    for name in end:
        if name not in (QUERY, KEY):
            assert_bits(found[name], end[name], name)
            continue
        U, S, Vh = np.linalg.svd(array(end[name]), full_matrices=False)
        near(found[name], (U * S * array(factors[name])) @ Vh)


def test_svf_of_parts_of_a_fused_tensor(tmp_path: Path) -> None:
    """By the name of the matrix, where a tensor holds several."""
    _, tuned = save_pair(tmp_path, "gpt2")
    end = read(tuned)
    done = edited(tmp_path / "all", tuned, Laser(keep=0.5, select="layers 1, attn.k"))
    (row,) = done.manifest["steps"][0]["rows"]
    save_file({row["name"]: torch.zeros(32)}, tmp_path / "z.safetensors")
    found = edit(tmp_path / "out", tuned, Svf(factors=str(tmp_path / "z.safetensors")))
    name = "transformer.h.1.attn.c_attn.weight"
    assert float(found[name][:, 32:64].abs().max()) == 0
    assert_bits(found[name][:, :32], end[name][:, :32])
    assert_bits(found[name][:, 64:], end[name][:, 64:])


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"nothing.weight": torch.ones(3)}, r"'nothing.weight' \[3\]: expected the name of a matrix"),
        ({UP: torch.ones(3)}, r"\[3\]: expected 24 factors"),
        ({UP: torch.ones(24, 1)}, r"\[24, 1\]: expected 24 factors"),
        ({"model.norm.weight": torch.ones(32)}, "expected the name of a matrix"),
    ],
)
def test_factors_that_do_not_fit(factors: Tensors, message: str, tmp_path: Path) -> None:
    _, tuned = save_pair(tmp_path, "llama")
    save_file(factors, tmp_path / "z.safetensors")
    with pytest.raises(SelectionError, match=message):
        edit(tmp_path / "out", tuned, Svf(factors=str(tmp_path / "z.safetensors")))


def test_one_vector_for_a_fused_tensor_is_ambiguous(tmp_path: Path) -> None:
    """A tensor of several matrices has no singular values of its own that the vector could be meant for."""
    _, tuned = save_pair(tmp_path, "gpt2")
    save_file({"transformer.h.1.attn.c_attn.weight": torch.zeros(32)}, tmp_path / "z.safetensors")
    with pytest.raises(SelectionError, match="expected the name of a matrix"):
        edit(tmp_path / "out", tuned, Svf(factors=str(tmp_path / "z.safetensors")))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"truncate": {"base": "x"}}, "expected exactly one of drop, rank, energy, above, rule, band; got none"),
        ({"truncate": {"base": "x", "drop": 0.5, "rank": 2}}, "got drop and rank"),
        ({"truncate": {"base": "x", "drop": 1.5}}, "drop: expected a fraction from 0 to 1"),
        ({"truncate": {"base": "x", "rank": 0}}, "rank: expected a whole number from 1"),
        ({"truncate": {"base": "x", "energy": 0}}, "energy: expected a share above 0"),
        ({"truncate": {"base": "x", "band": [0.5, 0.5]}}, "band: expected two fractions"),
        ({"truncate": {"base": "x", "band": [0, 0.5], "side": "tail"}}, "side: expected head with a band"),
        ({"truncate": {"base": "x", "rule": "noise"}}, "'donoho-gavish' or 'mp-edge'"),
        ({"laser": {"keep": 0, "select": "mlp"}}, "greater than 0"),
        ({"laser": {"keep": 0.5}}, r"laser\.select: this setting is missing"),
        ({"svf": {"z": 2, "factors": "x", "select": "mlp"}}, "either z or a file"),
        ({"svf": {"z": 2}}, "z for all needs a selection"),
    ],
)
def test_impossible_settings(step: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        edit(tmp_path / "out", "model", step)
