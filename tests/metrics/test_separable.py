"""The law of row and column norms: against closed forms, against draws, and what it calls structure."""

import math

import numpy as np
import pytest
import torch

import diffract
from diffract.densities import marchenko_pastur_cdf
from diffract.metrics import separable
from diffract.metrics.separable import Separable, sep_ks, sep_sigmas, sep_spikes, separable_law

RNG = np.random.default_rng(7)
PROFILES = {
    "equal": ((64, 256), np.ones(64), np.ones(256)),
    "square": ((96, 96), np.ones(96), np.ones(96)),
    "tall": ((200, 50), np.ones(200), np.ones(50)),
    "two sizes": ((64, 256), np.repeat([1.0, 3.0], 32), np.ones(256)),
    "dead rows": ((64, 256), np.r_[np.ones(56), np.zeros(8)], np.ones(256)),
    "log-normal rows and columns": ((64, 256), *(np.exp(0.6 * RNG.standard_normal(d)) for d in (64, 256))),
    "one large row": ((64, 256), np.r_[10.0, np.ones(63)], np.ones(256)),
}


def law_of(name: str) -> Separable:
    _, rows, cols = PROFILES[name]
    R, C = rows**2 * (cols**2).sum(), cols**2 * (rows**2).sum()
    return separable_law(torch.tensor(R)[None], torch.tensor(C)[None], torch.ones(1, dtype=torch.bool))


def draws(name: str, count: int) -> torch.Tensor:
    shape, rows, cols = PROFILES[name]
    w = np.random.default_rng(1).standard_normal((count, *shape)) * rows[:, None] * cols
    return torch.from_numpy(np.linalg.svd(w, compute_uv=False) ** 2 / max(shape))


@pytest.mark.parametrize("name", PROFILES)
def test_pooled_draws_follow_the_law(name: str) -> None:
    pooled = draws(name, 60).flatten().sort(descending=True).values[None]
    # Within what sizes of 64 still differ from the limit by.
    assert sep_ks(law_of(name), pooled).item() < 0.012


@pytest.mark.parametrize("name", ["equal", "square", "tall"])
def test_equal_norms_give_marchenko_pastur(name: str) -> None:
    law, shape = law_of(name), PROFILES[name][0]
    gamma = min(shape) / max(shape)
    assert law.edge.item() == pytest.approx((1 + math.sqrt(gamma)) ** 2, rel=1e-3)
    want = marchenko_pastur_cdf(law.x[0].numpy(), np.array(1.0), gamma)
    # Trapezoids over a density that ends, or begins, like a root.
    assert np.abs(law.share[0].numpy() - want).max() < 3e-3


def test_spikes_are_what_norms_do_not_explain() -> None:
    shape, rows, _ = PROFILES["two sizes"]
    noise = np.random.default_rng(2).standard_normal(shape) * rows[:, None]
    u, v = (np.linalg.qr(np.random.default_rng(3 + i).standard_normal((d, 3)))[0] for i, d in enumerate(shape))
    for strength, spikes, distance in ((0.0, 0, 0.06), (200.0, 3, None)):
        w = torch.from_numpy(noise + strength * u @ v.T)
        squares = w.square()[None]
        law = separable_law(squares.sum(2), squares.sum(1), torch.ones(1, dtype=torch.bool))
        lambdas = torch.linalg.svdvals(w).square()[None] / max(shape)
        assert sep_spikes(law, lambdas).item() == spikes
        assert sep_ks(law, lambdas).item() < distance if distance else sep_ks(law, lambdas).item() > 0.2


def test_a_spectrum_that_follows_the_law_has_no_distance_from_it() -> None:
    law = law_of("log-normal rows and columns")
    found = sep_sigmas(law, (64, 256))
    assert bool((found.diff(dim=1) <= 0).all())
    assert sep_ks(law, found.square() / 256).item() == pytest.approx(1 / 128, abs=1e-6)  # half a step


def test_unit_moves_the_law_and_neighbours_do_not() -> None:
    squares = torch.rand(3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, cols = squares.sum(2), squares.sum(1)
    rows[1] = math.nan
    one = separable_law(rows, cols, torch.tensor([True, True, False]))
    assert bool(one.edge[1:].isnan().all())
    assert bool(sep_sigmas(one, (8, 12))[1:].isnan().all())
    large = separable_law(rows[:1] * 1e150, cols[:1] * 1e150, torch.ones(1, dtype=torch.bool))
    assert large.edge.item() == pytest.approx(one.edge[0].item() * 1e150, rel=1e-9)
    assert torch.allclose(large.share[0], one.share[0], rtol=0, atol=1e-9)


def test_what_does_not_converge_has_no_law_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separable, "NEWTON_STEPS", 1)
    w = RNG.standard_normal((16, 24)) * np.linspace(1, 3, 16)[:, None]
    row = diffract.scan({"w": w}, metrics=["stable_rank", "sep_ks", "sep_edge", "sep_modes"], cache=False).metrics
    assert row["sep_ks"].to_list() == row["sep_edge"].to_list() == row["sep_modes"].to_list() == [None]
    assert row["stable_rank"][0] > 1
    assert row["warning"].to_list() == ["no law of row and column norms: it did not converge"]
