"""What a report says of a change that is plain noise, and of one that is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import diffract
from diffract.checkpoints import open_checkpoint
from diffract.cli.analyses import show_analysis
from diffract.report import headlines
from diffract.report.words import BEYOND, is_rounding

BASE = Path(__file__).parents[2] / "samples" / "tiny-olmo2" / "base"

Weights = dict[str, torch.Tensor]


def compared(base: Weights, tuned: Weights, metrics: str = "norms,change") -> diffract.Run:
    config = open_checkpoint(BASE).config
    return diffract.compare(*(replace(open_checkpoint(w), config=config) for w in (base, tuned)), metrics=metrics)


@cache
def changed(seed: int, head: float = 1.0, metrics: str = "norms,change") -> diffract.Run:
    """The sample with Gaussian noise of a tenth of each tensor's norm, on one query head ``head`` times as much."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: tensor.float() for name, tensor in load_file(BASE / "model.safetensors").items()}
    noise = {
        n: torch.randn(w.shape, generator=generator) * 0.1 * w.norm() / w.numel() ** 0.5 for n, w in weights.items()
    }
    for name in ("q_proj", "o_proj"):
        rows = noise[f"model.layers.1.self_attn.{name}.weight"]
        (rows if name == "q_proj" else rows.T)[:16] *= head
    return compared(weights, {n: w + noise[n] for n, w in weights.items()}, metrics)


ROUNDED = ("scaling", "scaling in bf16", "rounding")
"""Changes that are rounding, or that are so once scaling is taken off."""


def turned(w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The matrix with all directions of its short side turned by about a tenth."""
    short = min(w.shape)
    skew = torch.randn(short, short, generator=generator, dtype=torch.float64) * 0.07 / short**0.5
    turn = torch.matrix_exp(skew - skew.T)
    return (turn @ w.double() if w.shape[0] == short else w.double() @ turn).float()


@cache
def without_structure(kind: str) -> diffract.Run:
    """The sample, its matrices changed in a way that has no structure of its own."""
    generator = torch.Generator().manual_seed(0)
    base = {name: tensor.float() for name, tensor in load_file(BASE / "model.safetensors").items()}
    if kind == "rounding":
        base = {name: w * 1.2345 for name, w in base.items()}
    change: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "turn": lambda w: turned(w, generator),
        "scaling": lambda w: w * 1.1,
        "scaling in bf16": lambda w: (w * 1.1).bfloat16(),
        "rounding": lambda w: w.bfloat16(),
    }
    return compared(base, {name: change[kind](w) if w.ndim == 2 else w for name, w in base.items()})


@pytest.mark.parametrize("kind", [0, 1, "turn", "scaling", "scaling in bf16", "rounding"])
def test_of_a_change_without_structure_no_sentence_and_no_large_figure_claims_any(kind: int | str) -> None:
    run = changed(kind) if isinstance(kind, int) else without_structure(kind)
    assert run.manifest["notable"] == {"tuned": []}
    found = headlines(run.tables)
    (large,) = (h for h in found if not h.minor)
    assert large.text.startswith("is the size of the change of all matrices")
    assert ("scales the matrices, by 1.1 in the mean" in large.text) == (str(kind).startswith("scaling"))
    assert ("no more than rounding to the stored dtype" in large.text) == (kind in ROUNDED)
    for headline in (h for h in found if h.minor):
        assert "noise of the same norm" in headline.text
    row = run.models.row(1, named=True)
    for quantity in BEYOND:
        excess, p = row.get(f"{quantity}_excess"), row.get(f"{quantity}_pvalue")
        assert excess is None or excess < 1.2 or (p is not None and p > 0.01) or is_rounding(row)


def test_the_terminal_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    show_analysis(changed(0), {"output": None})
    said = capsys.readouterr().out
    assert "as much of the change lies in singular values as of noise of the same norm" in said
    assert "medians of 93 matrices" in said
    assert "in singular values;" not in said
    show_analysis(without_structure("scaling in bf16"), {"output": None})
    said = capsys.readouterr().out
    assert said.rstrip().endswith("the rest of it is no more than rounding to the stored dtype alone would cause")


def test_a_head_that_stands_out_is_shown_large() -> None:
    run = changed(0, head=8.0)
    row = run.models.row(1, named=True)
    assert row["head_top10_share_pvalue"] == 1 / 40
    (large,) = (h for h in headlines(run.tables) if "top tenth of heads" in h.text)
    assert not large.minor
    assert "times what noise of the same norms gives" in large.text


def test_the_noise_of_a_concentration_is_that_of_drawn_matrices() -> None:
    from diffract.attention import head_squares
    from diffract.stats import gini, top_share

    run = changed(0)
    row = run.models.row(1, named=True)
    others = [changed(seed, metrics="delta_frobenius") for seed in (2, 3, 4)]
    drawn = [head_squares(other["heads"]) for other in others]
    # the same norms, drawn entry by entry: over twelve seeds means agree (0.131, 0.025); these scatter
    tops = [float(top_share(squares)) for squares in drawn]
    assert row["head_top10_share_noise"] == pytest.approx(sum(tops) / 3, abs=4 * 0.0007)
    assert row["head_gini_noise"] == pytest.approx(sum(map(gini, drawn)) / 3, abs=4 * 0.0025)
    assert row["head_top10_share"] == pytest.approx(row["head_top10_share_noise"], rel=0.03)


def test_peaks_and_nulls_are_said_with_how_many_were_drawn_for(capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    arrays = {f"w{i}": torch.randn(48, 96, generator=generator) for i in range(40)}
    for i in range(20):  # rows of two sizes: two peaks by their norms alone
        arrays[f"w{i}"][:24] *= 6
    run = diffract.scan(arrays, metrics="peak_count,peak_count_rowcol_pvalue")
    drawn = run.manifest["nulls"]["drawn"]
    assert 20 < drawn <= 32
    assert run.manifest["nulls"]["of"] == 40
    (told,) = (h for h in headlines(run.tables) if "spectral peaks" in h.text)
    beyond, of = map(int, told.figure.split(" of "))
    assert of == drawn
    assert beyond <= 5  # 32 draws of a chance of at most 1 in 20 give more in 1 of 80 runs
    assert told.text.endswith(f"nulls were drawn for {drawn} of 40 matrices.")
    show_analysis(run, {"output": None})
    assert f"for {drawn} of 40 matrices (--nulls all for every one)" in capsys.readouterr().out


def test_nothing_changed_and_little_changed_are_said_in_plain_words() -> None:
    weights = load_file(BASE / "model.safetensors")
    (said,) = headlines(compared(weights, dict(weights)).tables)
    assert (said.figure, said.text) == ("0%", "is the size of the change: none of the matrices changed.")
    table = weights["model.embed_tokens.weight"].clone()
    table[100] += 1
    first = headlines(compared(weights, weights | {"model.embed_tokens.weight": table}).tables)[0]
    assert "; 0.01% of their entries differ" in first.text  # 128 of 968 thousand
