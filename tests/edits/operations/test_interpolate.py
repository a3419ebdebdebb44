from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffract.edits.mixing import interpolate


def test_hand_computed():
    a, b = torch.tensor([0.0, 4.0, -2.0]), torch.tensor([8.0, 4.0, 2.0])
    # Powers of two: exact.
    assert interpolate(a, b, 0.25).tolist() == [2.0, 4.0, -1.0]
    assert interpolate(a, b, 1.5).tolist() == [12.0, 4.0, 4.0]
    assert interpolate(a, b, -0.5).tolist() == [-4.0, 4.0, -4.0]


def test_the_ends_are_the_tensors_themselves():
    a, b = torch.tensor([torch.nan, -0.0, torch.inf]), torch.tensor([-0.0, torch.nan, 1.0])
    assert interpolate(a, b, 0.0) is a
    assert interpolate(a, b, 1.0) is b


@given(at=st.floats(-2, 3), seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_against_numpy(at: float, seed: int, dtype: torch.dtype):
    a, b = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    before = a.clone(), b.clone()
    got = interpolate(a, b, at)
    reference = (1 - at) * a.numpy().astype(np.float64) + at * b.numpy().astype(np.float64)
    # A handful of roundings of numbers below 5 * (2 + 3) in size.
    np.testing.assert_allclose(got.numpy(), reference, rtol=0, atol=100 * torch.finfo(dtype).eps)
    assert got.dtype == dtype
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


@given(at=st.floats(-5, 5))
def test_what_is_equal_stays(at: float):
    a = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(interpolate(a, a.clone(), at), a)


@pytest.mark.parametrize("at", [0.0, 0.25, 1.0])
def test_scalars_and_empty_tensors(at: float):
    assert interpolate(torch.tensor(2.0), torch.tensor(6.0), at).item() == 2 + 4 * at
    assert interpolate(torch.empty(0, 3), torch.empty(0, 3), at).shape == (0, 3)
