"""What row and column norms alone make of a spectrum, by draws; and Hartigan's dip, against linear programming."""

import math
from dataclasses import replace

import numpy as np
import pytest
import spectral_references as slow
import torch
from scipy.optimize import linprog

import diffract
from diffract.analysis.drawn import NULLS_SHARE, choose_nulls, foretold_seconds, null_seconds
from diffract.analysis.facts import MetricPlan
from diffract.analysis.work import TensorTask, tensor_tasks
from diffract.matrices import Matrix, lay_out
from diffract.metrics import choose_metrics
from diffract.metrics.nulls import dip, dips, reached, rowcol_sigmas


def squares(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return w.double().square().sum(-1), w.double().square().sum(-2)


ALL = torch.ones(1, dtype=torch.bool)


def test_draws_have_the_norms_of_the_matrix() -> None:
    w = torch.randn(1, 12, 30, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 3, 12)[:, None]
    found = rowcol_sigmas(*squares(w), ALL, draws=40)
    assert found.shape == (1, 40, 12)
    assert found.square().sum(-1).numpy() == pytest.approx(w.square().sum().item(), rel=1e-5)  # float32 entries


def test_noise_of_a_single_row_or_column_is_its_own_null() -> None:
    """Of one row the norms leave no freedom, so that draws have the matrix's own singular value."""
    for shape in ((1, 9), (9, 1)):
        w = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))
        assert rowcol_sigmas(*squares(w), ALL, draws=3).numpy() == pytest.approx(w.norm().item(), rel=1e-5)


def test_a_matrix_has_the_same_draws_alone_and_in_a_batch_at_any_scale() -> None:
    w = torch.randn(3, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows, cols = squares(w)
    together = rowcol_sigmas(rows, cols, torch.tensor([True, False, True]), draws=5)
    assert torch.equal(together[:1], rowcol_sigmas(rows[:1], cols[:1], ALL, draws=5))
    assert bool(together[1].isnan().all())
    assert not torch.equal(together[0], together[2])
    large = rowcol_sigmas(rows[:1] * 1e200, cols[:1] * 1e200, ALL, draws=5)
    assert bool((large.isfinite() & (large > 1e98)).all())
    bad = torch.stack([rows[0] * 0, rows[0] * math.nan])
    assert bool(rowcol_sigmas(bad, cols[:2], torch.ones(2, dtype=torch.bool), draws=2).isnan().all())


def test_p_counts_draws_that_reach() -> None:
    draws = torch.tensor([[1.0, 2.0, 2.0], [1.0, 1.0, 1.0], [math.nan] * 3, [1.0, 1.0, 1.0]]).double()
    p = reached(torch.tensor([2.0, 2.0, 1.0, math.nan]).double(), draws)
    assert p[:2].tolist() == [0.75, 0.25]
    assert bool(p[2:].isnan().all())


def profile(name: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    return {
        "equal": np.ones(64),
        "two sizes": np.repeat([1.0, 2.0], 32),
        "weak rows": np.r_[np.ones(56), np.full(8, 0.1)],
        "log-normal": np.exp(0.3 * rng.standard_normal(64)),
    }[name]


@pytest.mark.parametrize("name", ["equal", "two sizes", "weak rows", "log-normal"])
def test_structureless_noise_is_explained_by_its_norms(name: str) -> None:
    rng = np.random.default_rng(2)
    arrays = {f"w{i}": rng.standard_normal((64, 256)) * profile(name)[:, None] for i in range(12)}
    names = ["mp_spikes_tw", "mp_spikes_tw_rowcol", "peak_count_rowcol_pvalue", "dip_pvalue"]
    found = diffract.scan(arrays, metrics=names, cache=False).metrics
    # p = 1/40 to 2/40 in one draw of twenty: of twelve at most four, but for one run in ten thousand.
    for column in ("peak_count_rowcol_pvalue", "dip_pvalue"):
        assert (found[column] <= 0.05).sum() <= 4, column
    assert abs((found["mp_spikes_tw"] - found["mp_spikes_tw_rowcol"]).mean()) < 0.5


def test_planted_groups_of_directions_are_not() -> None:
    rng = np.random.default_rng(3)
    arrays = {}
    for i in range(8):
        u, v = np.linalg.qr(rng.standard_normal((64, 64)))[0], np.linalg.qr(rng.standard_normal((256, 64)))[0]
        arrays[f"w{i}"] = (u * np.r_[1 + 0.1 * rng.random(32), 3 + 0.3 * rng.random(32)]) @ v.T
    found = diffract.scan(arrays, metrics=["peak_count", "peak_count_rowcol_pvalue", "dip_pvalue"], cache=False).metrics
    assert found["peak_count"].to_list() == [2] * 8
    assert found["peak_count_rowcol_pvalue"].max() == found["dip_pvalue"].max() == 1 / 40


def test_row_norms_do_not_explain_what_column_norms_do() -> None:
    """Columns of two sizes on the short side make two peaks: noise for ``rowcol``, and no matter of the rows."""
    rng = np.random.default_rng(4)
    arrays = {f"w{i}": rng.standard_normal((256, 64)) * np.repeat([1.0, 3.0], 32) for i in range(4)}
    names = ["peak_count", "peak_count_rowcol", "peak_count_rowcol_pvalue", "peak_count_row", "peak_count_row_pvalue"]
    found = diffract.scan(arrays, metrics=names, cache=False).metrics
    assert found.select(names).unique().rows() == [(2, 2, 1, 1, 1 / 40)]
    turned = diffract.scan({name: w.T.copy() for name, w in arrays.items()}, metrics=names, cache=False).metrics
    assert turned.select(names).unique().rows() == [(2, 2, 1, 2, 1)]


def test_exponents_stand_beside_those_of_noise_of_the_same_norms() -> None:
    """Log-normal rows alone make a tail of 2.6 where equal ones read 6.7; a spectrum like 1 / sqrt(i) is heavier."""
    rng = np.random.default_rng(8)
    scaled = rng.standard_normal((4, 32, 96)) * profile("log-normal")[:32, None]
    U, _, Vh = np.linalg.svd(rng.standard_normal((32, 96)), full_matrices=False)
    arrays = {f"w{i}": w for i, w in enumerate([*scaled, U * np.arange(1, 33.0) ** -0.5 @ Vh])}
    names = ["pl_alpha", "pl_alpha_rowcol", "pl_alpha_rowcol_pvalue"]
    own, level, p = diffract.scan(arrays, metrics=names, nulls="all", cache=False).metrics.select(names)
    for i, w in enumerate(arrays.values()):
        values = np.linalg.svd(slow.rowcol_draws(w), compute_uv=False) ** 2 / 96
        alphas = [slow.best_tail(one, "power_law")["alpha"] for one in values]
        assert level[i] == pytest.approx(np.mean(alphas), rel=1e-4)  # draws are of float32
        assert p[i] == pytest.approx((1 + sum(a <= own[i] for a in alphas)) / 40)
    assert p[:4].min() > 0.05
    assert p[4] <= 0.05


# Agreement of matrices that have nothing in common but their norms

RATED = ("agreement_mean", "best_match_mean", "subspace_8", "agreement_window_mean", "angle_8")


def unrelated(rows: np.ndarray, cols: np.ndarray, count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(6)
    shape = len(rows), len(cols)
    made = [{f"w{i}": np.outer(rows, cols) * rng.standard_normal(shape) for i in range(count)} for _ in range(2)]
    return [{name: w.astype(np.float32) for name, w in one.items()} for one in made]


@pytest.mark.parametrize("turned", [False, True])
def test_levels_of_agreement_know_which_rows_are_large(turned: bool) -> None:
    """Unrelated matrices whose same rows are large agree more than random directions: as their level says."""
    rows, cols = np.exp(0.5 * np.random.default_rng(7).standard_normal(48)), np.ones(96)
    base, tuned = unrelated(*((cols, rows) if turned else (rows, cols)), 24)
    side = "right" if turned else "left"
    found = diffract.compare(
        base, tuned, metrics="agreement,angles,agreement_levels", nulls="all", noise="none", cache=False
    ).metrics.filter(model="tuned")
    for name in RATED:
        start = f"{side}_{name.removesuffix('_mean')}"
        ratio, plain = (found[f"{side}_{name}"] / found[f"{start}_{level}"] for level in ("rowcol", "chance"))
        error = ratio.std() / 24**0.5
        assert abs(ratio.mean() - 1) < 4 * error, name  # once in fifteen thousand
        assert abs(plain.mean() - 1) > 0.1, name


def test_levels_of_agreement_are_those_of_the_drawn_pairs() -> None:
    (base,), (tuned,) = (one.values() for one in unrelated(np.arange(1.0, 13), np.ones(20), 1))
    found = diffract.compare(
        {"w": base}, {"w": tuned}, metrics="agreement_levels", nulls="all", noise="none", cache=False
    ).metrics.filter(model="tuned")
    draws = [slow.rowcol_draws(w.astype(float), 4, salt) for salt, w in enumerate((base, tuned))]
    (U0, _, V0), (U1, _, V1) = (np.linalg.svd(w, full_matrices=False) for w in draws)
    S0, S1 = (np.linalg.svd(w.astype(float), compute_uv=False) for w in (base, tuned))
    near = np.abs(S0[:, None] - S1) <= 0.05 * S1
    for side, cosines in (("left", np.swapaxes(U0, 1, 2) @ U1), ("right", V0 @ np.swapaxes(V1, 1, 2))):
        want = {
            "agreement": np.abs(np.diagonal(cosines, axis1=1, axis2=2)).mean(),
            "best_match": np.abs(cosines).max(2).mean(),
            "subspace_8": (cosines[:, :8, :8] ** 2).sum((1, 2)).mean() / 8,
            "agreement_window": np.sqrt((cosines**2 * near).sum(1)).mean(),
            "angle_8": np.arccos(np.linalg.svd(cosines[:, :8, :8], compute_uv=False).clip(max=1)).mean(),
        }
        got = {name: found[f"{side}_{name}_rowcol"].item() for name in want}
        assert got == pytest.approx(want, rel=1e-3)  # draws are of float32, whose vectors move by 1e-7 over the gap
        assert found[f"{side}_subspace_32_rowcol"].item() is None


def test_a_matrix_that_did_not_change_has_the_level_of_strangers() -> None:
    base, _ = unrelated(np.linspace(1, 3, 24), np.ones(32), 2)
    zero = {"w0": base["w0"], "w1": np.zeros_like(base["w1"])}
    found = (
        diffract.compare(zero, zero, metrics="agreement,agreement_levels", nulls="all", noise="none", cache=False)
        .metrics.filter(model="tuned")
        .sort("name")
    )
    assert found["left_agreement_mean"].to_list() == [pytest.approx(1), None]
    level, none = found["left_agreement_rowcol"]
    assert none is None
    assert 0.1 < level < 0.35


def unimodal_distance(values: np.ndarray) -> float:
    """The dip by linear programming: for each mode the least d for which a unimodal function fits within d."""
    x, counts = np.unique(values, return_counts=True)
    n, K = len(values), len(x)
    above = counts.cumsum() / n
    below, best = above - counts / n, math.inf
    for mode in range(K):
        # Unknown are the function at 0 .. mode from the left, at mode .. K - 1 from the right, and d.
        width, last = K + 2, mode + 1
        rows, bounds = [], []

        def at_most(bound: float, rows: list = rows, bounds: list = bounds, **terms: float) -> None:
            row = np.zeros(width)  # noqa: B023
            for name, value in terms.items():
                row[int(name[1:])] += value
            rows.append(row)
            bounds.append(bound)

        places = [*range(mode + 1), *range(mode, K)]
        d = f"v{K + 1}"
        for v, place in enumerate(places):
            left = v < last
            if not (left and place == mode):
                at_most(-above[place], **{f"v{v}": -1, d: -1})
            if left or place != mode:
                at_most(below[place], **{f"v{v}": 1, d: -1})
            else:
                at_most(above[place], **{f"v{v}": 1, d: -1})
        for v in range(K):
            at_most(0, **{f"v{v}": 1, f"v{v + 1}": -1})
        for sign, first, stop in ((1, 0, last), (-1, last, K + 1)):
            for v in range(first + 1, stop - 1):
                a, m, b = (x[places[v + k]] for k in (-1, 0, 1))
                share = (m - a) / (b - a)
                at_most(0, **{f"v{v}": sign, f"v{v - 1}": -sign * (1 - share), f"v{v + 1}": -sign * share})
        found = linprog(np.eye(width)[-1], A_ub=np.array(rows), b_ub=bounds, bounds=[(None, None)] * width)
        best = min(best, found.fun)
    return max(best, 0.5 / n)


@pytest.mark.parametrize("seed", range(12))
def test_the_dip_is_the_least_distance_from_a_unimodal_law(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=int(rng.integers(3, 13))) + rng.choice([0, 4], 1) * (rng.random() < 0.7)
    values[::2] += 3
    if seed % 3 == 0:
        values = np.round(values)
    if len(np.unique(values)) > 1:
        assert dip(values) == pytest.approx(unimodal_distance(values), abs=1e-9)


def test_dips_of_rows() -> None:
    rows = torch.tensor([[1.0, 1, math.e, math.e], [0, 0, 1, 1], [1, math.e, math.e**2, 0]], dtype=torch.float64)
    assert dips(rows).tolist() == pytest.approx([0.25, math.nan, 1 / 6], nan_ok=True)


def test_nulls_are_drawn_for_some_matrices_of_every_role() -> None:
    rng = np.random.default_rng(0)
    arrays = {f"w{i}": rng.standard_normal((16, 24)).astype(np.float32) for i in range(40)}
    some = diffract.scan(arrays, metrics="peak_count_rowcol", cache=False)
    assert some.metrics["peak_count_rowcol"].is_not_null().sum() == 32
    assert some.manifest["nulls"] == {"drawn": 32, "of": 40}
    every = diffract.scan(arrays, metrics="peak_count_rowcol", nulls="all", cache=False)
    assert every.metrics["peak_count_rowcol"].null_count() == 0
    drawn = some.metrics["peak_count_rowcol"].is_not_null()
    assert every.metrics.filter(drawn)["peak_count_rowcol"].equals(some.metrics.filter(drawn)["peak_count_rowcol"])


def planned(*shape: int, count: int = 8) -> tuple[list[Matrix], list[TensorTask]]:
    with diffract.open({f"w{i}": np.zeros(shape, np.float32) for i in range(count)}) as checkpoint:
        layout = lay_out(checkpoint)
    return layout.matrices, tensor_tasks([layout])


@pytest.mark.parametrize("metrics", ["all", "heavy_tails", "random_matrix", "spectral_shape"])
@pytest.mark.parametrize("shape", [(64, 256), (128, 2048), (512, 512)])
def test_nulls_take_no_more_than_the_rest(metrics: str, shape: tuple[int, int]) -> None:
    matrices, tasks = planned(*shape, count=128)
    plan = MetricPlan(tuple(choose_metrics(metrics, pair=False)))
    chosen = choose_nulls(matrices, plan, tasks)
    rest, drawn = (
        sum(foretold_seconds(task, replace(plan, nulls=names)) for task in tasks) for names in (frozenset(), chosen)
    )
    assert 0 < len(chosen) <= 32
    assert rest < drawn <= (1 + NULLS_SHARE) * rest
    # one more would be too much
    assert len(chosen) == 32 or drawn + null_seconds(matrices[0], plan) > (1 + NULLS_SHARE) * rest


def test_what_nulls_of_a_comparison_take_is_foretold_of_every_model() -> None:
    matrices, tasks = planned(512, 512)
    plan = MetricPlan(tuple(choose_metrics("all", pair=False)))
    own, compared = (
        [foretold_seconds(replace(tasks[0], tuned=tuned), replace(plan, nulls=names)) for tuned in ((), (1, 2))]
        for names in (frozenset(), None)
    )
    drawn = [b - a for a, b in zip(own, compared, strict=True)]
    assert drawn == pytest.approx([null_seconds(matrices[0], plan), 3 * null_seconds(matrices[0], plan)])


def test_a_bootstrap_takes_less_than_draws() -> None:
    matrices, tasks = planned(512, 512)
    every, alone = (MetricPlan(tuple(choose_metrics(one, pair=False))) for one in ("all", "pl_alpha_stderr"))
    assert 0 < null_seconds(matrices[0], alone) < null_seconds(matrices[0], every) / 10
    assert len(choose_nulls(matrices, alone, tasks)) == 8


def test_the_weights_stay_as_they_are() -> None:
    w = np.random.default_rng(0).standard_normal((12, 20))
    kept = w.copy()
    diffract.scan({"w": w}, metrics="all", cache=False)
    diffract.compare({"w": w}, {"w": w}, metrics="all", cache=False)
    assert np.array_equal(w, kept)
