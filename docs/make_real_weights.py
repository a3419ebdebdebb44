"""Write docs/real-weights.md: usual values on pairs of real checkpoints that ship inside packages.

``python docs/make_real_weights.py FOLDER``; the folder holds ``rxnfp``, ``sceptr`` and ``anarcii``, as taken from the
packages of these names (rxnfp 0.1.0, sceptr 1.2.0, anarcii 2.0.8).
"""

from __future__ import annotations

import sys
from pathlib import Path

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

| base | tuned | read as | matrices compared | relative change of matrices | share of values in it | by chance |
|---|---|---|---|---|---|---|
"""


def main(folder: Path) -> None:
    """Compare the pairs and write the page."""
    rows = []
    for base, tuned in PAIRS:
        run = diffract.compare(folder / base, folder / tuned)
        model = run.models.row(1, named=True)
        count = run.metrics.filter(model=model["model"])["delta_relative"].drop_nulls().len()
        numbers = " | ".join(f"{model[k]:.4f}" for k in ("delta_relative", "value_share", "value_share_chance"))
        rows.append(f"| `{Path(base).stem}` | `{Path(tuned).stem}` | {model['family']} | {count} | {numbers} |")
    heads = diffract.heads(*(folder / "rxnfp" / n for n in ("bert_pretrained", "bert_ft", "bert_ft_10k_25s")))
    pair = heads.domains.row(0, named=True)
    text = f"""
The two descendants of rxnfp's `bert_pretrained` change the same of its {heads.heads.height // 2} heads most (Spearman's
correlation of the heads' changes {pair["spearman"]:.2f}), but not in the same direction (cosine of the changes of
attention {pair["cosine"]:.3f}).

rxnfp is read as BERT by its names, one of the three without the prefix of the others. sceptr and anarcii use torch's
own attention and state no number of heads: their projections are compared whole.
"""
    Path(__file__).with_name("real-weights.md").write_text(HEAD + "\n".join(rows) + "\n" + text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
