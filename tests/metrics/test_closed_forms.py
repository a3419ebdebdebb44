"""Metrics of matrices whose answer is known on paper, computed the way a scan and a comparison compute them."""

import math

import numpy as np
import pytest
import torch

import diffract
from diffract.analysis.facts import MetricPlan, StackPair, pair_facts, single_facts
from diffract.analysis.held import Stack
from diffract.metrics import CATALOG, GROUPS
from diffract.metrics.agreement import best_match_chance
from diffract.metrics.catalog import DEFAULT

CPU = torch.device("cpu")

EXACT = 1e-12
"""Relative: matrices of a few entries, float64 LAPACK; a few eps and room."""

GRAM = 1e-7
"""Relative: what Gram matrices promise of sigma_1; the sigmas here are no smaller than a tenth of it."""

USUAL = [m for group in DEFAULT for m in GROUPS[group]]
"""What is computed by default; the other groups have closed forms beside their kernels."""

SINGLE = [m.name for m in USUAL if not m.pair]
PAIR = [m.name for m in USUAL if m.pair]


def stack_of(w: torch.Tensor) -> Stack:
    return Stack(1, (w.shape[0], w.shape[1]), w.dtype, lambda: iter([w[None]]))


def single(w: torch.Tensor, method: str = "auto") -> dict[str, float]:
    metrics = tuple(CATALOG[name] for name in SINGLE)
    facts = single_facts(stack_of(w), MetricPlan(metrics, method=method), CPU).facts
    return {m.name: m(*(facts[fact] for fact in m.facts)).item() for m in metrics}


def compare(base: torch.Tensor, tuned: torch.Tensor, method: str = "auto") -> dict[str, float]:
    metrics = tuple(CATALOG[name] for name in PAIR)
    _, found = pair_facts(StackPair(stack_of(base), stack_of(tuned)), MetricPlan(metrics, method=method), CPU)
    return {m.name: m(*(found.facts[fact] for fact in m.facts)).item() for m in metrics}


def check(found: dict[str, float], want: dict[str, float], tolerance: float) -> None:
    wrong = {
        name: (found[name], value)
        for name, value in want.items()
        if found[name] != pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True)
    }
    assert not wrong


def diagonal(*values: float) -> torch.Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def orthogonal(n: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q


NAN = math.nan

P = (3 / 6, 2 / 6, 1 / 6)
"""Shares of the sigmas 3, 2, 1."""

SINGLE_CASES: dict[str, tuple[torch.Tensor, dict[str, float]]] = {
    "diag(3, -2, 1)": (
        diagonal(3, -2, 1),
        {
            "frobenius_norm": math.sqrt(14),
            "spectral_norm": 3,
            "nuclear_norm": 6,
            "stable_rank": 14 / 9,
            "effective_rank": math.exp(-sum(p * math.log(p) for p in P)),
            "participation_ratio": 14**2 / (81 + 16 + 1),
            "numerical_rank": 3,
            "energy_rank_90": 2,  # 9 / 14 < 0.9 <= 13 / 14
            "aspect_ratio": 1,
            "condition_number": 3,
            "entry_std": math.sqrt(14 / 9 - (2 / 9) ** 2),
            "entry_kurtosis": ((98 - 4 * (2 / 9) * (27 - 8 + 1) + 6 * (2 / 9) ** 2 * 14 - 3 * 9 * (2 / 9) ** 4) / 9)
            / (14 / 9 - (2 / 9) ** 2) ** 2
            - 3,
        },
    ),
    "4 by 4 orthogonal, twice": (
        2 * torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 2,
        {
            "frobenius_norm": 4,
            "spectral_norm": 2,
            "nuclear_norm": 8,
            "stable_rank": 4,
            "effective_rank": 4,
            "participation_ratio": 4,
            "numerical_rank": 4,
            "energy_rank_90": 4,  # 3 / 4 < 0.9
            "aspect_ratio": 1,
            "condition_number": 1,
            "entry_std": math.sqrt(1 - (4 / 16) ** 2),
            # +-1 with mean 1/4: kurtosis of a coin of p = 5/8, (1 - 6 p q) / (p q)
            "entry_kurtosis": (1 - 6 * 15 / 64) / (15 / 64),
        },
    ),
    "rank one, 2 by 4": (
        torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64) * 5,
        {
            "frobenius_norm": 5,
            "spectral_norm": 5,
            "nuclear_norm": 5,
            "stable_rank": 1,
            "effective_rank": 1,
            "participation_ratio": 1,
            "numerical_rank": 1,
            "energy_rank_90": 1,
            "aspect_ratio": 2,
            "condition_number": NAN,
            "entry_std": 5 * math.sqrt(1 / 8 - 1 / 64),
            "entry_kurtosis": (1 - 6 * 7 / 64) / (7 / 64),
        },
    ),
    "all ones, 3 by 12": (
        torch.ones(3, 12, dtype=torch.float64),
        {
            "frobenius_norm": 6,
            "spectral_norm": 6,
            "nuclear_norm": 6,
            "stable_rank": 1,
            "effective_rank": 1,
            "participation_ratio": 1,
            "numerical_rank": 1,
            "energy_rank_90": 1,
            "aspect_ratio": 4,
            "condition_number": NAN,
            "entry_std": 0,
            "entry_kurtosis": NAN,
        },
    ),
    "signs, 1 by 2": (
        torch.tensor([[1.0, -1.0]], dtype=torch.float64),
        {
            "frobenius_norm": math.sqrt(2),
            "spectral_norm": math.sqrt(2),
            "nuclear_norm": math.sqrt(2),
            "stable_rank": 1,
            "effective_rank": 1,
            "participation_ratio": 1,
            "numerical_rank": 1,
            "energy_rank_90": 1,
            "aspect_ratio": 2,
            "condition_number": 1,
            "entry_std": 1,
            "entry_kurtosis": -2,  # the least that is possible
        },
    ),
    "zero, 2 by 3": (
        torch.zeros(2, 3, dtype=torch.float64),
        {
            "frobenius_norm": 0,
            "spectral_norm": 0,
            "nuclear_norm": 0,
            "stable_rank": NAN,
            "effective_rank": NAN,
            "participation_ratio": NAN,
            "numerical_rank": 0,
            "energy_rank_90": NAN,
            "aspect_ratio": 1.5,
            "condition_number": NAN,
            "entry_std": 0,
            "entry_kurtosis": NAN,
        },
    ),
}


@pytest.mark.parametrize("method", ["exact", "gram"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", SINGLE_CASES)
def test_metrics_of_one_matrix(case: str, turned: bool, method: str) -> None:
    w, want = SINGLE_CASES[case]
    assert set(want) == set(SINGLE)
    found = single(w.mT.contiguous() if turned else w, method)
    # A Gram matrix has rank-one's other sigmas at up to 8e-8 sigma_1: shares of them move ranks by 1e-6.
    tolerance = EXACT if method == "exact" else 1e-5
    if method == "gram" and want["numerical_rank"] != min(w.shape):
        want = {k: v for k, v in want.items() if k != "numerical_rank"}  # float64's threshold is below what it resolves
    check(found, want, tolerance)


def change_cases() -> dict[str, tuple[torch.Tensor, torch.Tensor, dict[str, float]]]:
    base = diagonal(4, 3, 2, 1)
    d = 4
    chance = math.exp(math.lgamma(2) - math.lgamma(2.5)) / math.sqrt(math.pi)  # 4 / (3 pi)
    levels = {}
    for side in ("left", "right"):
        levels |= {
            f"{side}_agreement_chance": chance,
            f"{side}_best_match_chance": best_match_chance(d, 4),
            f"{side}_subspace_8": NAN,
            f"{side}_subspace_8_chance": NAN,
            f"{side}_subspace_32": NAN,
            f"{side}_subspace_32_chance": NAN,
        }

    def same(value: float, *names: str) -> dict[str, float]:
        return {f"{side}_{name}": value for side in ("left", "right") for name in names}

    scaled = {
        "delta_frobenius": 0.01 * math.sqrt(30),
        "delta_relative": 0.01,
        "delta_spectral": 0.04,
        "delta_stable_rank": 30 / 16,
        "delta_effective_rank": math.exp(-sum(p * math.log(p) for p in (0.4, 0.3, 0.2, 0.1))),
        "delta_changed_share": 4 / 16,
        "value_share": 1,
        "value_share_chance": 1 / 4,
        "spectral_shift_share": 1,
        "intruders": 0,
        **same(1, "agreement_mean", "best_match_mean", "agreement_window_mean"),
        **same(chance, "agreement_window_chance"),  # one vector in every window
        **levels,
    }
    scaled |= {"value_share_turned": 0, "sigma_change_relative": 0.01}
    scaled |= {
        "scale_change": 0.01,
        "delta_free_relative": 0,
        "value_share_free": NAN,
        "spectral_shift_share_free": NAN,
    }
    # Rows 1 and 2 swapped: left vectors are exchanged, right vectors and sigmas stay.
    swapped = base[[1, 0, 2, 3]].clone()
    swap = {
        "delta_frobenius": math.sqrt(2 * (16 + 9)),
        "delta_relative": math.sqrt(50 / 30),
        "delta_spectral": math.sqrt(50),  # D = (e2 - e1) (4 e1 - 3 e2)^T, rank one
        "delta_stable_rank": 1,
        "delta_effective_rank": 1,
        "delta_changed_share": 4 / 16,
        "value_share": (16 + 9) / 50,
        "value_share_chance": 1 / 4,
        "spectral_shift_share": 0,
        "intruders": 0,
        "left_agreement_mean": 0.5,
        "right_agreement_mean": 1,
        "left_agreement_window_mean": 0.5,
        "right_agreement_window_mean": 1,
        **same(1, "best_match_mean"),
        **same(chance, "agreement_window_chance"),
        **levels,
    }
    # |u0_i . u1_j| |v0_i . v1_j| is 0 throughout for both pairs, so nothing of them is left on the diagonal.
    swap |= {"value_share_turned": (16 + 9) / 50, "sigma_change_relative": 0}
    # <D, W0> = -25, so the scale is -5/6, and of ||D||^2 = 50 there stay 175/6. On the diagonal (-2/3, -1/2, 5/3, 5/6)
    # is left, of squared norm 25/6; sigmas s against s/6 are 125/6 apart.
    swap |= {"scale_change": -5 / 6, "delta_free_relative": math.sqrt(35 / 36)}
    swap |= {"value_share_free": 1 / 7, "spectral_shift_share_free": 5 / 7}
    # One entry grows by the rank-one change 2 e4 e4^T: sigmas 4, 3, 3, 2 would tie, so 1 becomes 1.5 instead.
    grown = base + diagonal(0, 0, 0, 0.5)
    grow = {
        "delta_frobenius": 0.5,
        "delta_relative": 0.5 / math.sqrt(30),
        "delta_spectral": 0.5,
        "delta_stable_rank": 1,
        "delta_effective_rank": 1,
        "delta_changed_share": 1 / 16,
        "value_share": 1,
        "value_share_chance": 1 / 4,
        "spectral_shift_share": 1,
        "intruders": 0,
        **same(1, "agreement_mean", "best_match_mean"),
        **same(3 / 4, "agreement_window_mean"),  # 1 lies outside 1.5 +- 5%
        **same(3 / 4 * chance, "agreement_window_chance"),
        **levels,
    }
    grow |= {"value_share_turned": 0, "sigma_change_relative": 0.5 / math.sqrt(30)}
    grow |= {"scale_change": 1 / 60, "delta_free_relative": math.sqrt(29) / 60}  # 0.5^2 - 0.5^2 / 30 = 29 / 120
    grow |= {"value_share_free": 1, "spectral_shift_share_free": 1}
    return {
        "scaled by 1.01": (base, 1.01 * base, scaled),
        "rows swapped": (base, swapped, swap),
        "one sigma grown": (base, grown, grow),
    }


@pytest.mark.parametrize("method", ["exact", "gram"])
@pytest.mark.parametrize("case", change_cases())
def test_metrics_of_a_pair(case: str, method: str) -> None:
    base, tuned, want = change_cases()[case]
    assert set(want) | {"delta_rounding_floor"} == set(PAIR)
    # D's zero sigmas come out at up to 8e-8 of ||D||_2 from a Gram matrix, and count in its effective rank.
    check(compare(base, tuned, method), want, EXACT if method == "exact" else 1e-5)


def test_values_that_change_places_are_no_turn() -> None:
    base = diagonal(4, 3, 2, 1)
    found = compare(base, diagonal(4, 1, 2, 3.5))  # sigmas 4, 3.5, 2, 1 of other directions than before
    assert found["value_share_turned"] == pytest.approx(0, abs=EXACT)
    assert found["value_share"] == pytest.approx(1)


@pytest.mark.parametrize("size", [0.4, 0.8])
def test_turning_alone_gives_the_share_of_values_that_it_has(size: float) -> None:
    def turn(n: int, seed: int) -> torch.Tensor:
        a = (
            torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            * size
            / (2 * n) ** 0.5
        )
        eye = torch.eye(n, dtype=torch.float64)
        return torch.linalg.solve(eye + (a - a.mT) / 2, eye - (a - a.mT) / 2)

    w = torch.randn(32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = compare(w, turn(32, 2) @ w @ turn(64, 3))
    assert found["value_share"] > 3 * found["value_share_chance"]
    assert found["value_share_turned"] == pytest.approx(found["value_share"], rel=0.25)
    assert found["sigma_change_relative"] < 1e-12


def test_rounding_floor() -> None:
    base = torch.tensor([[1.0, -3.0, 0.75, 4.0]], dtype=torch.bfloat16)
    # bfloat16 keeps 7 bits: ulps 2^-7, 2^-6, 2^-8, 2^-5.
    want = math.sqrt((2**-14 + 2**-12 + 2**-16 + 2**-10) / 12)
    assert compare(base, base)["delta_rounding_floor"] == pytest.approx(want, rel=EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_nothing_changed(dtype: torch.dtype) -> None:
    w = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = {
        "delta_frobenius": 0,
        "delta_relative": 0,
        "delta_spectral": 0,
        "delta_stable_rank": NAN,
        "delta_effective_rank": NAN,
        "delta_changed_share": 0,
        "value_share": NAN,
        "spectral_shift_share": NAN,
        "intruders": 0,
        **{f"{side}_{name}": 1 for side in ("left", "right") for name in ("agreement_mean", "best_match_mean")},
    }
    # Vectors of equal inputs: orthogonal to eps (sigma_1 / sigma_M)^2, here below 1e-12.
    check(compare(w, w), want, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_everything_zero(dtype: torch.dtype) -> None:
    zero = torch.zeros(3, 4, dtype=dtype)
    found = compare(zero, zero)
    no_value = ("delta_relative", "delta_stable_rank", "delta_effective_rank", "value_share", "spectral_shift_share")
    vectors = [f"{side}_{name}" for side in ("left", "right") for name in ("agreement_mean", "best_match_mean")]
    want = dict.fromkeys(("delta_frobenius", "delta_spectral", "delta_changed_share"), 0.0)
    check(found, want | dict.fromkeys((*no_value, *vectors), NAN), EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_zero_base_has_no_vectors(dtype: torch.dtype) -> None:
    tuned = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]], dtype=dtype)
    found = compare(torch.zeros_like(tuned), tuned)
    vectors = [
        f"{side}_{name}"
        for side in ("left", "right")
        for name in ("agreement_mean", "best_match_mean", "agreement_window_mean")
    ]
    want = {
        "delta_frobenius": 5.0,
        "delta_spectral": 4.0,
        "delta_stable_rank": 25 / 16,
        "delta_changed_share": 2 / 6,
        "spectral_shift_share": 1.0,
        **dict.fromkeys(("value_share", *vectors), NAN),
    }
    check(found, want, GRAM)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_delta_relative_of_a_zero_base_has_no_value(dtype: torch.dtype) -> None:
    tuned = torch.ones(2, 3, dtype=dtype)
    assert math.isnan(compare(torch.zeros_like(tuned), tuned)["delta_relative"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("which", ["base", "tuned"])
def test_intruders_have_no_value_where_there_are_no_vectors(which: str, dtype: torch.dtype) -> None:
    w = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    zero = torch.zeros_like(w)
    found = compare(zero, w) if which == "base" else compare(w, zero)
    assert math.isnan(found["intruders"])


def test_intruders_are_counted() -> None:
    n, planted = 40, 3
    base = orthogonal(n, 1) * torch.linspace(2, 1, n, dtype=torch.float64) @ orthogonal(n, 2)
    fresh = torch.randn(n, planted, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    left = torch.linalg.qr(fresh).Q
    assert (torch.linalg.svd(base).U.mT @ left).abs().max() < 0.5  # no base vector is near, by the seed
    # 100 times the base's norm: the top three left vectors are the planted ones to 1%.
    tuned = base + left * torch.tensor([300.0, 250.0, 200.0], dtype=torch.float64) @ orthogonal(n, 4)[:planted]
    assert compare(base, tuned)["intruders"] >= planted
    # Ten planted: all of the top ten, and no more are looked at.
    many = torch.linalg.qr(torch.randn(n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))).Q
    sizes = torch.linspace(400, 200, 12, dtype=torch.float64)
    if (torch.linalg.svd(base).U.mT @ many).abs().max() < 0.5:
        assert compare(base, base + many * sizes @ orthogonal(n, 6)[:12])["intruders"] == 10
    assert compare(base, 1.001 * base)["intruders"] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_vectors_that_rounding_chooses_do_not_count(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((60, 8), (8, 90))]
    w = factors[0] @ factors[1]
    found = compare(w.to(dtype), (1.01 * w).to(dtype))
    # 52 sigmas are rounding. The resolved vectors turn by rounding over the gap: eps 60 in bfloat16.
    tolerance = 20 * max(torch.finfo(dtype).eps ** 2, 1e-12) + 1e-5
    assert found["intruders"] == 0
    for side in ("left", "right"):
        for name in ("agreement_mean", "best_match_mean", "agreement_window_mean", "subspace_8"):
            assert found[f"{side}_{name}"] == pytest.approx(1, abs=100 * tolerance), name
        assert math.isnan(found[f"{side}_subspace_32"])
        assert math.isnan(found[f"{side}_subspace_32_chance"])
        dimension = 60 if side == "left" else 90
        assert found[f"{side}_best_match_chance"] == best_match_chance(dimension, 8)


def test_a_direction_is_resolved_above_its_rounding() -> None:
    w = diagonal(1, 0.5, 2**-9, 2**-10).to(torch.bfloat16)  # eps ||W||_F (1/2 + 1/2) = 2^-7 * 1.12
    found = compare(w, w[[0, 1, 3, 2]].contiguous())
    assert found["left_agreement_mean"] == pytest.approx(1)  # the two that change places are below
    assert found["left_agreement_window_chance"] == pytest.approx(4 / (3 * math.pi))
    exact = compare(w.double(), w[[0, 1, 3, 2]].double().contiguous())
    assert exact["left_agreement_mean"] == pytest.approx(0.5)


@pytest.mark.parametrize("k", [8, 32])
def test_subspaces(k: int) -> None:
    n = 48
    sigmas = torch.linspace(3, 1, n, dtype=torch.float64)
    base = torch.diag(sigmas)
    # The left vectors k / 2 - 1 and k + 3 (inside, outside) change places; the right ones stay.
    order = list(range(n))
    order[k // 2 - 1], order[k + 3] = order[k + 3], order[k // 2 - 1]
    found = compare(base, base[order].clone())
    assert found[f"left_subspace_{k}"] == pytest.approx((k - 1) / k, rel=1e-9)  # vectors to eps / gap = 5e-15
    assert found[f"right_subspace_{k}"] == pytest.approx(1, rel=1e-9)
    assert found[f"left_subspace_{k}_chance"] == pytest.approx(k / n, rel=EXACT)


def test_dimensions_of_the_chance_levels() -> None:
    w = torch.randn(10, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = compare(w, w + 1)
    assert found["left_subspace_8_chance"] == pytest.approx(8 / 10)
    assert found["right_subspace_8_chance"] == pytest.approx(8 / 90)
    assert found["value_share_chance"] == pytest.approx(1 / 90)
    assert found["left_best_match_chance"] == best_match_chance(10, 10)
    assert found["right_best_match_chance"] == best_match_chance(90, 10)
    # The asymptotic law sqrt(2 / (pi d)) (1 + 1 / (4 d)), next term d^-2 / 32.
    assert found["right_agreement_chance"] == pytest.approx(math.sqrt(2 / (math.pi * 90)) * (1 + 1 / 360), rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "rank"),
    [(torch.float64, 3), (torch.float32, 2), (torch.bfloat16, 1)],
    ids=str,
)
def test_numerical_rank_goes_by_the_stored_dtype(dtype: torch.dtype, rank: int) -> None:
    # Thresholds 3 eps: 7e-16, 4e-7; and eps = 2^-7 for bfloat16, whose 3 eps is above 0.001.
    w = diagonal(1, 2**-8, 2**-30).to(dtype)
    assert single(w, "exact")["numerical_rank"] == rank


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3, -1e6])
def test_moments_of_entries_far_from_zero(offset: float) -> None:
    noise = torch.from_numpy(np.random.default_rng(3).laplace(size=(40, 50)))
    w = noise + offset
    z = w.numpy() - w.numpy().mean()
    found = diffract.scan({"w": w}, metrics=["entry_std", "entry_kurtosis"], cache=False).metrics
    # The entries themselves are rounded to eps times the offset.
    tolerance = 1e-12 + 4e-16 * abs(offset)
    assert found["entry_std"].item() == pytest.approx(z.std(), rel=tolerance)
    assert found["entry_kurtosis"].item() == pytest.approx((z**4).mean() / (z**2).mean() ** 2 - 3, rel=10 * tolerance)
    constant = diffract.scan({"w": 0 * w + offset + 0.1}, metrics=["entry_std", "entry_kurtosis"], cache=False).metrics
    assert (constant["entry_std"].item(), constant["entry_kurtosis"].item()) == (0, None)


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e-310])
def test_entries_of_any_size_are_ordinary_numbers(scale: float) -> None:
    w = np.random.default_rng(4).standard_normal((24, 40))
    moved = w + 0.1 * np.random.default_rng(5).standard_normal((24, 40))
    names = [name for name, m in CATALOG.items() if m.degree is not None and "pvalue" not in name]
    plain, scaled = (
        diffract.compare({"w": w * s, "one": w}, {"w": moved * s, "one": moved}, metrics=names, cache=False).metrics
        for s in (1.0, scale)
    )
    # Denormal numbers have few digits.
    tolerance = 1e-9 if scale > 1e-300 else 1e-5
    assert scaled["status"].to_list() == ["ok"] * 4
    assert scaled.filter(name="one").select(names).equals(plain.filter(name="one").select(names))
    for name in names:
        for got, want in zip(scaled.filter(name="w")[name], plain.filter(name="w")[name], strict=True):
            factor = math.prod([scale] * abs(CATALOG[name].degree)) if CATALOG[name].degree >= 0 else math.inf
            if want is None or not 0 < abs(want * factor) < np.inf:  # a square of what is too large for one
                continue
            if CATALOG[name].unit == "count" or "sep_" in name or "rowcol" in name:
                assert got == pytest.approx(want * factor, rel=1e-3, abs=1), name
            else:
                assert got == pytest.approx(want * factor, rel=tolerance), name
    zero = diffract.scan({"w": 0 * w}, cache=False).metrics
    assert zero["status"].item() == "zero"
