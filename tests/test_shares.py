"""Which share of a plan is whose."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffract.errors import SelectionError
from diffract.shares import Share, cut, loads, read_share

ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "5"}
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "3"}
STEP = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize(
    ("text", "environ", "expected"),
    [
        ("0/1", {}, Share(0, 1)),
        (" 255/256 ", ARRAY, Share(255, 256)),
        ("auto", ARRAY, Share(3, 5)),
        ("auto", ARRAY | TORCHRUN | STEP, Share(3, 5)),
        ("auto", TORCHRUN | STEP, Share(2, 3)),
        ("auto", STEP, Share(1, 2)),
        ("auto", {"RANK": "0"} | STEP, Share(1, 2)),  # a rank without a number of ranks says nothing
        ("auto/8", {"JOB_COMPLETION_INDEX": "5"}, Share(5, 8)),
        ("auto/8", {"RANK": "5"}, Share(5, 8)),
    ],
)
def test_a_share_is_named_or_told_by_the_environment(text: str, environ: dict[str, str], expected: Share) -> None:
    assert read_share(text, environ) == expected


@pytest.mark.parametrize(
    ("text", "environ", "said"),
    [
        ("3", {}, "expected I/N"),
        ("1/2/3", {}, "expected I/N"),
        ("-1/2", {}, "expected I/N"),
        ("2/2", {}, "no share 2 of 2"),
        ("0/0", {}, "no share 0 of 0"),
        ("0/999999", {}, "100,000 at most"),
        ("auto", {}, "does not say which share"),
        ("auto", {"JOB_COMPLETION_INDEX": "5"}, "auto/N"),
        ("auto", {"RANK": "x", "WORLD_SIZE": "2"}, "whole numbers"),
        ("auto/2", {"RANK": "5"}, "no share 5 of 2"),
    ],
)
def test_what_is_no_share_is_refused(text: str, environ: dict[str, str], said: str) -> None:
    with pytest.raises(SelectionError, match=said):
        read_share(text, environ)


@given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(1, 9))
def test_every_task_has_one_owner_and_no_share_has_much_more_than_its_part(costs: list[float], count: int) -> None:
    """Graham 1969: the costliest first is at most 4/3 - 1/(3 N) of what is best, which is no less than either bound."""
    owners = cut(costs, count)
    found = loads(costs, owners, count)
    assert len(owners) == len(costs)
    assert set(owners) <= set(range(count))
    assert sum(found) == pytest.approx(sum(costs))
    # whoever has most got its last task when all others had at least as much
    assert max(found) <= sum(costs) / count + max(costs, default=0) * (1 - 1 / count) + 1e-6


def test_equal_tasks_go_round() -> None:
    assert cut([1.0] * 6, 3) == [0, 1, 2, 0, 1, 2]
