"""Inner products of changes against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffract.linalg import LowRank, blas, change_grams


def grams_of(base: torch.Tensor, tuned: list[torch.Tensor]) -> np.ndarray:
    """The same from whole float64 matrices."""
    rows = [base.double(), *(t.double() - base.double() for t in tuned)]
    flat = torch.stack(rows, 1).flatten(2).numpy()
    return np.einsum("bik,bjk->bij", flat, flat)


def family(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, list]:
    generator = torch.Generator().manual_seed(sum(shape) + count)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    moved = [base + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return base.to(dtype), [m.to(dtype) for m in moved]


@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 4, 9), (2, 1, 1), (4, 1, 30)])
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_of_changes(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> None:
    base, tuned = family(shape, count, dtype)
    found = change_grams(base, tuned)
    assert found.dtype == torch.float64
    assert found.shape == (shape[0], 1 + count, 1 + count)
    # sums of at most 36 products of order 1
    np.testing.assert_allclose(found.numpy(), grams_of(base, tuned), rtol=0, atol=1e-13)
    assert torch.equal(found, found.mT)


def test_strides_do_not_matter() -> None:
    base, tuned = family((2, 6, 5), 2)
    want = change_grams(base, tuned)
    turned = change_grams(base.mT, [t.mT for t in tuned])
    wide = torch.nn.functional.pad(base, (3, 4, 1, 2))[:, 1:7, 3:8]
    torch.testing.assert_close(turned, want, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(change_grams(wide, tuned), want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", [(3, 8, 50), (3, 50, 8)])
def test_pieces_add_up(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = family(shape, 2)
    low = LowRank(torch.randn(3, shape[1], 2).double(), torch.randn(3, 2, shape[2]).double())
    want = change_grams(base, [*tuned, low])
    monkeypatch.setitem(blas.PIECE_BYTES, "cpu", 8 * 8 * 7)
    torch.testing.assert_close(change_grams(base, [*tuned, low]), want, rtol=1e-12, atol=1e-12)


def test_factors_are_the_change_itself() -> None:
    base, tuned = family((2, 6, 9), 1)
    B, A = torch.randn(2, 6, 2).double(), torch.randn(2, 2, 9).double()
    found = change_grams(base, [tuned[0], LowRank(B, A)])
    np.testing.assert_allclose(found.numpy(), grams_of(base, [tuned[0], base + B @ A]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_its_own_only(bad: float) -> None:
    base, tuned = family((3, 4, 5), 3)
    want = change_grams(base, tuned)
    tuned[1][0, 2, 2] = bad
    base[2, 0, 0] = bad
    found = change_grams(base, tuned)
    assert torch.equal(found[1], want[1])
    assert not found[2].diagonal().isfinite().any()
    kept = [0, 1, 3]
    assert torch.equal(found[0][kept][:, kept], want[0][kept][:, kept])
    assert not found[0, 2].isfinite().any()


def test_an_unchanged_matrix_has_no_change() -> None:
    base, _ = family((2, 3, 4), 0)
    found = change_grams(base, [base, 2 * base])
    assert found[:, 1].abs().max() == 0
    torch.testing.assert_close(found[:, 2, 2], found[:, 0, 0], rtol=1e-15, atol=0)
    torch.testing.assert_close(found[:, 0, 2], found[:, 0, 0], rtol=1e-15, atol=0)
