"""Noise of equal norm beside the numbers of a pair: what is drawn, for which matrices, what a model's excess is."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
import torch

import diffract
from diffract.analysis.drawn import MOST_NOISE, SMALL_PLAN, choose_noise
from diffract.analysis.facts import MetricPlan, StackFacts, StackPair, pair_facts
from diffract.analysis.held import Stack
from diffract.analysis.noise import noise_facts, over_noise
from diffract.analysis.work import TensorTask
from diffract.checkpoints import TensorInfo
from diffract.linalg import LowRank
from diffract.matrices import Matrix
from diffract.metrics import choose_metrics

CPU = torch.device("cpu")
PLAN = MetricPlan(tuple(choose_metrics("delta_frobenius,delta_spectral,value_share,intruders", pair=True)))


def stack(w: torch.Tensor, *, cut: int = 0) -> Stack:
    parts = w.split(cut or w.shape[1], 1)
    return Stack(w.shape[0], (w.shape[1], w.shape[2]), w.dtype, lambda: iter(parts), streamed=bool(cut))


def matrices(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(*shape, generator=draw)
    return base, base + 0.1 * torch.randn(*shape, generator=draw) * torch.linspace(0.2, 2, shape[-1])


def drawn(pair: StackPair, labels: list[str], kind: str = "noise") -> torch.Tensor:
    """W0 + E as the finder meets it."""
    met: list[torch.Tensor] = []

    def find(noisy: StackPair) -> tuple[StackFacts, StackFacts]:
        met.append(torch.cat(list(noisy.tuned.pieces()), 1))
        assert torch.equal(met[0], noisy.tuned.whole())  # drawn again, it is the same
        return pair_facts(noisy, PLAN, CPU)

    noise_facts(pair, labels, kind, find=find)
    return met[0]


def test_noise_has_the_norm_of_the_change_and_no_structure() -> None:
    base, tuned = matrices(2, 40, 64)
    noisy = drawn(StackPair(stack(base), stack(tuned)), ["a", "b"])
    e, d = noisy - base.double(), tuned.double() - base.double()
    assert torch.allclose(e.norm(dim=(1, 2)), d.norm(dim=(1, 2)), rtol=1e-12)
    # columns of the change differ tenfold, those of noise by what 40 Gaussian numbers scatter
    assert e.norm(dim=1).amax() / e.norm(dim=1).amin() < 2.5
    kurtosis = (e / e.std()).pow(4).mean()
    assert kurtosis.item() == pytest.approx(3.0, abs=5 * (24 / e.numel()) ** 0.5)
    assert abs((e[0] * e[1]).sum() / (e[0].norm() * e[1].norm())) < 5 / 2560**0.5


def test_noise_of_rows_and_columns_has_their_norms() -> None:
    base, tuned = matrices(1, 400, 500)
    noisy = drawn(StackPair(stack(base), stack(tuned)), ["a"], "noise_rowcol")
    e, d = noisy - base.double(), tuned.double() - base.double()
    assert e.norm().item() == pytest.approx(d.norm().item(), rel=1e-12)
    # a norm over n Gaussian numbers scatters by 1 / sqrt(2 n)
    assert torch.allclose(e.norm(dim=1), d.norm(dim=1), rtol=5 / 800**0.5)
    assert torch.allclose(e.norm(dim=2), d.norm(dim=2), rtol=5 / 1000**0.5)


def test_the_seed_is_the_name_whatever_the_batch_and_the_pieces() -> None:
    base, tuned = matrices(3, 50, 30)
    together = drawn(StackPair(stack(base), stack(tuned)), ["a", "b", "c"])
    alone = drawn(StackPair(stack(base[1:2]), stack(tuned[1:2])), ["b"])
    assert torch.allclose(together[1:2], alone, rtol=0, atol=1e-14)
    other = drawn(StackPair(stack(base[1:2]), stack(tuned[1:2])), ["d"])
    assert not torch.allclose(other, alone, atol=1e-2)
    in_pieces = drawn(StackPair(stack(base[:1], cut=7), stack(tuned[:1], cut=7)), ["a"])
    assert (in_pieces - base[:1]).norm().item() == pytest.approx((tuned[0] - base[0]).norm().item(), rel=1e-6)


def test_a_change_that_is_known_as_factors_counts_as_they_are() -> None:
    base, _ = matrices(1, 40, 30)
    draw = torch.Generator().manual_seed(1)
    change = LowRank(*(torch.randn(1, *shape, generator=draw).double() for shape in ((40, 2), (2, 30))))
    noisy = drawn(StackPair(stack(base), stack(base), change), ["a"])
    assert (noisy - base).norm().item() == pytest.approx((change.B @ change.A).norm().item(), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_any_unit_is_ordinary(scale: float) -> None:
    base, tuned = matrices(1, 30, 20)
    pair = StackPair(stack(base.double() * scale), stack(tuned.double() * scale))
    found = noise_facts(pair, ["a"], "noise", find=lambda p: pair_facts(p, PLAN, CPU))
    same = noise_facts(StackPair(stack(base.double()), stack(tuned.double())), ["a"], "noise",
                       find=lambda p: pair_facts(p, PLAN, CPU))  # fmt: skip
    share = [(f.facts["diagonal"].square().sum(-1) / f.facts["delta_squares"]).item() for f in (found, same)]
    assert share[0] == pytest.approx(share[1], rel=1e-9)


def test_unchanged_and_not_finite_matrices_have_no_noise() -> None:
    base, tuned = matrices(3, 30, 20)
    tuned[0], tuned[1, 0, 0] = base[0], torch.nan
    names = ["same", "nan", "fine"]
    run = diffract.compare(
        dict(zip(names, base, strict=True)), dict(zip(names, tuned, strict=True)), cache=False, metrics="change"
    )
    rows = run["metrics"].filter(model="tuned")
    assert rows["value_share_noise"].is_null().to_list() == [True, True, False]
    assert rows["delta_spectral_noise"].to_list()[:2] == [0.0, None]


def test_numbers_of_noise_are_those_of_a_comparison_with_it() -> None:
    base, tuned = matrices(1, 60, 40)
    noisy = drawn(StackPair(stack(base), stack(tuned)), ["w"])[0]
    run = diffract.compare({"w": base[0]}, {"w": tuned[0]}, cache=False)
    beside = diffract.compare({"w": base[0].double()}, {"w": noisy}, cache=False, noise="none")
    row, other = (r["metrics"].row(1, named=True) for r in (run, beside))
    found = [name for name in row if name.endswith("_noise")]
    assert {"value_share_noise", "delta_spectral_noise", "left_agreement_mean_noise"} <= set(found)
    for name in found:
        assert row[name] == pytest.approx(other[name.removesuffix("_noise")], rel=1e-9), name
    assert not [name for name in other if name.endswith("_noise")]
    assert run.manifest["metrics"]["value_share_noise"]["group"] == "noise"


def test_noise_comes_from_the_cache_and_is_the_same() -> None:
    base, tuned = ({"w": one[0], "u": one[1]} for one in matrices(2, 30, 20))
    first, again = (diffract.compare(base, tuned)["metrics"] for _ in range(2))
    assert first.equals(again)
    every = diffract.compare(base, tuned, noise="all")["metrics"]
    assert every["value_share_noise"].equals(first["value_share_noise"])
    assert every["value_share_noise_rowcol"].null_count() == first["value_share_noise"].null_count() == 2


# Which matrices, and what of a model


def task(layer: int, projection: str, *shape: int) -> TensorTask:
    name = f"L{layer}.{projection}"
    m = Matrix(name, name, shape, "BF16", layer, "mlp", projection)  # pyright: ignore[reportArgumentType]
    return TensorTask(TensorInfo(name, shape, "BF16"), (m,), 0, (1,))


def test_noise_is_drawn_for_all_of_a_small_plan() -> None:
    tasks = [task(i, "up", 64, 64) for i in range(40)]
    assert sum(one.cost for one in tasks) < SMALL_PLAN
    assert len(choose_noise(tasks)) == 40
    assert choose_noise([replace(one, tuned=()) for one in tasks]) == frozenset()


def test_noise_of_a_large_plan_is_spread_over_roles_within_a_quarter_of_it() -> None:
    small = [task(i, "down", 128, 256) for i in range(40)]
    large = [task(i, "up", 2048, 2048) for i in range(40)]
    chosen = choose_noise([*small, *large])
    assert len([name for name in chosen if name.endswith("down")]) == MOST_NOISE
    assert len([name for name in chosen if name.endswith("up")]) == MOST_NOISE
    few = [*small, *large[:5]]
    chosen = choose_noise(few)
    cost = sum(one.cost for one in few if one.tensor in chosen)
    assert [name for name in chosen if name.endswith("up")]
    assert cost < 0.3 * sum(one.cost for one in few)


def test_a_matrix_that_is_the_plan_has_no_noise() -> None:
    tasks = [task(0, "down", 128, 256), task(0, "up", 2048, 2048)]
    assert choose_noise(tasks) == {"L0.down"}


def test_the_excess_of_a_model_by_hand() -> None:
    pairs = pl.DataFrame(
        {
            "value_share": [0.4, 0.2, 0.6, 0.9],
            "value_share_noise": [0.1, 0.1, 0.3, None],
            "intruders": [3.0, 5.0, 4.0, 9.0],
            "intruders_noise": [1.0, 2.0, 0.0, None],
            "delta_spectral": [1.0, 1.0, 1.0, 1.0],
            "delta_spectral_noise": [0.0, 0.0, 0.0, None],
        }
    )
    found = over_noise(pairs)
    assert (found["noise_matrices"], found["noise_of"]) == (3, 4)
    assert found["value_share_excess"] == pytest.approx(4.0)
    assert found["value_share_noise"] == pytest.approx(0.1)
    assert found["intruders_excess"] == pytest.approx(3.0)
    assert found["delta_spectral_excess"] is None
    # of three signs that agree, two of the eight ways to choose them are as far out
    assert found["value_share_pvalue"] == pytest.approx(0.25, abs=0.03)
    assert over_noise(pairs.select("value_share")) == {}
