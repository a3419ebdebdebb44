"""What names tell of a training run, and the order that follows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffract.analysis.timeline import LARGEST, Milestone, Stop, amount, arrange, parse_by, read_place
from diffract.errors import SelectionError
from diffract.settings import natural_key


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("stage1-step10000-tokens21B", Milestone(1, 10_000, 21_000_000_000)),
        ("stage2-ingredient1-step1000-tokens3B", Milestone(2, 1000, 3_000_000_000)),
        ("step10000-tokens42B", Milestone(None, 10_000, 42_000_000_000)),
        ("tokens42B-step10000", Milestone(None, 10_000, 42_000_000_000)),
        ("step0", Milestone(None, 0)),
        ("step143000", Milestone(None, 143_000)),
        ("global_step1000", Milestone(None, 1000)),
        ("global-step_1000", Milestone(None, 1000)),
        ("iter_0001000", Milestone(None, 1000)),
        ("iteration-20", Milestone(None, 20)),
        ("checkpoint-500", Milestone(None, 500)),
        ("ckpt_012", Milestone(None, 12)),
        ("ckpt-3-step-700", Milestone(None, 700)),
        ("step_02000", Milestone(None, 2000)),
        ("epoch=1-step=1000", Milestone(None, 1000)),
        ("STEP-40K", Milestone(None, 40_000)),
        ("TinyLlama-1.1B-intermediate-step-1431k-3T", Milestone(None, 1_431_000)),
        ("step1000_final", Milestone(None, 1000)),
        ("0500", Milestone(None, 500)),
        ("tokens1.5T", Milestone(None, None, 1_500_000_000_000)),
        ("run-300M-tokens", Milestone(None, None, 300_000_000)),
        ("step100-2B_tokens", Milestone(None, 100, 2_000_000_000)),
        ("tokens_5000", Milestone(None, None, 5000)),
        ("main", Milestone()),
        ("best", Milestone()),
        ("llama-7b", Milestone()),
        ("timestep1000", Milestone()),
        ("step1000v2", Milestone()),
        ("step1.5", Milestone()),
        ("epoch-3", Milestone()),
        ("500-long", Milestone()),
        ("2024-11-24", Milestone()),
        (f"step{10**18 - 1}T", Milestone()),
        ("", Milestone()),
    ],
)
def test_conventions(text: str, place: Milestone) -> None:
    assert read_place([text]) == place


def test_the_first_text_that_tells_counts() -> None:
    assert read_place(["step5", "step10-tokens2K"]) == Milestone(None, 5, 2000)
    assert read_place([]) == Milestone()


counts = st.integers(0, 10**9)


@given(stage=counts, step=counts, tokens=st.integers(0, 10**6), unit=st.sampled_from(["", "K", "M", "B", "T"]))
def test_what_is_written_is_read(stage: int, step: int, tokens: int, unit: str) -> None:
    scale = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[unit]
    place = read_place([f"stage{stage}-step{step}-tokens{tokens}{unit}"])
    assert place == Milestone(stage, step, tokens * scale if tokens * scale <= LARGEST else None)


@given(st.text())
def test_any_text_is_read_without_an_error(text: str) -> None:
    place = read_place([text])
    assert all(value is None or 0 <= value <= LARGEST for value in (place.stage, place.step, place.tokens))


def test_amounts_end_where_tables_do() -> None:
    assert amount("9223372036854775.807", "K") == LARGEST
    assert amount("9223372036854775.808", "K") is None
    assert amount("0.5", "k") == 500


def stop(name: str, *, reference: str = "") -> Stop:
    return Stop(name, reference or name, read_place([name]), (name,))


@given(places=st.sets(st.tuples(st.integers(1, 3), counts), min_size=2, max_size=12), data=st.data())
def test_any_shuffle_comes_back_in_order(places: set[tuple[int, int]], data: st.DataObject) -> None:
    ordered = [stop(f"stage{stage}-step{step}") for stage, step in sorted(places)]
    assert arrange(data.draw(st.permutations(ordered)), parse_by("step")) == ordered


@given(tokens=st.sets(counts, min_size=2, max_size=12), data=st.data())
def test_tokens_order_what_steps_would_not(tokens: set[int], data: st.DataObject) -> None:
    ordered = [stop(f"step{10**10 - n}-tokens{n}") for n in sorted(tokens)]
    assert arrange(data.draw(st.permutations(ordered)), parse_by("tokens")) == ordered
    assert arrange(ordered, parse_by("step")) == ordered[::-1]


@given(numbers=st.sets(counts, min_size=2, max_size=12), data=st.data())
def test_names_are_sorted_as_people_do(numbers: set[int], data: st.DataObject) -> None:
    ordered = [stop(f"run {n} end") for n in sorted(numbers)]
    assert arrange(data.draw(st.permutations(ordered)), parse_by("name")) == ordered


@given(st.lists(st.text()))
def test_any_names_can_be_sorted(names: list[str]) -> None:
    assert sorted(sorted(names, key=natural_key), key=natural_key) == sorted(names, key=natural_key)


def test_given_order_is_kept() -> None:
    stops = [stop(name) for name in ("sft", "step9", "base", "step1")]
    assert arrange(stops, parse_by("given")) == stops


def test_steps_begin_anew_in_each_stage() -> None:
    names = ["stage2-step10", "stage1-step200", "stage1-step100", "stage2-step20"]
    found = [s.name for s in arrange([stop(n) for n in names], parse_by("step"))]
    assert found == ["stage1-step100", "stage1-step200", "stage2-step10", "stage2-step20"]


def test_a_pattern_of_ones_own() -> None:
    by = parse_by(r"e(?P<stage>\d+)b(?P<step>\d+k?)")
    assert by.key == "step"
    assert by.pattern is not None
    assert read_place(["step7", "e1b20k"], by.pattern) == Milestone(1, 20_000)
    assert parse_by(r"(?P<tokens>\d+)").key == "tokens"


@pytest.mark.parametrize(
    ("names", "by", "texts"),
    [
        (["step1", "main"], "step", ["1 of 2", "tell no step", "first 'main'", "looked at 'main'", "step1000=MODEL"]),
        (["tokens1B", "tokens2B"], "step", ["2 of 2", "Every one tells tokens: pass --by tokens"]),
        (["step1", "step2"], "tokens", ["tell no tokens", "Every one tells step: pass --by step"]),
        (["step10", "iter_0010"], "step", ["'step10' and 'iter_0010'", "one place (step 10)", "Leave one out"]),
        (
            ["stage2-ingredient1-step1000", "stage2-ingredient2-step1000"],
            "step",
            ["are of 2 branches of one stage", "--by given"],
        ),
        (
            ["stage1-step5", "stage2-ingredient1-step1000", "stage2-ingredient3-step2000"],
            "step",
            ["'stage2-ingredient1-step1000' and 'stage2-ingredient3-step2000' are of 2 branches"],
        ),
        (["ingredient1-step1", "ingredient2-step2"], "name", ["are of 2 branches"]),
        (["step1", "stage1-step2"], "step", ["'stage1-step2' tells a stage and 'step1' none"]),
        (["a1", "a01"], "name", ["one place (one name)"]),
    ],
)
def test_what_cannot_be_ordered_is_explained(names: list[str], by: str, texts: list[str]) -> None:
    with pytest.raises(SelectionError) as caught:
        arrange([stop(name) for name in names], parse_by(by))
    for text in texts:
        assert text in str(caught.value)


def test_one_branch_is_a_series_with_what_it_began_from() -> None:
    names = ["stage2-ingredient2-step2000", "stage1-step5", "stage2-ingredient2-step1000"]
    assert [one.name for one in arrange([stop(name) for name in names], parse_by("step"))] == [
        "stage1-step5",
        "stage2-ingredient2-step1000",
        "stage2-ingredient2-step2000",
    ]


@pytest.mark.parametrize(
    ("by", "text"),
    [
        ("steps", "Did you mean 'step'"),
        ("", "expected one of: step, tokens, name, given"),
        ("(?P<step>", "is no regular expression"),
        (r"(?P<epoch>\d+)", "are called epoch, expected step or tokens"),
        (r"(?P<stage>\d+)", "are called stage, expected step or tokens"),
        (r"(?P<step>\d+)(?P<loss>\d+)", "are called loss, step"),
    ],
)
def test_a_wrong_order_is_explained(by: str, text: str) -> None:
    with pytest.raises(SelectionError) as caught:
        parse_by(by)
    assert text in str(caught.value)


def test_a_pattern_must_find_numbers() -> None:
    with pytest.raises(SelectionError, match="finds 'ten' in 'step-ten', expected a number"):
        read_place(["step-ten"], parse_by("step-(?P<step>.*)").pattern)
    with pytest.raises(SelectionError, match=r"tell no step, first 'b'.*what 'a"):
        arrange([Stop("b", "b", Milestone(), ("b",))] * 2, parse_by(r"a(?P<step>\d+)"))
