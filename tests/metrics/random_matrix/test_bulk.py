"""The fitted bulk on spectra whose noise and spikes are known."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binom, kstest

from diffract.densities import marchenko_pastur_cdf
from diffract.linalg import Method, spectrum
from diffract.metrics import Facts
from diffract.metrics.random_matrix import Bulk, bulk_warnings, fit_bulk, fluctuation_edge

EXACT = 1e-12
"""Relative: sums of a few hundred float64 numbers in two orders."""

RIGID = 2.6
"""Times 1 / M, the mean KS distance of noise: eigenvalues repel, a few of them are out of place and not sqrt(M)."""

NAMES = [field.name for field in fields(Bulk)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int, shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(count, *shape, dtype=torch.float64, generator=generator(seed))


def eigenvalues(w: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(w).square() / max(w.shape[-2:])


def signal(count: int, shape: tuple[int, int], rank: int, strength: float, seed: int) -> torch.Tensor:
    """Random directions, each with ``strength`` times the energy at which it would stick out of noise of variance 1.

    That is sigma^2 = sqrt(M N) (Benaych-Georges & Nadakuditi 2012).
    """
    U, V = (
        torch.linalg.qr(torch.randn(count, d, rank, dtype=torch.float64, generator=generator(seed + i))).Q
        for i, d in enumerate(shape)
    )
    return math.sqrt(strength * math.sqrt(shape[0] * shape[1])) * U @ V.mT


def row(fit: Bulk, i: int) -> dict[str, float]:
    return {name: getattr(fit, name)[i].item() for name in NAMES}


def reference(lambdas: np.ndarray, shape: tuple[int, int]) -> dict[str, float]:
    """The iteration as it is told: estimate, remove what is above the edge, estimate again."""
    N, M = max(shape), min(shape)
    gone, variances = 0, []
    while True:
        variances.append(N * lambdas[gone:].sum() / ((N - gone) * (M - gone)))
        above = int((lambdas > variances[-1] * fluctuation_edge(shape, gone).item()).sum())
        if above == gone:
            break
        assert above > gone  # monotone
        gone = above
    assert len(variances) <= M
    v = variances[-1]
    edge = v * (math.sqrt(N - gone) + math.sqrt(M - gone)) ** 2 / N
    bulk = lambdas[lambdas <= edge]
    if 2 * len(bulk) < M:
        return dict.fromkeys(NAMES, math.nan)
    law = lambda x: marchenko_pastur_cdf(x, np.array(v * (N - gone) / N), (M - gone) / (N - gone))  # noqa: E731
    return {
        "variance": v,
        "edge": edge,
        "ks": kstest(bulk, law).statistic,
        "spikes": M - len(bulk),
        "spikes_tw": gone,
        "soft_rank": edge / lambdas[0],
        "bulk_share": bulk.sum() / lambdas.sum(),
    }


@st.composite
def spectra(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int]]:
    """Positive spectra of every shape: flat, spiked, and heavy in the tail."""
    short = draw(st.integers(1, 24))
    shape = draw(st.permutations([short, short + draw(st.integers(0, 40))]))
    logs = draw(arrays(np.float64, short, elements=st.floats(-6, 6)))
    spread = draw(st.sampled_from([0.1, 0.5, 1.0]))
    return np.sort(np.exp(spread * logs))[::-1].copy(), (shape[0], shape[1])


@given(spectra())
@settings(max_examples=200, deadline=None)
def test_the_closed_form_is_the_iteration(case: tuple[np.ndarray, tuple[int, int]]) -> None:
    lambdas, shape = case
    found = row(fit_bulk(torch.tensor(lambdas)[None], shape), 0)
    assert found == pytest.approx(reference(lambdas, shape), rel=EXACT, abs=EXACT, nan_ok=True)


@given(spectra(), st.integers(-20, 20))
@settings(deadline=None)
def test_scale_moves_variance_and_edge_alone(case: tuple[np.ndarray, tuple[int, int]], power: int) -> None:
    lambdas, shape = case
    plain = row(fit_bulk(torch.tensor(lambdas)[None], shape), 0)
    scaled = row(fit_bulk(torch.tensor(lambdas * 2.0**power)[None], (shape[1], shape[0])), 0)
    for name in ("variance", "edge"):
        scaled[name] /= 2.0**power
    assert scaled == pytest.approx(plain, rel=0, abs=0, nan_ok=True)  # a power of two is exact


@pytest.mark.parametrize("shape", [(8, 8), (16, 64), (40, 40), (80, 30)])
def test_pure_noise(shape: tuple[int, int]) -> None:
    count = 400
    fit = fit_bulk(eigenvalues(1.5 * noise(count, shape, 0)), shape)
    error = 2.25 * math.sqrt(2 / (shape[0] * shape[1]))  # standard error of a variance from m n entries
    assert abs(fit.variance.mean() - 2.25) < 4 * error / math.sqrt(count)
    assert fit.variance.std().item() == pytest.approx(error, rel=0.15)  # 4 / sqrt(2 * 400)
    # At most one in a hundred: in a small matrix the largest eigenvalue raises the variance it is measured with.
    assert (fit.spikes_tw > 0).sum() <= binom.ppf(0.9995, count, 0.01)
    # l+ itself is passed more often, but no more than P(Tracy-Widom > 0) = 0.168.
    assert (fit.spikes > 0).sum() <= binom.ppf(0.9995, count, 0.168)
    assert (fit.spikes > 0).sum() > (fit.spikes_tw > 0).sum()
    assert fit.ks.mean() < RIGID / min(shape)
    # lambda_1 has the Tracy-Widom median -1.2686, up to the error of the limit at M = 8.
    long, short = math.sqrt(max(shape) - 1), math.sqrt(min(shape))
    middle = ((long + short) ** 2 - 1.2686 * (long + short) * (1 / long + 1 / short) ** (1 / 3)) / max(shape)
    edge = (1 + math.sqrt(min(shape) / max(shape))) ** 2
    assert fit.soft_rank.median().item() == pytest.approx(edge / middle, rel=0.03)
    assert fit.bulk_share.median() == 1


@pytest.mark.parametrize("shape", [(60, 60), (50, 200)])
def test_planted_spikes_are_counted_above_the_threshold_and_hidden_below(shape: tuple[int, int]) -> None:
    count = 100
    w = noise(count, shape, 1)
    seen = fit_bulk(eigenvalues(w + signal(count, shape, 3, 6.0, 2)), shape)
    # Ten standard deviations above the edge; one matrix in a hundred may add a fluctuation.
    assert bool((seen.spikes_tw >= 3).all())
    assert (seen.spikes_tw > 3).sum() <= binom.ppf(0.9995, count, 0.01)
    hidden = fit_bulk(eigenvalues(w + signal(count, shape, 3, 0.2, 4)), shape)
    assert (hidden.spikes_tw > 0).sum() <= binom.ppf(0.9995, count, 0.03)  # pulled towards the edge, not past it


@pytest.mark.parametrize(("shape", "rank"), [((64, 64), 5), ((64, 256), 10), ((200, 100), 20)])
def test_the_variance_of_noise_under_strong_signal(shape: tuple[int, int], rank: int) -> None:
    count = 50
    fit = fit_bulk(eigenvalues(2 * noise(count, shape, 5) + signal(count, shape, rank, 400.0, 6)), shape)
    assert bool((fit.spikes_tw == rank).all())
    left = (shape[0] - rank) * (shape[1] - rank)
    # Five standard errors of the mean, and 1 / 100 of what a direction just above the threshold hides, for each.
    tolerance = 5 * math.sqrt(2 / left / count) + rank / 100 / math.sqrt(shape[0] * shape[1])
    assert tolerance < 0.3 * rank / max(shape)  # the plain mean of the rest would be low by rank / N
    assert fit.variance.mean().item() == pytest.approx(4, rel=tolerance)
    assert fit.ks.mean() < RIGID / (min(shape) - rank)  # the bulk is that of a smaller matrix, and as rigid


def test_variance_under_spikes_just_above_the_threshold() -> None:
    shape, rank = (64, 128), 3
    fit = fit_bulk(eigenvalues(noise(200, shape, 7) + signal(200, shape, rank, 4.0, 8)), shape)
    # Low by up to 1 / sqrt(N M) each, and high where a spike is taken for a fluctuation.
    assert abs(fit.variance.mean() - 1) < rank / math.sqrt(64 * 128)


def test_heavy_tailed_entries_raise_spikes() -> None:
    rng = np.random.default_rng(0)
    fit = fit_bulk(eigenvalues(torch.tensor(rng.standard_t(3, (50, 64, 128)))), (64, 128))
    assert (fit.spikes_tw > 0).double().mean() > 0.9
    assert fit.soft_rank.median() < 0.9


def test_hand_computed() -> None:
    # v_0 = 14 / 4, edge 3.5 * 5.4 = 19 > 11: nothing is removed from so small a matrix. l+ = 4 v = 14.
    found = row(fit_bulk(torch.tensor([[11.0, 1, 1, 1]]).double(), (4, 4)), 0)
    F = marchenko_pastur_cdf(np.array([1.0, 11.0]), np.array(3.5), 1.0).tolist()
    assert found == pytest.approx(
        {
            "variance": 3.5,
            "edge": 14,
            "ks": max(abs(0.75 - F[0]), F[0], 1 - F[1], abs(F[1] - 0.75)),
            "spikes": 0,
            "spikes_tw": 0,
            "soft_rank": 14 / 11,
            "bulk_share": 1,
        }
    )
    # 9 x 16: one spike, v = 16 * 8 / (15 * 8), the rest is 8 x 15: l+ = v (sqrt(15) + sqrt(8))^2 / 16.
    found = row(fit_bulk(torch.tensor([[100.0] + 8 * [1.0]]).double(), (9, 16)), 0)
    v = 16 / 15
    assert found["variance"] == pytest.approx(v)
    edge = v * (math.sqrt(15) + math.sqrt(8)) ** 2 / 16
    assert found["edge"] == pytest.approx(edge)
    assert (found["spikes"], found["spikes_tw"]) == (1, 1)
    assert found["soft_rank"] == pytest.approx(edge / 100)
    assert found["bulk_share"] == pytest.approx(8 / 108)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_a_single_eigenvalue_is_its_own_bulk(shape: tuple[int, int]) -> None:
    found = row(fit_bulk(torch.tensor([[2.0]]).double(), shape), 0)
    edge = 2 * (1 + math.sqrt(1 / max(shape))) ** 2
    assert found["variance"] == 2
    assert found["edge"] == pytest.approx(edge)
    assert (found["spikes"], found["spikes_tw"], found["bulk_share"]) == (0, 0, 1)
    assert found["soft_rank"] == pytest.approx(edge / 2)
    assert 0 < found["ks"] < 1


def test_equal_eigenvalues_have_no_spike() -> None:
    found = row(fit_bulk(torch.full((1, 32), 0.25).double(), (32, 64)), 0)
    assert found["variance"] == pytest.approx(0.25)
    assert (found["spikes"], found["spikes_tw"], found["bulk_share"]) == (0, 0, 1)


NO_NOISE = {"variance": 0.0, "edge": 0.0, "ks": math.nan}


def test_zero_matrix() -> None:
    found = row(fit_bulk(torch.zeros(1, 16).double(), (16, 20)), 0)
    ratios = {"soft_rank": math.nan, "bulk_share": math.nan}
    assert found == pytest.approx(NO_NOISE | {"spikes": 0, "spikes_tw": 0} | ratios, nan_ok=True)


@pytest.mark.parametrize("method", ["exact", "gram"])
def test_low_rank_without_noise_is_all_spikes(method: Method) -> None:
    factors = noise(2, (60, 3), 9)
    w = factors[:1] @ factors[1:].mT[:, :, :40]
    # Rounding leaves 1e-16, or 1e-8 through a Gram matrix, not zero.
    found = row(Facts(sigmas=(s := spectrum(w, method=method)).S, resolved=s.resolved, shape=(60, 40))["bulk"], 0)
    want = NO_NOISE | {"spikes": 3, "spikes_tw": 3, "soft_rank": 0, "bulk_share": 0}
    assert found == pytest.approx(want, nan_ok=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 5, 31])
def test_a_bad_row_is_nan_and_leaves_the_others_alone(bad: float, place: int) -> None:
    shape = (32, 48)
    lambdas = eigenvalues(noise(3, shape, 10) + signal(3, shape, 2, 9.0, 11))
    spoiled = lambdas.clone()
    spoiled[1, place] = bad
    fit = fit_bulk(spoiled, shape)
    assert all(math.isnan(value) for value in row(fit, 1).values())
    for i in (0, 2):
        assert row(fit, i) == row(fit_bulk(lambdas[i : i + 1], shape), 0)


def test_signal_in_a_quarter_of_the_directions_hides() -> None:
    equal = torch.tensor([[1.0] * 32 + [0.0] * 96, [1.0] * 16 + [0.0] * 112]).double()
    assert fit_bulk(equal, (128, 128)).spikes.tolist() == [0, 16]


def test_noise_ends_where_the_edge_says_once_many_spikes_are_removed() -> None:
    shape, rank = (128, 128), 30
    w = noise(8, shape, 12) + signal(8, shape, rank, 40.0, 13)
    lambdas = eigenvalues(w)
    fit = fit_bulk(lambdas, shape)
    assert fit.spikes_tw.tolist() == [rank] * 8
    # v (sqrt(98) + sqrt(98))^2 / 128, where the edge of a whole 128 x 128 matrix would lie 30% above it.
    assert fit.edge.mean().item() == pytest.approx(lambdas[:, rank].mean().item(), rel=0.06)
    assert fit.ks.mean() < RIGID / (min(shape) - rank)


def test_noise_far_below_its_spikes_is_still_seen() -> None:
    shape = (40, 60)
    w = 1e-10 * noise(1, shape, 14) + 30 * signal(1, shape, 3, 100.0, 15)
    found = spectrum(w, method="exact")
    fit = Facts(sigmas=found.S, resolved=found.resolved, shape=shape)["bulk"]
    assert fit.spikes_tw.tolist() == [3]
    assert fit.variance.item() == pytest.approx(1e-20, rel=0.15)


def test_there_is_no_edge_where_noise_is_the_minority() -> None:
    lambdas = torch.cat([torch.linspace(2.0, 0.5, 24), 1e-4 * torch.linspace(2.0, 1.0, 8)]).double().square()[None]
    steep = torch.logspace(4, -4, 32).double()[None]
    for values in (lambdas, steep):
        fit = fit_bulk(values, (32, 400))
        if fit.variance.isnan():
            assert all(math.isnan(value) for value in row(fit, 0).values())
    fit = fit_bulk(steep, (32, 400))
    assert bulk_warnings(fit, steep) == ("no noise edge: under half of the eigenvalues would lie below it",)
    assert bulk_warnings(fit_bulk(torch.full((1, 4), torch.nan).double(), (4, 4)), steep[:, :4] * torch.nan) == ("",)
