"""Which share of a plan is whose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffract.errors import SelectionError
from diffract.matrices import Matrix, pair_seconds, scan_seconds
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


SECONDS = {
    "embed": ((100_352, 2048), 1, 2, 11.1, 46.6),
    "mlp": ((8192, 2048), 1, 48, 1.80, 10.3),
    "heads": ((128, 2048), 16, 64, 0.075, 0.31),
}
"""Of a model shaped like OLMo-2-1B: shape, matrices of a tensor, tensors, and seconds of one thread that a scan and a
comparison of one took, measured."""


@pytest.mark.parametrize(("foretell", "measured"), [(scan_seconds, 3), (pair_seconds, 4)])
def test_eight_shares_of_a_1b_model_end_at_the_same_time(foretell: Callable[..., float], measured: int) -> None:
    foretold, seconds = [], []
    for name, (shape, matrices, tensors, *_) in SECONDS.items():
        foretold += [foretell([Matrix(name, name, shape, "BF16")] * matrices)] * tensors
        seconds += [SECONDS[name][measured]] * tensors
    found = loads(seconds, cut(foretold, 8), 8)
    assert max(found) <= 1.1 * sum(found) / 8
    assert sum(foretold) == pytest.approx(sum(seconds), rel=0.1)
