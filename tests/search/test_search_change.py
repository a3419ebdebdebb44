"""What is kept of a change, against the edited weights themselves, and its bytes by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffract.edits import LiveModel, Truncate
from diffract.errors import SelectionError
from diffract.search.plan import SearchCurve
from diffract.search.truncate import (
    CONTROLS,
    RULES,
    MatrixChange,
    Truncater,
    kept_by,
    kept_by_chance,
    matrix_changes_of,
    parse_rules,
    share_for_bytes,
    total_bytes,
    truncation_curves,
)
from edit_cases import everything_of, family_pair


def matrices(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone().double() for n, p in model.named_parameters() if p.ndim == 2}


def norms(model: torch.nn.Module, base: torch.nn.Module) -> float:
    start = matrices(base)
    return sum(float((w - start[n]).square().sum()) for n, w in matrices(model).items())


def truncater(base: torch.nn.Module, tuned: torch.nn.Module) -> tuple[LiveModel, Truncater]:
    live = LiveModel(tuned)
    return live, Truncater(base, matrix_changes_of(live.bench, everything_of(live, base)))


@pytest.mark.parametrize(
    "settings",
    [
        {"drop": 0.5},
        {"drop": 0.9},
        {"band": (0.25, 1.0)},
        {"energy": 0.7},
        {"rule": "donoho-gavish"},
        {"rule": "mp-edge"},
        {"drop": 0.5, "side": "random", "seed": 2},
        {"energy": 0.7, "side": "random", "seed": 2},
    ],
    ids=str,
)
def test_energy_is_that_of_the_edited_weights(settings: dict[str, Any]) -> None:
    base, tuned = family_pair("llama")
    with torch.no_grad():  # directions that rise above noise
        for parameter in (p for p in tuned.parameters() if p.ndim == 2):
            parameter[:2, :2] += 1.0
    live, made = truncater(base, tuned)
    step, whole = Truncate(base=base, **settings), norms(tuned, base)
    found = kept_by(step, made.changes)
    with live.edited(step):
        assert norms(tuned, base) / whole == pytest.approx(found.energy, rel=1e-5)  # weights are rounded to float32
    rank = sum(c.sigmas.numel() for c in made.changes)
    assert 0 < found.directions < rank  # type: ignore[operator]


def test_dare_keeps_its_share_of_energy_on_average() -> None:
    base, tuned = family_pair("llama")
    live, made = truncater(base, tuned)
    point = made.point(SearchCurve("", {"rule": "dare-energy", "seed": 1}, (0.0, 0.5, 1.0)), 0.5)
    share, whole = point.labels["energy"], norms(tuned, base)
    assert share == kept_by(Truncate(base=base, drop=0.5), made.changes).energy
    assert point.labels["drop"] == pytest.approx(1 - share)
    vectors = {n: p.clone() for n, p in tuned.named_parameters() if p.ndim == 1}
    with live.edited(*point.steps):
        kept = norms(tuned, base) * share**2  # before it is scaled up
        assert all(torch.equal(p, vectors[n]) for n, p in tuned.named_parameters() if p.ndim == 1)
    # 20,000 entries, each kept with probability p: the share varies by sqrt(p (1 - p) 3 / 20,000) = 0.004 about
    assert kept / whole == pytest.approx(share, abs=0.02)


def change(shape: tuple[int, int], *sigmas: float, entry_bytes: int = 2) -> MatrixChange:
    return MatrixChange(f"m{shape}", shape, torch.tensor(sigmas, dtype=torch.float64), entry_bytes)


TWO = [change((2, 6), 2.0, 1.0), change((3, 3), 3.0, 2.0, 1.0)]
"""Bytes 24 and 18; energies 5 and 14."""


def test_bytes_and_energy_by_hand() -> None:
    assert total_bytes(TWO) == 42
    one = kept_by(Truncate(base="b", rank=1), TWO)  # factors of 8 and 6 numbers
    assert (one.directions, one.energy, one.bytes) == (2, pytest.approx(13 / 19), pytest.approx((16 + 12) / 42))
    two = kept_by(Truncate(base="b", rank=2), TWO)  # factors would take 32 and 24: all entries take less
    assert (two.directions, two.energy, two.bytes) == (4, pytest.approx(18 / 19), 1.0)
    none = kept_by(Truncate(base="b", drop=1), TWO)
    assert (none.directions, none.energy, none.bytes) == (0, 0.0, 0.0)
    # of 21 entries a tenth is kept, each with 2 bytes and 4 for its place
    by_chance = kept_by_chance(0.1, TWO)
    assert (by_chance.directions, by_chance.energy, by_chance.bytes) == (None, 0.1, pytest.approx(2.1 * 6 / 42))
    assert kept_by_chance(0.5, TWO).bytes == 1.0
    assert share_for_bytes(0.3, TWO) == pytest.approx(0.1)
    assert share_for_bytes(1.0, TWO) == 1.0


def test_a_change_that_is_zero() -> None:
    same = [change((2, 2), 0.0, 0.0)]
    found = kept_by(Truncate(base="b", drop=0.5), same)
    assert (found.directions, found.energy, found.bytes) == (0, 1.0, 0.0)


def test_controls_match_what_they_stand_beside() -> None:
    base, tuned = family_pair("llama")
    _, made = truncater(base, tuned)
    points = {
        rule: made.point(SearchCurve(rule, {"rule": rule, "seed": 0}, (0.0, 0.5, 1.0)), 0.5).labels for rule in RULES
    }
    drop = points["drop"]
    assert points["random"]["directions"] == points["tail"]["directions"] == drop["directions"]
    assert points["random"]["bytes"] == points["tail"]["bytes"] == pytest.approx(points["dare-bytes"]["bytes"])
    assert points["tail"]["energy"] < points["random"]["energy"] < drop["energy"]
    assert points["dare-energy"]["energy"] == drop["energy"]
    assert points["random-energy"]["energy"] == pytest.approx(drop["energy"], abs=0.05)  # one direction of 24 more
    assert points["random-energy"]["energy"] >= drop["energy"]
    assert points["energy"]["energy"] >= 0.5


def test_ends_are_one_state_whatever_the_rule() -> None:
    base, tuned = family_pair("llama")
    _, made = truncater(base, tuned)
    curves = truncation_curves([r for r in RULES if r not in ("donoho-gavish", "mp-edge")], 2, (0.0, 0.5, 1.0))
    assert len(curves) == 3 + 2 * 4
    for at in (0.0, 1.0):
        assert len({made.point(s, at).key for s in curves}) == 1
    assert len({made.point(s, 0.5).key for s in curves}) == len(curves)
    assert [s.control for s in curves] == [s.labels["rule"] in CONTROLS for s in curves]


def test_rules_as_they_are_typed() -> None:
    assert parse_rules(None) == RULES
    assert parse_rules("random, drop") == ("drop", "random")
    with pytest.raises(SelectionError, match=r"unknown rule 'dropp', expected one of: .*\. Did you mean 'drop'"):
        parse_rules("dropp")
    with pytest.raises(SelectionError, match="expected rules, got none"):
        parse_rules([])
