"""Measure how often each p-value, chance level and count of structure speaks where there is nothing or something.

    python benchmarks/calibration.py                  # draw what is missing, an hour or two of one core, then the page
    python benchmarks/calibration.py --minutes 20     # stop in time; what was drawn is kept and the next run goes on
    python benchmarks/calibration.py --page           # write docs/calibration.md and its figure from what was drawn

One factor is varied at a time around a middle case: a 64 x 256 matrix in float32; of a pair the base has two groups of
singular values and the change is a tenth of its norm. Draws are seeded by case and number, go to a file of lines as
they are made, and come in rounds over all cases, so that a run that is stopped has a bit of everything.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from scipy.stats import beta

import diffract
from diffract.plots import save
from diffract.plots.style import figure
from diffract.stats import difference_interval, mcnemar, sign_flip

ROOT = Path(__file__).parents[1]
DRAWN = ROOT / "build" / "calibration.jsonl"
PAGE, PICTURE = ROOT / "docs" / "calibration.md", ROOT / "docs" / "calibration.png"
REAL = ROOT.parent / "shared" / "data" / "checkpoints" / "real" / "rxnfp"

CHUNK = 25
"""Matrices of one line of the file."""

LEVEL = 0.05
SLACK = 0.03
"""By how much a size may lie above its level, beyond its own error, before the page warns."""

Rng = np.random.Generator
Draw = Mapping[str, list[float | None]]


# Matrices


def rows_of(rng: Rng, kind: str, n: int) -> np.ndarray:
    """Return sizes of rows (or columns) by the name of their profile."""
    if kind.startswith("1:"):
        return np.repeat([1.0, float(kind[2:])], [n - n // 2, n // 2])
    return {
        "equal": lambda: np.ones(n),
        "log-normal": lambda: np.exp(0.5 * rng.standard_normal(n)),
        "dead": lambda: np.r_[np.ones(n - n // 16), np.zeros(n // 16)],
        "weak": lambda: np.r_[np.ones(n - n // 16), np.full(n // 16, 0.1)],
    }[kind]()


def turn(rng: Rng, n: int, size: float) -> np.ndarray:
    """Return a random rotation that moves vectors by about ``size`` of their length."""
    a = rng.standard_normal((n, n)) * size / (2 * n) ** 0.5
    a = a - a.T
    return np.linalg.solve(np.eye(n) + a / 2, np.eye(n) - a / 2)


def vectors(rng: Rng, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return random orthonormal columns for both sides."""
    k = min(shape)
    return np.linalg.qr(rng.standard_normal((shape[0], k)))[0], np.linalg.qr(rng.standard_normal((shape[1], k)))[0]


def matrix(rng: Rng, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """Return a matrix by the name of its kind."""
    if kind.startswith("two groups 1:"):  # the upper half of the spectrum is that many times what noise has
        u, s, vh = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
        s[: len(s) // 2] *= float(kind.removeprefix("two groups 1:"))
        return u * s @ vh
    if kind == "real q of rxnfp":
        return real_slices()[int(rng.integers(len(real_slices())))]
    noise, (u, v) = rng.standard_normal(shape), vectors(rng, shape)
    edge, k = shape[0] ** 0.5 + shape[1] ** 0.5, min(shape)
    return {
        "noise": lambda: noise,
        "heavy-tailed entries": lambda: rng.standard_t(4, shape),
        "low rank and noise": lambda: noise + 6 * edge * u[:, :3] @ v[:, :3].T,
        "five spikes at twice the edge": lambda: noise + 2 * edge * u[:, :5] @ v[:, :5].T,
        "rounded to bf16": lambda: bf16(noise),
        "equal values": lambda: u @ v.T,
        "spiky": lambda: (u * np.arange(1, k + 1.0) ** -0.5) @ v.T * edge,
    }[kind]()


def bf16(w: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16."""
    bits = np.ascontiguousarray(w, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


# Cases: what is drawn


@dataclass(frozen=True)
class Case:
    """Draws of one kind.

    Attributes:
        family: What is asked of them: ``one`` matrix, a ``pair``, ``strangers``, ``tails`` or ``quality``.
        name: What is varied, and how.
        structure: Whether there is something to find, so that the share of hits is power and not size.
        shape: Of the matrices.
        base: Kind of the base, or of the only matrix, of spectrum, of items.
        change: Kind of the change.
        rows, cols: Profiles of row and column sizes.
        strength: Of what is planted.
        count: How many values there are, for tails and documents.
        most: Draws that are wanted; p-values that take a second each are drawn less often.
    """

    family: str
    name: str
    structure: bool = False
    shape: tuple[int, int] = (64, 256)
    base: str = "noise"
    change: str = "noise"
    rows: str = "equal"
    cols: str = "equal"
    strength: float = 1.0
    count: int = 64
    most: int = 200


def cases() -> Iterator[Case]:
    """Yield all cases, the middle one of each family first."""
    yield from single_cases()
    yield from pair_cases()
    for count in (16, 32, 64, 128):
        yield Case("tails", f"power law of exponent 3, {count} values", base="power law", count=count, most=100)
    for law in ("exponential", "log-normal"):
        yield Case("tails", f"{law}, 64 values", base=law, structure=True, most=50)
    for count in (6, 12, 20, 60):
        yield Case("quality", f"bits of {count} documents of 8 parts", base="bits", count=count, most=1000)
        yield Case("quality", f"{count} right or wrong answers", base="answers", count=count, most=1000)
    yield Case(
        "quality", "60 documents, better by half a deviation", base="bits", count=60, strength=1.5, structure=True
    )


def single_cases() -> Iterator[Case]:
    """Yield the cases of one matrix."""
    one = Case("one", "noise, 64 x 256")
    yield one
    for kind in ("1:1.3", "1:2", "1:3", "log-normal", "dead", "weak"):
        yield replace(one, name=f"rows {kind}", rows=kind)
    yield replace(one, name="rows and columns log-normal", rows="log-normal", cols="log-normal")
    for base in ("heavy-tailed entries", "low rank and noise", "rounded to bf16", "equal values", "spiky"):
        yield replace(one, name=base, base=base)
    for shape in ((16, 64), (32, 128), (64, 64), (64, 1024), (128, 512)):
        yield replace(one, name=f"noise, {shape[0]} x {shape[1]}", shape=shape)
        yield replace(one, name=f"rows 1:2, {shape[0]} x {shape[1]}", shape=shape, rows="1:2")
    for base in ("two groups 1:1.2", "two groups 1:1.5", "two groups 1:2", "five spikes at twice the edge"):
        yield replace(one, name=base, base=base, structure=True)


def pair_cases() -> Iterator[Case]:
    """Yield the cases of a base and a changed matrix, and of two that have nothing to do with each other."""
    pair = Case("pair", "noise on a base of two groups", base="two groups 1:1.2")
    yield pair
    for rows, cols in (("1:2", "equal"), ("log-normal", "equal"), ("dead", "equal"), ("equal", "log-normal")):
        yield replace(pair, name=f"noise, rows {rows}, columns {cols}", rows=rows, cols=cols)
    for change in ("heavy-tailed", "rank 4", "right turn", "left turn", "scaling and noise", "rounding to bf16"):
        yield replace(pair, name=change, change=change)
    for base in ("noise", "two groups 1:1.1", "spiky", "real q of rxnfp"):
        for change in ("noise", "left turn"):
            yield replace(pair, name=f"{change} on {base}", base=base, change=change)
    for shape in ((32, 128), (64, 64), (64, 1024), (256, 64)):
        yield replace(pair, name=f"noise, {shape[0]} x {shape[1]}", shape=shape)
    for more in (1.3, 1.6):
        yield replace(pair, name=f"{more} times the noise in peaks", change="in peaks", strength=more, structure=True)

    strangers = Case("strangers", "unrelated")
    for shape in ((64, 256), (16, 64), (128, 128), (256, 64)):
        yield replace(strangers, name=f"unrelated Gaussians, {shape[0]} x {shape[1]}", shape=shape)
    yield replace(strangers, name="unrelated, spiky", base="spiky")
    yield replace(strangers, name="unrelated, rows log-normal", rows="log-normal")


def draw(case: Case, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """Return a base, or the only matrix, and its tuned matrix; sizes of rows are those of a pair's change."""
    base = matrix(rng, case.base, case.shape)
    rows, cols = rows_of(rng, case.rows, base.shape[0])[:, None], rows_of(rng, case.cols, base.shape[1])
    if case.family == "pair":
        return base, base + _change(case, rng, base) * rows * cols
    return base * rows * cols, matrix(rng, case.base, case.shape) * rows * cols


def _change(case: Case, rng: Rng, base: np.ndarray) -> np.ndarray:
    m, n = base.shape
    noise = rng.standard_normal((m, n))
    if case.change == "in peaks":
        u, s, _ = np.linalg.svd(base, full_matrices=False)
        k = len(s)
        noise[[*range(k // 10, 4 * k // 10), *range(6 * k // 10, 9 * k // 10)]] *= case.strength
        change = u @ noise[:k]
    else:
        change = {
            "noise": lambda: noise,
            "heavy-tailed": lambda: rng.standard_t(3, (m, n)),
            "rank 4": lambda: rng.standard_normal((m, 4)) @ rng.standard_normal((4, n)),
            "right turn": lambda: base @ turn(rng, n, 0.1) - base,
            "left turn": lambda: turn(rng, m, 0.1) @ base - base,
            "scaling and noise": lambda: base + 0.2 * noise,
            "rounding to bf16": lambda: bf16(base) - base,
        }[case.change]()
    return change if case.change == "rounding to bf16" else 0.1 * change * np.linalg.norm(base) / np.linalg.norm(change)


_REAL: list[np.ndarray] = []


def real_slices() -> list[np.ndarray]:
    """Return the query slices of a small chemical language model, where its checkpoint is at hand."""
    if not _REAL and REAL.is_dir():
        with diffract.open(REAL / "bert_pretrained") as checkpoint:
            for layer in range(12):
                whole = checkpoint[f"bert.encoder.layer.{layer}.attention.self.query.weight"].double().numpy()
                _REAL.extend(whole.reshape(-1, 64, whole.shape[1]))
    return _REAL


# Statistics: what is asked

ONE = ("peak_count", "peak_count_rowcol", "peak_count_rowcol_pvalue", "dip_pvalue")
ONE += ("mp_spikes_tw", "mp_spikes_tw_rowcol", "sep_spikes")
PAIR = ("peak_enrichment_pvalue", "energy_tenth_1", "energy_tenth_5", "energy_tenth_10", "value_share")
PAIR += ("value_share_chance",)
SIDES = ("agreement_mean", "best_match_mean", "subspace_8", "agreement_window_mean", "angle_8")
STRANGERS = tuple(f"{side}_{name}" for side in ("left", "right") for name in SIDES)
CHANCES = tuple(f"{name.removesuffix('_mean')}_chance" for name in STRANGERS)
TAILS = ("pl_alpha", "pl_alpha_stderr", "pl_pvalue", "pl_pvalue_fixed_xmin", "exp_pvalue", "ln_pvalue", "pl_vs_exp_p")


def measure(case: Case, seed: int) -> Draw:
    """Return what each statistic says of one chunk of draws."""
    rng = np.random.default_rng(seed)
    if case.family == "quality":
        return quality(case, rng)
    if case.family == "tails":
        return tails(case, rng)
    pairs = [draw(case, rng) for _ in range(CHUNK)]
    base = {f"w{i}": one.astype(np.float32) for i, (one, _) in enumerate(pairs)}
    if case.family == "one":
        table = diffract.scan(base, metrics=list(ONE), cache=False, heads=False, nulls="all").metrics
        return {name: table[name].to_list() for name in ONE}
    tuned = {f"w{i}": other.astype(np.float32) for i, (_, other) in enumerate(pairs)}
    names = [*STRANGERS, *CHANCES] if case.family == "strangers" else list(PAIR)
    run = diffract.compare(base, tuned, metrics=names, cache=False, heads=False, noise="none")
    table = run.metrics.filter(model="tuned")
    return {name: table[name].to_list() for name in names}


def tails(case: Case, rng: Rng) -> Draw:
    """Ask for exponents and p-values of spectra whose eigenvalues are drawn from a law."""
    arrays = {}
    for i in range(CHUNK):
        values = {
            "power law": lambda: (1 - rng.random(case.count)) ** (-1 / 2),
            "exponential": lambda: rng.exponential(size=case.count),
            "log-normal": lambda: np.exp(rng.standard_normal(case.count)),
        }[case.base]()
        u, v = vectors(rng, (case.count, case.count))
        arrays[f"w{i}"] = (u * np.sqrt(case.count * np.sort(values)[::-1])) @ v.T
    table = diffract.scan(arrays, metrics=list(TAILS), cache=False, heads=False, nulls="all").metrics
    return {name: table[name].to_list() for name in TAILS}


def quality(case: Case, rng: Rng) -> Draw:
    """Ask for the interval and the p-value of a difference between two models of equal quality, or of unequal."""
    found: dict[str, list[float | None]] = {"interval without 0": [], "two-sided p": []}
    for _ in range(CHUNK):
        if case.base == "answers":
            first, second = rng.random((2, case.count)) < rng.beta(2, 2, case.count)
            x, y, documents = first.astype(float), second.astype(float), np.arange(case.count).astype(str)
            p = mcnemar(x, y)
        else:
            effect = rng.standard_normal(case.count) + (case.strength - 1)
            documents = np.repeat(np.arange(case.count), 8).astype(str)
            x = 3 + rng.standard_normal(len(documents))
            y = x + np.repeat(effect, 8) + 0.5 * rng.standard_normal(len(documents))
            p = sign_flip((y - x).reshape(case.count, 8).sum(1))
        low, high = difference_interval(x, y, np.ones(len(x)), documents)
        found["interval without 0"].append(float(not low <= 0 <= high))
        found["two-sided p"].append(float(p))
    return found


# Drawing


def known(file: Path) -> dict[str, list[Draw]]:
    """Return the chunks that were drawn, by case; a last line that was cut off does not count."""
    found: dict[str, list[Draw]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            one = json.loads(line)
        except json.JSONDecodeError:
            continue
        found.setdefault(one["case"], []).append(one["values"])
    return found


def key(case: Case) -> str:
    """Return what a case is called in the file."""
    return f"{case.family}: {case.name}"


def run(file: Path, minutes: float, families: list[str]) -> None:
    """Draw what is missing, chunk by chunk, all cases in turn."""
    file.parent.mkdir(parents=True, exist_ok=True)
    have = {name: len(chunks) for name, chunks in known(file).items()}
    until = time.monotonic() + 60 * minutes
    wanted = [c for c in cases() if c.family in families and (not c.base.startswith("real") or real_slices())]
    for chunk in range(max(c.most for c in wanted) // CHUNK):
        for case in wanted:
            if chunk * CHUNK >= case.most or have.get(key(case), 0) > chunk:
                continue
            if time.monotonic() > until:
                return
            begun = time.process_time()
            values = measure(case, zlib.crc32(f"{key(case)} {chunk}".encode()))
            line = {"case": key(case), "chunk": chunk, "seconds": time.process_time() - begun, "values": values}
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")


# The page

SPIKED = ("low rank and noise", "spiky")
"""Kinds of matrices with directions of their own, but without groups of them."""


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
        """Whether there is something to find; a few large directions are that for counts of spikes alone."""
        return self.case.structure or ("spikes" in self.statistic and self.case.base in SPIKED)

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
    "`pl_pvalue` <= 0.05": (LEVEL, "tails", lambda d: d["pl_pvalue"] <= LEVEL),
    "`pl_pvalue_fixed_xmin` <= 0.05": (LEVEL, "tails", lambda d: d["pl_pvalue_fixed_xmin"] <= LEVEL),
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
            usable = [d for d in draws_of(drawn[key(case)]) if not math.isnan(d[statistic])]
            if usable:
                hits = sum(hit(d) for d in usable)
                rows.append(Row(name, case, level, hits / len(usable), *share(hits, len(usable)), len(usable)))
    return rows


def averaged(drawn: Mapping[str, list[Draw]]) -> list[Row]:
    """Return a row for each chance level and case: the mean of value over level."""
    ratios = {name: (name, chance, "strangers") for name, chance in zip(STRANGERS, CHANCES, strict=True)}
    ratios |= {"value_share": ("value_share", "value_share_chance", "pair")}
    ratios |= {f"energy_tenth_{k}": (f"energy_tenth_{k}", "", "pair") for k in (1, 5, 10)}
    rows = []
    for name, (value, chance, family) in ratios.items():
        for case in (c for c in cases() if c.family == family and not c.structure and key(c) in drawn):
            found = [d[value] / (d[chance] if chance else 1.0) for d in draws_of(drawn[key(case)])]
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
calibration` draws matrices of which that is known, one factor varied at a time around a middle case (64 x 256, float32;
of a pair the base has two groups of singular values, 1:1.2, and the change is a tenth of its norm), and counts.
Intervals are 95%, of as many draws as the row says: p-values that take a second each are drawn less often, and where a
statistic has no value for a draw the draw does not count. **Too often** marks a size above its level by more than its
error and 0.03: do not use the statistic for such matrices. Power stands in the same tables, at the stated effect.

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
        lines.append(f"| `{row.statistic}` | {row.case.name} | {row.value:.3f} | {ends} | {row.draws} |")
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
