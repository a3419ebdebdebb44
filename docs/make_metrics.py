"""Write the catalog part of metrics.md: what the code says of each metric, and what it gives for degenerate matrices.

python docs/make_metrics.py            # rewrite the page
python docs/make_metrics.py --check    # say whether it is up to date
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np

import diffract
from diffract.metrics import FACTS, GROUPS, Metric

PAGE = Path(__file__).parent / "metrics.md"
LISTING = Path(__file__).parents[1] / "src" / "diffract" / "cli" / "metrics.json"
CALIBRATION = PAGE.with_name("calibration.md")
BEGIN, END = "<!-- catalog: made by make_metrics.py -->", "<!-- end of catalog -->"

TITLES = {
    "norms": "Norms",
    "ranks": "Ranks",
    "shape": "Shape",
    "change": "Change",
    "agreement": "Agreement of singular vectors",
    "angles": "Principal angles",
    "agreement_levels": "Levels of agreement that know row and column norms",
    "heavy_tails": "Heavy tails",
    "random_matrix": "Random-matrix baselines",
    "spectral_shape": "Spectral shape",
    "peak_nulls": "Further nulls of peaks",
    "profile": "Where along the spectrum the change sits",
    "p_values": "P-values",
}

ONES = np.ones((40, 48))
SLOPE = np.eye(40, 48) * np.arange(40.0, 0.0, -1.0)[:, None]

Degenerate = dict[str, dict[str, float | None]]


def degenerate() -> dict[bool, Degenerate]:
    """What every metric gives for a zero and a rank-one matrix, and for pairs without change and with a zero base."""
    names = [m.name for rows in GROUPS.values() for m in rows]
    alone = [n for n in names if not diffract.metrics.CATALOG[n].pair]
    single = diffract.scan({"a": 0 * ONES, "b": ONES}, metrics=alone, cache=False).metrics
    pair = diffract.compare({"a": SLOPE, "b": 0 * ONES}, {"a": SLOPE, "b": ONES}, metrics=names, cache=False).metrics
    tuned = pair.filter(model="tuned")
    return {
        False: {"zero": single.row(0, named=True), "rank one": single.row(1, named=True)},
        True: {"unchanged": tuned.row(0, named=True), "zero base": tuned.row(1, named=True)},
    }


def catalog() -> str:
    """Return the page's part as Markdown."""
    found, links, lines = degenerate(), calibrated(), []
    for group, rows in GROUPS.items():
        lines += [f"### {TITLES[group]} (`{group}`)", ""]
        lines += ["| metric | meaning | unit | range | needs | degenerate | source |", "|" + "---|" * 7]
        lines += [row(m, found[m.pair], links) for m in rows]
        lines += [""]
    return "\n".join(lines)


def listing() -> str:
    """Return what `diffract metrics` prints: the declarations of all metrics and facts as JSON."""
    shown = ("needs", "summary", "unit", "range", "source")
    rows = [
        {"name": m.name, "group": group, "of": "pair" if m.pair else "matrix", **{n: getattr(m, n) for n in shown}}
        for group, members in GROUPS.items()
        for m in members
    ]
    facts = [{"name": name, "needs": fact.need, "summary": fact.summary} for name, fact in FACTS.items()]
    return json.dumps({"metrics": rows, "facts": facts}, indent=1, ensure_ascii=False) + "\n"


def calibrated() -> dict[str, str]:
    """Return for each name that the page of calibrations speaks of the link to where it first does."""
    found, anchor = {}, ""
    for line in (CALIBRATION.read_text(encoding="utf-8") if CALIBRATION.exists() else "").splitlines():
        if line.startswith("## "):
            anchor = re.sub(r"[^\w -]", "", line[3:].lower()).replace(" ", "-")
        for name in re.findall(r"`(\w+)`", line):
            found.setdefault(name, f"[calibration](calibration.md#{anchor})")
    return found


def row(m: Metric, cases: Degenerate, links: dict[str, str]) -> str:
    """Return one metric's line."""
    values = ", ".join(f"{name} {number(case.get(m.name))}" for name, case in cases.items())
    meaning = m.summary if m.name not in links else f"{m.summary}; {links[m.name]}"
    cells = [f"`{m.name}`", meaning, m.unit, m.range, m.needs, values, m.source]
    return "| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |"


def number(value: float | None) -> str:
    """A value for people, null where there is none; rounding's dust is zero."""
    return "null" if value is None else f"{0.0 if abs(value) < 1e-12 else value:.3g}"


def main() -> None:
    """Rewrite the page and the listing, or check them."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = f"{before}{BEGIN}\n\n{catalog()}\n{END}{after}"
    wanted = {PAGE: made, LISTING: listing()}
    for path, whole in wanted.items():
        if "--check" not in sys.argv:
            path.write_text(whole, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != whole:
            sys.exit(f"{path.name} is out of date: run `make docs`")


if __name__ == "__main__":
    main()
