"""Which heads go first: recomputed in NumPy from the files themselves, and read from tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.torch import load_file

import diffract
from diffract.edits import Recipe, Rewind, apply
from diffract.errors import SelectionError

SAMPLES = Path(__file__).parents[2] / "samples" / "tiny-olmo2"
BASE, MATH, CODE, NATURAL = (str(SAMPLES / name) for name in ("base", "math", "code", "natural"))
NAMES = [f"L{layer}.h{head}" for layer in range(4) for head in range(8)]


def change(model: str) -> np.ndarray:
    """||D||_F of q, k, v, o of each head; four heads share the 16 rows of k and v."""
    one, base = (load_file(Path(m) / "model.safetensors") for m in (model, BASE))
    squares = []
    for layer in range(4):
        prefix = f"model.layers.{layer}.self_attn."
        names = [f"{prefix}{p}_proj.weight" for p in "qkvo"]
        q, k, v, o = ((one[name].double() - base[name].double()).numpy() ** 2 for name in names)
        for head in range(8):
            own, kv = slice(16 * head, 16 * head + 16), slice(16 * (head // 4), 16 * (head // 4) + 16)
            squares.append(q[own].sum() + o[:, own].sum() + k[kv].sum() + v[kv].sum())
    return np.sqrt(squares)


def scale01(x: np.ndarray) -> np.ndarray:
    return (x - x.min()) / (x.max() - x.min())


def rewound(tmp_path: Path, fraction: float = 0.25, **settings: Any) -> list[str]:
    step = Rewind(to=BASE, fraction=fraction, **settings)
    edited = apply(Recipe(model=MATH, steps=[step]), tmp_path / f"out{len(list(tmp_path.iterdir()))}")
    return edited.manifest["steps"][0]["summary"]["names"]


def ranked(scores: np.ndarray, count: int = 8) -> list[str]:
    return [NAMES[i] for i in np.argsort(scores, kind="stable")[:count]]


def test_least_changed_first(tmp_path: Path) -> None:
    assert rewound(tmp_path) == ranked(change(MATH))
    assert rewound(tmp_path, reverse=True) == ranked(-change(MATH))


def test_least_specific_first(tmp_path: Path) -> None:
    score = scale01(change(MATH)) - scale01(change(CODE))
    assert rewound(tmp_path, order="reference", reference=CODE) == ranked(score)
    assert rewound(tmp_path, order="reference", reference=CODE, reverse=True) == ranked(-score)


def test_by_chance(tmp_path: Path) -> None:
    first, again, other = (rewound(tmp_path, order="random", seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 8


def test_from_a_run_of_heads(tmp_path: Path) -> None:
    diffract.heads(BASE, f"math={MATH}", f"natural={NATURAL}", output=tmp_path / "run")
    table = str(tmp_path / "run" / "heads.parquet")
    assert rewound(tmp_path, scores=table, domain="math") == rewound(tmp_path)
    by_table = rewound(tmp_path, order="reference", scores=table, domain="math", reference="natural")
    assert by_table == rewound(tmp_path, order="reference", reference=NATURAL)
    with pytest.raises(SelectionError, match=r"speaks of 2 models \(math, natural\)"):
        rewound(tmp_path, scores=table)
    with pytest.raises(SelectionError, match="Did you mean 'math'"):
        rewound(tmp_path, scores=table, domain="maths")


def effects() -> pl.DataFrame:
    rows = [{"layer": i // 8, "head": i % 8, "effect": float((i * 11) % 32)} for i in range(32)]
    return pl.DataFrame(rows)


@pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
def test_best_measured_first(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"effects.{kind}"
    getattr(effects(), f"write_{kind}")(path)
    expected = ranked(-effects()["effect"].to_numpy())
    assert rewound(tmp_path, order="greedy", scores=str(path)) == expected
    worst = ranked(effects()["effect"].to_numpy())
    assert rewound(tmp_path, order="greedy", scores=str(path), reverse=True) == worst


@pytest.mark.parametrize(
    ("change_table", "message"),
    [
        (lambda t: t.with_columns(layer=pl.col("layer") + 9), "has L9.h0, which this model has not"),
        (lambda t: t.head(30), "2 of 32 units have no score, first L3.h6"),
        (
            lambda t: t.rename({"effect": "efect"}),
            "no column 'effect', expected layer, head, effect. Did you mean 'efect'",
        ),
        (lambda t: t.with_columns(effect=pl.lit(None, pl.Float64)), "32 of 32 units have no score"),
    ],
    ids=["another model's", "too few", "a column", "nulls"],
)
def test_tables_that_do_not_fit(change_table: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "effects.csv"
    change_table(effects()).write_csv(path)
    with pytest.raises(SelectionError) as caught:
        rewound(tmp_path, order="greedy", scores=str(path))
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "text"), [("t.txt", ""), ("t.csv", None), ("t.json", "{"), ("t.parquet", "x")])
def test_files_that_are_no_table(name: str, text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SelectionError, match=r"expected a \.parquet, \.csv or \.json table|cannot read"):
        rewound(tmp_path, order="greedy", scores=str(tmp_path / name))
