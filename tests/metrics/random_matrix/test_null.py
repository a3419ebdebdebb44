"""The permutation null: what it keeps, what it forgets, and what it explains."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, wasserstein_distance

from diffract.metrics.random_matrix import entry_order, null_w1, permuted, wasserstein

SHAPE = (64, 128)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def eigenvalues(w: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(w).square() / max(w.shape[-2:])


def null_distance(w: torch.Tensor) -> torch.Tensor:
    order = entry_order((w.shape[1], w.shape[2]), seed=0)
    return null_w1(eigenvalues(w), eigenvalues(permuted(w, order)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_all_entries_stay(dtype: torch.dtype) -> None:
    w = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    w[0, 0, :3] = torch.tensor([-0.0, 0.0, math.nan])
    w = w.to(dtype)
    moved = permuted(w, entry_order((5, 7), seed=1))
    assert (moved.dtype, moved.shape) == (w.dtype, w.shape)
    for before, after in zip(w, moved, strict=True):
        old, new = (np.sort(t.contiguous().view(torch.uint8).reshape(35, -1).numpy(), axis=0) for t in (before, after))
        assert (old == new).all()
        assert not torch.equal(before.float().nan_to_num(9), after.float().nan_to_num(9))


def test_entry_i_is_entry_order_i_counted_along_the_rows() -> None:
    w = torch.arange(6.0).reshape(1, 2, 3)
    order = torch.tensor([5, 4, 3, 0, 1, 2])
    assert permuted(w, order).tolist() == [[[5, 4, 3], [0, 1, 2]]]


def test_a_matrix_has_one_null_whatever_its_batch_and_layout() -> None:
    w = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    order = entry_order(SHAPE, seed=3)
    together = permuted(w, order)
    for i in range(4):
        assert torch.equal(permuted(w[i : i + 1], entry_order(SHAPE, seed=3))[0], together[i])
    assert torch.equal(permuted(w.mT.contiguous().mT, order), together)


def test_orders_differ_by_seed_and_are_all_likely() -> None:
    count = 1200
    drawn = [tuple(entry_order((1, 4), seed=seed).tolist()) for seed in range(count)]
    low, high = binom.interval(1 - 1e-3 / 24, count, 1 / 24)
    for one in permutations(range(4)):
        assert low <= drawn.count(one) <= high


samples = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 1e3)), min_size=n, max_size=n)
)


@given(samples)
def test_wasserstein_agrees_with_scipy(pairs: list[tuple[float, float]]) -> None:
    a, b = torch.tensor(pairs, dtype=torch.float64).T
    found = wasserstein(a[None], b[None]).item()
    assert found == pytest.approx(wasserstein_distance(a.numpy(), b.numpy()), rel=1e-12, abs=1e-10)
    assert wasserstein(b[None], a[None].flip(-1)).item() == found


def test_null_w1_by_hand_and_at_its_limit() -> None:
    peak, flat = torch.tensor([[8.0, 0, 0, 0]]).double(), torch.full((1, 4), 2.0).double()
    assert null_w1(peak, flat).item() == (6 + 2 + 2 + 2) / 4 / 2 == 2 * (1 - 1 / 4)
    assert null_w1(flat, flat).item() == 0
    rows = torch.tensor([[0.0, 0], [math.nan, 1], [3, 1]]).double()
    np.testing.assert_equal(null_w1(rows, rows.flip(1)).numpy(), [math.nan, math.nan, 0])


def test_it_explains_heavy_entries_and_no_structure() -> None:
    rng = np.random.default_rng(0)
    gaussian = torch.tensor(rng.standard_normal((30, *SHAPE)))
    heavy = torch.tensor(rng.standard_t(3, (30, *SHAPE)))
    levels = null_distance(gaussian), null_distance(heavy)
    # Two draws of noise differ by a few eigenvalues out of place; heavy entries add where the largest of them meet.
    assert levels[0].max() < 0.06
    assert levels[1].max() < 0.12
    U, V = (torch.tensor(rng.standard_normal((30, d, 3))) for d in SHAPE)
    planted = gaussian + 0.5 * U @ V.mT  # a third of the energy in three directions
    assert null_distance(planted).min() > 2 * levels[1].max()
    scaled = heavy * torch.linspace(0.2, 2, 64)[:, None]  # rows of unequal size, entries otherwise independent
    assert null_distance(scaled).mean() > 3 * levels[1].mean()


def test_it_keeps_the_mean_eigenvalue() -> None:
    w = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    moved = permuted(w, entry_order(SHAPE, seed=0))
    assert eigenvalues(moved).mean(-1).tolist() == pytest.approx(eigenvalues(w).mean(-1).tolist(), rel=1e-12)
