"""Changes as thin factors, against LAPACK on the whole float64 change."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffract.edits.directions import decomposed, energy_share, fewer
from diffract.edits.rule import Rule
from diffract.edits.spectral_edits import LowRankDelta, low_rank

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SHAPES = [(20, 20), (50, 11), (11, 50), (1, 6), (6, 1)]


def pair(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base, noise = (0.02 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (base + 0.1 * noise).to(dtype), base.to(dtype)


def delta_of(tuned: torch.Tensor, base: torch.Tensor) -> np.ndarray:
    return tuned.double().numpy() - base.double().numpy()


@pytest.mark.parametrize("rule", [Rule(rank=4), Rule(drop=0.5, side="tail"), Rule(band=(0.2, 0.6))], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_agree_with_lapack(shape: tuple[int, int], dtype: torch.dtype, rule: Rule) -> None:
    tuned, base = pair(shape, dtype)
    delta = delta_of(tuned, base)
    U, S, Vh = scipy.linalg.svd(delta, full_matrices=False, lapack_driver="gesvd")
    found = low_rank(tuned, base, rule)
    start = {"rank": 0, "tail": len(S) - found.kept, "band": math.floor(0.2 * len(S) + 0.5)}[
        "band" if rule.band else "tail" if rule.side == "tail" else "rank"
    ]
    part = slice(start, start + found.kept)
    assert found.B.shape == (shape[0], found.kept)
    assert found.A.shape == (found.kept, shape[1])
    # eps sigma_1^2 over the gap at the cut, which is 1e-3 sigma_1 or more here, and room.
    want = (U[:, part] * S[part]) @ Vh[part]
    np.testing.assert_allclose((found.B @ found.A).numpy(), want, rtol=0, atol=1e-11 * S[0])
    assert found.error == pytest.approx(np.linalg.norm(delta - want), abs=1e-11 * S[0])
    assert found.error_relative == pytest.approx(found.error / np.linalg.norm(delta), rel=1e-13)
    # Balanced: vectors from Gram matrices are orthonormal to eps (sigma_1 / sigma)^2, 1e-10 here.
    for product in (found.B.mT @ found.B, found.A @ found.A.mT):
        np.testing.assert_allclose(product.numpy(), np.diag(S[part]), rtol=0, atol=1e-9 * S[0])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000), st.sampled_from(DTYPES))
def test_all_directions_are_the_change(m: int, n: int, seed: int, dtype: torch.dtype) -> None:
    tuned, base = pair((m, n), dtype, seed)
    found = low_rank(tuned, base, Rule(rank=12))
    # The contract; rounding of at most a dozen products is 1e-15.
    assert found.error_relative <= 1e-12
    np.testing.assert_allclose((found.B @ found.A).numpy(), delta_of(tuned, base), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (12, 12)])
def test_weak_directions_are_right(shape: tuple[int, int], dtype: torch.dtype) -> None:
    # Twelve sigmas from 1 to 1e-7; rounding to the dtype moves them, the reference sees the same rounded entries.
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(d, 12, generator=generator).double()).Q for d in shape)
    tuned = (left * torch.logspace(0, -7, 12).double() @ right.mT).to(dtype)
    base = torch.zeros_like(tuned)
    S = scipy.linalg.svdvals(delta_of(tuned, base))
    found = low_rank(tuned, base, Rule(rank=12))
    assert found.error_relative <= 1e-12
    # LAPACK (sigma_12 <= 1e-5 sigma_1) is right to eps sigma_1, a Gram matrix to eps sigma_1^2 / sigma <= 2e-11.
    norms = found.B.square().sum(0).numpy()
    np.testing.assert_allclose(norms, S, rtol=0, atol=1e-10 * S[0])
    gram = (found.A @ found.A.mT).numpy() / np.sqrt(np.outer(S, S))
    np.testing.assert_allclose(gram, np.eye(12), rtol=0, atol=2e-6 if dtype != torch.float64 else 1e-8)


def test_float64_is_not_squared() -> None:
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.linalg.qr(torch.randn(9, 9, generator=generator).double()).Q for _ in range(2))
    tuned = left * torch.logspace(0, -4, 9).double() @ right.mT
    found = low_rank(tuned, torch.zeros_like(tuned), Rule(rank=9))
    # eps sigma_1 / sigma_9 = 2e-12, where vectors by the Gram matrix have eps (sigma_1 / sigma_9)^2 = 2e-8.
    roots = found.A.norm(dim=1)
    gram = (found.A / roots[:, None]) @ (found.A / roots[:, None]).mT
    torch.testing.assert_close(gram, torch.eye(9).double(), rtol=0, atol=1e-11)


def test_by_hand() -> None:
    tuned = torch.tensor([[0.0, 9.0, 0.0], [-4.0, 0.0, 0.0]])
    found = low_rank(tuned, torch.zeros(2, 3), Rule(rank=1))
    sign = found.B[0, 0].sign()
    torch.testing.assert_close(found.B * sign, torch.tensor([[3.0], [0]]).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(found.A * sign, torch.tensor([[0.0, 3, 0]]).double(), rtol=0, atol=1e-14)
    assert (found.kept, found.total) == (1, 2)
    assert found.error == pytest.approx(4.0, rel=1e-14)
    assert found.error_relative == pytest.approx(4 / math.sqrt(97), rel=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_kept(dtype: torch.dtype) -> None:
    tuned, base = pair((7, 5), dtype)
    found = low_rank(tuned, base, Rule(drop=1.0))
    assert found.B.shape == (7, 0)
    assert found.A.shape == (0, 5)
    assert found.error == pytest.approx(np.linalg.norm(delta_of(tuned, base)), rel=1e-13)
    assert found.error_relative == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_unchanged_matrix_has_no_factors(dtype: torch.dtype) -> None:
    tuned, _ = pair((7, 5), dtype)
    found = low_rank(tuned, tuned, Rule(rank=3))
    assert (found.kept, found.total, found.error, found.error_relative) == (0, 5, 0.0, 0.0)
    assert found.B.shape == (7, 0)


def test_a_rank_that_is_given_is_kept_beyond_what_is_there() -> None:
    tuned = torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 5))
    found = low_rank(tuned, torch.zeros(5, 4), Rule(rank=3))
    assert found.B.shape == (5, 3)
    assert found.error_relative < 1e-14
    assert low_rank(tuned, torch.zeros(5, 4), Rule(energy=1.0)).kept == 1


def test_inputs_stay_and_views_do() -> None:
    tuned, base = pair((9, 6), torch.bfloat16)
    before = tuned.clone(), base.clone()
    want = low_rank(tuned, base, Rule(rank=2))
    found = low_rank(tuned.mT, base.mT, Rule(rank=2))
    torch.testing.assert_close((found.B @ found.A).mT, want.B @ want.A, rtol=0, atol=1e-14)
    for dtype in DTYPES[:2]:
        wide = tuned.to(dtype), base.to(dtype)
        low_rank(*wide, Rule(rank=2))
        assert torch.equal(wide[0], tuned.to(dtype))
        assert torch.equal(wide[1], base.to(dtype))
    assert torch.equal(tuned, before[0])
    assert torch.equal(base, before[1])


@pytest.mark.parametrize("where", [0, 1])
def test_what_no_factors_can_be_had_of(where: int) -> None:
    both = pair((4, 4), torch.bfloat16)
    both[where][1, 1] = math.nan
    with pytest.raises(ValueError, match="expected finite values"):
        low_rank(*both, Rule(rank=1))
    with pytest.raises(ValueError, match="one shape"):
        untyped(torch.zeros(2, 3), torch.zeros(3, 2))


def untyped(tuned: torch.Tensor, base: torch.Tensor) -> LowRankDelta:
    """As it is called where shapes are not checked at run time."""
    return getattr(low_rank, "__wrapped__", low_rank)(tuned, base, Rule(rank=1))


def test_the_fewer_directions() -> None:
    for kept, want, keeps in [
        (slice(0, 2), [0, 1], True),
        (slice(0, 3), [3, 4], False),
        (slice(1, 4), [0, 4], False),
        (slice(2, 4), [2, 3], True),
        (slice(0, 5), [], False),
        (slice(0, 0), [], True),
    ]:
        found, kept_ones = fewer(kept, 5, torch.device("cpu"))
        assert (found.tolist(), kept_ones) == (want, keeps)


def test_energy_of_a_range() -> None:
    S = torch.tensor([3.0, 2.0, 1.0]).double()
    assert energy_share(S, slice(1, 3)) == pytest.approx(5 / 14, rel=1e-15)
    assert energy_share(S * 0, slice(0, 0)) == 1.0


@pytest.mark.parametrize("gram", [True, False])
def test_directions_added_up_are_the_matrix(gram: bool) -> None:
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).double()
    found = decomposed(x, gram=gram)
    torch.testing.assert_close(found.added(slice(None)), x, rtol=0, atol=1e-14)
    B, A = found.factors(slice(0, 2))
    rest = found.added(torch.tensor([2, 3, 4]))
    torch.testing.assert_close(B @ A + rest, x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_that_of_the_stored_factors(dtype: torch.dtype) -> None:
    tuned = torch.from_numpy(np.random.default_rng(0).standard_normal((7, 5)))
    found = low_rank(tuned, torch.zeros_like(tuned), Rule(drop=0.0), factor_dtype=dtype)
    assert torch.equal(found.B, found.B.to(dtype).double())
    assert torch.equal(found.A, found.A.to(dtype).double())
    missed = np.linalg.norm(tuned.numpy() - found.B.numpy() @ found.A.numpy())
    assert found.error == pytest.approx(missed, rel=1e-9)  # a difference of products that agree to 1e-16 of 6
    assert found.error > 0


def test_factors_that_overflow_their_dtype_are_refused() -> None:
    tuned = torch.diag(torch.tensor([1e20, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"they overflow torch\.float16"):
        low_rank(tuned, torch.zeros_like(tuned), Rule(rank=1), factor_dtype=torch.float16)
