"""What calibration draws, and what it asks of the draws: matrices, pairs, whole models, tails, differences in quality.

One factor is varied at a time around a middle case: a 64 x 256 matrix in float32; of a pair the base has two groups of
singular values and the change is a tenth of its norm. Draws are seeded by case and number, go to a file of lines as
they are made, and come in rounds over all cases, so that a run that is stopped has a bit of everything.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import diffract
from diffract.stats import difference_interval, mcnemar, sign_flip

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("DIFFRACT_DATA", ROOT.parent / "shared" / "data")) / "checkpoints" / "real" / "rxnfp"

CHUNK = 25
"""Draws of one line of the file."""

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
        family: What is asked of them: ``one`` matrix, a ``pair``, ``strangers``, whole ``models``, ``tails`` or
            ``quality``.
        name: What is varied, and how.
        structure: Whether there is something to find.
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
        yield Case("tails", f"power law of exponent 3, {count} values", base="power law", count=count)
    for law in ("exponential", "log-normal"):
        yield Case("tails", f"{law}, 64 values", base=law)
    for base, change in (("spiky", "noise"), ("noise", "noise"), ("spiky", "heavy-tailed"), ("spiky", "unrelated")):
        yield Case("models", f"{change} on {base} weights", base=base, change=change)
    for change in ("values", "one head"):
        yield Case("models", f"change of {change}", base="spiky", change=change, structure=True)
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
    for rows, cols in (("log-normal", "equal"), ("equal", "log-normal"), ("1:3", "equal")):
        names = [f"{side} {kind}" for side, kind in (("rows", rows), ("columns", cols)) if kind != "equal"]
        yield replace(strangers, name=f"unrelated, {' and '.join(names)}", rows=rows, cols=cols)


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

SIDES = ("agreement_mean", "best_match_mean", "subspace_8", "agreement_window_mean", "angle_8")
STRANGERS = tuple(f"{side}_{name}" for side in ("left", "right") for name in SIDES)
CHANCES, LEVELS = (tuple(f"{name.removesuffix('_mean')}_{kind}" for name in STRANGERS) for kind in ("chance", "rowcol"))

ASKED: dict[str, tuple[str, ...]] = {
    "one": (
        *("peak_count", "peak_count_rowcol", "peak_count_rowcol_pvalue", "dip_pvalue"),
        *("mp_spikes_tw", "mp_spikes_tw_rowcol", "sep_spikes", "peak_count_row_pvalue", "pl_alpha_rowcol_pvalue"),
    ),
    "pair": (
        *("peak_enrichment_pvalue", "energy_tenth_1", "energy_tenth_5", "energy_tenth_10"),
        *("value_share", "value_share_chance"),
    ),
    "strangers": (*STRANGERS, *CHANCES, *LEVELS),
    "tails": (
        *("pl_alpha", "pl_alpha_stderr", "pl_pvalue", "pl_pvalue_fixed_xmin", "exp_pvalue", "ln_pvalue"),
        *("pl_vs_exp_p", "tpl_pvalue"),
    ),
    "models": (
        *("value_share_free_excess", "value_share_free_pvalue"),
        *("spectral_shift_share_free_excess", "spectral_shift_share_free_pvalue"),
        *("intruders_pvalue", "head_top10_share_pvalue", "lineage"),
    ),
    "quality": ("interval without 0", "two-sided p"),
}
"""What is asked of the draws of a family."""

RARELY = {"tpl_pvalue": 25, "peak_count_row_pvalue": 50, "pl_alpha_rowcol_pvalue": 50}
"""Of how many draws what is dear, or was added late, is asked at most."""


def measure(case: Case, seed: int, names: Sequence[str]) -> Draw:
    """Return what statistics say of one chunk of draws, which are the same whatever is asked of them."""
    rng = np.random.default_rng(seed)
    if case.family == "quality":
        return quality(case, rng)
    if case.family == "tails":
        return tails(case, rng, names)
    if case.family == "models":
        return models(case, rng, names)
    pairs = [draw(case, rng) for _ in range(CHUNK)]
    base = {f"w{i}": one.astype(np.float32) for i, (one, _) in enumerate(pairs)}
    if case.family == "one":
        table = diffract.scan(base, metrics=list(names), cache=False, heads=False, nulls="all").metrics
        return {name: table[name].to_list() for name in names}
    tuned = {f"w{i}": other.astype(np.float32) for i, (_, other) in enumerate(pairs)}
    run = diffract.compare(base, tuned, metrics=list(names), cache=False, heads=False, nulls="all", noise="none")
    table = run.metrics.filter(model="tuned")
    return {name: table[name].to_list() for name in names}


HEADS, WIDTH, LAYERS = 8, 64, 3
"""Of the models that are drawn."""


def models(case: Case, rng: Rng, names: Sequence[str]) -> Draw:
    """Ask what is said of a whole model's change."""
    config = {"model_type": "llama", "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
    config |= {"intermediate_size": 2 * WIDTH, "vocab_size": 16, "num_key_value_heads": HEADS}
    shapes = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    shapes |= {f"mlp.{name}_proj": (2 * WIDTH, WIDTH) for name in ("gate", "up")} | {
        "mlp.down_proj": (WIDTH, 2 * WIDTH)
    }
    found: dict[str, list[float | None]] = {name: [] for name in names}
    for _ in range(CHUNK):
        base, tuned = {}, {}
        for name, shape in (
            (f"model.layers.{i}.{name}.weight", s) for i in range(LAYERS) for name, s in shapes.items()
        ):
            base[name] = matrix(rng, case.base, shape).astype(np.float32)
            tuned[name] = model_change(case, rng, base[name], first="layers.0" in name).astype(np.float32)
        with tempfile.TemporaryDirectory() as folder:
            for model, weights in (("base", base), ("tuned", tuned)):
                (Path(folder) / model).mkdir()
                (Path(folder) / model / "config.json").write_text(json.dumps(config), encoding="utf-8")
                save_file(weights, Path(folder) / model / "model.safetensors")
            run = diffract.compare(f"{folder}/base", f"{folder}/tuned", cache=False)
        row = run.models.row(1, named=True)
        row["lineage"] = float(row["lineage"] not in ("stranger", "cannot tell"))
        for name in names:
            found[name].append(row.get(name))
    return found


def model_change(case: Case, rng: Rng, base: np.ndarray, *, first: bool) -> np.ndarray:
    """Return the tuned matrix; ``first`` says whether it is of the first layer, whose first head changes twice."""
    if case.change == "unrelated":
        return matrix(rng, case.base, base.shape)
    if case.change == "values":
        u, s, vh = np.linalg.svd(base, full_matrices=False)
        return u * (s * (1 + 0.1 * rng.standard_normal(len(s)))) @ vh
    noise = rng.standard_t(3, base.shape) if case.change == "heavy-tailed" else rng.standard_normal(base.shape)
    if case.change == "one head" and first:
        noise[: WIDTH // HEADS] *= 2
    return base + 0.1 * noise * np.linalg.norm(base) / np.linalg.norm(noise)


def tails(case: Case, rng: Rng, names: Sequence[str]) -> Draw:
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
    table = diffract.scan(arrays, metrics=list(names), cache=False, heads=False, nulls="all").metrics
    return {name: table[name].to_list() for name in names}


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
    """Return the chunks that were drawn, by case; a last line that was cut off does not count.

    A chunk has several lines where statistics were added later.
    """
    found: dict[str, dict[int, dict[str, list[float | None]]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            one = json.loads(line)
        except json.JSONDecodeError:
            continue
        found.setdefault(one["case"], {}).setdefault(one["chunk"], {}).update(one["values"])
    return {case: [chunks[i] for i in sorted(chunks)] for case, chunks in found.items()}


def key(case: Case) -> str:
    """Return what a case is called in the file."""
    return f"{case.family}: {case.name}"


def run(file: Path, minutes: float, families: list[str]) -> None:
    """Draw what is missing, chunk by chunk, all cases in turn."""
    file.parent.mkdir(parents=True, exist_ok=True)
    have = known(file)
    until = time.monotonic() + 60 * minutes
    wanted = [c for c in cases() if c.family in families and (not c.base.startswith("real") or real_slices())]
    for chunk in range(max(c.most for c in wanted) // CHUNK):
        for case in wanted:
            done = have.get(key(case), [])[chunk : chunk + 1]
            asked = [name for name in ASKED[case.family] if chunk * CHUNK < min(case.most, RARELY.get(name, case.most))]
            missing = [name for name in asked if not done or name not in done[0]]
            if not missing:
                continue
            if time.monotonic() > until:
                return
            begun = time.process_time()
            values = measure(case, zlib.crc32(f"{key(case)} {chunk}".encode()), missing)
            line = {"case": key(case), "chunk": chunk, "seconds": time.process_time() - begun, "values": values}
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
