"""Sums over pairs of matrices, and what follows from them, against NumPy on the matrices themselves."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from diffract.linalg import (
    LowRank,
    PairSpectrum,
    PairSums,
    Sums,
    factored_spectrum,
    pair_from_matrices,
    pair_from_sums,
    replace_pairs,
    weak_pairs,
)
from diffract.linalg import blas as products_module
from diffract.metrics.single import entry_kurtosis, entry_std

SHAPES = [(7, 12), (12, 7), (9, 9), (1, 6), (6, 1)]
"""Rows short, columns short, square, and the two thinnest."""

CPU = torch.device("cpu")

ROUNDING = 1e-12
"""Relative: sums of a hundred float64 products lose a few eps; the rest is room for another order of summation."""

VECTORS = 1e-9
"""Absolute, on cosines: eps (sigma_1 / sigma_M)^2 over the relative gap; these matrices have sigmas 1, 1.3, 1.6, ..."""


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spaced(count: int, m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Matrices whose sigmas lie well apart, so that their vectors are well defined."""
    k = min(m, n)
    sigmas = 1 + 0.3 * torch.arange(k, dtype=torch.float64).flip(0)
    left = torch.linalg.qr(gaussian(count, m, k, seed=seed)).Q
    right = torch.linalg.qr(gaussian(count, n, k, seed=seed + 1)).Q
    return left * sigmas @ right.mT


def pair(m: int, n: int, count: int = 3, size: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    base = spaced(count, m, n)
    return base, base + size * gaussian(count, m, n, seed=9)


def summed(
    base: torch.Tensor,
    tuned: torch.Tensor | LowRank,
    *,
    powers: int = 4,
    delta: bool = True,
    vectors: bool = True,
    rounding: tuple[int, int] = (52, -1022),
) -> PairSums:
    shape = (base.shape[1], base.shape[2])
    sums = PairSums(
        len(base), shape, powers=powers, delta=delta, vectors=vectors, row_energy=True, rounding=rounding, device=CPU
    )
    sums.add(base, tuned)
    return sums


@dataclass
class Reference:
    """What a pair has to do with each other, from full decompositions by NumPy."""

    left: np.ndarray
    right: np.ndarray
    diagonal: np.ndarray
    energy: np.ndarray
    row_energy: np.ndarray
    sigmas: tuple[np.ndarray, np.ndarray]


def reference(base: torch.Tensor, tuned: torch.Tensor) -> Reference:
    w0, w1 = base.double().numpy(), tuned.double().numpy()
    U0, S0, V0 = np.linalg.svd(w0, full_matrices=False)
    U1, S1, V1 = np.linalg.svd(w1, full_matrices=False)
    core = U0.T @ (w1 - w0) @ V0.T
    energy = ((U0.T @ (w1 - w0)) ** 2).sum(1)
    row_energy = (U0.T**2) @ ((w1 - w0) ** 2).sum(1)
    return Reference(np.abs(U0.T @ U1), np.abs(V0 @ V1.T), np.diag(core), energy, row_energy, (S0, S1))


def check(found: PairSpectrum, base: torch.Tensor, tuned: torch.Tensor, tolerance: float = VECTORS) -> None:
    for i in range(len(base)):
        want = reference(base[i], tuned[i])
        for name, value in (
            ("left_overlap", want.left),
            ("right_overlap", want.right),
            ("diagonal", want.diagonal),
            ("energy", want.energy),
            ("row_energy", want.row_energy),
        ):
            got = getattr(found, name)[i].numpy()
            got = np.abs(got) if name.endswith("overlap") else got  # signs of vectors are arbitrary
            assert got.shape == value.shape
            assert np.abs(got - value).max() <= tolerance, name
        for spectrum, S in zip((found.base, found.tuned), want.sigmas, strict=True):
            assert np.abs(spectrum.S[i].numpy() - S).max() <= 1e-12 * S[0]  # eps sigma_1^2 / sigma_M


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_entries_and_products(shape: tuple[int, int]) -> None:
    base, tuned = pair(*shape)
    sums = summed(base, tuned)
    for i in range(len(base)):
        w0, w1 = base[i].numpy(), tuned[i].numpy()
        d = w1 - w0
        for moments, w in ((sums.base_moments, w0), (sums.tuned_moments, w1)):
            assert moments.count == w.size
            for power, name in enumerate(("first", "second", "third", "fourth"), 1):
                # The first and third powers cancel, so the tolerance is of the sum of magnitudes.
                x = w - moments.centre[i].item()
                error = abs(getattr(moments, name)[i].item() - (x**power).sum())
                assert error <= ROUNDING * (np.abs(x) ** power).sum()
            assert moments.squares[i].item() == pytest.approx((w**2).sum(), rel=ROUNDING)
        assert sums.along[i].item() == pytest.approx((d * w0).sum(), abs=ROUNDING * np.abs(d * w0).sum())
        assert sums.delta_squares[i].item() == pytest.approx((d**2).sum(), rel=ROUNDING)
        g = (lambda a, b: a @ b.T) if shape[0] <= shape[1] else (lambda a, b: a.T @ b)
        scale = ROUNDING * np.linalg.norm(w0) ** 2
        assert np.abs(np.triu(sums.base_gram[i].numpy() - g(w0, w0))).max() <= scale
        assert np.abs(sums.cross[i].numpy() - g(w0, d)).max() <= scale
        assert np.abs(sums.delta_gram[i].numpy() - g(d, d)).max() <= scale
        assert np.abs(np.triu(sums.tuned_gram[i].numpy() - g(w1, w1))).max() <= scale


def test_powers_that_were_not_asked_for_are_nan_and_products_empty() -> None:
    base, tuned = pair(4, 6)
    sums = summed(base, tuned, powers=2, delta=False, vectors=False)
    assert bool(sums.tuned_moments.third.isnan().all())
    assert bool(sums.tuned_moments.fourth.isnan().all())
    assert bool(sums.tuned_moments.second.isfinite().all())
    assert sums.delta_gram.shape == sums.base_gram.shape == sums.cross.shape == (0, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_changed_counts_entries_that_differ(dtype: torch.dtype) -> None:
    base = gaussian(2, 5, 9).to(dtype)
    tuned = base.clone()
    tuned[0, 1, 2] += 1
    tuned[0, 4, 8] = -tuned[0, 4, 8]
    tuned[1, :, 3] *= 2
    assert summed(base, tuned).changed.tolist() == [2.0, 5.0]
    assert summed(base, base).changed.tolist() == [0.0, 0.0]
    signed = torch.zeros(1, 2, 2, dtype=dtype)
    assert summed(signed, -signed).changed.tolist() == [0.0]  # 0.0 == -0.0


# Rounding


def brute_force_floor(w: torch.Tensor, dtype: torch.dtype) -> float:
    """Squared spacing / 12, entry by entry; np.spacing where NumPy knows the dtype, the exponent by hand elsewhere."""
    info, total = torch.finfo(dtype), 0.0
    spacing = {torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16}.get(dtype)
    for value in w.flatten().tolist():
        if spacing is not None:
            ulp = float(np.spacing(spacing(abs(value))))
        else:
            magnitude = max(abs(value), info.smallest_normal)
            ulp = 2.0 ** (np.frexp(magnitude)[1] - 1) * info.eps
        total += ulp**2 / 12
    return total


def rounding_of(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.finfo(dtype)
    return round(-np.log2(info.eps)), round(np.log2(info.smallest_normal))


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_rounding_floor_entry_by_entry(dtype: torch.dtype) -> None:
    wide = gaussian(2, 6, 10) * torch.logspace(-6, 1, 10, base=4, dtype=torch.float64)
    wide[0, 0, :6] = torch.tensor([1.0, -2.0, 0.5, 0.0, -0.0, 1.75])  # powers of two, zeros
    wide[1, 1, :3] = torch.tensor([1e-7, -6e-8, 5e-5])  # below float16's smallest normal 6.1e-5
    tuned = wide.to(dtype)
    sums = summed(tuned, tuned, rounding=rounding_of(dtype))
    for i in range(2):
        want = brute_force_floor(tuned[i].double(), dtype)
        assert sums.rounding_squares[i].item() == pytest.approx(want, rel=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e5m2], ids=str)
def test_rounding_floor_is_the_norm_that_rounding_causes(dtype: torch.dtype) -> None:
    exact = gaussian(1, 200, 300, seed=3)
    rounded = exact.to(dtype)
    floor = summed(rounded, rounded, rounding=rounding_of(dtype)).rounding_squares.sqrt().item()
    real = (rounded.double() - exact).norm().item()
    # The errors of 60000 entries are uniform only within each binade; 2% is ten times the sampling error 1/sqrt(60000).
    # The binade's edge, where a rounded-up entry counts with the larger ulp, adds up to 2% for two bits of significand.
    assert floor == pytest.approx(real, rel=0.02 if dtype != torch.float8_e5m2 else 0.15)


# Pairs from sums


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_pair_from_sums_agrees_with_full_decompositions(shape: tuple[int, int]) -> None:
    base, tuned = pair(*shape)
    found = pair_from_sums(summed(base, tuned))
    check(found, base, tuned)
    assert found.base.method == found.tuned.method == ("gram",) * 3
    assert weak_pairs(found) == []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_pair_from_matrices_agrees_with_full_decompositions(shape: tuple[int, int]) -> None:
    base, tuned = pair(*shape)
    found = pair_from_matrices(base, tuned)
    check(found, base, tuned, 1e-12)  # LAPACK against LAPACK: eps over the relative gap 0.1
    assert found.base.method == found.tuned.method == ("lapack",) * 3
    assert found.base.U is None
    assert found.tuned.Vh is None


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)], ids=str)
def test_an_unrelated_pair(shape: tuple[int, int]) -> None:
    base, tuned = spaced(2, *shape, seed=1), spaced(2, *shape, seed=30)
    check(pair_from_sums(summed(base, tuned)), base, tuned)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)], ids=str)
def test_an_unchanged_matrix_overlaps_itself(shape: tuple[int, int]) -> None:
    base = spaced(1, *shape)
    found = pair_from_sums(summed(base, base))
    one = torch.eye(7, dtype=torch.float64)
    assert (found.left_overlap[0].abs() - one).abs().max() <= VECTORS
    assert (found.right_overlap[0].abs() - one).abs().max() <= VECTORS
    assert not found.diagonal.any()
    assert not found.energy.any()


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)], ids=str)
def test_swapping_left_and_right_is_transposing(shape: tuple[int, int]) -> None:
    base, tuned = pair(*shape)
    found = pair_from_sums(summed(base, tuned))
    turned = pair_from_sums(summed(base.mT.contiguous(), tuned.mT.contiguous()))
    # The same sums over the same entries; BLAS may take them in another order.
    assert (found.left_overlap.abs() - turned.right_overlap.abs()).abs().max() <= VECTORS
    assert (found.right_overlap.abs() - turned.left_overlap.abs()).abs().max() <= VECTORS
    assert (found.diagonal - turned.diagonal).abs().max() <= VECTORS


def same_moments(one: PairSums, other: PairSums) -> None:
    """Each has a centre of its own, from its first piece."""
    for first, second in ((one.base_moments, other.base_moments), (one.tuned_moments, other.tuned_moments)):
        assert first.squares.tolist() == pytest.approx(second.squares.tolist(), rel=ROUNDING)
        for of in (entry_std, entry_kurtosis):
            assert of(first).tolist() == pytest.approx(of(second).tolist(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("shape", [(7, 50), (50, 7), (9, 9)], ids=str)
def test_several_pieces_give_the_same(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = pair(*shape)
    whole = summed(base, tuned)
    monkeypatch.setitem(products_module.PIECE_BYTES, "cpu", 8 * min(shape) * 4)  # four of the long axis at once
    assert len(list(products_module.pieces((3, *shape), whole.side, CPU))) == 3 * -(-max(shape) // 4)
    cut = summed(base, tuned)
    same_moments(whole, cut)
    for name in ("delta_squares", "changed", "rounding_squares", "base_gram", "cross", "delta_gram"):
        one, other = getattr(whole, name), getattr(cut, name)
        assert (one - other).abs().max() <= ROUNDING * (1 + one.abs().max())
    check(pair_from_sums(cut), base, tuned)


def test_rows_may_come_one_block_after_the_other() -> None:
    base, tuned = pair(50, 7)
    whole = summed(base, tuned)
    parts = PairSums(3, (50, 7), powers=4, delta=True, vectors=True, row_energy=True, rounding=(52, -1022), device=CPU)
    single = Sums(3, (50, 7), powers=4, products=True, device=CPU)
    for rows in (slice(0, 20), slice(20, 21), slice(21, 50)):
        parts.add(base[:, rows], tuned[:, rows])
        single.add(base[:, rows])
    for name in ("delta_squares", "rounding_squares", "base_gram", "cross", "delta_gram"):
        one, other = getattr(whole, name), getattr(parts, name)
        assert (one - other).abs().max() <= ROUNDING * (1 + one.abs().max())
    assert torch.equal(whole.changed, parts.changed)
    assert (single.gram - whole.base_gram).abs().max() <= ROUNDING * whole.base_gram.abs().max()
    same_moments(whole, parts)
    kurtosis = [entry_kurtosis(moments).tolist() for moments in (single.moments, whole.base_moments)]
    assert kurtosis[0] == pytest.approx(kurtosis[1], rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_stacks_of_stored_dtypes(dtype: torch.dtype) -> None:
    base, tuned = pair(7, 12)
    base, tuned = base.to(dtype), tuned.to(dtype)
    straight = summed(base, tuned)
    view0 = base.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    view1 = torch.cat([tuned, tuned], 2)[:, :, :12]
    strided = summed(view0, view1)
    for name in ("delta_squares", "changed", "rounding_squares", "base_gram", "cross", "delta_gram"):
        assert torch.equal(getattr(straight, name), getattr(strided, name))  # the same float64 values, the same order


# What Gram matrices cannot resolve


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)], ids=str)
def test_weak_pairs_are_found_and_replaced(shape: tuple[int, int]) -> None:
    base, tuned = pair(*shape, count=4)
    base[1] = gaussian(shape[0], 2, seed=5) @ gaussian(2, shape[1], seed=6)
    tuned[1] = base[1] + 0.1 * gaussian(*shape, seed=7)
    tuned[2] = gaussian(shape[0], 3, seed=8) @ gaussian(3, shape[1], seed=9)
    tuned[3] = 0.0
    base[3] = spaced(1, *shape)[0]
    coarse = pair_from_sums(summed(base, tuned))
    weak = weak_pairs(coarse)
    assert {1, 2} <= set(weak)
    assert 0 not in weak
    mended = replace_pairs(coarse, [1, 2], pair_from_matrices(base[[1, 2]], tuned[[1, 2]]))
    assert mended.base.method == ("gram", "lapack", "lapack", "gram")
    for name in ("left_overlap", "right_overlap", "diagonal", "energy"):
        one, other = getattr(coarse, name), getattr(mended, name)
        assert torch.equal(one[0], other[0])
    want = pair_from_matrices(base, tuned)
    for i in (1, 2):
        assert torch.equal(mended.left_overlap[i], want.left_overlap[i])
        assert torch.equal(mended.energy[i], want.energy[i])
        assert torch.equal(mended.base.S[i], want.base.S[i])
        assert torch.equal(mended.tuned.resolved[i], want.tuned.resolved[i])


def test_a_zero_tuned_matrix_is_known_as_zero() -> None:
    base = gaussian(1, 40, 90, seed=2).float()
    found = pair_from_sums(summed(base, torch.zeros_like(base)))
    assert found.tuned.S.max().item() == 0.0


@pytest.mark.parametrize("scale", [1e5, 1.0, 1e-2, 1e-5])
def test_sigmas_of_a_tuned_matrix_of_another_size_than_its_base(scale: float) -> None:
    base, tuned = gaussian(1, 20, 30, seed=2), scale * gaussian(1, 20, 30, seed=3)
    found = pair_from_sums(summed(base, tuned))
    want = torch.linalg.svdvals(tuned)
    # W1's Gram matrix is a sum of parts as large as W0's: the promise for one matrix holds of the larger sigma_1.
    assert (found.tuned.S - want).abs().max() <= 1e-7 * max(want.max(), found.base.S.max())
    if scale >= 1e-2:
        assert (found.tuned.S - want).abs().max() <= 1e-7 * want.max()


# Low rank


@pytest.mark.parametrize("shape", [(7, 50), (50, 7), (9, 9)], ids=str)
@pytest.mark.parametrize("room", [1 << 25, 8 * 9 * 4])
def test_a_low_rank_change_equals_the_dense_one(
    shape: tuple[int, int], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(products_module.PIECE_BYTES, "cpu", room)
    base = spaced(2, *shape)
    change = LowRank(0.1 * gaussian(2, shape[0], 3, seed=4), gaussian(2, 3, shape[1], seed=5))
    tuned = base + change.B @ change.A
    factored, dense = summed(base, change), summed(base, tuned)
    same_moments(dense, factored)
    for name in ("delta_squares", "rounding_squares", "base_gram", "cross", "delta_gram"):
        one, other = getattr(dense, name), getattr(factored, name)
        # W0 + D - W0 is D to eps |W0|.
        assert (one - other).abs().max() <= ROUNDING * (1 + one.abs().max()), name
    check(pair_from_sums(factored), base, tuned)


def test_low_rank_pieces() -> None:
    change = LowRank(gaussian(2, 8, 3, seed=1), gaussian(2, 3, 5, seed=2))
    whole = change.B @ change.A
    assert change.shape == (2, 8, 5)
    assert torch.equal(change[0:1, 2:4, 1:3], (change.B[0:1, 2:4] @ change.A[0:1, :, 1:3]))
    # A part of a product is the product of parts; BLAS may sum it in another order.
    assert (change[:, :, 1:3] - whole[:, :, 1:3]).abs().max() <= ROUNDING
    assert (change.rows(2, 6)[:, 1:2, :] - whole[:, 3:4]).abs().max() <= ROUNDING
    assert change.rows(2, 6).shape == (2, 4, 5)


@pytest.mark.parametrize("shape", [(20, 3, 30), (30, 3, 20), (4, 6, 5), (2, 6, 9), (9, 6, 2), (6, 1, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_factored_spectrum_is_that_of_the_product(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, r, n = shape
    B, A = gaussian(2, m, r, seed=1).to(dtype), gaussian(2, r, n, seed=2).to(dtype)
    whole = B.double() @ A.double()
    found = factored_spectrum(B, A, vectors=True)
    k = min(m, r, n)
    assert found.S.shape == (2, k)
    want = torch.linalg.svdvals(whole)
    # QR and LAPACK are backward stable: eps ||B|| ||A||, here a few times sigma_1.
    assert (found.S - want[:, :k]).abs().max() <= ROUNDING * want.max()
    assert want[:, k:].numel() == 0 or want[:, k:].max() <= ROUNDING * want.max()
    assert torch.equal(factored_spectrum(B, A).S.round(decimals=9), found.S.round(decimals=9))
    assert factored_spectrum(B, A).U is None
    assert found.U.shape == (2, m, k)
    assert found.Vh.shape == (2, k, n)
    one = torch.eye(k, dtype=torch.float64)
    assert (found.U.mT @ found.U - one).abs().max() <= ROUNDING
    assert (found.Vh @ found.Vh.mT - one).abs().max() <= ROUNDING
    assert (found.U * found.S[:, None] @ found.Vh - whole).abs().max() <= ROUNDING * want.max()


def test_factored_spectrum_keeps_small_sigmas_that_the_product_would_lose() -> None:
    left, right = torch.linalg.qr(gaussian(30, 2, seed=1)).Q, torch.linalg.qr(gaussian(40, 2, seed=2)).Q
    sigmas = torch.tensor([1.0, 1e-12], dtype=torch.float64)
    found = factored_spectrum((left * sigmas.sqrt())[None], (right * sigmas.sqrt()).mT[None])
    assert found.S[0, 0].item() == pytest.approx(1.0, rel=1e-14)
    # Absolute error eps ||B|| ||A||, so 1e-4 relative at 1e-12; graded factors do better.
    assert found.S[0, 1].item() == pytest.approx(1e-12, rel=1e-3)


def test_a_zero_factor_gives_zero() -> None:
    found = factored_spectrum(torch.zeros(1, 5, 2), gaussian(1, 2, 6))
    assert found.S.tolist() == [[0.0, 0.0]]
