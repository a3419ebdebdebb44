"""Which heads go first: by scores that are computed here anew in NumPy, by tables, by chance."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import diffract
from diffract.edits import Rewind
from diffract.edits.heads import Head
from diffract.errors import RecipeError, SelectionError
from edit_cases import Tensors, edited, family_pair, moved, read, save_pair

NAMES = [f"L{layer}.h{head}" for layer in range(2) for head in range(4)]


def head_change(tuned: Tensors, base: Tensors, layer: int, head: int) -> float:
    """||D||_F over a head's q, k, v and o: 8 rows each; two heads share the squares of k and v."""
    delta = {
        part: (tuned[name].double() - base[name].double()).numpy()
        for part in "qkvo"
        if (name := f"model.layers.{layer}.self_attn.{part}_proj.weight")
    }
    own, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
    alone, halved = (delta["q"][own], delta["o"][:, own]), (delta["k"][shared], delta["v"][shared])
    return math.sqrt(sum(float((x**2).sum()) for x in alone) + sum(float((x**2).sum()) / 2 for x in halved))


def changes(tuned: Path, base: Path) -> np.ndarray:
    one, zero = read(tuned), read(base)
    return np.array([head_change(one, zero, layer, head) for layer in range(2) for head in range(4)])


def scaled(x: np.ndarray) -> np.ndarray:
    return (x - x.min()) / (x.max() - x.min())


Trio = tuple[Path, Path, Path]


def save_trio(folder: Path, family: str) -> Trio:
    """A base, and two models that were tuned from it: no two heads changed alike."""
    for number in range(3):
        model, _ = family_pair(family)
        moved(model, 0.05 * (number > 0), seed=10 + number)
        model.save_pretrained(folder / str(number))
    return folder / "0", folder / "1", folder / "2"


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return save_trio(tmp_path_factory.mktemp("trio"), "qwen2")


def done(out: Path, model: Path, **settings: Any) -> tuple[list[str], dict[str, float]]:
    """Which heads were rewound, and what each was ordered by."""
    step = edited(out, model, Rewind(**settings)).manifest["steps"][0]
    for row in step["rows"]:
        assert row["rewound"] == (row["name"] in step["summary"]["names"])
    return step["summary"]["names"], {row["name"]: row["score"] for row in step["rows"]}


def by(values: np.ndarray) -> list[str]:
    return [NAMES[i] for i in np.argsort(values, kind="stable")]


@pytest.mark.parametrize("family", ["qwen2", "olmo2"])
@pytest.mark.parametrize("reverse", [False, True])
def test_magnitude(reverse: bool, family: str, trio: Trio, tmp_path: Path) -> None:
    """Biases do not count, and norms do not."""
    base, tuned, _ = trio if family == "qwen2" else save_trio(tmp_path, family)
    wanted = changes(tuned, base)
    names, scores = done(tmp_path / "out", tuned, to=base, fraction=0.375, reverse=reverse)
    assert list(scores) == NAMES
    assert list(scores.values()) == pytest.approx(wanted, rel=1e-12)  # float64 sums in another order
    assert names == by(-wanted if reverse else wanted)[:3]


@pytest.mark.parametrize("reverse", [False, True])
def test_reference(reverse: bool, trio: Trio, tmp_path: Path) -> None:
    base, tuned, reference = trio
    wanted = scaled(changes(tuned, base)) - scaled(changes(reference, base))
    settings = {"to": base, "fraction": 0.5, "order": "reference", "reference": reference, "reverse": reverse}
    names, scores = done(tmp_path / "out", tuned, **settings)
    assert list(scores.values()) == pytest.approx(wanted, rel=1e-9, abs=1e-12)  # differences of numbers up to 1
    assert names == by(-wanted if reverse else wanted)[:4]


def test_a_reference_score_is_of_all_heads_whichever_are_selected(trio: Trio, tmp_path: Path) -> None:
    base, tuned, reference = trio
    settings: dict[str, Any] = {"to": base, "fraction": 0.5, "order": "reference"}
    _, every = done(tmp_path / "all", tuned, reference=reference, **settings)
    wanted = {name: score for name, score in every.items() if name.startswith("L1")}
    _, some = done(tmp_path / "some", tuned, reference=reference, select="layers 1", **settings)
    assert some == wanted
    run = diffract.heads(base, f"math={tuned}", f"natural={reference}")
    told = {"scores": str(run.save(tmp_path / "run") / "heads.parquet"), "domain": "math", "reference": "natural"}
    _, read_off = done(tmp_path / "read", tuned, select="layers 1", **told, **settings)
    assert read_off == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_a_table_need_not_have_heads_that_are_not_selected(trio: Trio, tmp_path: Path) -> None:
    base, tuned, _ = trio
    path = tmp_path / "effects.csv"
    table(effect=EFFECTS).filter(layer=1).write_csv(path)
    settings = {"to": base, "order": "greedy", "scores": str(path), "fraction": 0.25}
    assert done(tmp_path / "out", tuned, select="layers 1", **settings)[0] == ["L1.h0"]


def test_a_random_order_from_its_end_is_the_rest_of_it(trio: Trio, tmp_path: Path) -> None:
    base, tuned, _ = trio
    parts = [
        done(tmp_path / f"out{reverse}", tuned, to=base, fraction=share, order="random", seed=3, reverse=reverse)[0]
        for reverse, share in ((False, 0.375), (True, 0.625))
    ]
    permuted = [NAMES[i] for i in np.random.default_rng(3).permutation(8)]
    assert parts == [permuted[:3], permuted[:2:-1]]


def test_random_is_seeded(trio: Trio, tmp_path: Path) -> None:
    base, tuned, _ = trio
    drawn = [
        done(tmp_path / f"out{i}", tuned, to=base, fraction=0.5, order="random", seed=seed)[0]
        for i, seed in enumerate((0, 0, 1, 2, 3))
    ]
    assert drawn[0] == drawn[1] == [NAMES[i] for i in np.random.default_rng(0).permutation(8)[:4]]
    assert len({tuple(sorted(names)) for names in drawn}) > 1
    assert all(len(set(names)) == 4 for names in drawn)


@pytest.mark.parametrize(
    ("fraction", "count"), [(0, 0), (0.06, 0), (0.0625, 1), (0.5, 4), (0.56, 4), (0.5625, 5), (1, 8)]
)
def test_a_fraction_is_rounded_half_up(fraction: float, count: int, trio: Trio, tmp_path: Path) -> None:
    base, tuned, _ = trio
    assert len(done(tmp_path / "out", tuned, to=base, fraction=fraction)[0]) == count


def table(**columns: Any) -> pl.DataFrame:
    return pl.DataFrame({"layer": [0] * 4 + [1] * 4, "head": [0, 1, 2, 3] * 2, **columns})


WRITERS: dict[str, Callable[[pl.DataFrame, Path], Any]] = {
    "csv": lambda frame, path: frame.write_csv(path),
    "json": lambda frame, path: frame.write_json(path),
    "parquet": lambda frame, path: frame.write_parquet(path),
}
EFFECTS = [0.1, -0.4, 0.3, 0.0, 0.9, -0.2, 0.3, 0.5]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("reverse", [False, True])
def test_greedy_by_measured_effects(reverse: bool, kind: str, trio: Trio, tmp_path: Path) -> None:
    """The best effect on quality first."""
    base, tuned, _ = trio
    path = tmp_path / f"effects.{kind}"
    WRITERS[kind](table(effect=EFFECTS).sample(fraction=1, shuffle=True, seed=1), path)
    settings = {"to": base, "order": "greedy", "scores": str(path), "reverse": reverse}
    names, scores = done(tmp_path / "out", tuned, fraction=0.25, **settings)
    assert scores == dict(zip(NAMES, EFFECTS, strict=True))
    assert names == (["L0.h1", "L1.h1"] if reverse else ["L1.h0", "L1.h3"])


def test_heads_of_a_run(trio: Trio, tmp_path: Path) -> None:
    """``heads.parquet`` of `diffract.heads` gives the orders that measuring gives."""
    base, tuned, reference = trio
    run = diffract.heads(base, f"math={tuned}", f"natural={reference}")
    path = str(run.save(tmp_path / "run") / "heads.parquet")
    for order in ({}, {"order": "reference", "reference": reference}):
        measured = done(tmp_path / f"measured{len(order)}", tuned, to=base, fraction=0.5, **order)
        named = {**order, "reference": "natural"} if order else {}
        read_off = done(
            tmp_path / f"read{len(order)}", tuned, to=base, fraction=0.5, scores=path, domain="math", **named
        )
        assert read_off[0] == measured[0]
        assert list(read_off[1].values()) == pytest.approx(list(measured[1].values()), rel=1e-9, abs=1e-12)


def wrong_tables() -> dict[str, tuple[pl.DataFrame | str, dict[str, Any], str]]:
    greedy = {"order": "greedy"}
    models = pl.concat([table(effect=EFFECTS).with_columns(model=pl.lit(name)) for name in ("math", "code")])
    return {
        "another model's heads": (
            table(effect=EFFECTS).with_columns(pl.col("head") + 10),
            greedy,
            r"has L0\.h10, which this model has not .*from L0\.h0 to L1\.h3",
        ),
        "more layers": (
            pl.concat([table(effect=EFFECTS), table(effect=EFFECTS).with_columns(pl.col("layer") + 2)]),
            greedy,
            r"has L2\.h0, which this model has not",
        ),
        "no numbers at all": (
            table(effect=pl.Series([None] * 8, dtype=pl.Float64)),
            greedy,
            r"8 of 8 units have no score",
        ),
        "heads missing": (table(effect=EFFECTS).head(6), greedy, r"2 of 8 units have no score, first L1\.h2"),
        "no number": (table(effect=[*EFFECTS[:-1], None]), greedy, r"1 of 8 units have no score, first L1\.h3"),
        "a missing column": (table(efect=EFFECTS), greedy, r"no column 'effect', .*Did you mean 'efect'\?"),
        "no heads": (pl.DataFrame({"effect": EFFECTS}), greedy, "no column 'layer'"),
        "several models": (models, greedy, r"speaks of 2 models \(code, math\)\. Say which one"),
        "none of that name": (models, {**greedy, "domain": "maths"}, r"no rows of 'maths'\. Did you mean 'math'\?"),
        "no table": ("layer,head,effect", greedy, "have no score"),
        "words": ("layer,head,effect\n0,0,much\n", greedy, "column 'effect': expected numbers, got String"),
        "one head twice": (pl.concat([table(effect=EFFECTS)] * 2), greedy, "several rows for one head"),
        "reference in memory": (
            table(head_delta=EFFECTS),
            {"order": "reference", "reference": {"a": torch.ones(2, 2)}},
            "reference is the name of a model",
        ),
    }


@pytest.mark.parametrize("kind", wrong_tables())
def test_tables_that_do_not_fit(kind: str, trio: Trio, tmp_path: Path) -> None:
    base, tuned, _ = trio
    content, settings, message = wrong_tables()[kind]
    path = tmp_path / "scores.csv"
    path.write_text(content) if isinstance(content, str) else content.write_csv(path)
    with pytest.raises(SelectionError, match=message):
        done(tmp_path / "out", tuned, to=base, fraction=0.5, scores=str(path), **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["scores.txt", "missing.parquet", "damaged.parquet", "damaged.json", "pipe.csv"])
def test_files_that_cannot_be_read(name: str, trio: Trio, tmp_path: Path) -> None:
    base, tuned, _ = trio
    if name == "pipe.csv":  # to open one waits until somebody writes to it
        os.mkfifo(tmp_path / name)
    elif name != "missing.parquet":
        (tmp_path / name).write_bytes(b"{\x00")
    with pytest.raises(SelectionError, match=r"expected a \.parquet, \.csv or \.json|cannot read"):
        done(tmp_path / "out", tuned, to=base, fraction=0.5, order="greedy", scores=str(tmp_path / name))


def test_names_of_heads() -> None:
    """A layer with several attentions says which: T5's decoder, for one."""
    assert [Head(3, "attn", 5).name, Head(12, "cross", 3).name] == ["L3.h5", "L12.cross.h3"]


def test_heads_that_changed_alike_have_no_reference_score(trio: Trio, tmp_path: Path) -> None:
    base, tuned, _ = trio
    with pytest.raises(SelectionError, match=r"8 of 8 units have no score.*everything changed alike"):
        done(tmp_path / "out", tuned, to=base, fraction=0.5, order="reference", reference=base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either a fraction or a list of heads"),
        ({"fraction": 0.5, "heads": "L0.h0"}, "either a fraction or a list of heads"),
        ({"fraction": 0.5, "order": "reference"}, "order reference needs a reference"),
        ({"fraction": 0.5, "order": "greedy"}, "order greedy needs scores"),
        ({"fraction": 0.5, "scores": "x.csv", "unit": "tensor"}, "expected unit head, got tensor"),
        ({"fraction": 1.5}, "less than or equal to 1"),
        ({"fraction": -1}, "greater than or equal to 0"),
        ({"fraction": math.nan}, "fraction"),
        ({"fraction": 0.5, "order": "smallest"}, "'reference', 'magnitude', 'random' or 'greedy'"),
        ({"fraction": 0.5, "amount": math.inf}, "amount: input should be a finite number"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        diffract.apply({"model": "x", "steps": [{"rewind": {"to": "y", **settings}}]}, tmp_path / "out")


@pytest.mark.parametrize("unit", ["matrix", "tensor", "expert"])
def test_magnitude_of_other_units(unit: str, tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, "qwen3_moe")
    start, end = read(base), read(tuned)
    names, scores = done(tmp_path / "out", tuned, to=base, fraction=0.25, unit=unit)
    if unit == "tensor":
        norms = {name: float((end[name].double() - start[name].double()).norm()) for name in end}
        assert scores == pytest.approx(norms, rel=1e-12)
    assert names == sorted(scores, key=lambda name: scores[name])[: len(names)]
    assert 0 < len(names) < len(scores)
