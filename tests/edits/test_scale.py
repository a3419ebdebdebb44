"""Factors of the singular directions of a change: what is 1 stays, what is 0 goes back, live and on disk alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from diffract.edits import LiveModel, Scale, apply, verify
from diffract.edits.bench import Bench
from diffract.edits.factors import as_table, read_factors
from diffract.edits.spectral_edits import scale_change
from diffract.errors import SelectionError
from edit_cases import assert_bits, assert_same, edit, family_pair, read, save_pair
from families import FAMILIES


def factors_of(model: Any, value: float | None = None, *, heads: bool = False) -> pl.DataFrame:
    """One factor for every direction of every matrix, and one for every vector; random ones unless they are given."""
    generator = torch.Generator().manual_seed(5)
    bench = Bench(model)
    sizes = {m.name: (min(m.shape),) for m in bench.matrices(None, heads=heads)}
    held = {m.tensor for m in bench.matrices(None, heads=heads)}
    sizes |= {name: () for name in bench.entries() if name not in held}
    return as_table({
        name: torch.rand(size, generator=generator).double() if value is None else torch.full(size, value).double()
        for name, size in sizes.items()
    })  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_ones_are_the_tuned_model_and_zeros_the_base(family: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if sorted(FAMILIES).index(family) % 2 else torch.float32
    base, tuned = save_pair(tmp_path, family, dtype)
    for value, same in ((1.0, tuned), (0.0, base)):
        step = Scale(base=str(base), factors=factors_of(tuned, value))
        assert_same(edit(tmp_path / f"out-{value}", str(tuned), step), read(same))


@pytest.mark.parametrize("heads", [False, True])
def test_a_live_model_and_files_are_scaled_alike(heads: bool, tmp_path: Path) -> None:
    base, tuned = family_pair("llama")
    table = factors_of(tuned, heads=heads)
    written = edit(tmp_path / "out", tuned, Scale(base=base, factors=table))
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    with LiveModel(tuned).edited(Scale(base=base, factors=table)):
        assert_same({name: tuned.state_dict()[name] for name in written}, written)
    assert_same(tuned.state_dict(), before)


def test_a_factor_for_each_direction_is_lapack_s_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(12, 7, generator=generator)
    tuned = base + 0.1 * torch.randn(12, 7, generator=generator)
    f = torch.linspace(-0.5, 2, 7).double()
    U, S, Vh = torch.linalg.svd(tuned.double() - base.double(), full_matrices=False)
    expected = base.double() + (U * (f * S)) @ Vh
    # The Gram matrix squares the condition number, about 10 here; what is left is rounding of float64.
    torch.testing.assert_close(scale_change(tuned, base, f), expected, rtol=0, atol=1e-13)


def test_one_number_scales_all_of_a_change() -> None:
    base, tuned = family_pair("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    start, end = base.state_dict()[name], tuned.state_dict()[name].clone()
    with LiveModel(tuned).edited(Scale(base=base, factors=as_table({"L0.mlp.up": torch.tensor(0.25).double()}))):
        torch.testing.assert_close(tuned.state_dict()[name], start + 0.25 * (end - start), rtol=0, atol=1e-7)


def test_a_table_in_memory_is_written_beside_the_checkpoint(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "llama")
    table = factors_of(tuned)
    made = apply({"model": str(tuned), "steps": [Scale(base=str(base), factors=table)]}, tmp_path / "out")
    assert made.manifest["recipe"]["steps"] == [
        {"scale": {"base": str(base), "factors": str(tmp_path / "out" / "factors.parquet")}}
    ]
    again = apply(tmp_path / "out" / "recipe.yaml", tmp_path / "again")
    assert_same(read(again.folder), read(made.folder))
    assert not verify(tmp_path / "out", replay=True).faults


def test_tables_of_other_kinds_say_the_same(tmp_path: Path) -> None:
    table = factors_of(family_pair("llama")[1])
    table.write_csv(tmp_path / "f.csv")
    table.write_json(tmp_path / "f.json")
    for name in ("f.csv", "f.json"):
        for key, found in read_factors(str(tmp_path / name)).items():
            assert_bits(found, read_factors(table)[key], key)


def test_a_table_of_factors_of_wholes_alone_is_read(tmp_path: Path) -> None:
    as_table({"L0.mlp.up": torch.tensor(0.5)}).write_csv(tmp_path / "f.csv")
    assert read_factors(str(tmp_path / "f.csv")) == {"L0.mlp.up": torch.tensor(0.5)}


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"L9.mlp.up": torch.ones(3)}, "is not in this model"),
        ({"L0.mlp.up": torch.ones(3)}, "expected .* one for each singular direction"),
        ({"model.norm.weight": torch.ones(3)}, "has no directions"),
        ({"L0.attn.q": torch.tensor(1.0), "L0.attn.q.h0": torch.tensor(1.0)}, "overlap"),
        ({"L0.mlp.up": torch.tensor(float("nan"))}, "expected a finite factor"),
    ],
)
def test_factors_of_another_pair_are_refused(factors: dict[str, torch.Tensor], message: str) -> None:
    base, tuned = family_pair("llama")
    with pytest.raises(SelectionError, match=message):
        LiveModel(tuned).apply(Scale(base=base, factors=as_table(factors)))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("nowhere.parquet", "cannot read"),
        ("weights.safetensors", "expected a .parquet"),
        (pl.DataFrame({"name": ["a", "a"], "direction": [0, 0], "factor": [1.0, 1.0]}), "each direction"),
        (pl.DataFrame({"name": ["a"], "direction": [0], "factor": ["x"]}), "expected names"),
    ],
)
def test_tables_that_are_none_are_refused(table: str | pl.DataFrame, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        read_factors(table)
