"""Metrics of one's own, what a metric needs, and how metrics are chosen by name."""

from collections.abc import Callable

import pytest
import torch

from diffract.errors import SelectionError
from diffract.metrics import CATALOG, FACTS, NEEDS, Facts, Metric, catalog, choose_metrics, metric, sources
from diffract.metrics.catalog import DEFAULT, DERIVED, GROUPS, LEFT_OUT
from diffract.metrics.facts import INVARIANCES


def gap(sigmas: torch.Tensor) -> torch.Tensor:
    """Ratio of the two largest sigmas.

    More text.
    """
    return sigmas[:, 0] / sigmas[:, 1]


# One's own


def test_facts_name_and_summary_come_from_the_function() -> None:
    found = metric(gap)
    assert isinstance(found, Metric)
    assert (found.name, found.facts, found.summary) == ("gap", ("sigmas",), "Ratio of the two largest sigmas.")
    assert (found.needs, found.pair, found.unit, found.source) == ("sigmas", False, "1", "user")
    assert found(torch.tensor([[6.0, 3.0], [4.0, 1.0]])).tolist() == [2.0, 4.0]


def test_options_take_precedence() -> None:
    found = metric(name="other", summary="What it is.", unit="weight", range="[1, inf)", version=3)(gap)
    assert (found.name, found.summary, found.unit, found.range) == ("other", "What it is.", "weight", "[1, inf)")
    assert found.version == 3
    assert found.key.startswith("other/3/")


def test_a_function_without_docstring_has_an_empty_summary() -> None:
    assert metric(lambda squares: squares).summary == ""


def test_parameters_keep_their_order() -> None:
    found = metric(lambda shape, diagonal, squares: squares)
    assert found.facts == ("shape", "diagonal", "squares")
    assert found.pair
    assert found.needs == "vectors"


@pytest.mark.parametrize(
    ("function", "wrong", "right"),
    [
        (lambda sigma: sigma, "sigma", "sigmas"),
        (lambda squares, left_overlaps: squares, "left_overlaps", "left_overlap"),
        (lambda Shape: Shape, "Shape", "shape"),
    ],
)
def test_an_unknown_parameter_raises_with_a_suggestion(function: Callable, wrong: str, right: str) -> None:
    with pytest.raises(
        SelectionError, match=rf"metric 'mine': parameter '{wrong}' is no fact\. Did you mean .*'{right}'"
    ):
        metric(name="mine")(function)


def test_an_unknown_parameter_without_neighbours_lists_all_facts() -> None:
    with pytest.raises(SelectionError) as caught:
        metric(lambda zzz: zzz)
    assert "Did you mean" not in str(caught.value)
    assert all(fact in str(caught.value) for fact in FACTS)


def test_the_key_tells_texts_and_versions_apart() -> None:
    def first() -> Metric:
        def mine(squares: torch.Tensor) -> torch.Tensor:
            return squares + 1

        return metric(mine)

    def second() -> Metric:
        def mine(squares: torch.Tensor) -> torch.Tensor:
            return squares + 2

        return metric(mine)

    assert first().key == first().key
    assert first().key != second().key
    assert metric(version=2)(gap).key != metric(gap).key
    keys = [m.key for m in CATALOG.values()]
    assert len(set(keys)) == len(keys)


def test_the_key_tells_closures_and_defaults_apart() -> None:
    def closed(k: int) -> Metric:
        def kth(sigmas: torch.Tensor) -> torch.Tensor:
            return sigmas[:, k]

        return metric(kth)

    def with_default(k: object) -> Metric:
        def kth(sigmas: torch.Tensor) -> torch.Tensor:
            return sigmas * kth.__kwdefaults__["scale"]

        kth.__kwdefaults__ = {"scale": k}
        return metric(kth)

    assert closed(0).key == closed(0).key != closed(5).key
    assert with_default(torch.ones(3000)).key != with_default(torch.ones(3000).index_fill(0, torch.tensor(9), 2)).key


def test_a_function_without_source_has_a_key_of_its_code() -> None:
    def typed(text: str) -> Metric:
        space: dict = {}
        exec(text, space)
        return metric(space["mine"])

    one, other = "def mine(squares):\n return squares + 1.5", "def mine(squares):\n return squares + 2.5"
    assert typed(one).key == typed(one).key
    assert typed(one).key != typed(other).key


# What a metric needs


def test_every_fact_has_its_price() -> None:
    prices = {
        "shape": ("shape", "epsilon", "base_epsilon"),
        "entries": (
            *("squares", "moments", "row_squares", "col_squares", "base_row_squares", "base_col_squares"),
            *("base_squares", "delta_squares", "delta_along", "changed", "rounding_squares"),
        ),
        "sigma_max": ("sigma_max",),
        "sigmas": ("sigmas", "resolved", "delta_sigmas", "base_sigmas", "base_resolved"),
        "null": ("null_sigmas", "drawn", "block_sigmas"),
        "vectors": ("U", "Vh", "left_cosines", "right_cosines", "diagonal", "delta_energy", "delta_row_energy"),
        "matrix": ("matrix",),
    }
    assert tuple(prices) == NEEDS
    assert {fact for facts in prices.values() for fact in facts} == sources(FACTS)
    for need, facts in prices.items():
        for fact in facts:
            assert Metric("m", lambda x: x, (fact,), "").needs == need


@pytest.mark.parametrize(
    ("facts", "need"),
    [
        (("shape", "squares"), "entries"),
        (("sigma_max", "squares"), "sigma_max"),
        (("sigmas", "sigma_max", "shape"), "sigmas"),
        (("diagonal", "sigmas"), "vectors"),
        (("U", "matrix", "shape"), "matrix"),
    ],
)
def test_the_dearest_fact_decides(facts: tuple[str, ...], need: str) -> None:
    assert Metric("m", lambda *x: x[0], facts, "").needs == need
    assert Metric("m", lambda *x: x[0], facts[::-1], "").needs == need


def test_pair_facts() -> None:
    singles = {"shape", "epsilon", "squares", "moments", "sigma_max", "sigmas", "resolved", "U", "Vh", "matrix"}
    singles |= {"null_sigmas", "drawn", "row_squares", "col_squares", "block_sigmas"}
    assert {name for name in sources(FACTS) if not FACTS[name].pair} == singles
    assert not Metric("m", lambda x: x, ("sigmas",), "").pair
    assert Metric("m", lambda x, y: x, ("sigmas", "base_sigmas"), "").pair


def test_derived_facts_cost_what_they_come_from_and_are_computed_once() -> None:
    for fact in FACTS.values():
        if fact.sources:
            assert fact.need == max((FACTS[s].need for s in fact.sources), key=NEEDS.index)
            assert fact.pair == any(FACTS[s].pair for s in fact.sources)
    assert set(DERIVED) == {name for name, fact in FACTS.items() if fact.sources}
    resolved = {"resolved", "squares", "epsilon", "base_resolved", "base_squares", "base_epsilon", "shape"}
    assert sources(["left_agreement_window"]) == {"left_cosines", "base_sigmas", "sigmas", *resolved}
    every = torch.ones(2, 3, dtype=torch.bool)
    facts = Facts(left_overlap=torch.rand(2, 3, 3).double(), directions=every, base_directions=every)
    assert facts["left_agreement"] is facts["left_agreement"]
    with pytest.raises(KeyError, match="base_sigmas"):
        facts["window"]


def test_catalog_rows_are_well_formed() -> None:
    for name, row in CATALOG.items():
        assert row.name == name
        assert row.facts
        assert set(row.facts) <= set(FACTS)
        assert row.summary
        assert row.range
        assert row.invariant <= INVARIANCES
        assert row.degree == {"weight": 1, "weight^2": 2, "weight^-2": -2}.get(row.unit, 0) or row.degree is None


# Choosing


def test_groups_stand_for_their_members() -> None:
    everything = [m.name for m in choose_metrics("all", pair=True)]
    assert everything == [m.name for g, rows in GROUPS.items() if g not in LEFT_OUT for m in rows]
    assert [m.name for m in choose_metrics("norms, ranks", pair=False)] == [
        m.name for g in ("norms", "ranks") for m in GROUPS[g]
    ]
    assert not any(m.pair for m in choose_metrics(["all"], pair=False))
    # A member that is named as well is there once; groups that hold only pair metrics leave nothing of one matrix.
    assert sum(m.name == "mp_ks" for m in choose_metrics(["random_matrix", "mp_ks"], pair=False)) == 1
    with pytest.raises(SelectionError, match="no metric is chosen"):
        choose_metrics("agreement", pair=False)
    with pytest.raises(SelectionError, match="Did you mean 'random_matrix'"):
        choose_metrics("random_matrices", pair=False)


def test_no_choice_is_the_default_groups() -> None:
    usual = [m.name for group in DEFAULT for m in GROUPS[group]]
    assert [m.name for m in choose_metrics(None, pair=True)] == usual
    alone = choose_metrics(None, pair=False)
    assert [m.name for m in alone] == [name for name in usual if not CATALOG[name].pair]
    assert {"stable_rank", "entry_std"} <= {m.name for m in alone}


def test_a_choice_keeps_its_order_and_mixes_names_with_ones_own() -> None:
    own = metric(gap)
    found = choose_metrics(["stable_rank", own, "frobenius_norm"], pair=False)
    assert found == [CATALOG["stable_rank"], own, CATALOG["frobenius_norm"]]


def test_an_unknown_name_raises_with_a_suggestion() -> None:
    with pytest.raises(
        SelectionError, match=r"unknown metric 'stable_rnk'\. Did you mean 'stable_rank'.*diffract metrics"
    ):
        choose_metrics(["stable_rnk"], pair=False)
    with pytest.raises(SelectionError, match=r"unknown metric 'xyzzy'\. `diffract metrics`"):
        choose_metrics(["xyzzy"], pair=False)


@pytest.mark.parametrize("twice", [["stable_rank", "stable_rank"], [metric(name="stable_rank")(gap), "stable_rank"]])
def test_a_name_given_twice_raises(twice: list) -> None:
    with pytest.raises(SelectionError, match="'stable_rank' is given twice"):
        choose_metrics(twice, pair=False)


def test_a_metric_of_two_matrices_needs_two() -> None:
    with pytest.raises(SelectionError, match="'value_share' speaks of two checkpoints"):
        choose_metrics(["value_share"], pair=False)
    assert choose_metrics(["value_share"], pair=True) == [CATALOG["value_share"]]


def test_an_empty_choice_raises() -> None:
    with pytest.raises(SelectionError, match="no metric is chosen"):
        choose_metrics([], pair=True)


class Point:
    """An entry point that counts how often it is loaded."""

    def __init__(self, value: object) -> None:
        self.value, self.loads = value, 0

    def load(self) -> object:
        self.loads += 1
        return self.value


def test_installed_metrics_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"gap": Point(metric(gap)), "broken": Point(gap)}
    monkeypatch.setattr(catalog, "installed_metrics", lambda: points)
    assert choose_metrics(["gap"], pair=False)[0].name == "gap"
    assert (points["gap"].loads, points["broken"].loads) == (1, 0)
    with pytest.raises(SelectionError, match=r"entry point 'broken' is a function, expected a diffract\.metric"):
        choose_metrics(["broken"], pair=False)
    with pytest.raises(SelectionError, match="Did you mean 'broken'"):
        choose_metrics(["brokn"], pair=False)


def test_a_name_of_the_catalog_is_never_taken_from_an_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    point = Point(metric(name="stable_rank")(gap))
    monkeypatch.setattr(catalog, "installed_metrics", lambda: {"stable_rank": point})
    assert choose_metrics(["stable_rank"], pair=False) == [CATALOG["stable_rank"]]
    assert point.loads == 0
