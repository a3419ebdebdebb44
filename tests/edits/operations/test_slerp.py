from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from diffract.edits.mixing import ANTIPARALLEL, PARALLEL, angle, interpolate, slerp


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


def test_the_ends_are_the_tensors_themselves():
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
