"""The grammar of selections."""

from __future__ import annotations

import pytest

from diffract.errors import SelectionError
from diffract.matrices import Matrix, parse_selection, select

MATRICES = [
    *(
        Matrix(f"L{layer}.attn.q.h{h}", f"l.{layer}.q", (8, 32), "F32", layer, "attn", "q", head=h, kv_head=h // 2)
        for layer in range(12)
        for h in range(4)
    ),
    *(Matrix(f"L{layer}.mlp.up", f"l.{layer}.up", (48, 32), "F32", layer, "mlp", "up") for layer in range(12)),
    *(Matrix(f"L0.moe.up.e{e}", "l.0.experts", (4, 4), "F32", 0, "moe", "up", expert=e) for e in range(9)),
    Matrix("embed", "embed.weight", (50, 32), "F32", block="embed"),
]


def names(text: str | None) -> list[str]:
    return [m.name for m in select(MATRICES, parse_selection(text))]


@pytest.mark.parametrize("text", [None, "", " , ,"])
def test_no_terms_select_everything(text: str | None) -> None:
    assert len(names(text)) == len(MATRICES) == 12 * 4 + 12 + 9 + 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("embed", ["embed"]),
        ("embed.weight", ["embed"]),
        ("L3.mlp.*", ["L3.mlp.up"]),
        ("L1?.mlp.up", ["L10.mlp.up", "L11.mlp.up"]),
        ("layer 2, mlp", ["L2.mlp.up"]),
        ("layers 0-1, mlp.up", ["L0.mlp.up", "L1.mlp.up"]),
        ("layers 10-, mlp", ["L10.mlp.up", "L11.mlp.up"]),
        ("layers 0 11, mlp", ["L0.mlp.up", "L11.mlp.up"]),
        ("layers 0, layers 11, mlp", ["L0.mlp.up", "L11.mlp.up"]),
        ("layers 5, heads 3", ["L5.attn.q.h3"]),
        ("layers 5, kv_heads 1", ["L5.attn.q.h2", "L5.attn.q.h3"]),
        ("experts 0-1 8", ["L0.moe.up.e0", "L0.moe.up.e1", "L0.moe.up.e8"]),
        ("L0.mlp.up, embed", ["L0.mlp.up", "embed"]),
        ("layers 4, up", ["L4.mlp.up"]),
    ],
)
def test_terms(text: str, expected: list[str]) -> None:
    assert names(text) == expected


def test_a_number_leaves_out_what_has_none() -> None:
    assert "embed" not in names("layers 0-99")
    assert len(names("layers 0-99")) == len(MATRICES) - 1


@pytest.mark.parametrize(
    "text", ["layers", "layers x", "layers 1-2-3", "layers -3", "layers 1.5", "layers ٣", "attn q", "layers 0;1"]
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(SelectionError, match="Terms are separated by commas"):
        parse_selection(text)


@pytest.mark.parametrize("text", ["attn.k", "L99.*", "mlp, attn.z"])
def test_a_name_must_fit_something(text: str) -> None:
    with pytest.raises(SelectionError, match="fits no matrix"):
        names(text)


def test_an_empty_result_is_refused() -> None:
    for text in ("layers 7-3", "layers 99", "experts 1, attn"):
        with pytest.raises(SelectionError, match="leaves none of 70 matrices"):
            names(text)


def test_a_hostile_term_is_escaped() -> None:
    with pytest.raises(SelectionError) as caught:
        names("a\x1b[31m*")
    assert "\x1b" not in str(caught.value)
