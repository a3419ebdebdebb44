"""Principal angles between top-k spaces, against constructions, SciPy, and random spaces drawn outright."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import torch

from diffract.metrics.agreement import mean_principal_angle, principal_angle_chance, principal_angles, subspace

ARCCOS = 1e-7
"""Angles near zero are known to sqrt(2 c eps), c of a few; others far better."""


def all_resolved(overlap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    every = torch.ones(overlap.shape[:2], dtype=torch.bool)
    return every, every


def bases(count: int, d: int, k: int, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(count, d, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(noise).Q


def rotated(d: int, angles: list[float]) -> torch.Tensor:
    """Overlap of the unit vectors with ones turned by the angles out of their own span, in d >= 2k dimensions."""
    k = len(angles)
    turned = torch.zeros(d, k, dtype=torch.float64)
    for i, angle in enumerate(angles):
        turned[i, i], turned[k + i, i] = math.cos(angle), math.sin(angle)
    return (torch.eye(d, k, dtype=torch.float64).mT @ turned)[None]


def test_planted_angles_come_back() -> None:
    angles = [0.0, 0.2, 0.7, 1.3, math.pi / 2]
    mixed = bases(2, 5, 5)
    overlap = mixed[0].mT @ rotated(12, angles) @ mixed[1]  # other bases of the same two spaces
    found = principal_angles(overlap, 5)
    assert found[0].tolist() == pytest.approx(angles, abs=ARCCOS)
    assert principal_angles(overlap, 5)[0, -1].item() == pytest.approx(math.pi / 2, abs=1e-15)
    mean = mean_principal_angle(overlap, *all_resolved(overlap), k=5).item()
    assert mean == pytest.approx(sum(angles) / 5, abs=ARCCOS)


def test_only_the_top_vectors_count() -> None:
    overlap = rotated(12, [0.3, 0.1, 0.9, 0.4])
    assert principal_angles(overlap, 2)[0].tolist() == pytest.approx([0.1, 0.3], abs=1e-14)  # far from zero
    assert principal_angles(overlap, 1)[0].tolist() == pytest.approx([0.3], abs=1e-14)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_angles_are_scipys(k: int) -> None:
    first, second = bases(5, 20, 6), bases(5, 20, 6, seed=1)
    found = principal_angles(first.mT @ second, k)
    for i in range(5):
        want = np.sort(scipy.linalg.subspace_angles(first[i, :, :k].numpy(), second[i, :, :k].numpy()))
        assert np.abs(found[i].numpy() - want).max() <= 1e-13  # random spaces have no angle near zero
    cosines = found.cos().square().mean(-1)
    overlap = (first.mT @ second).abs()
    assert torch.allclose(cosines, subspace(overlap, *all_resolved(overlap), k=k), rtol=1e-13, atol=0)


def test_absolute_values_would_not_do() -> None:
    turn = torch.tensor([[[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]]], dtype=torch.float64)
    assert principal_angles(turn, 2)[0, -1].item() == pytest.approx(0.0, abs=ARCCOS)
    assert principal_angles(turn.abs(), 2)[0, -1].item() > 0.5


def test_degenerate_overlaps() -> None:
    overlap = bases(3, 4, 4)
    want = principal_angles(overlap, 2)
    overlap[1, 0, 1] = torch.nan
    found = principal_angles(overlap, 2)
    assert bool(found[1].isnan().all())
    assert torch.equal(found[[0, 2]], want[[0, 2]])
    assert principal_angles(overlap, 5).shape == (3, 5)
    assert bool(mean_principal_angle(overlap, *all_resolved(overlap), k=5).isnan().all())
    slightly_more = torch.eye(3, dtype=torch.float64)[None] * (1 + 1e-9)  # vectors off by rounding
    assert principal_angles(slightly_more, 3).tolist() == [[0.0] * 3]


@pytest.mark.parametrize("d", [2, 3, 10, 500])
def test_chance_of_single_vectors_is_the_integral(d: int) -> None:
    # The angle between random lines has density sin^(d-2) on [0, pi/2].
    weight = scipy.integrate.quad(lambda t: math.sin(t) ** (d - 2), 0, math.pi / 2)[0]
    mean = scipy.integrate.quad(lambda t: t * math.sin(t) ** (d - 2), 0, math.pi / 2)[0] / weight
    square = scipy.integrate.quad(lambda t: t * t * math.sin(t) ** (d - 2), 0, math.pi / 2)[0] / weight
    error = math.sqrt((square - mean**2) / 4000)
    assert error < 0.008  # as stated
    largest, average = principal_angle_chance(d, 1)
    assert largest == average
    assert abs(average - mean) <= 4 * error  # four standard errors of 4,000 draws


@pytest.mark.parametrize(("d", "k"), [(6, 2), (40, 4), (9, 5), (7, 6), (30, 15), (5, 5)], ids=str)
def test_chance_is_that_of_spaces_drawn_outright(d: int, k: int) -> None:
    first, second = bases(3000, d, k), bases(3000, d, k, seed=1)
    angles = principal_angles(first.mT @ second, k)
    for found, sample in zip(principal_angle_chance(d, k), (angles[:, -1], angles.mean(-1)), strict=True):
        draws = max(4000 // max(min(k, d - k), 1), 8)
        error = sample.std().item() * math.sqrt(1 / 3000 + 1 / draws)
        assert error < 0.02
        assert abs(found - sample.mean().item()) <= 4 * error + ARCCOS  # four standard errors


def test_chance_of_large_spaces_is_the_limit() -> None:
    # cos^2 has the limiting density sqrt(x (r - x)) / (2 pi c x (1 - x)) on [0, r], r = 4 c (1 - c), c = k / d
    # (Wachter 1980). With x = r sin^2 t the root goes.
    d, k = 2000, 100
    c = k / d
    r = 4 * c * (1 - c)

    def density(t: float) -> float:
        x = r * math.sin(t) ** 2
        return 2 * r * math.cos(t) ** 2 / (2 * math.pi * c * (1 - x))

    assert scipy.integrate.quad(density, 0, math.pi / 2)[0] == pytest.approx(1.0, rel=1e-9)
    mean = scipy.integrate.quad(lambda t: density(t) * math.acos(math.sqrt(r) * math.sin(t)), 0, math.pi / 2)[0]
    largest, average = principal_angle_chance(d, k)
    assert average == pytest.approx(mean, abs=1e-3)  # corrections of order 1 / k^2 and the draws' error
    assert 0.99 * math.pi / 2 < largest < math.pi / 2


def test_chance_is_seeded_and_knows_its_limits() -> None:
    assert principal_angle_chance(20, 3, seed=1) == principal_angle_chance(20, 3, seed=1)
    assert principal_angle_chance(20, 3, seed=1) != principal_angle_chance(20, 3, seed=2)
    assert principal_angle_chance(7, 7) == (0.0, 0.0)
    assert all(map(math.isnan, principal_angle_chance(3, 4)))
