from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffract.edits.mixing import interpolate, task_arithmetic


def test_hand_computed():
    base = torch.tensor([1.0, 2.0])
    tuned = [torch.tensor([2.0, 2.0]), torch.tensor([1.0, 6.0])]
    assert task_arithmetic(base, tuned, [2.0, 0.5]).tolist() == [3.0, 4.0]
    assert task_arithmetic(base, tuned, [-1.0, 0.0]).tolist() == [0.0, 2.0]


def test_no_task_and_one_whole_task():
    base, tuned = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(task_arithmetic(base, [], []), base)
    assert torch.equal(task_arithmetic(base, [tuned], [0.0]), base)
    assert torch.equal(task_arithmetic(base, [tuned], [1.0]), tuned)


@given(
    weights=st.lists(st.floats(-2, 2), min_size=1, max_size=4), dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_against_numpy(weights: list[float], dtype: torch.dtype):
    base, *tuned = torch.randn(1 + len(weights), 3, 9, generator=torch.Generator().manual_seed(2), dtype=dtype)
    got = task_arithmetic(base, tuned, weights)
    reference = base.double().numpy().copy()
    for one, weight in zip(tuned, weights, strict=True):
        reference += weight * (one.double().numpy() - base.double().numpy())
    # Ten roundings of partial sums below 5 * (1 + 2 * 8).
    np.testing.assert_allclose(got.numpy(), reference, rtol=0, atol=850 * torch.finfo(dtype).eps)


@given(at=st.floats(-2, 2))
def test_one_task_is_the_line_from_the_base(at: float):
    base, tuned = torch.randn(2, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    # A handful of roundings of numbers below 5 * (3 + 2).
    torch.testing.assert_close(
        task_arithmetic(base, [tuned], [at]), interpolate(base, tuned, at), rtol=0, atol=100 * 2.0**-52
    )


@given(weights=st.lists(st.floats(-2, 2), min_size=2, max_size=2), stored=st.sampled_from(["bfloat16", "float16"]))
def test_what_no_model_changed_rounds_to_itself(weights: list[float], stored: str):
    dtype = getattr(torch, stored)
    base = torch.randn(1000, generator=torch.Generator().manual_seed(4)).to(dtype)
    wide = base.float()
    assert torch.equal(task_arithmetic(wide, [wide, wide], weights).to(dtype), base)


def test_numbers_that_do_not_fit():
    with pytest.raises(ValueError, match="one weight for each tuned"):
        task_arithmetic(torch.ones(2), [torch.ones(2)], [])
