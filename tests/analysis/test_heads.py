"""Heads and domains: a planted family whose numbers are worked out by hand, and what may not change them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.stats
import torch
from polars.testing import assert_frame_equal

import diffract
from diffract import schemas
from diffract.attention import head_sums, query_heads
from tiny_llama import llama_tensors

ATTENTION = "model.layers.{}.self_attn.{}_proj.weight"
Tensors = dict[str, torch.Tensor]

SHARED = {(0, "q"): [(0, 0, 3.0), (1, 1, 4.0)]}
"""Layer 0, head 0: the same in all domains, norm 5."""

PLANTED = {
    # layer 1, head 2 (columns 16 to 23 of o): norm sqrt(8)
    "math": {(1, "o"): [(0, 16, 2.0), (5, 17, 2.0)]},
    # layer 0, key-value head 1 (rows 8 to 15 of k), which heads 2 and 3 share: norm 6, half of its square each
    "text": {(0, "k"): [(8, 0, 6.0)]},
    # half of what math does, and layer 1, head 3 (rows 24 to 31 of q): norms 2 and 1
    "code": {(1, "o"): [(0, 16, 2.0)], (1, "q"): [(24, 3, 1.0)]},
}
DELTAS = {
    "math": [5, 0, 0, 0, 0, 0, math.sqrt(8), 0],
    "text": [5, 0, math.sqrt(18), math.sqrt(18), 0, 0, 0, 0],
    "code": [5, 0, 0, 0, 0, 0, 2, 1],
}
"""Of layer 0, heads 0 to 3, then layer 1."""

PLACES = [(layer, head) for layer in range(2) for head in range(4)]


def whole_numbers(seed: int = 0) -> Tensors:
    """A base in float32 whose entries are whole numbers, so that planted changes are exact."""
    return {name: (8 * value.float()).round() for name, value in llama_tensors(seed).items()}


def planted(base: Tensors, *changes: dict) -> Tensors:
    tensors = {name: value.clone() for name, value in base.items()}
    for change in changes:
        for (layer, projection), entries in change.items():
            for row, col, value in entries:
                tensors[ATTENTION.format(layer, projection)][row, col] += value
    return tensors


@pytest.fixture
def domains(write_model: Callable[..., Path]) -> list[str]:
    """References of a base and of math, text and code."""
    base = whole_numbers()
    made = {name: write_model(name, planted(base, SHARED, own)) for name, own in PLANTED.items()}
    return [str(write_model("base", base)), *(f"{name}={folder}" for name, folder in made.items())]


def of(run: diffract.Run, model: str) -> pl.DataFrame:
    return run.heads.filter(model=model).sort("layer", "head")


# By hand


def test_planted_norms_ranks_and_shares(domains: list[str]) -> None:
    run = diffract.heads(*domains)
    for name, deltas in DELTAS.items():
        rows = of(run, name)
        assert rows.select("layer", "head").rows() == PLACES
        assert rows["kv_head"].to_list() == [0, 0, 1, 1] * 2
        assert rows["status"].to_list() == ["ok"] * 8
        # 512 entries of q and o, 512 of k and v that count half: (512 + 256)^2 / (512 + 128)
        assert rows["entries"].to_list() == [922] * 8
        # sums of squares of whole numbers are exact; one square root
        assert rows["head_delta"].to_list() == pytest.approx(deltas, rel=1e-15)
        total = sum(d * d for d in deltas)
        assert rows["change_share"].to_list() == pytest.approx([d * d / total for d in deltas], rel=1e-14)
    assert of(run, "math")["rank"].to_list() == [1, 3, 3, 3, 3, 3, 2, 3]
    assert of(run, "text")["rank"].to_list() == [1, 4, 2, 2, 4, 4, 4, 4]


def test_relative_change_is_that_of_the_slices(domains: list[str]) -> None:
    base, run = whole_numbers(), diffract.heads(*domains)
    squares = []
    for layer, head in PLACES:
        q, o = (base[ATTENTION.format(layer, p)].double() for p in "qo")
        k, v = (base[ATTENTION.format(layer, p)].double() for p in "kv")
        own, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        halves = (float((w * w).sum()) / 2 for w in (k[shared], v[shared]))
        squares.append(sum(float((w * w).sum()) for w in (q[own], o[:, own])) + sum(halves))
    want = np.array(DELTAS["code"]) / np.sqrt(squares)
    assert of(run, "code")["head_delta_relative"].to_list() == pytest.approx(want.tolist(), rel=1e-14)
    model = run.models.row(by_predicate=pl.col("model") == "code", named=True)
    assert model["attention_delta"] == pytest.approx(math.sqrt(30), rel=1e-15)
    whole = sum(float(base[ATTENTION.format(layer, p)].double().square().sum()) for layer in range(2) for p in "qkvo")
    assert model["attention_delta_relative"] == pytest.approx(math.sqrt(30 / whole), rel=1e-14)


def test_concentration_by_hand(domains: list[str]) -> None:
    run = diffract.heads(*domains)
    models = {row["model"]: row for row in run.models.iter_rows(named=True)}
    # math: squares 25 and 8 of 33 in eight heads; the top tenth of eight is one
    assert models["math"]["head_top10_share"] == pytest.approx(25 / 33, rel=1e-14)
    assert models["math"]["head_top10_share_chance"] == 1 / 8
    assert models["math"]["head_gini"] == pytest.approx(2 * (7 * 8 + 8 * 25) / (8 * 33) - 9 / 8, rel=1e-14)
    assert models["base"]["head_gini"] is None
    points = run.lorenz.filter(model="math")
    assert points["heads_share"].to_list() == [i / 8 for i in range(9)]
    assert points["change_share"].to_list() == pytest.approx([0] * 7 + [8 / 33, 1], rel=1e-14)


def test_domains_by_hand(domains: list[str]) -> None:
    run = diffract.heads(*domains)
    pairs = {(row["a"], row["b"]): row for row in run.domains.iter_rows(named=True)}
    assert list(pairs) == [("math", "text"), ("math", "code"), ("text", "code")]
    # the shared slice of text counts once here: 25 + 36
    cosines = [25 / math.sqrt(33 * 61), 29 / math.sqrt(33 * 30), 25 / math.sqrt(61 * 30)]
    assert [row["cosine"] for row in pairs.values()] == pytest.approx(cosines, rel=1e-14)
    entries = 2 * (2 * 32 * 32 + 2 * 16 * 32)
    for (a, b), row in pairs.items():
        assert (row["heads"], row["entries"]) == (8, entries)
        assert row["spearman"] == pytest.approx(scipy.stats.spearmanr(DELTAS[a], DELTAS[b]).statistic, abs=1e-14)
        assert row["cosine_chance"] == pytest.approx(1 / math.sqrt(entries), rel=1e-14)
        # the exact mean of |cos| is 1 + 1 / (4 n) times the known approximation
        assert row["cosine_chance_abs"] == pytest.approx(math.sqrt(2 / (math.pi * entries)), rel=1 / entries)


def test_of_two_domains_the_shared_cosine_is_that_of_their_changes(domains: list[str]) -> None:
    """Every head of it by hand, as of the pairs of domains above."""
    base, *tuned = domains
    math_text, math_code = (
        of(diffract.heads(base, tuned[0], other), "math").rows_by_key(["layer", "head"], named=True, unique=True)
        for other in tuned[1:]
    )
    assert math_text[0, 0]["shared_cosine"] == pytest.approx(1.0, rel=1e-15)
    assert math_code[1, 2]["shared_cosine"] == pytest.approx(math.sqrt(0.5), rel=1e-15)
    assert math_text[1, 2]["shared_cosine"] is None


def test_what_all_domains_share_by_hand(domains: list[str]) -> None:
    run = diffract.heads(*domains)
    math_rows, text, code = (of(run, name) for name in DELTAS)
    assert [rows["shared_cosine"][0] for rows in (math_rows, text, code)] == pytest.approx([1, 1, 1], rel=1e-14)
    assert math_rows["specific_delta"][0] == pytest.approx(0.0, abs=5 * 1e-7)  # a square root of rounding errors
    # head 2 of layer 1: D = (2, 2), (0, 0), (2, 0); the mean of the others of math is (1, 0)
    assert math_rows["shared_cosine"][6] == pytest.approx(math.sqrt(0.5), rel=1e-14)
    assert math_rows["shared_share"][6] == pytest.approx(0.5, rel=1e-14)
    assert math_rows["specific_delta"][6] == pytest.approx(2.0, rel=1e-14)
    assert text["shared_share"][6] is None
    # <math, code> = 4 in one of three pairs, squares 8, 0 and 4
    assert math_rows["agnostic_share"].to_list() == text["agnostic_share"].to_list()
    want = [1, None, 0, 0, None, None, 1 / 3, 0]
    for found, expected in zip(math_rows["agnostic_share"], want, strict=True):
        assert found == (None if expected is None else pytest.approx(expected, rel=1e-14))
    whole = ((25 + 29 + 25) / 3) / ((33 + 61 + 30) / 3)
    assert run.models["agnostic_share"].to_list() == [None, *[pytest.approx(whole, rel=1e-14)] * 3]
    along = (25 + 29) / math.sqrt(33 * (61 + 30 + 2 * 25))  # of math with text + code
    assert run.models["shared_cosine"][1] == pytest.approx(along, rel=1e-14)


def test_squares_of_heads_add_up_to_those_of_attention(family: tuple[Path, Path]) -> None:
    run = diffract.heads(*family)
    assert (run.heads["head_delta"] ** 2).sum() == pytest.approx(run.models["attention_delta"][1] ** 2, rel=1e-12)


def test_a_head_without_a_slice_that_others_of_its_layer_have_has_no_sum() -> None:
    places = [("q", 0, 0), ("q", 1, 0), ("q", 2, 1), ("k", None, 0), ("k", None, 1), ("o", 0, 0), ("o", 2, 1)]
    places += [("qk", 0, 0), ("k_norm", None, None)]  # neither is a slice
    slices = pl.DataFrame(
        [{"layer": 0, "block": "attn", "projection": p, "head": h, "kv_head": kv, "x": 2.0} for p, h, kv in places]
    )
    sums = head_sums(query_heads(slices), slices, ["x"])
    # heads 0 and 1 share a key slice, head 1 has no output
    assert sums["x"].to_list()[::2] == [5.0, 6.0]
    assert math.isnan(sums["x"][1])


def test_scores_by_hand(domains: list[str]) -> None:
    run = diffract.heads(*domains)
    scores = {
        (r["domain"], r["reference"], r["layer"], r["head"]): r["score"] for r in run.scores.iter_rows(named=True)
    }
    assert len(scores) == 6 * 8
    # every domain has an unchanged head, so that scale01 is division by the largest
    assert scores["text", "math", 0, 2] == pytest.approx(math.sqrt(18) / 5, rel=1e-14)
    assert scores["text", "math", 0, 0] == pytest.approx(0.0, abs=1e-15)
    assert scores["math", "code", 1, 2] == pytest.approx((math.sqrt(8) - 2) / 5, rel=1e-14)
    for (a, b, *place), score in scores.items():
        assert score == -scores[b, a, *place]


@pytest.mark.parametrize(
    ("projections", "deltas", "entries"),
    [
        (["o"], [0, 0, 0, 0, 0, 0, 2, 0], 256),
        (["o", "q", "o"], [5, 0, 0, 0, 0, 0, 2, 1], 512),
        (["v", "k"], [0] * 8, 512),
    ],
)
def test_projections_can_be_chosen(
    domains: list[str], projections: list[str], deltas: list[float], entries: int
) -> None:
    run = diffract.heads(*domains, projections=projections)
    assert of(run, "code")["head_delta"].to_list() == deltas
    assert of(run, "code")["entries"].to_list() == [entries] * 8
    if "k" in projections:
        assert of(run, "text")["head_delta"].to_list() == pytest.approx([0, 0, 18**0.5, 18**0.5, 0, 0, 0, 0])
        assert run.models["head_gini"].to_list()[3] is None  # of code nothing has changed
    read = run.tensors.filter(model="base", outcome="analysed")["tensor"]
    assert all(any(f".{p}_proj" in name for p in projections) for name in read)
    assert run.manifest["settings"]["projections"] == [p for p in "qkvo" if p in projections]


# Against a comparison, and what may not matter


def test_changes_and_concentration_are_those_of_compare(family: tuple[Path, Path]) -> None:
    run, compared = diffract.heads(*family), diffract.compare(*family)
    want = compared.heads
    known = ["model", "layer", "block", "head", "kv_head", "status", "entries", "rank"]
    assert_frame_equal(run.heads.select(known), want.select(known))
    # sums of 1024 squares in another order
    for name in ("head_delta", "head_delta_relative", "change_share"):
        assert run.heads[name].to_list() == pytest.approx(want[name].to_list(), rel=1e-12)
    for name in ("head_gini", "head_top10_share", "head_top10_share_chance"):
        assert run.models[name][1] == pytest.approx(compared.models[name][1], rel=1e-12)


@pytest.fixture
def unrelated(write_model: Callable[..., Path]) -> Callable[[float], diffract.Run]:
    """A run over two domains with random changes of a random base, all of it scaled."""

    def run(scale: float = 1.0) -> diffract.Run:
        base = llama_tensors(0)
        scaled = [{n: scale * v for n, v in t.items()} for t in (base, llama_tensors(1, base), llama_tensors(2, base))]
        return diffract.heads(write_model(f"base-{scale}", scaled[0]), *scaled[1:])

    return run


def test_scale_does_not_matter(unrelated: Callable[[float], diffract.Run]) -> None:
    one, other = unrelated(1.0), unrelated(4.0)
    # powers of two change no rounding
    assert (other.heads["head_delta"] / one.heads["head_delta"]).to_list() == [4.0] * 16
    same = ["head_delta_relative", "rank", "change_share", "shared_cosine", "shared_share", "agnostic_share"]
    assert_frame_equal(one.heads.select(same), other.heads.select(same), check_exact=True)
    assert_frame_equal(one.domains, other.domains, check_exact=True)
    assert_frame_equal(one.scores, other.scores, check_exact=True)


def test_the_order_of_domains_does_not_matter(domains: list[str]) -> None:
    base, *tuned = domains
    one, other = diffract.heads(base, *tuned), diffract.heads(base, *reversed(tuned))
    keys = ["model", "layer", "head"]
    assert_frame_equal(one.heads.sort(keys), other.heads.sort(keys), rel_tol=1e-14)
    turned = other.domains.rename({"a": "b", "b": "a"}).select(one.domains.columns)
    assert_frame_equal(one.domains.sort("a", "b"), turned.sort("a", "b"), rel_tol=1e-14)


def test_the_same_change_twice_is_shared_wholly(family: tuple[Path, Path]) -> None:
    run = diffract.heads(family[0], f"a={family[1]}", f"b={family[1]}")
    assert run.heads["shared_share"].to_list() == pytest.approx([1.0] * 16, rel=1e-12)
    assert run.domains.select("spearman", "cosine").row(0) == pytest.approx((1.0, 1.0), rel=1e-12)
    assert set(run.scores["score"]) == {0.0}


def test_unrelated_changes_share_nothing_but_chance(unrelated: Callable[[], diffract.Run]) -> None:
    run = unrelated()
    row = run.domains.row(0, named=True)
    assert abs(row["cosine"]) < 5 * row["cosine_chance"]
    # 32 cosines of directions in at least 1,000 dimensions, by chance 1 / sqrt(entries)
    assert (run.heads["shared_cosine"].abs() < 5 / run.heads["entries"].sqrt()).all()


def test_one_domain_has_no_pairs(domains: list[str]) -> None:
    run = diffract.heads(*domains[:2])
    assert of(run, "math")["head_delta"].to_list() == pytest.approx(DELTAS["math"], rel=1e-15)
    for name in ("domains", "scores"):
        table = getattr(run, name)
        assert table.height == 0
        assert dict(table.schema) == schemas.KINDS["heads"][name]
    for column in ("shared_cosine", "shared_share", "specific_delta", "agnostic_share"):
        assert run.heads[column].null_count() == 8


def test_identical_checkpoints_have_no_change(domains: list[str]) -> None:
    run = diffract.heads(domains[0], f"same={domains[0]}", domains[1])
    rows = of(run, "same")
    assert set(rows["head_delta"]) == {0.0}
    assert set(rows["rank"]) == {1}
    assert rows["change_share"].null_count() == 8
    assert run.models["head_gini"][1] is None
    assert run.domains.select("spearman", "cosine").row(0) == (None, None)
    assert run.scores["score"].null_count() == run.scores.height


# What is bad, or is not there


def test_slices_that_are_not_finite(domains: list[str], write_model: Callable[..., Path]) -> None:
    base = whole_numbers()
    broken = planted(base, SHARED, PLANTED["math"])
    broken[ATTENTION.format(0, "q")][9, 3] = torch.nan  # head 1
    broken[ATTENTION.format(1, "v")][2, 0] = torch.inf  # key-value head 0: heads 0 and 1
    run = diffract.heads(domains[0], f"broken={write_model('broken', broken)}", *domains[1:])
    rows = of(run, "broken")
    bad = [False, True, False, False, True, True, False, False]
    assert rows["status"].to_list() == ["non_finite" if b else "ok" for b in bad]
    expected = [None if b else d for b, d in zip(bad, DELTAS["math"], strict=True)]
    assert rows["head_delta"].to_list() == expected
    assert rows["rank"].to_list() == [1, None, 3, 3, None, None, 2, 3]
    assert of(run, "math")["head_delta"].to_list() == DELTAS["math"]
    assert of(run, "math")["shared_share"][1] is None
    pair = run.domains.row(by_predicate=(pl.col("a") == "broken") & (pl.col("b") == "math"), named=True)
    # the lost slices are those of q and v, 256 entries each
    assert (pair["heads"], pair["entries"], pair["cosine"]) == (5, 6144 - 512, pytest.approx(1.0, rel=1e-14))
    assert run.models["attention_delta"][1] == pytest.approx(math.sqrt(33), rel=1e-15)
    lost = run.scores.filter(pl.col("score").is_null())
    assert set(lost.select("layer", "head").unique().rows()) == {(0, 1), (1, 0), (1, 1)}
    assert any(
        "3 heads hold NaN or Inf" in text and "broken layer 0 head 1" in text for text in run.manifest["warnings"]
    )


def test_a_base_that_is_not_finite_spoils_every_domain(domains: list[str], write_model: Callable[..., Path]) -> None:
    base = whole_numbers()
    base[ATTENTION.format(0, "o")][3, 31] = torch.inf  # head 3
    run = diffract.heads(write_model("bad", base), *domains[1:])
    bad = run.heads.filter(pl.col("status") == "non_finite")
    assert bad.select("model", "layer", "head").rows() == [(name, 0, 3) for name in DELTAS]


def test_an_attention_tensor_without_a_partner(domains: list[str], write_model: Callable[..., Path]) -> None:
    fewer = planted(whole_numbers(), SHARED, PLANTED["math"])
    del fewer[ATTENTION.format(0, "k")]
    del fewer["model.layers.0.mlp.up_proj.weight"]  # is of no concern
    lacking = f"math={write_model('fewer', fewer)}"
    with pytest.raises(diffract.CheckpointError, match=r"1 tensors besides embeddings.*k_proj.*--allow-unmatched"):
        diffract.heads(domains[0], lacking, domains[2])
    run = diffract.heads(domains[0], lacking, domains[2], allow_unmatched=True)
    rows = of(run, "math")
    assert rows["status"].to_list() == ["unpaired"] * 4 + ["ok"] * 4
    assert rows["head_delta"].to_list() == [None] * 4 + DELTAS["math"][4:]
    assert of(run, "text")["head_delta"].to_list() == DELTAS["text"]
    assert run.models["matrices"].to_list() == [24, 22, 24]
    assert any("4 heads lack a slice" in text for text in run.manifest["warnings"])
    outcomes = run.tensors.filter(model="base", tensor=ATTENTION.format(0, "k"))["outcome"].to_list()
    assert outcomes == ["analysed"]  # text has it


def test_other_models_are_refused(domains: list[str], write_model: Callable[..., Path]) -> None:
    wide = {name: torch.ones(*(2 * extent for extent in value.shape)) for name, value in whole_numbers().items()}
    other = write_model("wide", wide, hidden_size=64, intermediate_size=96)
    with pytest.raises(diffract.CheckpointError, match="share no tensor of one name and shape"):
        diffract.heads(domains[0], other, allow_unmatched=True)


def test_a_model_without_heads_is_refused() -> None:
    with pytest.raises(diffract.CheckpointError, match=r"no q, k, v, o that is cut into heads.*--architecture"):
        diffract.heads({"w": np.eye(3)}, {"w": np.eye(3)})


def test_tuned_weights_need_no_configuration(domains: list[str]) -> None:
    run = diffract.heads(domains[0], planted(whole_numbers(), SHARED, PLANTED["text"]))
    assert of(run, "tuned")["head_delta"].to_list() == DELTAS["text"]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["queries"], "'queries'.*Did you mean 'q'"),
        (["q", "attn.k"], "'attn.k'.*Did you mean 'k'"),
        (["out_proj"], "Did you mean 'o'"),
        (["mlp"], r"expected some of: q, k, v, o\.$"),
        ([], "no projection is named"),
    ],
)
def test_unknown_projections_are_refused(domains: list[str], names: list[str], text: str) -> None:
    with pytest.raises(diffract.SelectionError, match=text):
        diffract.heads(*domains, projections=names)


def test_wrong_calls_are_refused(domains: list[str]) -> None:
    base, one, *_ = domains
    with pytest.raises(diffract.SelectionError, match="two checkpoints are called 'math'"):
        diffract.heads(base, one, one)
    with pytest.raises(diffract.SelectionError, match="at least one tuned"):
        diffract.heads(base)
    with pytest.raises(diffract.SelectionError, match="unknown engine"):
        diffract.heads(base, one, engine="spark")
    with pytest.raises(diffract.SelectionError, match="unknown device"):
        diffract.heads(base, one, device="tpu")
