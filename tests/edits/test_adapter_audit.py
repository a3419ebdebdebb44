"""What an audit of an adapter says, against dense float64 algebra of the changes themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from diffract.cli.main import app
from diffract.edits import apply
from diffract.edits.adapter_audit import audit
from diffract.errors import DiffractError

NAMES = ("layers.1.q_proj", "layers.11.q_proj", "layers.1.up_proj")
SHAPES = {"layers.1.q_proj": (24, 16), "layers.11.q_proj": (24, 16), "layers.1.up_proj": (40, 16)}


def write(folder: Path, ranks: tuple[int, ...], *, seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Write an adapter of rank 6 whose changes have these ranks, alpha 12, and return the changes."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, torch.Tensor] = {}
    for name, rank in zip(NAMES, ranks, strict=True):
        out, inputs = SHAPES[name]
        mixing = torch.randn(6, rank, generator=generator) @ torch.randn(rank, 6, generator=generator)
        held[f"base_model.model.{name}.lora_A.weight"] = torch.randn(6, inputs, generator=generator)
        held[f"base_model.model.{name}.lora_B.weight"] = scale * torch.randn(out, 6, generator=generator) @ mixing
    save_file(held, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 6, "lora_alpha": 12, "base_model_name_or_path": "nowhere/at-all"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    pairs = {n: [held[f"base_model.model.{n}.lora_{side}.weight"].double().numpy() for side in "BA"] for n in NAMES}
    return {name: 2 * b @ a for name, (b, a) in pairs.items()}


def test_ranks_and_energies_are_those_of_the_changes(tmp_path: Path) -> None:
    """No base is there, nor asked for."""
    changes = write(tmp_path / "adapter", (2, 6, 0))
    found = audit(tmp_path / "adapter", energy=0.9)
    assert [row["name"] for row in found.modules] == ["layers.1.q_proj", "layers.1.up_proj", "layers.11.q_proj"]
    total = sum(np.sum(change**2) for change in changes.values())
    for row in found.modules:
        change = changes[row["name"]]
        sigmas = np.linalg.svd(change, compute_uv=False)
        assert row["rank"] == 6
        assert row["norm"] == pytest.approx(np.linalg.norm(change), rel=1e-12, abs=1e-12)  # float64 in another order
        assert row["share"] == pytest.approx(np.sum(change**2) / total, rel=1e-12, abs=1e-12)
        assert row["rms"] == pytest.approx(np.sqrt(np.mean(change**2)), rel=1e-12, abs=1e-12)
        if row["name"] == NAMES[2]:
            assert (row["used"], row["suffices"], row["effective_rank"]) == (0, 0, None)
            continue
        shares = np.cumsum(sigmas**2) / np.sum(sigmas**2)
        assert row["used"] == {NAMES[0]: 2, NAMES[1]: 6}[row["name"]]
        assert row["suffices"] == int((shares < 0.9).sum()) + 1
        p = sigmas[:6][sigmas[:6] > 1e-12 * sigmas[0]] / sigmas.sum()
        assert row["effective_rank"] == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-5)  # tiny ones left out
        assert row["lost_above"] == pytest.approx(256 * row["rms"])
    needed = {row["name"]: max(row["suffices"], 1) for row in found.modules}
    assert found.rank == max(needed.values())
    assert {n: found.rank_pattern.get(n, found.rank) for n in NAMES} == needed
    assert audit(tmp_path / "adapter", energy=1.0).modules[2]["suffices"] == 6


def test_a_truncated_adapter_of_the_rank_pattern_holds_the_energy(tmp_path: Path) -> None:
    changes = write(tmp_path / "adapter", (3, 6, 5))
    found = audit(tmp_path / "adapter", energy=0.8)
    for name, change in changes.items():
        sigmas = np.linalg.svd(change, compute_uv=False)
        kept = found.rank_pattern.get(name, found.rank)
        assert np.sum(sigmas[:kept] ** 2) >= 0.8 * np.sum(sigmas**2)
        assert kept == 1 or np.sum(sigmas[: kept - 1] ** 2) < 0.8 * np.sum(sigmas**2)


def test_overlap_of_two_adapters_beside_chance(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", (2, 3, 4)), write(tmp_path / "two", (1, 3, 4), seed=1)
    found = audit(tmp_path / "one", against=tmp_path / "two", energy=0.999999)
    for row in found.overlap:
        a, b = one[row["name"]], two[row["name"]]
        assert row["cosine"] == pytest.approx(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)
        assert row["cosine_chance"] == pytest.approx(a.size**-0.5)
        (ua, sa, va), (ub, sb, vb) = (np.linalg.svd(x, full_matrices=False) for x in (a, b))
        k, l_ = ((np.cumsum(s**2) < 0.999999 * np.sum(s**2)).sum() + 1 for s in (sa, sb))
        assert row["output"] == pytest.approx(np.sum((ua[:, :k].T @ ub[:, :l_]) ** 2) / min(k, l_), abs=1e-9)
        assert row["input"] == pytest.approx(np.sum((va[:k] @ vb[:l_].T) ** 2) / min(k, l_), abs=1e-9)
        assert row["output_chance"] == pytest.approx(max(k, l_) / len(a))
    same = audit(tmp_path / "one", against=tmp_path / "one").overlap
    assert [row[key] for row in same for key in ("cosine", "output", "input")] == pytest.approx([1.0] * 9, abs=1e-12)


def test_chance_is_what_random_adapters_have(tmp_path: Path) -> None:
    found: dict[str, list[float]] = {"output": [], "cosine": []}
    for seed in range(30):
        write(tmp_path / f"{seed}", (6, 6, 6), seed=seed)
        if seed:
            rows = audit(tmp_path / f"{seed - 1}", against=tmp_path / f"{seed}", energy=1.0).overlap
            found["output"] += [row["output"] / row["output_chance"] for row in rows]
            found["cosine"] += [row["cosine"] / row["cosine_chance"] for row in rows]
    # means of 87: the standard deviation of one is about 0.2 of chance, and 1
    assert np.mean(found["output"]) == pytest.approx(1, abs=0.1)
    assert abs(np.mean(found["cosine"])) < 0.4
    assert np.std(found["cosine"]) == pytest.approx(1, abs=0.3)


def test_what_merging_loses_is_measured_over_a_base(tmp_path: Path) -> None:
    changes = write(tmp_path / "adapter", (2, 6, 6), scale=2e-5)
    weights = {f"{n}.weight": torch.randn(SHAPES[n], generator=torch.Generator().manual_seed(3)) for n in NAMES}
    base = {name: weight.bfloat16() for name, weight in weights.items()}
    rows = {row["name"]: row for row in audit(tmp_path / "adapter", base=base).merging}
    assert set(rows) == set(base)
    for name, weight in base.items():
        exact = weight.double() + torch.tensor(changes[name.removesuffix(".weight")])
        merged = exact.bfloat16()
        wanted = float((merged.double() - exact).norm() / (exact - weight.double()).norm())
        assert rows[name]["error"] == pytest.approx(wanted, rel=1e-9)
        assert rows[name]["unmoved"] == float((merged == weight).double().mean())
        assert 0.5 < rows[name]["unmoved"] < 1


def test_what_is_not_finite_is_said(tmp_path: Path) -> None:
    write(tmp_path / "adapter", (2, 6, 6))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    held = load_file(file)
    held[f"base_model.model.{NAMES[0]}.lora_B.weight"][0, 0] = torch.nan
    save_file(held, file)
    row = audit(tmp_path / "adapter").modules[0]
    assert {key for key, value in row.items() if value is not None} == {"name", "rank"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0.0}, "expected a share above 0"),
        ({"energy": float("nan")}, "expected a share above 0"),
        ({"against": "nothing-there"}, "no adapter at 'nothing-there'"),
        ({"base": {"w": torch.ones(2, 2)}}, "does not hold. Pass --adapter-base"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "adapter", (2, 6, 6))
    with pytest.raises(DiffractError, match=message):
        audit(tmp_path / "adapter", **options)


def test_a_folder_that_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(DiffractError, match=r"is no adapter, adapter_config.json is missing"):
        audit(tmp_path)


def test_the_command(tmp_path: Path) -> None:
    write(tmp_path / "adapter", (2, 6, 6))
    command = ["lora", str(tmp_path / "adapter"), "--audit"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "layers.11.q_proj" in done.stdout
    assert '"rank_pattern"' in done.stdout
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert [row["used"] for row in told["modules"]] == [2, 6, 6]
    wrong = CliRunner().invoke(app, [*command[:2], "-o", str(tmp_path / "x")])
    assert wrong.exit_code == 1
    assert "expected base" in wrong.stderr


def test_without_a_base_nothing_is_exported(tmp_path: Path) -> None:
    with pytest.raises(DiffractError, match="expected base"):
        apply({"model": "x", "export": {"lora": {}}}, tmp_path / "out")
