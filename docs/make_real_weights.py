"""Write docs/real-weights.md: usual values on pairs of real checkpoints that ship inside packages.

``python docs/make_real_weights.py FOLDER``; the folder holds ``rxnfp``, ``sceptr`` and ``anarcii``, as taken from the
packages of these names (rxnfp 0.1.0, sceptr 1.2.0, anarcii 2.0.8).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import polars as pl

import diffract

PAIRS = (
    ("rxnfp/bert_pretrained", "rxnfp/bert_ft"),
    ("rxnfp/bert_pretrained", "rxnfp/bert_ft_10k_25s"),
    ("sceptr/SCEPTR", "sceptr/SCEPTR_finetuned"),
    ("anarcii/antibody_4_1_128_512.safetensors", "anarcii/tcr_4_1_128_512.safetensors"),
    ("anarcii/antibody_4_2_128_512.safetensors", "anarcii/tcr_4_2_128_512.safetensors"),
    ("anarcii/antibody_4_2_128_512.safetensors", "anarcii/shark_4_2_128_512.safetensors"),
)
HEAD = """# Real weights

Values that `compare` and `heads` give for small transformers that other people trained and ship inside Python packages.
They say what is usual, nothing about quality. `python docs/make_real_weights.py FOLDER` writes this page.

| base | tuned | read as | matrices compared | their relative change | with vectors | values in it | by chance |
|---|---|---|---|---|---|---|---|
"""

LEVEL = 0.05
"""Largest p with which a number of peaks counts as more than the norms of rows and columns give."""


def change_of_all(run: diffract.Run, name: str) -> float:
    """Return ||D|| / ||W0|| over all matrices and vectors that two models have in common."""
    before = run.metrics.filter(model=run.models["model"][0]).select("name", norm="frobenius_norm")
    matrices = run.metrics.filter(model=name).join(before, on="name").select("norm", delta="delta_frobenius")
    vectors = run["vectors"].filter(model=name).select("norm", "delta")
    squares = pl.concat([matrices, vectors]).drop_nulls().select(pl.all().pow(2).sum()).row(0, named=True)
    return math.sqrt(squares["delta"] / squares["norm"])


def cosine_of_all(base: Path, one: Path, other: Path) -> float:
    """Return the cosine of two changes over all tensors that three models have in common."""
    models = [diffract.open(path) for path in (base, one, other)]
    names = [{name.removeprefix("bert."): name for name in model.names} for model in models]
    sums = [0.0, 0.0, 0.0]
    for name in set.intersection(*map(set, names)):
        tensors = [model[own[name]] for model, own in zip(models, names, strict=True)]
        if tensors[0].is_floating_point() and len({tensor.shape for tensor in tensors}) == 1:
            start, *ends = (tensor.double().flatten() for tensor in tensors)
            a, b = (end - start for end in ends)
            sums = [total + float(x @ y) for total, (x, y) in zip(sums, ((a, b), (a, a), (b, b)), strict=True)]
    return sums[0] / math.sqrt(sums[1] * sums[2])


def main(folder: Path) -> None:
    """Compare the pairs and write the page."""
    rows = []
    for base, tuned in PAIRS:
        run = diffract.compare(folder / base, folder / tuned)
        model = run.models.row(1, named=True)
        count = run.metrics.filter(model=model["model"])["delta_relative"].drop_nulls().len()
        changes = f"{model['delta_relative']:.4f} | {change_of_all(run, model['model']):.4f}"
        shares = f"{model['value_share']:.4f} | {model['value_share_chance']:.4f}"
        names = f"`{Path(base).stem}` | `{Path(tuned).stem}`"
        rows.append(f"| {names} | {model['family']} | {count} | {changes} | {shares} |")
    berts = [folder / "rxnfp" / name for name in ("bert_pretrained", "bert_ft", "bert_ft_10k_25s")]
    heads = diffract.heads(*berts)
    pair = heads.domains.row(0, named=True)
    peaks = ["peak_count", "peak_count_rowcol", "peak_count_rowcol_pvalue"]
    found = diffract.scan(berts[0], metrics=peaks, select="attn.q, attn.k", nulls="all").metrics
    two, more = ((found["peak_count"] >= 2).sum(), (found["peak_count_rowcol_pvalue"] <= LEVEL).sum())
    text = f"""
The relative change is ||D|| / ||W0||. Norms and biases change less than matrices do, but their norm is large: with them
that of `bert_ft` is {change_of_all(diffract.compare(*berts[:2]), "bert_ft"):.3f}.

The two descendants of rxnfp's `bert_pretrained` change the same of its {heads.heads.height // 2} heads most (Spearman's
correlation of the heads' changes {pair["spearman"]:.2f}), but not in the same direction: the cosine of the changes is
{pair["cosine"]:.3f} over attention and {cosine_of_all(*berts):.3f} over all tensors.

Of the {len(found)} q and k heads of `bert_pretrained` {two} have two peaks or more in the density of ln sigma. Noise
with the same norms of rows and columns reaches as many in at most 5% of draws in {more} of them
({more / len(found):.1%}).

rxnfp is read as BERT by its names, one of the three without the prefix of the others. sceptr and anarcii use torch's
own attention and state no number of heads: their projections are compared whole, and as heads with an architecture file
that states it ([architectures](architectures.md)).
"""
    Path(__file__).with_name("real-weights.md").write_text(HEAD + "\n".join(rows) + "\n" + text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
