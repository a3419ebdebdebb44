"""Decompositions that are made once: found again by what was decomposed, in memory or in files, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffract.edits import spectral_edits
from diffract.edits.directions import Decompositions
from diffract.edits.rule import Rule
from diffract.edits.spectral_edits import change_directions, change_sigmas, scale_change, svf, truncate
from diffract.errors import RunError


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(12, 8, generator=generator)
    return base + torch.randn(12, 8, generator=generator) / 8, base


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Have calls of a function that decomposes noted."""
    calls: list[str] = []
    real: Callable[..., object] = getattr(spectral_edits, name)

    def counted(*given: object, **named: object) -> object:
        calls.append(name)
        return real(*given, **named)

    monkeypatch.setattr(spectral_edits, name, counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_bytes", [0, 1 << 20])
def test_edits_with_kept_decompositions_are_the_same_bits(
    pair: tuple[Tensor, Tensor], tmp_path: Path, dtype: torch.dtype, memory_bytes: int
) -> None:
    one, two = (w.to(dtype) for w in pair)
    known, z = Decompositions(tmp_path, memory_bytes), torch.linspace(0.5, 1.5, 8)
    for _ in range(2):
        assert torch.equal(change_sigmas(one, two, known=known), change_sigmas(one, two))
        for rule in (Rule(drop=0.5), Rule(energy=0.7), Rule(rank=2, side="tail")):
            found, fresh = truncate(one, two, rule, known=known), truncate(one, two, rule)
            assert torch.equal(found.values, fresh.values)
            assert (found.kept, found.energy_share) == (fresh.kept, fresh.energy_share)
        assert torch.equal(scale_change(one, two, z, known=known), scale_change(one, two, z))
        assert torch.equal(change_directions(one, two, known=known).told, change_directions(one, two).told)
        assert torch.equal(svf(one, z, known=known), svf(one, z))
    assert bool(list(tmp_path.iterdir())) == (memory_bytes == 0)


@pytest.mark.parametrize("name", ["gram_eigen", "decomposed"])
def test_one_matrix_is_decomposed_once(
    pair: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    one, two = pair if name == "gram_eigen" else (w.double() for w in pair)
    calls, known = count_calls(monkeypatch, name), Decompositions(tmp_path)
    change_sigmas(one, two, known=known)
    for rule in (Rule(drop=0.5), Rule(drop=0.25), Rule(rule="donoho-gavish"), Rule(rank=3, side="tail")):
        truncate(one, two, rule, known=known)
    assert len(calls) == 1
    # Trained in place meanwhile: what is known of the old values says nothing.
    one[0, 0] += 1
    assert torch.equal(truncate(one, two, Rule(rank=1), known=known).values, truncate(one, two, Rule(rank=1)).values)
    assert len(calls) == 3


def test_a_folder_without_room_is_said(pair: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot keep decompositions in .*gone.*Make room"):
        svf(pair[0], 0.5, known=Decompositions(tmp_path / "gone", memory_bytes=0))
