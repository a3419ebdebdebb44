"""Energy inside spectral peaks over energy outside, and its permutation test."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffract.metrics.profile import peak_enrichment, peak_enrichment_pvalue


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example(count: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    inside = random.random((count, n)) < random.uniform(0.1, 0.9, (count, 1))
    inside[:, 0], inside[:, 1] = True, False
    return torch.from_numpy(random.exponential(size=(count, n))), torch.from_numpy(inside)


def test_ratio_of_means() -> None:
    energy = torch.tensor([[1.0, 2, 3, 10], [1, 1, 1, 1]], dtype=torch.float64)
    inside = torch.tensor([[True, False, False, True], [True, False, False, False]])
    assert peak_enrichment(energy, inside).tolist() == [(11 / 2) / (5 / 2), 1.0]


def test_where_there_is_no_ratio() -> None:
    energy = torch.ones(5, 3, dtype=torch.float64)
    energy[2], energy[3, 1] = 0.0, torch.nan
    inside = torch.tensor([[True] * 3, [False] * 3, [True, False, False], [True, False, False], [True, False, False]])
    for found in (
        peak_enrichment(energy, inside),
        peak_enrichment_pvalue(energy, inside, generator=seeded()),
    ):
        assert bool(found[:4].isnan().all())
        assert found[4].item() == 1.0


def test_all_energy_inside() -> None:
    energy = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    inside = torch.tensor([[True, False, False, False]])
    assert peak_enrichment(energy, inside).item() == math.inf
    # One permutation in four puts the label there; five standard deviations of 999 draws.
    p = peak_enrichment_pvalue(energy, inside, generator=seeded()).item()
    assert p == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 999))


def test_pvalue_is_that_of_all_permutations() -> None:
    energy, inside = example(20, 8)
    draws = 20_000
    found = peak_enrichment_pvalue(energy, inside, draws=draws, generator=seeded())
    for i in range(20):
        e, k = energy[i].numpy(), int(inside[i].sum())
        observed = e[inside[i].numpy()].sum()
        sums = [e[list(chosen)].sum() for chosen in itertools.combinations(range(8), k)]
        exact = np.mean(np.array(sums) >= observed - 1e-12)
        # Five standard deviations of the draws, and the one that the observed labels themselves are.
        assert abs(found[i].item() - exact) <= 5 * math.sqrt(exact * (1 - exact) / draws) + 1 / draws


def test_draws_are_counted_one_by_one() -> None:
    energy, inside = example(6, 12)
    found = peak_enrichment_pvalue(energy, inside, draws=50, generator=seeded(3))
    places = torch.rand(50, 12, generator=seeded(3)).argsort(-1)
    for i in range(6):
        labels = [places[t] < inside[i].sum() for t in range(50)]
        reached = sum(bool(energy[i][label].sum() >= energy[i][inside[i]].sum() - 1e-12) for label in labels)
        assert found[i].item() == (1 + reached) / 51


def test_equal_energies_are_ties_whatever_the_rounding() -> None:
    energy = torch.full((9, 50), 0.1, dtype=torch.float64)
    inside = torch.arange(50) < torch.arange(3, 48, 5)[:, None]
    assert peak_enrichment_pvalue(energy, inside, generator=seeded()).tolist() == [1.0] * 9


def test_pvalues_of_no_relation_are_uniform() -> None:
    energy, inside = example(2000, 40)
    found = peak_enrichment_pvalue(energy, inside, draws=199, generator=seeded())
    for level in (0.05, 0.2, 0.5, 0.8):
        share = (found <= level).double().mean().item()
        # Four standard deviations of 2,000 rows, and of the 199 draws that they share.
        assert abs(share - level) <= 4 * math.sqrt(level * (1 - level)) * (2000**-0.5 + 199**-0.5)


def test_planted_enrichment_is_found() -> None:
    energy, inside = example(30, 128)
    found = peak_enrichment_pvalue(energy * (1 + 4 * inside), inside, generator=seeded())
    reverse = peak_enrichment_pvalue(energy * (5 - 4 * inside.double()), inside, generator=seeded())
    ratio = peak_enrichment(energy * (1 + 4 * inside), inside) / peak_enrichment(energy, inside)
    assert ratio.numpy() == pytest.approx(5.0, rel=1e-12)  # rounding
    assert found.max() <= 0.01
    assert reverse.min() >= 0.99


def test_a_rows_value_does_not_depend_on_its_batch_and_follows_the_seed() -> None:
    energy, inside = example(12, 30)
    whole = peak_enrichment_pvalue(energy, inside, generator=seeded(1))
    for i in range(12):
        assert peak_enrichment_pvalue(energy[i : i + 1], inside[i : i + 1], generator=seeded(1)).item() == whole[i]
    assert not torch.equal(whole, peak_enrichment_pvalue(energy, inside, generator=seeded(2)))


def test_scale_does_not_matter() -> None:
    energy, inside = example(10, 30)
    for scale in (2.0**-40, 2.0**40):  # powers of two round nothing
        assert torch.equal(peak_enrichment(scale * energy, inside), peak_enrichment(energy, inside))
        found = peak_enrichment_pvalue(scale * energy, inside, generator=seeded())
        assert torch.equal(found, peak_enrichment_pvalue(energy, inside, generator=seeded()))


def test_no_rows() -> None:
    energy = torch.zeros(0, 5, dtype=torch.float64)
    assert peak_enrichment_pvalue(energy, energy > 0, generator=seeded()).shape == (0,)
