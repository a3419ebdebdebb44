"""Truncated changes against LAPACK on the whole float64 change."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffract.edits.rule import Rule
from diffract.edits.spectral_edits import Truncated, change_sigmas, truncate
from diffract.linalg import blas as products

EPSILON = float(torch.finfo(torch.float64).eps)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

SHAPES = [(24, 24), (61, 13), (13, 61), (1, 9), (9, 1), (1, 1)]

RULES = (
    Rule(drop=0.0),
    Rule(drop=0.25),
    Rule(drop=0.75),
    Rule(drop=1.0),
    Rule(rank=3),
    Rule(rank=3, side="tail"),
    Rule(energy=0.5),
    Rule(band=(0.25, 0.5)),
    Rule(band=(0.125, 0.875)),
    Rule(rule="mp-edge"),
    Rule(rule="donoho-gavish", side="tail"),
)


def pair(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A tuned matrix and its base, in the range of weights."""
    generator = torch.Generator().manual_seed(seed)
    base, noise = (0.02 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    decay = torch.logspace(0, -1, shape[1], dtype=torch.float64)
    return (base + 0.2 * noise * decay).to(dtype), base.to(dtype)


def reference(tuned: torch.Tensor, base: torch.Tensor, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """The edited matrix by LAPACK's QR iteration, and all singular values of the change."""
    w0 = base.double().numpy()
    U, S, Vh = scipy.linalg.svd(tuned.double().numpy() - w0, full_matrices=False, lapack_driver="gesvd")
    return w0 + (U[:, start:stop] * S[start:stop]) @ Vh[start:stop], S


def chosen(found: Truncated, rule: Rule) -> tuple[int, int]:
    """Where the kept directions start and stop, from their count alone."""
    if rule.band is not None:
        start = math.floor(rule.band[0] * found.total + 0.5)
        return start, start + found.kept
    return (0, found.kept) if rule.side == "head" else (found.total - found.kept, found.total)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_lapack(shape: tuple[int, int], dtype: torch.dtype, rule: Rule) -> None:
    tuned, base = pair(shape, dtype)
    found = truncate(tuned, base, rule)
    start, stop = chosen(found, rule)
    want, S = reference(tuned, base, start, stop)
    assert found.total == min(shape)
    assert found.values.dtype == (torch.float64 if dtype in (torch.float64, torch.float32) else torch.float32)
    # eps sigma_1^2 over the gap of the sigmas at the cut, of which the narrowest here is 3e-3 sigma_1, and room; then
    # the rounding of entries below 0.1 to float32.
    rounding = 0.1 * 2.0**-24 if found.values.dtype == torch.float32 else 0.0
    assert np.abs(found.values.double().numpy() - want).max() <= 1e-11 * S[0] + rounding
    assert found.energy_share == pytest.approx((S[start:stop] ** 2).sum() / (S**2).sum(), abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_everything_and_nothing_are_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tuned, base = pair(shape, dtype)
    whole, none = truncate(tuned, base, Rule(drop=0.0)), truncate(tuned, base, Rule(drop=1.0))
    assert torch.equal(whole.values.to(dtype), tuned)
    assert torch.equal(none.values.to(dtype), base)
    assert (whole.kept, whole.energy_share) == (min(shape), 1.0)
    assert (none.kept, none.energy_share) == (0, 0.0)
    tail = truncate(tuned, base, Rule(drop=0.0, side="tail"))
    assert torch.equal(tail.values, none.values)


def test_a_diagonal_change_by_hand() -> None:
    base = torch.full((3, 4), 2.0)
    tuned = base.clone()
    tuned[0, 1] += 3
    tuned[1, 3] -= 4
    tuned[2, 0] += 1
    found = truncate(tuned, base, Rule(rank=1))
    want = torch.full((3, 4), 2.0, dtype=torch.float64)
    want[1, 3] = -2
    # A few eps of sigma_1 = 4.
    torch.testing.assert_close(found.values, want, rtol=0, atol=1e-14)
    assert found.energy_share == pytest.approx(16 / 26, rel=1e-14)
    found = truncate(tuned, base, Rule(above=2.0, side="tail"))
    want = torch.full((3, 4), 2.0, dtype=torch.float64)
    want[2, 0] = 3
    torch.testing.assert_close(found.values, want, rtol=0, atol=1e-14)
    assert (found.kept, found.total) == (1, 3)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 100), st.integers(0, 1000), st.sampled_from(DTYPES[:3]))
def test_head_and_tail_make_the_whole_change(m: int, n: int, percent: int, seed: int, dtype: torch.dtype) -> None:
    tuned, base = pair((m, n), dtype, seed)
    head = truncate(tuned, base, Rule(drop=percent / 100))
    tail = truncate(tuned, base, Rule(drop=percent / 100, side="tail"))
    rebuilt = head.values.double() + tail.values.double() - base.double()
    # Whatever the directions are, P P^T D and D - P P^T D sum to D: roundings of numbers below 0.3, two of them to
    # float32 for bf16.
    atol = 0.3 * (2.0**-23 if dtype == torch.bfloat16 else 16 * EPSILON)
    torch.testing.assert_close(rebuilt, tuned.double(), rtol=0, atol=atol)
    if bool((tuned != base).any()):
        assert head.kept + tail.kept == head.total
        assert head.energy_share + tail.energy_share == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_unchanged_matrix(rule: Rule, dtype: torch.dtype) -> None:
    tuned, _ = pair((6, 9), dtype)
    found = truncate(tuned, tuned.clone(), rule)
    assert torch.equal(found.values.to(dtype), tuned)
    assert (found.kept, found.total, found.energy_share) == (0, 6, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_an_unchanged_matrix_keeps_the_signs_of_its_zeros(dtype: torch.dtype) -> None:
    tuned, base = torch.full((2, 3), -0.0, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
    assert bool(truncate(tuned, base, Rule(rank=1)).values.signbit().all())


@pytest.mark.parametrize("rule", [Rule(rank=3), Rule(drop=0.2), Rule(band=(0.3, 0.6))], ids=str)
@pytest.mark.parametrize("shape", [(40, 9), (9, 40)])
def test_pieces_and_strides_do_not_matter(shape: tuple[int, int], rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, base = pair(shape, torch.bfloat16)
    want = truncate(tuned, base, rule)
    monkeypatch.setitem(products.PIECE_BYTES, "cpu", 8 * 9 * 7)
    padded = torch.nn.functional.pad(tuned, (3, 2, 1, 4))[1 : 1 + shape[0], 3 : 3 + shape[1]]
    found = truncate(padded, base.mT.contiguous().mT, rule)
    turned = truncate(tuned.mT, base.mT, rule)
    # Sums in another order, rounded to float32 in the end.
    torch.testing.assert_close(found.values, want.values, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(turned.values.mT, want.values, rtol=1e-6, atol=1e-9)
    assert found.kept == turned.kept == want.kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_stay_as_they_are(dtype: torch.dtype) -> None:
    tuned, base = pair((9, 7), dtype)
    before = tuned.clone(), base.clone()
    for rule in RULES:
        truncate(tuned, base, rule).values.zero_()
    assert torch.equal(tuned, before[0])
    assert torch.equal(base, before[1])


def test_parameters_are_taken_without_their_gradients() -> None:
    tuned, base = pair((6, 8), torch.float32)
    found = truncate(torch.nn.Parameter(tuned), torch.nn.Parameter(base), Rule(rank=2))
    assert not found.values.requires_grad
    assert torch.equal(found.values, truncate(tuned, base, Rule(rank=2)).values)


def test_a_pair_of_two_dtypes_counts_as_the_wider() -> None:
    tuned, base = pair((6, 8), torch.float32)
    base = base.bfloat16()
    found = truncate(tuned, base, Rule(rank=2))
    assert found.values.dtype == torch.float64
    want, S = reference(tuned, base, 0, 2)
    np.testing.assert_allclose(found.values.numpy(), want, rtol=0, atol=1e-12 * S[0])


def with_sigmas(m: int, n: int, S: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(m * n)
    left, right = (torch.randn(d, len(S), generator=generator, dtype=torch.float64) for d in (m, n))
    return torch.linalg.qr(left).Q * S @ torch.linalg.qr(right).Q.mT


@pytest.mark.parametrize("k", range(1, 12))
def test_the_stated_error_over_six_orders(k: int) -> None:
    # sigma_i = 10^(-i / 2): the gap at the cut is 0.68 sigma_k.
    S = torch.logspace(0, -6, 13, dtype=torch.float64)
    tuned = with_sigmas(30, 20, S).float()
    base = torch.zeros_like(tuned)
    found = truncate(tuned, base, Rule(rank=k))
    want, exact = reference(tuned, base, 0, k)
    error = np.linalg.norm(found.values.numpy() - want, 2)
    # The constant in front of eps is a small multiple of sqrt(m n).
    assert error <= 50 * EPSILON * exact[0] ** 2 / (exact[k - 1] - exact[k])
    assert error <= 2 * exact[k - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_drowns_in_rounding_is_not_counted(dtype: torch.dtype) -> None:
    tuned = torch.zeros(9, 9, dtype=dtype)
    tuned[0, 0], tuned[1, 1], tuned[2, 2] = 1.0, 1e-4, 1e-9
    found = truncate(tuned, torch.zeros_like(tuned), Rule(above=0.0))
    # The Gram matrix resolves 8e-8 sigma_1, LAPACK 2e-15.
    assert found.kept == (2 if dtype == torch.float32 else 3)
    assert found.values[1, 1].item() == pytest.approx(1e-4, rel=1e-7)


@pytest.mark.parametrize("shape", [(150, 150), (80, 320), (320, 80)])
@pytest.mark.parametrize("name", ["donoho-gavish", "mp-edge"])
def test_noise_rules_find_the_planted_rank(shape: tuple[int, int], name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    base = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
    noise = 1e-3 * torch.randn(shape, generator=generator)
    # Noise has sigmas up to 1e-3 (sqrt(m) + sqrt(n)) = 0.027, rounding to bf16 adds 2e-5 per entry, the signal has 0.2.
    signal = with_sigmas(*shape, torch.full((5,), 0.2, dtype=torch.float64))
    tuned = (base.double() + noise + signal).bfloat16()
    found = truncate(tuned, base, Rule(rule=name))  # type: ignore[arg-type]
    assert found.kept == 5
    left = found.values.double() - base.double() - signal
    # Five directions take 5 (m + n) of the m n degrees of freedom of the noise, 0.28 of its norm at the most; and room.
    assert left.norm() < 0.5 * (1e-3 * math.sqrt(shape[0] * shape[1]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", [0, 1])
def test_what_is_not_finite_is_refused_here(where: int, dtype: torch.dtype, bad: float) -> None:
    both = pair((5, 4), dtype)
    both[where][2, 3] = bad
    with pytest.raises(ValueError, match="expected finite values, got NaN or an infinity"):
        truncate(*both, Rule(rank=1))


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and, at place 1, \(2, 2\)"):
        untyped(torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"with entries, got shape \(0, 3\)"):
        truncate(torch.zeros(0, 3), torch.zeros(0, 3), Rule(rank=1))


def untyped(tuned: torch.Tensor, base: torch.Tensor) -> Truncated:
    """As it is called where shapes are not checked at run time."""
    return getattr(truncate, "__wrapped__", truncate)(tuned, base, Rule(rank=1))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(24, 24), (61, 13), (13, 61)], ids=str)
def test_random_keeps_as_many_directions_as_head(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """What is kept is W0 plus some of the singular directions of the change: each wholly there, or not at all."""
    tuned, base = pair(shape, dtype)
    rule = Rule(drop=0.5, side="random")
    found = truncate(tuned, base, rule, seeded(3))
    w0 = base.double().numpy()
    U, S, Vh = scipy.linalg.svd(tuned.double().numpy() - w0, full_matrices=False)
    along = np.einsum("mi,mn,in->i", U, found.values.double().numpy() - w0, Vh) / S
    # the result is rounded to float32 where weights are stored in up to 32 bits: eps 6e-8 of entries up to 0.1, over
    # the smallest sigma of about 4e-3, sums of 24 of them
    there = along > 0.5
    assert np.abs(along - there).max() < 1e-4
    assert there.sum() == found.kept == truncate(tuned, base, Rule(drop=0.5)).kept
    assert not there[: found.kept].all()  # by chance 1 in 10^6
    assert found.energy_share == pytest.approx((S[there] ** 2).sum() / (S**2).sum(), rel=1e-6)


def test_random_takes_directions_until_they_hold_the_energy() -> None:
    tuned, base = pair((24, 24), torch.float64)
    for seed in range(5):
        found = truncate(tuned, base, Rule(energy=0.6, side="random"), seeded(seed))
        assert 0.6 <= found.energy_share < 1
        assert found.kept >= truncate(tuned, base, Rule(energy=0.6)).kept
    assert truncate(tuned, base, Rule(energy=1.0, side="random"), seeded(0)).kept == 24


def test_random_is_seeded_and_seeds_differ() -> None:
    tuned, base = pair((24, 24), torch.float32)
    rule = Rule(drop=0.5, side="random")
    once, again, other = (truncate(tuned, base, rule, seeded(seed)).values for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_random_leaves_directions_that_hold_nothing_for_last() -> None:
    """A change of rank 2: whichever two directions are kept, they are these."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    tuned = base + torch.randn(9, 2, generator=generator).double() @ torch.randn(2, 7, generator=generator).double()
    found = truncate(tuned, base, Rule(rank=2, side="random"), seeded(0))
    assert (found.values - tuned).abs().max() < 1e-13  # float64 rounding of entries up to 5, a few sums
    assert found.energy_share == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmas_are_those_of_the_change(dtype: torch.dtype) -> None:
    tuned, base = pair((31, 13), dtype)
    _, S = reference(tuned, base, 0, 0)
    # by the Gram matrix sigma_i is off by about eps sigma_1^2 / sigma_i, here sigma_1 < 20 sigma_M
    assert np.abs(change_sigmas(tuned, base).numpy() / S - 1).max() < 400 * 20 * EPSILON
