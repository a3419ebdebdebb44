"""Fits that facts share: one fit to every candidate gives each law's best tail, the scan, and all comparisons."""

import math
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
import torch
from tail_samples import KINDS, batch, compare_tails, sample

import diffract
from diffract.linalg import spectrum
from diffract.metrics import CATALOG, Facts
from diffract.metrics.heavy_tails import (
    exponential,
    log_normal,
    power_law,
    truncated_power_law,
)
from diffract.metrics.heavy_tails.fit import fit_candidates, order, scan_distances
from diffract.metrics.heavy_tails.significance import LAWS

VALUES = batch(*(sample(kind, n, 4) for kind in KINDS for n in (60, 30)), np.ones(9), np.full(3, np.nan))


@pytest.mark.parametrize("fits", [power_law, exponential, log_normal, truncated_power_law])
def test_a_fact_is_the_fit_of_the_values(fits: Callable[..., object]) -> None:
    fact, want = Facts(tail_eigenvalues=VALUES)[fits.__name__], fits(VALUES)
    assert type(fact) is type(want)
    for name, value in vars(want).items():
        assert torch.equal(getattr(fact, name).nan_to_num(-1.0), value.nan_to_num(-1.0)), name


def test_the_power_law_has_the_least_distance_of_its_scan() -> None:
    facts = Facts(tail_eigenvalues=VALUES)
    scan = facts["power_law_scan"]
    assert torch.equal(
        scan.nan_to_num(-1.0), scan_distances(fit_candidates(order(VALUES), LAWS["power_law"])).nan_to_num(-1.0)
    )
    assert torch.equal(scan.nan_to_num(math.inf).amin(1), facts["power_law"].ks.nan_to_num(math.inf))


def test_comparisons_take_the_candidates_that_begin_where_the_power_law_does() -> None:
    # Over a tail of nearly equal values all laws are one, up to the rounding of their densities.
    kinds = [kind for kind in KINDS if kind != "nearly equal"]
    values = batch(*(sample(kind, 60, 4) for kind in kinds), np.ones(9), np.full(3, np.nan))
    found, want = Facts(tail_eigenvalues=values)["tail_comparisons"], compare_tails(values)
    for law in ("exponential", "log_normal", "truncated_power_law"):
        one, other = getattr(found, law), getattr(want, law)
        assert one.p.isnan().tolist() == [False] * len(kinds) + [True] * 2
        # A ratio of two laws that nearly coincide is a small difference of likelihoods, each good to its rounding.
        assert torch.allclose(one.ratio, other.ratio, rtol=1e-6, atol=1e-6, equal_nan=True), law
        assert torch.allclose(one.p, other.p, rtol=1e-6, atol=1e-9, equal_nan=True), law


def test_parameters_are_found_by_the_number_of_values() -> None:
    x = torch.tensor([[8.0, 4.0, 4.0, 1.0, 0.0], [2.0, 2.0, 1.0, math.nan, 1.0]], dtype=torch.float64)
    candidates = fit_candidates(order(x), LAWS["power_law"])
    mean_log = {3: math.log(2) / 3, 4: math.log(8 * 4 * 4) / 4}
    for count, want in mean_log.items():
        found = candidates.parameters_at(torch.tensor([count, 4.0], dtype=torch.float64))
        assert found[:, 0].tolist() == pytest.approx([1 / want, 2 / math.log(2)], rel=1e-14)
    # No tail of the first row ends between its equal values, the largest alone is none, and three is no end of row two.
    none = candidates.parameters_at(torch.tensor([2.0, 3.0], dtype=torch.float64))
    assert none.isnan().all()
    assert candidates.parameters_at(torch.tensor([1.0, math.nan], dtype=torch.float64)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (300, 300)])
def test_values_equal_up_to_rounding_have_no_tail_and_no_peaks(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    made = torch.float64 if dtype == torch.float64 else torch.float32  # an initialisation is made in float32 at best
    w = torch.randn(*shape, dtype=made, generator=torch.Generator().manual_seed(0))
    for matrix, equal in ((torch.linalg.qr(w).Q, True), (3 * torch.eye(*shape, dtype=made), True), (w, False)):
        found = spectrum(matrix.to(dtype)[None], method="exact")
        facts = Facts(sigmas=found.S, resolved=found.resolved, shape=shape, epsilon=torch.finfo(dtype).eps)
        for law in LAWS:
            assert bool(facts[law].xmin.isnan().all()) == equal
        assert bool(facts["peaks"].count.isnan().all()) == equal
        for name in ("pl_alpha", "alpha_hat", "log10_alpha_norm", "pl_vs_exp"):
            value = CATALOG[name](*(facts[fact] for fact in CATALOG[name].facts))
            assert bool(value.isnan().all()) == equal, name
        assert facts["bulk"].spikes.tolist() == [0]


def test_a_narrow_spectrum_is_not_an_equal_one() -> None:
    w = torch.randn(1, 16, 40_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = spectrum(w)
    assert (found.S[0, 0] / found.S[0, -1]).item() < 1.05
    facts = Facts(sigmas=found.S, resolved=found.resolved, shape=w.shape[1:], epsilon=torch.finfo(w.dtype).eps)
    assert bool(facts["power_law"].alpha.isfinite().all())


def test_pooled_blocks_do_not_know_the_aspect_ratio() -> None:
    """Gaussian noise of 128 x 128 and of 128 x 2048 has one exponent by blocks, and very different ones by matrices."""
    rng = np.random.default_rng(0)
    shapes = {"square": (128, 128), "long": (128, 2048)}
    arrays = {f"{kind}{i}": rng.standard_normal(shape) for kind, shape in shapes.items() for i in range(4)}
    found = diffract.scan(arrays, metrics=["pl_alpha", "pl_alpha_farms"], cache=False, nulls="all", heads=False).metrics
    middle = found.group_by(pl.col("name").str.strip_chars("0123456789")).agg(
        pl.col("pl_alpha", "pl_alpha_farms").mean()
    )
    by_kind = {row["name"]: row for row in middle.iter_rows(named=True)}
    # The exponent by blocks scatters by 0.03 in one square matrix.
    assert abs(by_kind["square"]["pl_alpha_farms"] - by_kind["long"]["pl_alpha_farms"]) < 0.06
    assert by_kind["long"]["pl_alpha"] > by_kind["square"]["pl_alpha"] + 1
