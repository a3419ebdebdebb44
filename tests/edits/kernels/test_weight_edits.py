"""LASER, SVF and PiSSA: edits of the singular values of a weight matrix itself."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffract.edits.spectral_edits import laser, pissa, svf

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(16, 16), (40, 9), (9, 40), (1, 5), (5, 1)]


def weights(shape: tuple[int, int], dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scipy_svd(w: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return scipy.linalg.svd(w.double().numpy(), full_matrices=False, lapack_driver="gesvd")


def tolerance(values: torch.Tensor) -> float:
    """Float64 rounding over gaps of 1e-2; or half a unit in the last place of float32, of entries below 8."""
    return 1e-12 if values.dtype == torch.float64 else 4 * 2.0**-23


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float64, torch.float32) else torch.float32


@pytest.mark.parametrize("rho", [0.0, 0.1, 0.4, 0.8, 0.99])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_laser_agrees_with_lapack(shape: tuple[int, int], dtype: torch.dtype, rho: float) -> None:
    w = weights(shape, dtype)
    before = w.clone()
    U, S, Vh = scipy_svd(w)
    found = laser(w, rho)
    k = max(1, int(rho * len(S) + 1e-9))
    assert (found.kept, found.total) == (k, len(S))
    assert found.values.dtype == result_dtype(dtype)
    want = (U[:, :k] * S[:k]) @ Vh[:k]
    np.testing.assert_allclose(found.values.double().numpy(), want, rtol=0, atol=tolerance(found.values))
    assert found.energy_share == pytest.approx((S[:k] ** 2).sum() / (S**2).sum(), rel=1e-12)
    assert torch.equal(w, before)


@pytest.mark.parametrize(("rho", "kept"), [(0.005, 1), (0.29, 29), (0.295, 29), (0.3, 30), (1.0, 100)])
def test_the_rank_is_rounded_down(rho: float, kept: int) -> None:
    # 0.29 * 100 is 28.999999999999996 in floats.
    assert laser(torch.diag(torch.arange(100, 0, -1.0)), rho).kept == kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_full_rank_is_the_matrix_itself(dtype: torch.dtype) -> None:
    w = weights((6, 9), dtype)
    assert torch.equal(laser(w, 1.0).values.to(dtype), w)
    zero = laser(torch.zeros_like(w), 0.5)
    assert (zero.kept, zero.energy_share, int(zero.values.count_nonzero())) == (0, 1.0, 0)


@pytest.mark.parametrize("rho", [-0.1, 1.1, math.nan])
def test_what_is_no_fraction_of_a_rank(rho: float) -> None:
    with pytest.raises(ValueError, match="rho: expected a fraction from 0 to 1; got"):
        laser(torch.eye(3), rho)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svf_agrees_with_lapack(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = weights(shape, dtype)
    before = w.clone()
    U, S, Vh = scipy_svd(w)
    z = torch.linspace(-1, 2, len(S))
    found = svf(w, z)
    assert found.dtype == result_dtype(dtype)
    want = (U * (S * z.double().numpy())) @ Vh
    np.testing.assert_allclose(found.double().numpy(), want, rtol=0, atol=2 * tolerance(found))
    assert torch.equal(w, before)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(-3, 3), st.integers(0, 99))
def test_one_factor_scales_the_matrix(m: int, n: int, z: float, seed: int) -> None:
    w = weights((m, n), seed=seed)
    # Rounding of sums of at most nine products.
    torch.testing.assert_close(svf(w, z), z * w, rtol=0, atol=1e-13)
    torch.testing.assert_close(svf(w, torch.full((min(m, n),), z)), torch.tensor(z).double() * w, rtol=0, atol=1e-6)


def test_svf_by_hand() -> None:
    w = torch.tensor([[0.0, 3.0, 0.0], [5.0, 0.0, 0.0]])
    want = torch.tensor([[0.0, -3.0, 0.0], [10.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(svf(w, torch.tensor([2.0, -1.0])), want, rtol=0, atol=1e-14)
    assert int(svf(torch.zeros(3, 2), 2.0).count_nonzero()) == 0


def test_factors_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"z: expected a number or 3 of them; got shape \(4,\)"):
        svf(torch.eye(3), torch.ones(4))
    with pytest.raises(ValueError, match="z: expected finite factors"):
        svf(torch.eye(3), torch.tensor([1.0, math.nan, 1.0]))
    with pytest.raises(ValueError, match="z: expected finite factors"):
        svf(torch.eye(3), math.inf)


@pytest.mark.parametrize("factor_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pissa_sums_to_the_matrix(shape: tuple[int, int], dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    w = weights(shape, dtype)
    before = w.clone()
    rank = min(3, *shape)
    found = pissa(w, rank, factor_dtype=factor_dtype)
    U, S, Vh = scipy_svd(w)
    for factor in (found.A, found.B):
        assert torch.equal(factor.to(factor_dtype).double(), factor)
    # What is stored adds up: to float64 rounding of entries below 10 before the residual is rounded, whatever the
    # factors were rounded to, and to the residual's own rounding after it.
    torch.testing.assert_close(found.residual + found.B @ found.A, w.double(), rtol=0, atol=1e-14)
    stored = found.residual.to(dtype).double()
    bound = torch.finfo(dtype).eps / 2 * found.residual.abs() + torch.finfo(dtype).smallest_normal + 1e-14
    assert bool(((stored + found.B @ found.A - w.double()).abs() <= bound).all())
    # Two roundings of factors whose entries sum to sigma_1 at the most; over gaps of 1e-2 for float64.
    want = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    atol = 2 * torch.finfo(factor_dtype).eps * S[0] + 1e-12
    np.testing.assert_allclose((found.B @ found.A).numpy(), want, rtol=0, atol=atol)
    assert torch.equal(w, before)


def test_pissa_by_hand() -> None:
    found = pissa(torch.tensor([[0.0, 2.0], [-16.0, 0.0], [0.0, 0.0]]), 1)
    sign = found.B[1, 0].sign()
    torch.testing.assert_close(found.B * sign, torch.tensor([[0.0], [4], [0]]).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(found.A * sign, torch.tensor([[-4.0, 0]]).double(), rtol=0, atol=1e-14)
    want = torch.tensor([[0.0, 2.0], [0.0, 0.0], [0.0, 0.0]]).double()
    torch.testing.assert_close(found.residual, want, rtol=0, atol=1e-14)


def test_the_adapter_of_a_zero_matrix_is_zero() -> None:
    found = pissa(torch.zeros(4, 3), 2)
    assert found.B.shape == (4, 2)
    assert not any(bool(t.any()) for t in (found.A, found.B, found.residual))


@pytest.mark.parametrize("rank", [0, 4, -1])
def test_ranks_that_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank: expected 1 to 3 for a matrix of shape \(3, 5\); got {rank}"):
        pissa(torch.ones(3, 5), rank)


def test_factors_must_fit_their_dtype() -> None:
    with pytest.raises(ValueError, match=r"they overflow torch\.float16"):
        pissa(torch.eye(2) * 1e10, 1, factor_dtype=torch.float16)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite(bad: float) -> None:
    w = torch.eye(3)
    w[1, 2] = bad
    for edit in (lambda: laser(w, 0.5), lambda: svf(w, 1.0), lambda: pissa(w, 1)):
        with pytest.raises(ValueError, match="expected finite values, got NaN or an infinity"):
            edit()
