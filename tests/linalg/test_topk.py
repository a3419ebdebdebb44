"""The largest singular triplets against LAPACK, and the bounds that come with them."""

import pytest
import torch

from diffract.errors import DiffractError
from diffract.linalg import blas as products_module
from diffract.linalg import top_spectrum

ROUNDING = 1e-13
"""Of sigma_1: what float64 products of a few hundred terms lose, in both the answer and the reference."""


def gaussian(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_sigmas(m: int, n: int, sigmas: torch.Tensor, seed: int = 0) -> torch.Tensor:
    left = torch.linalg.qr(gaussian(m, len(sigmas), seed)).Q
    return left * sigmas @ torch.linalg.qr(gaussian(n, len(sigmas), seed + 1)).Q.mT


def decaying(m: int, n: int, factor: float) -> torch.Tensor:
    return with_sigmas(m, n, factor ** torch.arange(min(m, n), dtype=torch.float64))


MATRICES = {
    "gaussian": gaussian(60, 90),
    "tall": gaussian(150, 40),
    "fast decay": decaying(80, 70, 0.5),
    "slow decay": decaying(120, 130, 0.98),
    "rank one": gaussian(50, 1, 1) @ gaussian(1, 70, 2),
    "rank three": gaussian(50, 3, 1) @ gaussian(3, 70, 2),
    "equal sigmas": with_sigmas(40, 50, torch.cat([torch.full((6,), 3.0), torch.ones(34)]).double()),
    "identity": torch.eye(30, dtype=torch.float64),
    "all ones": torch.ones(20, 45, dtype=torch.float64),
    "one row": gaussian(1, 9),
}


@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("kind", MATRICES)
def test_values_vectors_and_bounds(kind: str, k: int) -> None:
    w = MATRICES[kind]
    k = min(k, *w.shape)
    sigmas = torch.linalg.svdvals(w)
    found = top_spectrum(w, k)
    slack = ROUNDING * sigmas[0]
    assert found.S.shape == found.residual.shape == found.error.shape == (k,)
    assert bool((found.S.diff() <= slack).all())
    assert found.converged
    # Converged to 1e-9 of sigma_1 by its own, first-order or Kato-Temple, bound.
    assert (found.S - sigmas[:k]).abs().max() <= 1e-9 * sigmas[0]
    # Within its residual of each value lies a singular value, whatever the start.
    nearest = (found.S[:, None] - sigmas).abs().amin(1)
    assert bool((nearest <= found.residual + slack).all())
    # A Ritz value never exceeds the sigma of its rank (Cauchy interlacing).
    assert bool((sigmas[:k] + slack >= found.S).all())
    one = torch.eye(k, dtype=torch.float64)
    live = 1e-9 * sigmas[0] < found.S
    assert found.U.shape == (w.shape[0], k)
    assert found.Vh.shape == (k, w.shape[1])
    short, long = (found.U, found.Vh.mT) if w.shape[0] <= w.shape[1] else (found.Vh.mT, found.U)
    # Reorthogonalised in full: a few eps on the short side; B^T ritz / S on the other loses eps sigma_1 / sigma.
    assert (short.mT @ short - one).abs().max() <= 1e-12
    assert (long[:, live].mT @ long[:, live] - one[live][:, live]).abs().max() <= 1e-5
    # The residual that is stated, recomputed from the matrix itself.
    v_side = (w @ found.Vh.mT - found.U * found.S).norm(dim=0)
    u_side = (w.mT @ found.U - found.Vh.mT * found.S).norm(dim=0)
    assert bool((torch.minimum(v_side, u_side)[live] <= found.residual[live] + slack).all())
    assert bool((torch.maximum(v_side, u_side)[live] <= found.residual[live] + 10 * slack).all())


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("kind", ["gaussian", "tall", "slow decay"])
def test_bounds_hold_before_convergence(kind: str, steps: int) -> None:
    w = MATRICES[kind]
    sigmas = torch.linalg.svdvals(w)
    found = top_spectrum(w, 5, steps=steps)
    slack = ROUNDING * sigmas[0]
    assert not found.converged
    assert bool(((found.S[:, None] - sigmas).abs().amin(1) <= found.residual + slack).all())
    assert bool((sigmas[:5] + slack >= found.S).all())
    assert bool((found.error <= found.residual).all())
    assert found.residual.max() > 1e-9 * sigmas[0]


def test_the_residual_bound_is_sharp_enough_to_be_of_use() -> None:
    found = top_spectrum(MATRICES["fast decay"], 3)
    # Stopped when residual^2 / gap < 1e-9 sigma_1, gap about sigma_1 / 8: the residual is below sqrt(1e-9) sigma_1.
    assert found.residual.max() <= 1e-9**0.5 * found.S[0]


def test_converged_says_whether_the_tolerance_is_met() -> None:
    w = MATRICES["slow decay"]
    early, late = top_spectrum(w, 3, steps=2), top_spectrum(w, 3, steps=50)
    assert not early.converged
    assert bool((early.error > 1e-9 * early.S[0]).any())
    assert late.converged
    assert bool((late.error <= 1e-9 * late.S[0]).all())
    assert top_spectrum(w, 3, steps=2, tolerance=1.0).converged


def test_a_loose_tolerance_stops_earlier() -> None:
    w = MATRICES["slow decay"]
    sigmas = torch.linalg.svdvals(w)
    loose, tight = top_spectrum(w, 2, tolerance=1e-2), top_spectrum(w, 2, tolerance=1e-12, steps=60)
    assert loose.residual.max() > tight.residual.max()
    assert (tight.S - sigmas[:2]).abs().max() <= 1e-12 * sigmas[0]


@pytest.mark.parametrize("kind", ["gaussian", "tall", "rank one"])
def test_the_same_seed_gives_the_same_bits(kind: str) -> None:
    w = MATRICES[kind]
    first, again, other = (top_spectrum(w, 3, seed=seed, steps=3) for seed in (5, 5, 6))
    for name in ("S", "U", "Vh", "residual", "error"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.U, other.U)


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    w = MATRICES["gaussian"]
    torch.manual_seed(0)
    first, state = top_spectrum(w, 2), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(top_spectrum(w, 2).S, first.S)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("k", [-1, 0, 7, 100])
def test_an_impossible_k_raises(k: int) -> None:
    with pytest.raises(DiffractError, match=rf"1 <= k <= 6 .*\(6, 9\).*got {k}"):
        top_spectrum(gaussian(6, 9), k)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (1, 1)])
def test_all_of_a_small_matrix(shape: tuple[int, int]) -> None:
    w = gaussian(*shape)
    found = top_spectrum(w, min(shape))
    sigmas = torch.linalg.svdvals(w)
    assert found.converged
    # The basis spans the whole space: nothing but rounding is left.
    assert (found.S - sigmas).abs().max() <= ROUNDING * sigmas[0]
    assert (found.U * found.S @ found.Vh - w).abs().max() <= 1e-12 * sigmas[0]


def test_a_zero_matrix() -> None:
    found = top_spectrum(torch.zeros(6, 8), 2)
    assert found.S.tolist() == [0.0, 0.0]
    assert found.residual.tolist() == [0.0, 0.0]
    assert found.converged
    assert bool(found.U.isfinite().all())
    assert bool(found.Vh.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_stored_dtypes_are_computed_in_float64(dtype: torch.dtype) -> None:
    w = decaying(40, 50, 0.7).to(dtype)
    found = top_spectrum(w, 3)
    sigmas = torch.linalg.svdvals(w.double())
    assert found.S.dtype == torch.float64
    assert (found.S - sigmas[:3]).abs().max() <= 1e-9 * sigmas[0]  # its tolerance


@pytest.mark.parametrize("shape", [(12, 90), (90, 12)])
def test_pieces_and_strides_make_no_difference_but_rounding(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = decaying(*shape, 0.6)
    whole = top_spectrum(w, 4)
    monkeypatch.setitem(products_module.PIECE_BYTES, "cpu", 8 * 12 * 7)
    cut, turned = top_spectrum(w, 4), top_spectrum(w.mT.contiguous().mT, 4)
    for other in (cut, turned):
        assert (other.S - whole.S).abs().max() <= ROUNDING * whole.S[0]
