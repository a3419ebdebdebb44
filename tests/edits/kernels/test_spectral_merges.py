"""Iso-C and TSV-M: by hand, by plain references, and what must hold of them."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffract.edits.spectral_merges import iso_c, nearest_orthonormal, tsv_merge

DTYPES = (torch.float64, torch.float32)
SHAPES = [(12, 12), (30, 8), (8, 30), (1, 5), (5, 1)]

ATOL = 1e-9
"""Of sigma_1 of order 10: vectors by Gram matrices are off by eps (sigma_1 / sigma)^2 over gaps, 1e-11; and room."""

Merge = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def changes(shape: tuple[int, int], count: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def rotation(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def svd(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return scipy.linalg.svd(x, full_matrices=False, lapack_driver="gesvd")


def polar(x: np.ndarray) -> np.ndarray:
    """The polar factor by another road than a singular value decomposition: x (x^T x)^(-1/2)."""
    return x @ np.linalg.inv(scipy.linalg.sqrtm(x.T @ x).real)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_iso_c_agrees_with_lapack(shape: tuple[int, int], dtype: torch.dtype, count: int) -> None:
    deltas = changes(shape, count, dtype)
    before = [d.clone() for d in deltas]
    U, S, Vh = svd(sum(d.double().numpy() for d in deltas))
    found = iso_c(deltas)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), S.mean() * U @ Vh, rtol=0, atol=ATOL)
    np.testing.assert_allclose(scipy.linalg.svdvals(found.numpy()), S.mean(), rtol=ATOL)
    assert all(torch.equal(d, b) for d, b in zip(deltas, before, strict=True))


def test_iso_c_by_hand() -> None:
    one = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    two = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -2.0]])
    want = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, -3.0]]).double()
    torch.testing.assert_close(iso_c([one, two]), want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_of_low_rank_keeps_its_rank(dtype: torch.dtype) -> None:
    one = torch.zeros(4, 6, dtype=dtype)
    one[1, 2], one[3, 3] = 4.0, 2.0
    found = iso_c([one])
    assert found[1, 2].item() == pytest.approx(3.0, rel=1e-14)
    assert scipy.linalg.svdvals(found.numpy()) == pytest.approx([3, 3, 0, 0], abs=1e-14)
    left, right = (rotation(9, seed)[:, :2] for seed in (1, 2))
    turned = iso_c([left * torch.tensor([4.0, 2.0]).double() @ right.mT])
    # The zeros of this one are rounding: a few eps of 4.
    torch.testing.assert_close(turned, 3 * left @ right.mT, rtol=0, atol=1e-13)


def reference_tsv(deltas: list[torch.Tensor]) -> np.ndarray:
    k = min(deltas[0].shape) // len(deltas)
    parts = [svd(d.double().numpy()) for d in deltas]
    U = np.concatenate([u[:, :k] for u, _, _ in parts], 1)
    V = np.concatenate([vh[:k].T for _, _, vh in parts], 1)
    return polar(U) * np.concatenate([s[:k] for _, s, _ in parts]) @ polar(V).T


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_tsv_agrees_with_another_road(shape: tuple[int, int], dtype: torch.dtype, count: int) -> None:
    deltas = changes(shape, count, dtype)
    before = [d.clone() for d in deltas]
    found = tsv_merge(deltas)
    assert found.dtype == torch.float64
    # The reference squares the condition of the vectors side by side, at most 1e4 here: 1e-8, of sigmas up to 10.
    np.testing.assert_allclose(found.numpy(), reference_tsv(deltas), rtol=0, atol=1e-6)
    assert all(torch.equal(d, b) for d, b in zip(deltas, before, strict=True))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_the_merged_singular_values_are_those_of_the_tasks(shape: tuple[int, int], count: int) -> None:
    # U_perp and V_perp have orthonormal columns, so that S is the spectrum of the merged matrix.
    deltas = changes(shape, count)
    k = min(shape) // count
    want = np.sort(np.concatenate([scipy.linalg.svdvals(d.numpy())[:k] for d in deltas]))[::-1]
    found = scipy.linalg.svdvals(tsv_merge(deltas).numpy())
    np.testing.assert_allclose(found[: len(want)], want, rtol=1e-10)
    np.testing.assert_allclose(found[len(want) :], 0, atol=1e-12)


def test_tasks_that_do_not_touch_are_added() -> None:
    one, two = torch.zeros(4, 6), torch.zeros(4, 6)
    one[0, 0], one[1, 1], one[0, 1] = 3.0, 2.0, 1.0
    two[2, 3], two[3, 4] = -5.0, 0.5
    torch.testing.assert_close(tsv_merge([one, two]), (one + two).double(), rtol=0, atol=1e-14)


def test_only_the_top_directions_of_each_are_taken() -> None:
    one, two = torch.zeros(5, 5), torch.zeros(5, 5)
    one[0, 0], one[1, 1], one[4, 4] = 3.0, 2.0, 1.0  # floor(5 / 2) = 2 of them
    two[2, 2], two[3, 3] = 7.0, 6.0
    want = torch.diag(torch.tensor([3.0, 2, 7, 6, 0])).double()
    torch.testing.assert_close(tsv_merge([one, two]), want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_change_comes_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    (delta,) = changes(shape, 1, dtype)
    # Vectors by Gram matrices are orthonormal to eps (sigma_1 / sigma)^2 = 1e-12 here; entries are below 5.
    torch.testing.assert_close(tsv_merge([delta]), delta.double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 8), (20, 6), (6, 20)])
def test_equal_changes_give_the_top_half_once(shape: tuple[int, int], dtype: torch.dtype) -> None:
    (delta,) = changes(shape, 1, dtype)
    U, S, Vh = svd(delta.double().numpy())
    k = len(S) // 2
    np.testing.assert_allclose(tsv_merge([delta, delta]).numpy(), (U[:, :k] * S[:k]) @ Vh[:k], rtol=0, atol=ATOL)


@pytest.mark.parametrize("shape", [(8, 8), (20, 6), (6, 20)])
def test_a_task_that_changed_nothing_bends_nothing(shape: tuple[int, int]) -> None:
    (delta,) = changes(shape, 1)
    U, S, Vh = svd(delta.numpy())
    k = len(S) // 2
    found = tsv_merge([torch.zeros(shape, dtype=torch.float64), delta])
    np.testing.assert_allclose(found.numpy(), (U[:, :k] * S[:k]) @ Vh[:k], rtol=0, atol=ATOL)


@pytest.mark.parametrize("shape", [(2, 6), (6, 2), (1, 1)])
def test_more_tasks_than_directions(shape: tuple[int, int]) -> None:
    deltas = changes(shape, 4)
    found = tsv_merge(deltas)
    # One direction of each; the side that has fewer dimensions than tasks gets orthonormal rows.
    parts = [svd(d.numpy()) for d in deltas]
    U = np.stack([u[:, 0] for u, _, _ in parts], 1)
    V = np.stack([vh[0] for _, _, vh in parts], 1)
    factors = [polar(x) if x.shape[0] >= x.shape[1] else polar(x.T).T for x in (U, V)]
    want = factors[0] * np.array([s[0] for _, s, _ in parts]) @ factors[1].T
    np.testing.assert_allclose(found.numpy(), want, rtol=0, atol=ATOL)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 8), st.integers(2, 8), st.integers(1, 3), st.integers(0, 999))
@pytest.mark.parametrize("merge", [iso_c, tsv_merge])
def test_rotations_of_all_rotate_the_result(merge: Merge, m: int, n: int, count: int, seed: int) -> None:
    deltas = changes((m, n), count, seed=seed)
    left, right = rotation(m, seed + 1), rotation(n, seed + 2)
    turned = merge([left @ d @ right for d in deltas])
    # Condition numbers of such small random matrices rarely pass 1e4: eps 1e4^2 at the worst, of entries of order 10.
    torch.testing.assert_close(turned, left @ merge(deltas) @ right, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 8), st.integers(1, 8), st.floats(1e-3, 1e3), st.integers(0, 999))
@pytest.mark.parametrize("merge", [iso_c, tsv_merge])
def test_scaling_and_transposition(merge: Merge, m: int, n: int, scale: float, seed: int) -> None:
    deltas = changes((m, n), 2, seed=seed)
    want = merge(deltas)
    torch.testing.assert_close(merge([scale * d for d in deltas]) / scale, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(merge([d.mT for d in deltas]).mT, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("merge", [iso_c, tsv_merge])
def test_nothing_merges_to_nothing(merge: Merge, dtype: torch.dtype) -> None:
    found = merge([torch.zeros(3, 4, dtype=dtype)] * 2)
    assert found.shape == (3, 4)
    assert not bool(found.any())
    (delta,) = changes((3, 4), 1, dtype)
    assert not bool(iso_c([delta, -delta]).any())


@pytest.mark.parametrize("merge", [iso_c, tsv_merge])
def test_merges_that_are_refused(merge: Merge) -> None:
    with pytest.raises(ValueError, match="expected one change or more, got none"):
        merge([])
    with pytest.raises(ValueError, match="expected finite values"):
        merge([torch.eye(2), torch.tensor([[1.0, torch.nan], [0.0, 1.0]])])
    with pytest.raises(ValueError, match=r"one shape, got \(2, 2\) and, at place 1, \(2, 3\)"):
        getattr(merge, "__wrapped__", merge)([torch.eye(2), torch.ones(2, 3)])


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5)])
def test_the_nearest_orthonormal_matrix(shape: tuple[int, int], gram: bool) -> None:
    (x,) = changes(shape, 1)
    found = nearest_orthonormal(x, gram=gram)
    product = found.mT @ found if shape[0] >= shape[1] else found @ found.mT
    torch.testing.assert_close(product, torch.eye(min(shape)).double(), rtol=0, atol=1e-11)
    for seed in range(20):  # no turn of it is nearer
        turn = rotation(shape[0], seed)
        assert (x - turn @ found).norm() > (x - found).norm()
