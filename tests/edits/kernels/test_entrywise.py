"""Lines, arcs, means and task vectors: by hand, against NumPy, and what must hold of them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from diffract.edits.mixing import (
    ANTIPARALLEL,
    PARALLEL,
    angle,
    interpolate,
    linear,
    slerp,
    task_arithmetic,
    weighted_sum,
)


def test_hand_computed_of_the_line():
    a, b = torch.tensor([0.0, 4.0, -2.0]), torch.tensor([8.0, 4.0, 2.0])
    # Powers of two: exact.
    assert interpolate(a, b, 0.25).tolist() == [2.0, 4.0, -1.0]
    assert interpolate(a, b, 1.5).tolist() == [12.0, 4.0, 4.0]
    assert interpolate(a, b, -0.5).tolist() == [-4.0, 4.0, -4.0]


def test_the_ends_are_the_tensors_themselves_of_the_line():
    a, b = torch.tensor([torch.nan, -0.0, torch.inf]), torch.tensor([-0.0, torch.nan, 1.0])
    assert interpolate(a, b, 0.0) is a
    assert interpolate(a, b, 1.0) is b


@given(at=st.floats(-2, 3), seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_against_numpy_of_the_line(at: float, seed: int, dtype: torch.dtype):
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


def pair(seed: int, size: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a, b


def test_hand_computed_quarter_circle():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    theta = angle([(a, b)])
    assert theta == pytest.approx(math.pi / 2, abs=1e-15)  # one rounding of pi / 2
    third = slerp(a, b, 1 / 3, theta)
    assert third.tolist() == pytest.approx([math.cos(math.pi / 6), math.sin(math.pi / 6)], abs=2e-7)  # float32
    # Unnormalised: a length of 2 at the start, of 4 at the end.
    assert slerp(2 * a, 4 * b, 0.5, theta).tolist() == pytest.approx([2**0.5, 2 * 2**0.5], abs=1e-6)  # float32
    beyond = slerp(a, b, 2.0, theta)
    assert beyond.tolist() == pytest.approx([-1, 0], abs=2e-7)  # float32; half a circle from a


@given(seed=st.integers(0, 500), at=st.floats(-1, 2))
def test_unit_tensors_stay_on_the_circle_at_the_right_distance(seed: int, at: float):
    a, b = (x / x.norm() for x in pair(seed, size=5))
    theta = angle([(a, b)])
    assume(1e-2 < theta < math.pi - 1e-2)  # 1 / sin(theta) amplifies rounding: by at most 100
    got = slerp(a, b, at, theta)
    assert got.norm().item() == pytest.approx(1, abs=1e-11)
    # cos of the angle to a: at theta, taken as a cosine since an arccos near 0 loses half of the digits.
    assert got.dot(a).item() == pytest.approx(math.cos(at * theta), abs=1e-11)


@given(seed=st.integers(0, 500), cuts=st.lists(st.integers(0, 12), max_size=5))
def test_the_angle_does_not_depend_on_the_blocks(seed: int, cuts: list[int]):
    a, b = (x.view(12, 5) for x in pair(seed))
    edges = [0, *sorted(cuts), 12]
    blocks = [(a[start:stop], b[start:stop]) for start, stop in pairwise(edges)]
    cosine = np.sum(a.numpy() * b.numpy()) / np.linalg.norm(a.numpy()) / np.linalg.norm(b.numpy())
    # Sums of 60 products in another order; the angle is not near 0 or pi.
    assert angle(blocks) == pytest.approx(math.acos(cosine), abs=1e-13)
    assert angle([(a.mT, b.mT)]) == pytest.approx(math.acos(cosine), abs=1e-13)


def test_a_block_of_several_pieces():
    a, b = torch.randn(2, 600_000, generator=torch.Generator().manual_seed(0))
    cosine = float(a.double() @ b.double() / a.double().norm() / b.double().norm())
    assert angle([(a, b)]) == pytest.approx(math.acos(cosine), abs=1e-12)  # float64 sums of 600 000 products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at", [-0.3, 0.3, 0.5, 0.9])
def test_no_jump_where_the_line_takes_over(dtype: torch.dtype, at: float):
    a, b = (x.to(dtype) for x in pair(1))
    below, above = slerp(a, b, at, PARALLEL * 0.99), slerp(a, b, at, PARALLEL)
    assert torch.equal(below, interpolate(a, b, at))
    # A few roundings of numbers below 4.
    torch.testing.assert_close(below, above, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_rounding_stays_small_up_to_opposite():
    a, _ = pair(2)
    b = torch.randn(60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    b -= a * (a @ b) / (a @ a)
    theta = math.pi - 1.01 * ANTIPARALLEL
    opposite = a * math.cos(theta) + b / b.norm() * a.norm() * math.sin(theta)
    exact = slerp(a, opposite, 0.4, theta)
    got = slerp(a.float(), opposite.float(), 0.4, theta)
    # The documented bound 2^-12, relative to the largest entry; twice, for a and for b.
    assert (got.double() - exact).abs().max() < 2 * 2.0**-12 * a.abs().max()


def test_parallel_opposite_and_zero_tensors_take_the_line():
    a, _ = pair(4)
    for b in (3 * a, -a, -2 * a, torch.zeros_like(a)):
        assert torch.equal(slerp(a, b, 0.3, angle([(a, b)])), interpolate(a, b, 0.3))
    assert angle([(a, torch.zeros_like(a))]) == 0
    assert angle([(a, -a)]) == pytest.approx(math.pi, abs=1e-7)  # arccos near -1
    assert angle([]) == 0


def test_the_ends_are_the_tensors_themselves_of_the_arc():
    a, b = pair(5)
    assert slerp(a, b, 0.0, 1.0) is a
    assert slerp(a, b, 1.0, 1.0) is b


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_has_no_angle(bad: float):
    a, b = pair(6)
    a[3] = bad
    with pytest.raises(ValueError, match="finite"):
        angle([(a, b)])
    with pytest.raises(ValueError, match="0 to pi"):
        slerp(a, b, 0.5, bad)


def test_hand_computed_of_means():
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


def test_weights_that_do_not_fit_of_means():
    x = torch.ones(2)
    with pytest.raises(ValueError, match="not zero"):
        linear([x, x], [1.0, -1.0])
    with pytest.raises(ValueError, match="one weight for each"):
        linear([x, x], [1.0])
    with pytest.raises(ValueError, match="one weight for each"):
        linear([x], [1.0, 2.0])


def test_hand_computed_of_task_vectors():
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
def test_against_numpy_of_task_vectors(weights: list[float], dtype: torch.dtype):
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


def test_numbers_that_do_not_fit_of_task_vectors():
    with pytest.raises(ValueError, match="one weight for each tuned"):
        task_arithmetic(torch.ones(2), [torch.ones(2)], [])
