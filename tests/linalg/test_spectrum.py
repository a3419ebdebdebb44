"""Singular value decompositions of stacks against float64 LAPACK, as SciPy calls it."""

import numpy as np
import pytest
import scipy.linalg
import torch

from diffract.linalg import blas as products_module
from diffract.linalg import gram_values, spectrum, takes_gram

GRAM_TOLERANCE = 1e-7
"""Of sigma_1: an eigenvalue of a Gram matrix is off by c eps sigma_1^2, so a sigma at zero by sqrt(c eps) = 8e-8."""

EXACT_TOLERANCE = 1e-10
"""Of sigma_1: LAPACK against LAPACK, a small multiple of max(m, n) eps = 1e-14; two drivers may differ."""

EPSILON = float(torch.finfo(torch.float64).eps)

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def gaussian(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(m: int, k: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(gaussian(m, k, seed)).Q


def with_sigmas(m: int, n: int, sigmas: torch.Tensor, seed: int = 0) -> torch.Tensor:
    k = len(sigmas)
    return orthogonal(m, k, seed) * sigmas @ orthogonal(n, k, seed + 1).mT


MATRICES = {
    "gaussian": gaussian(24, 24),
    "tall": gaussian(70, 9),
    "wide": gaussian(9, 70),
    "row": gaussian(1, 40),
    "column": gaussian(40, 1),
    "single entry": torch.tensor([[-3.0]], dtype=torch.float64),
    "rank deficient": gaussian(30, 5, 1) @ gaussian(5, 40, 2),
    "rank one": gaussian(20, 1, 3) @ gaussian(1, 33, 4),
    "all ones": torch.ones(17, 31, dtype=torch.float64),
    "log-spaced": with_sigmas(20, 28, torch.logspace(0, -14, 20, dtype=torch.float64)),
    "log-spaced tall": with_sigmas(40, 15, torch.logspace(0, -14, 15, dtype=torch.float64)),
    "equal sigmas": orthogonal(12, 12, 5) * 4.0,
    "zero": torch.zeros(8, 11, dtype=torch.float64),
}


def reference(w: torch.Tensor) -> np.ndarray:
    """LAPACK's QR iteration, which is not the driver that the package takes."""
    return scipy.linalg.svd(w.double().numpy(), compute_uv=False, lapack_driver="gesvd")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["auto", "gram", "exact"])
@pytest.mark.parametrize("kind", MATRICES)
def test_sigmas_agree_with_lapack(kind: str, method: str, dtype: torch.dtype) -> None:
    w = MATRICES[kind].to(dtype)
    want = reference(w)
    found = spectrum(w, method=method)
    exact = method == "exact" or (method == "auto" and dtype == torch.float64)
    tolerance = EXACT_TOLERANCE if exact else GRAM_TOLERANCE
    assert found.S.dtype == torch.float64
    assert found.S.shape == want.shape
    assert np.abs(found.S.numpy() - want).max() <= tolerance * want[0]
    assert bool((found.S >= 0).all())
    assert bool((found.S.diff() <= 0).all())
    assert found.method == ("lapack" if exact else "gram",)


@pytest.mark.parametrize("method", ["auto", "gram", "exact"])
def test_zero_matrix_has_sigmas_of_exactly_zero(method: str) -> None:
    found = spectrum(torch.zeros(3, 4), method=method)
    assert found.S.tolist() == [0.0, 0.0, 0.0]
    assert found.resolved.item() == 0.0


@pytest.mark.parametrize("method", ["gram", "exact"])
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_resolved_separates_rank_from_rounding(method: str, rank: int) -> None:
    w = gaussian(12, rank, 6) @ gaussian(rank, 30, 7)
    found = spectrum(w, method=method)
    assert found.resolved.shape == ()
    assert int((found.resolved < found.S).sum()) == rank


def test_resolved_of_the_gram_matrix_is_coarser_and_both_follow_sigma_max() -> None:
    w = gaussian(10, 12)
    coarse, fine = spectrum(w, method="gram"), spectrum(w, method="exact")
    assert fine.resolved < 1e-5 * coarse.resolved
    eightfold = spectrum(8 * w, method="gram")
    # A power of two scales every intermediate exactly; only the eigensolver's own scaling may round.
    assert eightfold.resolved.item() == pytest.approx(8 * coarse.resolved.item(), rel=1e-14)
    assert coarse.resolved < GRAM_TOLERANCE * coarse.S[0] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_which_dtypes_take_the_gram_matrix(dtype: torch.dtype) -> None:
    assert takes_gram(dtype, "auto") == (dtype != torch.float64)
    assert takes_gram(dtype, "gram")
    assert not takes_gram(dtype, "exact")


# Vectors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["auto", "exact"])
@pytest.mark.parametrize("kind", MATRICES)
def test_vectors_are_orthonormal_and_reconstruct(kind: str, method: str, dtype: torch.dtype) -> None:
    w = MATRICES[kind].to(dtype).double()
    found = spectrum(MATRICES[kind].to(dtype), vectors=True, method=method)
    assert found.U is not None
    assert found.Vh is not None
    k = min(w.shape)
    assert found.U.shape == (w.shape[0], k)
    assert found.Vh.shape == (k, w.shape[1])
    # LAPACK's are orthogonal to a small multiple of eps; long-side vectors from the Gram matrix, Sigma^-1 P^T W, to
    # c eps (sigma_1 / sigma_M)^2, with c of a few.
    tolerance = 1e-13
    if found.method == ("gram",) and found.S[-1] > 0:
        tolerance += 16 * EPSILON * float(found.S[0] / found.S[-1]) ** 2
    one = torch.eye(k, dtype=torch.float64)
    if kind == "zero" and found.method == ("gram",):
        assert not found.S.any()
        return
    assert (found.U.mT @ found.U - one).abs().max() <= tolerance
    assert (found.Vh @ found.Vh.mT - one).abs().max() <= tolerance
    # P P^T W = W whatever the sigmas are: rounding alone, eps times a few.
    assert (found.U * found.S @ found.Vh - w).abs().max() <= 1e-12 * max(float(found.S[0]), 1e-300)


@pytest.mark.parametrize("ratio", [1e-4, 1e-6])
def test_vectors_of_weak_matrices_come_from_lapack(ratio: float) -> None:
    w = with_sigmas(4, 14, torch.tensor([1.0, 0.5, 0.3, ratio], dtype=torch.float64)).float()
    found = spectrum(w, vectors=True)
    assert found.method == ("gram" if ratio > 1e-5 else "lapack",)
    assert found.Vh is not None
    error = (found.Vh @ found.Vh.mT - torch.eye(4, dtype=torch.float64)).abs().max()
    # c eps / ratio^2 = c 2e-8 for the Gram matrix with c of a few; eps for LAPACK.
    assert error <= (1e-6 if ratio > 1e-5 else 1e-13)
    resolved = found.resolved / found.S[0]
    assert (resolved > 1e-9) == (ratio > 1e-5)


def test_only_the_weak_matrices_of_a_stack_go_to_lapack() -> None:
    strong, weak = gaussian(6, 9, 1).float(), (gaussian(6, 2, 2) @ gaussian(2, 9, 3)).float()
    stack = torch.stack([strong, weak, strong])
    found = spectrum(stack, vectors=True)
    assert found.method == ("gram", "lapack", "gram")
    assert found.U is not None
    assert found.Vh is not None
    for i in range(3):
        error = (found.U[i] * found.S[i] @ found.Vh[i] - stack[i].double()).abs().max()
        assert error <= 1e-12 * found.S[i, 0]  # rounding alone


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_vectors_of_a_rank_deficient_matrix_raise_no_overflow(scale: float) -> None:
    found = spectrum(torch.ones(64, 200) * scale, vectors=True)
    assert found.Vh is not None
    assert bool(found.Vh.isfinite().all())
    # sigma_1 of a constant matrix is c sqrt(m n); float32 holds the scale to 6e-8.
    assert found.S[0].item() == pytest.approx(scale * (64 * 200) ** 0.5, rel=1e-7)


def test_vectors_are_left_out_unless_wanted() -> None:
    for method in ("gram", "exact"):
        found = spectrum(gaussian(3, 4), method=method)
        assert found.U is None
        assert found.Vh is None


# Stacks


@pytest.mark.parametrize("method", ["gram", "exact"])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_leading_axes_are_kept(method: str, shape: tuple[int, int]) -> None:
    stack = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(3))
    found = spectrum(stack, vectors=True, method=method)
    k = min(shape)
    assert found.U is not None
    assert found.Vh is not None
    assert found.S.shape == (2, 3, k)
    assert found.resolved.shape == (2, 3)
    assert found.U.shape == (2, 3, shape[0], k)
    assert found.Vh.shape == (2, 3, k, shape[1])
    assert len(found.method) == 6
    again = found.U * found.S[..., None, :] @ found.Vh
    assert (again - stack.double()).abs().max() <= 1e-12 * found.S.max()  # rounding alone


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["auto", "gram", "exact"])
@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (1, 7)])
@pytest.mark.parametrize("vectors", [False, True])
def test_a_stack_gives_what_single_matrices_give_bit_for_bit(
    shape: tuple[int, int], method: str, dtype: torch.dtype, vectors: bool
) -> None:
    stack = torch.randn(4, *shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    whole = spectrum(stack, method=method, vectors=vectors)
    for i, w in enumerate(stack):
        one = spectrum(w, method=method, vectors=vectors)
        assert torch.equal(whole.S[i], one.S)
        assert torch.equal(whole.resolved[i], one.resolved)
        if vectors:
            assert torch.equal(whole.U[i], one.U)
            assert torch.equal(whole.Vh[i], one.Vh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("vectors", [False, True])
def test_strides_do_not_matter(dtype: torch.dtype, vectors: bool) -> None:
    big = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(5)).to(dtype)
    views = (big.mT, big[:, ::2], big[:, :, 3:35:2], big.permute(1, 0, 2)[4], big[1:, 5:9, 7:30].mT)
    for view in views:
        found = spectrum(view, vectors=vectors)
        want = spectrum(view.clone(memory_format=torch.contiguous_format), vectors=vectors)
        # The same values in the same order: the cast makes them contiguous before any product.
        assert torch.equal(found.S, want.S)
        if vectors:
            assert torch.equal(found.U, want.U)
            assert torch.equal(found.Vh, want.Vh)


def test_the_input_is_left_as_it_was() -> None:
    w = gaussian(6, 9)
    before = w.clone()
    for method in ("gram", "exact"):
        spectrum(w, vectors=True, method=method)
    assert torch.equal(w, before)


@pytest.mark.parametrize("shape", [(6, 50), (50, 6)])
def test_pieces_make_no_difference_but_rounding(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(6))
    whole = spectrum(stack, vectors=True)
    monkeypatch.setitem(products_module.PIECE_BYTES, "cpu", 8 * 6 * 7)  # seven of fifty at once, the last piece short
    cut = spectrum(stack, vectors=True)
    # The order of the summation changes: eps times a few, for well separated sigmas as these.
    assert (cut.S - whole.S).abs().max() <= 1e-12 * whole.S.max()
    assert cut.U is not None
    assert cut.Vh is not None
    assert (cut.U * cut.S[:, None, :] @ cut.Vh - stack.double()).abs().max() <= 1e-12 * whole.S.max()


def test_a_gram_matrix_that_is_not_finite_gives_nan_and_spares_its_neighbours() -> None:
    good = gaussian(5, 5) @ gaussian(5, 5).mT
    bad = good.clone()
    bad[2, 3] = torch.inf
    found = gram_values(torch.stack([good, bad, good]))
    assert bool(found.S[1].isnan().all())
    assert torch.equal(found.S[0], gram_values(good[None]).S[0])
    assert torch.equal(found.S[2], found.S[0])
