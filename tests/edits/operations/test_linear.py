from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffract.edits.mixing import linear, weighted_sum


def test_hand_computed():
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -2.0])
    assert linear([x, y], [1.0, 3.0]).tolist() == [4.0, -1.0]
    assert linear([x, y], [2.0, -1.0]).tolist() == [-3.0, 6.0]
    assert weighted_sum([x, y], [1.0, 3.0]).tolist() == [16.0, -4.0]


def test_one_tensor_is_its_own_mean():
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear([x], [0.3]), x)


@given(
    weights=st.lists(st.floats(0.1, 3), min_size=1, max_size=5),
    scale=st.floats(0.1, 10),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_against_numpy_and_free_of_scale(weights: list[float], scale: float, dtype: torch.dtype):
    tensors = torch.randn(len(weights), 6, 5, generator=torch.Generator().manual_seed(1), dtype=dtype)
    before = tensors.clone()
    got = linear(list(tensors), weights)
    reference = np.average(tensors.double().numpy(), axis=0, weights=weights)
    # Ten roundings of numbers below 5.
    bound = 50 * torch.finfo(dtype).eps
    np.testing.assert_allclose(got.numpy(), reference, rtol=0, atol=bound)
    scaled = linear(list(tensors), [scale * weight for weight in weights])
    np.testing.assert_allclose(scaled.numpy(), got.numpy(), rtol=0, atol=bound)
    assert torch.equal(tensors, before)


def test_weights_that_do_not_fit():
    x = torch.ones(2)
    with pytest.raises(ValueError, match="not zero"):
        linear([x, x], [1.0, -1.0])
    with pytest.raises(ValueError, match="one weight for each"):
        linear([x, x], [1.0])
    with pytest.raises(ValueError, match="one weight for each"):
        linear([x], [1.0, 2.0])
