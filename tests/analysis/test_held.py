"""What is read of a tensor of which only a part is wanted."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

import diffract
from diffract.analysis import held
from diffract.checkpoints import Checkpoint

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, int] | None]]:
    """Tensors, and the rows of them, that were read."""
    seen: list[tuple[str, tuple[int, int] | None]] = []
    read = Checkpoint.read

    def noted(self: Checkpoint, name: str, rows: tuple[int, int] | None = None, *rest: object) -> object:
        seen.append((name, rows))
        return read(self, name, rows, *rest)

    monkeypatch.setattr(Checkpoint, "read", noted)
    return seen


@pytest.mark.parametrize("keep", [1 << 27, 0], ids=["kept", "read when asked for"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_head_costs_its_rows(
    family: tuple[Path, Path], taken: list, monkeypatch: pytest.MonkeyPatch, keep: int, cached: bool
) -> None:
    whole = diffract.scan(family[0], cache=False).metrics.filter(pl.col("name") == "L0.attn.q.h1")
    monkeypatch.setattr(held, "KEEP_BYTES", keep)
    taken.clear()
    run = diffract.scan(family[0], select="layers 0, attn.q, heads 1", cache=cached)
    assert {(name, rows) for name, rows in taken if name == NAME} == {(NAME, (8, 16))}
    assert {name for name, _ in taken} == {NAME}
    assert_frame_equal(run.metrics.drop("model"), whole.drop("model"), rel_tol=1e-12)
    assert run.models["digest"].to_list() == [None]


def test_parts_of_a_tensor_are_not_taken_for_each_other(family: tuple[Path, Path]) -> None:
    for head in (1, 2, 1):
        for kind in ("scan", "compare"):
            references = family if kind == "compare" else family[:1]
            selection = f"layers 0, attn.q, heads {head}"
            kept = getattr(diffract, kind)(*references, select=selection)
            new = getattr(diffract, kind)(*references, select=selection, cache=False)
            assert_frame_equal(kept.metrics, new.metrics, rel_tol=1e-12)
