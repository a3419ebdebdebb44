"""Spectra of attention circuits from their factors, against the d x d products themselves."""

import numpy as np
import pytest
import scipy.linalg
import torch

from diffract.linalg import CircuitFactors, circuit_pair, circuit_spectrum

EPSILON = float(torch.finfo(torch.float64).eps)

GRAM = 1e-7
"""Of sigma_1: what is promised of the Gram way."""

EXACT = 1e-12
"""Of ||L|| ||R||: QR factors against LAPACK on the product; eps times a few."""


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(m: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(gaussian(m, k, seed=seed)).Q


def with_condition(condition: float, h: int, d: int, *, reverse: bool = False) -> torch.Tensor:
    """Factor (1, h, d) with log-spaced sigmas 1 .. 1 / condition; two of them have the same head-side vectors."""
    sigmas = torch.from_numpy(np.geomspace(1, 1 / condition, h))
    sigmas = sigmas.flip(0) if reverse else sigmas
    return (orthogonal(h, h) * sigmas @ orthogonal(d, h, seed=1 + reverse).mT)[None]


def reference(left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    """Singular values of the product, multiplied out, by LAPACK's QR iteration."""
    a, b = left.double().numpy(), right.double().numpy()
    return scipy.linalg.svd(a.T @ b, compute_uv=False, lapack_driver="gesvd")


def size(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(left.double(), 2) * torch.linalg.matrix_norm(right.double(), 2))


@pytest.mark.parametrize("method", ["auto", "gram", "exact"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6, 20, 20), (6, 20, 31), (6, 6, 6), (1, 5, 5), (7, 5, 9), (3, 3, 2)], ids=str)
def test_values_are_those_of_the_product(shape: tuple[int, int, int], dtype: torch.dtype, method: str) -> None:
    h, m, n = shape
    left, right = gaussian(4, h, m).to(dtype), gaussian(4, h, n, seed=1).to(dtype)
    found = circuit_spectrum(left, right, method=method)
    k = min(shape)
    assert found.S.shape == (4, k)
    assert found.S.dtype == torch.float64
    for i in range(4):
        want = reference(left[i], right[i])
        tolerance = EXACT * size(left[i], right[i]) if found.method[i] == "lapack" else GRAM * want[0]
        assert np.abs(found.S[i].numpy() - want[:k]).max() <= tolerance
        assert (want[k:] <= EXACT * size(left[i], right[i])).all()
    if method == "exact" or h > min(m, n) or (method == "auto" and dtype == torch.float64):
        assert found.method == ("lapack",) * 4


def test_well_conditioned_weights_below_float64_take_the_gram_way() -> None:
    left, right = gaussian(3, 8, 64).bfloat16(), gaussian(3, 8, 64, seed=1).bfloat16()
    assert circuit_spectrum(left, right).method == ("gram",) * 3
    assert circuit_spectrum(left, right, method="exact").method == ("lapack",) * 3


def test_orthonormal_factors_have_ones() -> None:
    frame = orthogonal(12, 4).mT[None]
    for method in ("gram", "exact"):
        found = circuit_spectrum(2 * frame, 3 * frame, method=method)
        assert found.S[0].tolist() == pytest.approx([6.0] * 4, rel=1e-14)  # a few eps


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4, 1e6, 1e8, 1e12])
def test_worst_alignment_keeps_the_promise(condition: float) -> None:
    h = 32
    left, right = with_condition(condition, h, 256), with_condition(condition, h, 256, reverse=True)
    # The large directions of one meet the small ones of the other: every sigma of the product is 1 / condition.
    found = circuit_spectrum(left, right, method="gram")
    assert found.method == ("gram" if condition <= 1e3 else "lapack",)
    error = (found.S[0] * condition - 1).abs().max().item()
    # The stated bound of either way: 2 eps k^2, and c eps ||L|| ||R|| / sigma_1 = c eps k with c of a few.
    assert error <= (2 * EPSILON * condition**2 if condition <= 1e3 else 8 * EPSILON * condition)
    assert error <= GRAM or condition > 1e8


def test_only_the_weak_factors_take_qr() -> None:
    left, right = gaussian(3, 5, 40), gaussian(3, 5, 40, seed=1)
    left[1, 4] = left[1, 3]
    right[2] *= torch.tensor([1.0, 1, 1, 1, 1e-6], dtype=torch.float64)[:, None]
    found = circuit_spectrum(left, right, method="gram")
    assert found.method == ("gram", "lapack", "lapack")
    for i in range(3):
        # Rows of very unlike size: QR loses eps of the largest.
        assert np.abs(found.S[i].numpy() - reference(left[i], right[i])[:5]).max() <= EXACT * size(left[i], right[i])


@pytest.mark.parametrize("method", ["gram", "exact"])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_resolved_separates_rank_from_rounding(rank: int, method: str) -> None:
    left = gaussian(2, 8, rank) @ gaussian(2, rank, 50, seed=1)
    found = circuit_spectrum(left, gaussian(2, 8, 50, seed=2), method=method)
    assert (found.resolved[:, None] < found.S).sum(-1).tolist() == [rank, rank]


@pytest.mark.parametrize("method", ["gram", "exact"])
def test_query_heads_share_a_key_value_head(method: str) -> None:
    left, right = gaussian(6, 4, 30), gaussian(2, 4, 30, seed=1)
    right_of_left = torch.tensor([0, 0, 0, 1, 1, 1])
    shared = circuit_spectrum(left, right, right_of_left=right_of_left, method=method)
    repeated = circuit_spectrum(left, right.repeat_interleave(3, 0), method=method)
    assert torch.equal(shared.S, repeated.S)
    assert torch.equal(shared.resolved, repeated.resolved)
    swapped = circuit_spectrum(left, right, right_of_left=1 - right_of_left, method=method)
    assert np.abs(swapped.S[0].numpy() - reference(left[0], right[1])[:4]).max() <= 1e-10  # well conditioned


@pytest.mark.parametrize("method", ["gram", "exact"])
def test_a_change_of_the_heads_basis_changes_nothing(method: str) -> None:
    left, right = gaussian(2, 5, 30), gaussian(2, 5, 30, seed=1)
    basis = gaussian(5, 5, seed=3)
    want = circuit_spectrum(left, right, method=method).S
    turned = circuit_spectrum(basis @ left, torch.linalg.inv(basis).mT @ right, method=method).S
    # eps k^2 with k, that of the basis included, of about a hundred.
    assert (turned - want).abs().max() <= 1e-10 * want.max()
    slices = torch.linalg.svdvals(basis @ left) - torch.linalg.svdvals(left)
    assert slices.abs().max() > 0.1  # while the slices' own spectra do change


def test_degenerate_factors_spare_their_neighbours() -> None:
    left, right = gaussian(5, 4, 20), gaussian(5, 4, 20, seed=1)
    alone = {method: circuit_spectrum(left[4:], right[4:], method=method) for method in ("gram", "exact")}
    left[0], right[1] = 0.0, 0.0
    left[2, 1, 3], right[3, 0, 0] = torch.nan, torch.inf
    for method, want in alone.items():
        found = circuit_spectrum(left, right, method=method)
        assert found.S[:2].abs().max() == 0
        assert found.resolved[:2].tolist() == [0.0, 0.0]
        assert bool(found.S[2:4].isnan().all())
        assert torch.equal(found.S[4:], want.S)


def pair_of(shape: tuple[int, int, int], *, size: float = 0.1) -> tuple[CircuitFactors, CircuitFactors]:
    """Three query heads, two of which share a key-value head."""
    h, m, n = shape
    heads = torch.tensor([0, 0, 1])
    left, right = gaussian(3, h, m), gaussian(2, h, n, seed=1)
    moved = left + size * gaussian(3, h, m, seed=2), right + size * gaussian(2, h, n, seed=3)
    return CircuitFactors(left, right, heads, 0.0), CircuitFactors(*moved, heads, 0.0)


@pytest.mark.parametrize("shape", [(6, 20, 20), (6, 20, 31), (6, 9, 9), (6, 6, 6), (1, 5, 5), (5, 3, 4)], ids=str)
def test_a_pair_is_that_of_the_maps_multiplied_out(shape: tuple[int, int, int]) -> None:
    base, tuned = pair_of(shape)
    found, k = circuit_pair(base, tuned), min(shape)
    assert found.finite.all()
    for i, kv in enumerate([0, 0, 1]):
        C0, C1 = (c.left[i].numpy().T @ c.right[kv].numpy() for c in (base, tuned))
        (U0, S0, V0), (U1, S1, V1) = (np.linalg.svd(C) for C in (C0, C1))
        D = C1 - C0
        room = 1e-12 * float(np.linalg.norm(C0))  # a few eps of the whole; vectors over the gaps of Gaussian sigmas
        np.testing.assert_allclose(found.spectra.base.S[i], S0[:k], atol=room)
        np.testing.assert_allclose(found.spectra.tuned.S[i], S1[:k], atol=room)
        changed = np.linalg.svd(found.delta[i].numpy(), compute_uv=False)
        both = min(len(changed), *D.shape)
        np.testing.assert_allclose(changed[:both], np.linalg.svd(D, compute_uv=False)[:both], atol=room)
        for own, want in (
            (found.spectra.left_overlap, U0.T @ U1),
            (found.spectra.right_overlap, V0 @ V1.T),
        ):
            assert own is not None
            np.testing.assert_allclose(own[i].abs(), np.abs(want[:k, :k]), atol=1e-10)
        along = (U0.T @ D)[:k]
        assert found.spectra.energy is not None
        assert found.spectra.diagonal is not None
        np.testing.assert_allclose(found.spectra.energy[i], (along**2).sum(1), atol=1e-10)
        np.testing.assert_allclose(found.spectra.diagonal[i], (along @ V0.T)[:, :k].diagonal(), atol=1e-10)


def test_circuits_of_which_only_the_basis_of_a_head_changed_did_not_change() -> None:
    base, _ = pair_of((6, 20, 20))
    assert circuit_pair(base, base).delta.abs().max() == 0.0
    turn = orthogonal(6, 6)
    turned = CircuitFactors(turn @ base.left, turn @ base.right, base.right_of_left, 0.0)
    assert circuit_pair(base, turned).delta.abs().max() == 0.0
    slightly = CircuitFactors(base.left, base.right * (1 + 1e-11), base.right_of_left, 0.0)
    changed = torch.linalg.matrix_norm(circuit_pair(base, slightly).delta)
    size = circuit_pair(base, base).spectra.base.S.norm(dim=1)
    np.testing.assert_allclose(changed / size, 1e-11, rtol=1e-4)  # 1 + 1e-11 is itself rounded


def test_a_pair_in_closed_form() -> None:
    """C0 = 3 e0 f0^T + 2 e1 f1^T, of which the second direction grows to 4 and turns by 90 degrees to e2."""
    left, right = torch.zeros(1, 2, 5).double(), torch.zeros(1, 2, 4).double()
    left[0, 0, 0], left[0, 1, 1], right[0, 0, 0], right[0, 1, 1] = 3.0, 2.0, 1.0, 1.0
    moved = left.clone()
    moved[0, 1, 1], moved[0, 1, 2] = 0.0, 4.0
    heads = torch.tensor([0])
    found = circuit_pair(CircuitFactors(left, right, heads, 0.0), CircuitFactors(moved, right, heads, 0.0))
    assert found.spectra.base.S[0].tolist() == pytest.approx([3.0, 2.0], abs=1e-14)
    assert found.spectra.tuned.S[0].tolist() == pytest.approx([4.0, 3.0], abs=1e-14)
    assert found.spectra.left_overlap is not None
    assert found.spectra.right_overlap is not None
    assert found.spectra.left_overlap[0].abs().tolist() == pytest.approx(np.array([[0.0, 1.0], [0.0, 0.0]]), abs=1e-14)
    assert found.spectra.right_overlap[0].abs().tolist() == pytest.approx(np.array([[0.0, 1.0], [1.0, 0.0]]), abs=1e-14)
    changed = torch.linalg.svdvals(found.delta[0])
    assert changed[:2].tolist() == pytest.approx([20.0**0.5, 0.0], abs=1e-14)  # -2 e1 + 4 e2 along f1


def test_a_pair_says_what_rounding_the_factors_hides() -> None:
    h, d = 16, 256
    left, right = gaussian(1, h, d), gaussian(1, h, d, seed=1)
    left[0, -1] *= 1e-4  # its direction drowns in the rounding of the other rows
    rounded = left.bfloat16(), right.bfloat16()
    heads, eps = torch.tensor([0]), float(torch.finfo(torch.bfloat16).eps)
    found = circuit_pair(CircuitFactors(*rounded, heads, eps), CircuitFactors(*rounded, heads, eps))
    known = found.spectra.base.resolved[:, None] < found.spectra.base.S
    assert known[0].tolist() == [True] * (h - 1) + [False]


def test_a_pair_marks_circuits_that_are_not_finite() -> None:
    base, tuned = pair_of((4, 10, 10))
    tuned.right[1, 0, 0] = torch.inf
    assert circuit_pair(base, tuned).finite.tolist() == [True, True, False]
