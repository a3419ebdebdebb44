"""Energies beside their expectation: the fit, the profile by tenth and by peak, enrichment and its permutation test."""

import itertools
import math

import numpy as np
import pytest
import spectral_references as slow
import torch

import diffract
from diffract.metrics.peaks import Peaks
from diffract.metrics.profile import (
    PROFILE,
    by_peak,
    expected_energy,
    peak_enrichment,
    peak_enrichment_pvalue,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def peaks_of(inside: torch.Tensor, count: float = 2.0) -> Peaks:
    """Peaks that hold these sigmas."""
    found = torch.full((len(inside), 2), torch.nan, dtype=torch.float64)
    member = inside.long() - 1
    return Peaks(found[:, 0].nan_to_num(count), found, found, found, found, member)


def example(count: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    inside = random.random((count, n)) < random.uniform(0.1, 0.6, (count, 1))
    inside[:, 0], inside[:, 1:6] = True, False
    return torch.from_numpy(random.exponential(size=(count, n))), torch.from_numpy(inside)


def pvalues(ratio: torch.Tensor, inside: torch.Tensor, seed: int = 0, draws: int = 999) -> torch.Tensor:
    return peak_enrichment_pvalue(ratio, peaks_of(inside), draws=draws, generator=seeded(seed))


# Expectation


@pytest.mark.parametrize("seed", range(4))
def test_expectation_is_reweighted_least_squares(seed: int) -> None:
    random = np.random.default_rng(seed)
    energy, rows = random.exponential(size=(2, 3, 40)) + 0.01
    sigmas = np.sort(random.random((3, 40)) + 0.2)[:, ::-1].copy()
    known = np.arange(40) < np.array([[40], [25], [9]])
    found = expected_energy(*(torch.from_numpy(x) for x in (energy, rows, sigmas, known)))
    for i in range(2):
        want = slow.expected_energy(energy[i], rows[i], sigmas[i], known[i])
        assert found[i].numpy() == pytest.approx(want, rel=1e-9, nan_ok=True)  # rounding of twenty solutions
    assert bool(found[2].isnan().all())  # fewer than ten directions


def test_energies_that_are_a_sum_of_the_terms_are_their_own_expectation() -> None:
    sigmas = torch.linspace(3, 1, 30, dtype=torch.float64)[None]
    rows = torch.rand(1, 30, dtype=torch.float64, generator=seeded()) + 0.5
    all_known = sigmas > 0
    for a, b, c in ((1.0, 0.0, 0.0), (0.3, 1.0, 0.0), (10.0, -1.0, 0.0), (0.0, 0.0, 2.0), (1.0, 0.2, 0.7)):
        energy = a + b * sigmas**2 + c * rows
        assert torch.allclose(expected_energy(energy, rows, sigmas, all_known), energy, rtol=1e-9)
    # Rows of equal size say nothing that the constant does not.
    energy = 1 + 0.5 * sigmas**2
    assert torch.allclose(expected_energy(energy, torch.ones_like(rows), sigmas, all_known), energy, rtol=1e-9)


def test_expectation_follows_the_unit_and_knows_what_is_missing() -> None:
    energy, _ = example(3, 20)
    sigmas = torch.linspace(3, 1, 20, dtype=torch.float64).expand(3, 20)
    energy[1], energy[2, 0] = 0.0, torch.nan
    found = expected_energy(energy, energy.nan_to_num() + 1, sigmas, sigmas > 0)
    assert bool(found[1].isnan().all())  # nothing changed
    alone = expected_energy(energy[:1], energy[:1] + 1, sigmas[:1], sigmas[:1] > 0)
    assert torch.allclose(found[:1], alone, rtol=1e-12)
    tiny = expected_energy(energy[:1] * 1e-80, (energy[:1] + 1) * 1e-80, sigmas[:1] * 1e-40, sigmas[:1] > 0)
    assert torch.allclose(tiny * 1e80, alone, rtol=1e-9)


# Profile


def test_profile_is_a_ratio_of_sums() -> None:
    energy = torch.arange(1.0, 22, dtype=torch.float64)[None]
    expected = torch.full_like(energy, 2.0)
    expected[0, 20] = torch.nan  # not resolved: twenty directions, two a tenth
    found = torch.stack([m(energy, expected) for m in PROFILE], 1)[0]
    assert found.tolist() == [(4 * k + 3) / 4 for k in range(10)]
    inside = torch.tensor([[0] * 5 + [-1] * 10 + [1] * 6])
    assert by_peak(energy, expected, Peaks(*[energy[:, :2]] * 5, inside))[0].tolist() == [15 / 10, 90 / 10]


def turned(random: np.random.Generator, n: int, size: float) -> np.ndarray:
    a = random.standard_normal((n, n)) * size / (2 * n) ** 0.5
    return np.linalg.solve(np.eye(n) + (a - a.T) / 2, np.eye(n) - (a - a.T) / 2)


@pytest.mark.parametrize("shape", [(40, 96), (96, 40)], ids=str)
def test_noise_scaling_and_turns_have_a_flat_profile(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    base, changes = {}, {"noise": {}, "rows": {}, "columns": {}, "right turn": {}, "scaling": {}}
    for i in range(12):
        w = random.standard_normal(shape)
        base[f"w{i}"] = w
        noise = random.standard_normal(shape)
        rows, cols = (np.exp(0.3 * random.standard_normal(d)) for d in shape)
        changes["noise"][f"w{i}"] = 0.1 * noise
        changes["rows"][f"w{i}"] = 0.1 * noise * rows[:, None]
        changes["columns"][f"w{i}"] = 0.1 * noise * cols
        changes["right turn"][f"w{i}"] = w @ turned(random, shape[1], 0.2) - w
        changes["scaling"][f"w{i}"] = 0.01 * w + 1e-3 * noise
    names = [m.name for m in PROFILE]
    for kind, change in changes.items():
        tuned = {name: w + change[name] for name, w in base.items()}
        found = diffract.compare(base, tuned, metrics=names, cache=False).metrics.filter(model="tuned")
        # Of 40 terms of unequal size an energy scatters by 0.27, and 48 of them are averaged: 3.3 standard errors.
        assert np.abs(found.select(names).mean().to_numpy() - 1).max() < 0.13, kind


def test_a_change_in_one_band_stands_out() -> None:
    random = np.random.default_rng(2)
    base, tuned = {}, {}
    for i in range(6):
        u, s, vh = np.linalg.svd(random.standard_normal((40, 96)), full_matrices=False)
        d = 0.1 * random.standard_normal((40, 96))
        d[8:12] *= 2  # the third tenth
        base[f"w{i}"] = u * s @ vh
        tuned[f"w{i}"] = base[f"w{i}"] + u @ d
    names = [m.name for m in PROFILE]
    run = diffract.compare(base, tuned, metrics=names, cache=False)
    found = run.metrics.filter(model="tuned").select(names).mean().row(0)
    assert np.argmax(found) == 2
    assert found[2] > 2
    assert {"delta_energy", "energy_expected"} <= set(run.spectra["quantity"])


# Enrichment


def test_ratio_of_means() -> None:
    ratio = torch.tensor([[1.0, 2, 3, 4, 5, 10]], dtype=torch.float64)
    inside = torch.tensor([[True, False, False, False, False, False]])
    assert peak_enrichment(ratio, peaks_of(inside)).tolist() == [1 / (24 / 5)]


def test_where_there_is_no_ratio() -> None:
    ratio = torch.ones(5, 7, dtype=torch.float64)
    ratio[2], ratio[3, 3] = torch.nan, torch.nan
    inside = torch.zeros(5, 7, dtype=torch.bool)
    inside[0, :3] = True  # four outside
    inside[2:, :2] = True  # of the third nothing is known, of the fourth four of five outside
    for found in (peak_enrichment(ratio, peaks_of(inside)), pvalues(ratio, inside)):
        assert bool(found[:4].isnan().all())
        assert found[4].item() == 1.0
    one_peak = peaks_of(inside, count=1.0)
    assert bool(peak_enrichment(ratio, one_peak).isnan().all())


def test_all_energy_inside() -> None:
    ratio = torch.tensor([[1.0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    inside = ratio > 0
    assert peak_enrichment(ratio, peaks_of(inside)).item() == math.inf
    # One permutation in six puts the label there; five standard deviations of 999 draws.
    assert pvalues(ratio, inside).item() == pytest.approx(1 / 6, abs=5 * math.sqrt(5 / 36 / 999))


def test_pvalue_is_that_of_all_permutations() -> None:
    ratio, inside = example(20, 9)
    ratio[:5, 8] = torch.nan
    draws = 20_000
    found = pvalues(ratio, inside, draws=draws)
    for i in range(20):
        known = ratio[i].isfinite().numpy()
        e, label = ratio[i].numpy()[known], inside[i].numpy()[known]
        if (~label).sum() < 5:
            assert math.isnan(found[i].item())
            continue
        observed = e[label].sum()
        sums = [e[list(chosen)].sum() for chosen in itertools.combinations(range(len(e)), int(label.sum()))]
        exact = np.mean(np.array(sums) >= observed - 1e-12)
        # Five standard deviations of the draws, and the one that the observed labels themselves are.
        assert abs(found[i].item() - exact) <= 5 * math.sqrt(exact * (1 - exact) / draws) + 1 / draws


def test_equal_energies_are_ties_whatever_the_rounding() -> None:
    ratio = torch.full((9, 50), 0.1, dtype=torch.float64)
    inside = torch.arange(50) < torch.arange(3, 45, 5)[:, None]
    assert pvalues(ratio, inside).tolist() == [1.0] * 9


def test_pvalues_of_no_relation_are_uniform() -> None:
    ratio, inside = example(2000, 40)
    found = pvalues(ratio, inside, draws=199)
    for level in (0.05, 0.2, 0.5, 0.8):
        share = (found <= level).double().mean().item()
        # Four standard deviations of 2,000 rows, and of the 199 draws that they share.
        assert abs(share - level) <= 4 * math.sqrt(level * (1 - level)) * (2000**-0.5 + 199**-0.5)


def test_planted_enrichment_is_found() -> None:
    ratio, inside = example(30, 128)
    ratio[:, -8:] = torch.nan
    inside[:, -8:] = False
    found = pvalues(ratio * (1 + 4 * inside), inside)
    reverse = pvalues(ratio * (5 - 4 * inside.double()), inside)
    peaks = peaks_of(inside)
    grown = peak_enrichment(ratio * (1 + 4 * inside), peaks) / peak_enrichment(ratio, peaks)
    assert grown.numpy() == pytest.approx(5.0, rel=1e-12)  # rounding
    assert found.max() <= 0.01
    assert reverse.min() >= 0.99


def test_a_rows_value_does_not_depend_on_its_batch_and_follows_the_seed() -> None:
    ratio, inside = example(12, 30)
    whole = pvalues(ratio, inside, seed=1)
    for i in range(12):
        assert pvalues(ratio[i : i + 1], inside[i : i + 1], seed=1).item() == whole[i]
    assert not torch.equal(whole, pvalues(ratio, inside, seed=2))


def test_no_rows() -> None:
    ratio = torch.zeros(0, 5, dtype=torch.float64)
    assert pvalues(ratio, ratio > 0).shape == (0,)


def test_dead_rows_enrich_nothing() -> None:
    """Directions without a sigma are neither inside nor outside."""
    random = np.random.default_rng(4)
    base, tuned = {}, {}
    for i in range(40):
        u, s, vh = np.linalg.svd(random.standard_normal((62, 256)), full_matrices=False)
        s[:31] *= 1.2
        d = 0.1 * random.standard_normal((62, 256))
        zeros = np.zeros((2, 256))
        base[f"w{i}"] = np.vstack([zeros, u * s @ vh])
        tuned[f"w{i}"] = base[f"w{i}"] + np.vstack([zeros, d])
    run = diffract.compare(base, tuned, metrics="peak_enrichment_pvalue", cache=False)
    p = run.metrics.filter(model="tuned")["peak_enrichment_pvalue"].drop_nulls().to_numpy()
    assert len(p) > 30
    assert (p < 0.05).sum() <= 7  # of forty at five in a hundred more than that once in 800
