"""Measure how often each p-value, chance level and count of structure speaks where there is nothing or something.

    python benchmarks/calibration.py                  # draw what is missing, an hour or two of one core, then the page
    python benchmarks/calibration.py --minutes 20     # stop in time; what was drawn is kept and the next run goes on
    python benchmarks/calibration.py --page           # write docs/calibration.md and its figure from what was drawn

What is drawn stands in ``calibration_draws.py``.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from calibration_draws import CHANCES, LEVELS, ROOT, STRANGERS, Case, Draw, cases, key, known, run
from scipy.stats import beta

from diffract.plots import save
from diffract.plots.style import figure

DRAWN = ROOT / "build" / "calibration.jsonl"
PAGE, PICTURE = ROOT / "docs" / "calibration.md", ROOT / "docs" / "calibration.png"

LEVEL = 0.05
SLACK = 0.03
"""By how much a size may lie above its level, beyond its own error, before the page warns."""

SPIKED = ("low rank and noise", "spiky")
"""Kinds of matrices with directions of their own, but without groups of them."""

CHANGED = {"value": ("values",), "spectral": ("values",), "head": ("values", "one head")}
"""Which changes of whole models are something to find, by how a statistic's name begins."""

LAWS = {"pl_": ("power law",), "tpl": ("power law", "exponential"), "exp": ("exponential",), "ln_": ("log-normal",)}
"""Which spectra follow the law that a p-value tests, likewise."""


def has_structure(name: str, case: Case) -> bool:
    """Whether a statistic has something to find in a case, so that the share of hits is power and not size."""
    if case.family == "models":
        related = case.change != "unrelated"
        return related if name == "lineage" else case.change in CHANGED.get(name.partition("_")[0], ())
    if case.family == "tails":
        return case.base not in LAWS[name[:3]]
    return case.structure or (case.base in SPIKED and ("spikes" in name or "alpha" in name))


@dataclass(frozen=True)
class Row:
    """A line of a table: hits among draws, or the mean of values, with a 95% interval."""

    statistic: str
    case: Case
    level: float
    value: float
    low: float
    high: float
    draws: int

    @property
    def structure(self) -> bool:
        """Whether there is something to find."""
        return has_structure(self.statistic.split("`")[1], self.case)

    @property
    def above(self) -> bool:
        """Whether noise is called structure more often than stated, by more than the error and the slack."""
        return not self.structure and self.low > self.level and self.value > self.level + SLACK


def share(hits: int, count: int) -> tuple[float, float]:
    """Return the interval of a share (Clopper & Pearson 1934)."""
    low = float(beta.ppf(0.025, hits, count - hits + 1)) if hits else 0.0
    return low, float(beta.ppf(0.975, hits + 1, count - hits)) if hits < count else 1.0


Hit = Callable[[dict[str, float]], bool]

TESTS: dict[str, tuple[float, str, Hit]] = {
    "`peak_count` > 1": (0.0, "one", lambda d: d["peak_count"] > 1),
    "`peak_count_rowcol_pvalue` <= 0.05": (LEVEL, "one", lambda d: d["peak_count_rowcol_pvalue"] <= LEVEL),
    "`dip_pvalue` <= 0.05": (LEVEL, "one", lambda d: d["dip_pvalue"] <= LEVEL),
    "`mp_spikes_tw` > 0": (0.01, "one", lambda d: d["mp_spikes_tw"] > 0),
    "`mp_spikes_tw` > `mp_spikes_tw_rowcol` + 2": (
        LEVEL, "one", lambda d: d["mp_spikes_tw"] > d["mp_spikes_tw_rowcol"] + 2,
    ),
    "`sep_spikes` > 1": (LEVEL, "one", lambda d: d["sep_spikes"] > 1),
    "`peak_enrichment_pvalue` <= 0.05": (LEVEL, "pair", lambda d: d["peak_enrichment_pvalue"] <= LEVEL),
    "`peak_count_row_pvalue` <= 0.05": (LEVEL, "one", lambda d: d["peak_count_row_pvalue"] <= LEVEL),
    "`pl_alpha_rowcol_pvalue` <= 0.05": (LEVEL, "one", lambda d: d["pl_alpha_rowcol_pvalue"] <= LEVEL),
    **{
        f"`{name}_pvalue` <= 0.01 and 1.2 times noise or more": (
            0.01, "models", lambda d, name=name: d[f"{name}_pvalue"] <= 0.01 and d[f"{name}_excess"] >= 1.2,
        )
        for name in ("value_share_free", "spectral_shift_share_free")
    },
    "`intruders_pvalue` <= 0.05": (LEVEL, "models", lambda d: d["intruders_pvalue"] <= LEVEL),
    "`head_top10_share_pvalue` <= 0.05": (LEVEL, "models", lambda d: d["head_top10_share_pvalue"] <= LEVEL),
    "`lineage` is not stranger": (LEVEL, "models", lambda d: d["lineage"] > 0),
    "`pl_pvalue` <= 0.05": (LEVEL, "tails", lambda d: d["pl_pvalue"] <= LEVEL),
    "`pl_pvalue_fixed_xmin` <= 0.05": (LEVEL, "tails", lambda d: d["pl_pvalue_fixed_xmin"] <= LEVEL),
    **{
        f"`{law}_pvalue` <= 0.05": (LEVEL, "tails", lambda d, law=law: d[f"{law}_pvalue"] <= LEVEL)
        for law in ("tpl", "exp", "ln")
    },
    "`interval without 0` of a difference in quality": (LEVEL, "quality", lambda d: d["interval without 0"] > 0),
    "`two-sided p` of a difference in quality <= 0.05": (LEVEL, "quality", lambda d: d["two-sided p"] <= LEVEL),
}  # fmt: skip
"""What counts as a hit (the first name is of the statistic), how often noise may have one, and of which family."""


def draws_of(chunks: list[Draw]) -> list[dict[str, float]]:
    """Return draws one by one; what has no value is NaN."""
    found = []
    for chunk in chunks:
        names, columns = list(chunk), zip(*chunk.values(), strict=True)
        found += [{n: math.nan if v is None else v for n, v in zip(names, row, strict=True)} for row in columns]
    return found


def tested(drawn: Mapping[str, list[Draw]]) -> list[Row]:
    """Return a row for each test and case."""
    rows = []
    for name, (level, family, hit) in TESTS.items():
        for case in (c for c in cases() if c.family == family and key(c) in drawn):
            statistic = name.split("`")[1]
            usable = [d for d in draws_of(drawn[key(case)]) if not math.isnan(d.get(statistic, math.nan))]
            if usable:
                hits = sum(hit(d) for d in usable)
                rows.append(Row(name, case, level, hits / len(usable), *share(hits, len(usable)), len(usable)))
    return rows


def averaged(drawn: Mapping[str, list[Draw]]) -> list[Row]:
    """Return a row for each chance level and case: the mean of value over level."""
    ratios = {name: (name, chance, "strangers") for name, chance in zip(STRANGERS, CHANCES, strict=True)}
    ratios |= {f"{n} beside *_rowcol": (n, level, "strangers") for n, level in zip(STRANGERS, LEVELS, strict=True)}
    ratios |= {"value_share": ("value_share", "value_share_chance", "pair")}
    ratios |= {f"energy_tenth_{k}": (f"energy_tenth_{k}", "", "pair") for k in (1, 5, 10)}
    rows = []
    for name, (value, chance, family) in ratios.items():
        for case in (c for c in cases() if c.family == family and not c.structure and key(c) in drawn):
            all_draws = draws_of(drawn[key(case)])
            found = [d[value] / (d[chance] if chance else 1.0) for d in all_draws if not chance or chance in d]
            known = np.array([v for v in found if math.isfinite(v)])
            if len(known) > 1:
                mean, error = float(known.mean()), 1.96 * float(known.std(ddof=1)) / len(known) ** 0.5
                rows.append(Row(name, case, 1.0, mean, mean - error, mean + error, len(known)))
    return rows


def exponents(drawn: Mapping[str, list[Draw]]) -> list[str]:
    """Return the table of what a true exponent of 3 reads, and how wide its error is stated."""
    lines = ["| values | mean `pl_alpha` | scatter | median `pl_alpha_stderr` | draws |", "|---|---|---|---|---|"]
    for case in (c for c in cases() if c.base == "power law" and key(c) in drawn):
        rows = draws_of(drawn[key(case)])
        alpha, error = (np.array([d[name] for d in rows]) for name in ("pl_alpha", "pl_alpha_stderr"))
        lines.append(
            f"| {case.count} | {np.nanmean(alpha):.2f} ({np.nanmean(alpha) / 3 - 1:+.0%}) | {np.nanstd(alpha):.2f} "
            f"| {np.nanmedian(error):.2f} | {len(rows)} |"
        )
    return lines


ABOUT = """# Calibration: may I believe this?

Whoever reads a p-value or a count of structure wants to know how often it speaks where there is nothing. `make
calibration` draws matrices, pairs and whole models of which that is known, one factor varied at a time around a middle
case (64 x 256, float32; of a pair the base has two groups of singular values, 1:1.2, and the change is a tenth of its
norm; a model is a Llama of three layers and eight heads, its change a tenth of its norm), and counts. Real weights are
the query heads of rxnfp; no other model's were at hand. Intervals are 95%, of as many draws as the row says: what is
dear is drawn less often, and where a statistic has no value for a draw the draw does not count. **Too often** marks a
size above its level by more than its error and 0.03: do not use the statistic for such matrices. Power stands in the
same tables, at the stated effect.

![Sizes of all tests](calibration.png)
"""


def page(drawn: Mapping[str, list[Draw]]) -> str:
    """Return the page as Markdown."""
    rows, lines = tested(drawn), [ABOUT]
    for name in dict.fromkeys(row.statistic for row in rows):
        own = [row for row in rows if row.statistic == name]
        lines += [
            f"## {name}",
            "",
            f"Stated level {own[0].level:g}." if own[0].level else "No level: a plain count.",
            "",
        ]
        lines += ["| draws of | shape | share | interval | draws | |", "|---|---|---|---|---|---|"]
        for row in own:
            word = "power" if row.structure else "**too often**" if row.above and row.level else ""
            size = f"{row.case.shape[0]} x {row.case.shape[1]}" if row.case.family in ("one", "pair") else ""
            ends = f"{row.low:.3f} to {row.high:.3f}"
            lines.append(f"| {row.case.name} | {size} | {row.value:.3f} | {ends} | {row.draws} | {word} |")
        lines.append("")
    lines += ["## Chance levels", "", "Mean of value over stated level where there is nothing; 1 is right.", ""]
    lines += ["| statistic | draws of | value / level | interval | draws |", "|---|---|---|---|---|"]
    for row in averaged(drawn):
        ends = f"{row.low:.3f} to {row.high:.3f}"
        name, *beside = row.statistic.split(" ", 1)
        lines.append(f"| `{name}` {' '.join(beside)} | {row.case.name} | {row.value:.3f} | {ends} | {row.draws} |")
    lines += ["", "## pl_alpha of small samples", "", "A true exponent of 3, by number of eigenvalues.", ""]
    return "\n".join([*lines, *exponents(drawn)]) + "\n"


def picture(drawn: Mapping[str, list[Draw]]) -> go.Figure:
    """Return sizes of all tests with their intervals, and the level."""
    rows = [row for row in tested(drawn) if not row.structure and row.level]
    names = list(dict.fromkeys(row.statistic for row in rows))
    traces = [
        go.Scatter(
            x=[row.value for row in own],
            y=[name.replace("`", "")] * len(own),
            error_x={
                "array": [row.high - row.value for row in own],
                "arrayminus": [row.value - row.low for row in own],
                "thickness": 1,
            },
            mode="markers",
            name=label,
            marker={"color": colour, "size": 7, "opacity": 0.7},
        )
        for label, colour, wanted in (("as stated", "#0072b2", False), ("too often", "#d55e00", True))
        for name in names
        if (own := [row for row in rows if row.statistic == name and row.above == wanted])
    ]
    legend = {str(trace.name): trace for trace in reversed(traces)}
    for trace in traces:
        trace.showlegend = trace is legend[str(trace.name)]
    made = figure(traces, x="share of draws without structure that are called structure", y="", height=480)
    return made.add_vline(x=LEVEL, line={"dash": "dot", "width": 1}).update_layout(margin={"l": 280})


def main() -> None:
    """Draw, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop drawing after this long")
    parser.add_argument("--page", action="store_true", help="draw nothing")
    parser.add_argument("--families", nargs="*", help="draw only these: one, pair, strangers, tails, quality")
    parser.add_argument("--drawn", type=Path, default=DRAWN, help="file of draws")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    if not asked.page:
        run(asked.drawn, asked.minutes, asked.families or [case.family for case in cases()])
    drawn = known(asked.drawn)
    PAGE.write_text(page(drawn), encoding="utf-8")
    save(picture(drawn), PICTURE, width=900, scale=1)


if __name__ == "__main__":
    main()
