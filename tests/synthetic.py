"""Tables as a run with all metrics has them, computed from random matrices by NumPy and SciPy alone."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_ndtr

from diffract.schemas import KINDS
from diffract.tables import FORMAT, MANIFEST

Array = NDArray[np.float64]
LAYERS, HEADS, KV_HEADS, WIDTH, HEAD = 4, 6, 2, 48, 8
DOMAINS = ("math", "code", "natural")
WINDOW = 0.05


def power_law_scan(values: Array) -> tuple[dict[str, float], Array]:
    """The power law by Clauset's search, and the distance for each value, NaN for the largest; values descend."""
    distances = np.full(len(values), np.nan)
    alphas = np.full(len(values), np.nan)
    for last in range(1, len(values)):
        tail = values[: last + 1][::-1]
        alphas[last] = 1 + len(tail) / np.log(tail / tail[0]).sum()
        fitted = 1 - (tail / tail[0]) ** (1 - alphas[last])
        distances[last] = np.abs(np.arange(len(tail)) / len(tail) - fitted).max()
    best = int(np.nanargmin(distances))
    row = {"pl_alpha": alphas[best], "pl_xmin": values[best], "pl_ks": distances[best], "pl_tail_count": best + 1.0}
    return row | {"pl_alpha_stderr_fixed_xmin": (alphas[best] - 1) / np.sqrt(best + 1)}, distances


def other_tails(values: Array, xmin: float) -> dict[str, float]:
    """Exponential, truncated and log-normal tails from one xmin on."""
    tail = values[values >= xmin]
    logs = np.log(tail)

    def log_normal_loss(p: Array) -> float:
        mu, sigma = p[0], np.exp(p[1])
        z = (logs - mu) / sigma
        return float(np.sum(z * z / 2 + p[1]) + len(tail) * log_ndtr((mu - np.log(xmin)) / sigma))

    mu, log_sigma = minimize(log_normal_loss, [logs.mean(), np.log(logs.std() + 0.1)], method="Nelder-Mead").x
    exp = {"exp_rate": 1 / (tail - xmin).mean(), "exp_xmin": xmin}
    return exp | {"ln_mu": mu, "ln_sigma": float(np.exp(log_sigma)), "ln_xmin": xmin,
                  "tpl_alpha": 1.5, "tpl_rate": 0.5 / tail.mean(), "tpl_xmin": xmin}  # fmt: skip


def bulk(values: Array, shape: tuple[int, int]) -> dict[str, float]:
    """The variance whose edge leaves the mean of what lies below it equal to it."""
    reach = (1 + np.sqrt(min(shape) / max(shape))) ** 2
    variance = values.mean()
    for _ in range(50):
        variance = values[values <= variance * reach].mean()
    return {"mp_variance": variance, "mp_edge": variance * reach, "mp_spikes": float((values > variance * reach).sum())}


def matrix(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Noise, and a part with a heavy tail."""
    rank = min(shape) // 3
    parts = rng.standard_normal((shape[0], rank)) * rng.pareto(2.5, rank) @ rng.standard_normal((rank, shape[1]))
    return 0.02 * rng.standard_normal(shape) + 0.02 * parts / np.sqrt(max(shape)) / 2


def single(w: Array, rng: np.random.Generator) -> tuple[dict[str, float], dict[str, Array]]:
    """Metrics and curves of one matrix."""
    sigmas = np.linalg.svd(w, compute_uv=False)
    eigenvalues = sigmas**2 / max(w.shape)
    fit, scan = power_law_scan(eigenvalues)
    shares = sigmas / sigmas.sum()
    row = {
        "frobenius_norm": float(np.linalg.norm(w)),
        "effective_rank": float(np.exp(-(shares * np.log(shares)).sum())),
        **fit,
        **other_tails(eigenvalues, fit["pl_xmin"]),
        **bulk(eigenvalues, w.shape),
    }
    null = np.linalg.svd(rng.permutation(w.ravel()).reshape(w.shape), compute_uv=False)
    logs = np.log(sigmas)
    peak = np.select(
        [abs(logs - np.median(logs)) < logs.std() / 2, logs > logs.mean() + 2 * logs.std()], [0.0, 1.0], -1
    )
    return row, {"sigma": sigmas, "null_sigma": null, "pl_ks_scan": scan, "peak": peak}


def pair(w0: Array, w1: Array) -> tuple[dict[str, float], dict[str, Array]]:
    """Metrics and curves of base and tuned."""
    delta = w1 - w0
    u0, s0, v0 = np.linalg.svd(w0, full_matrices=False)
    u1, s1, v1 = np.linalg.svd(w1, full_matrices=False)
    row = {"delta_frobenius": float(np.linalg.norm(delta))}
    row["delta_relative"] = row["delta_frobenius"] / float(np.linalg.norm(w0))
    curves = {"delta_sigma": np.linalg.svd(delta, compute_uv=False)}
    energy = ((u0.T @ delta) ** 2).sum(1)
    for k, own in enumerate(np.array_split(energy / energy.mean(), 10), start=1):
        row[f"energy_tenth_{k}"] = float(own.mean()) if len(own) else 1.0  # tenths of a small matrix may be empty
    curves["energy_by_peak"] = np.array([own.mean() for own in np.array_split(energy / energy.mean(), 2)])
    near = abs(s0[:, None] - s1[None, :]) <= WINDOW * s1[None, :]
    for side, overlap, d in (("left", abs(u0.T @ u1), w0.shape[0]), ("right", abs(v0 @ v1.T), w0.shape[1])):
        curves[f"{side}_agreement"] = np.diag(overlap)
        curves[f"{side}_agreement_window"] = np.sqrt((overlap**2 * near).sum(0))
        row[f"{side}_agreement_mean"] = float(np.diag(overlap).mean())
        row[f"{side}_agreement_chance"] = float(np.sqrt(2 / (np.pi * d)))
        row[f"{side}_agreement_window_chance"] = float(np.sqrt(near.sum(0) / d).mean())
    return row, curves


def places(layers: int = LAYERS, width: int = WIDTH, head: int = HEAD) -> list[tuple[dict[str, Any], tuple[int, int]]]:
    """Labels and shapes of the matrices of a grouped-query model."""
    found = []
    for layer in range(layers):
        for p, shape in (("q", (head, width)), ("o", (width, head))):
            found += [(_labels(layer, "attn", p, f".h{h}", head=h, kv_head=h // 3), shape) for h in range(HEADS)]
        for p in "kv":
            found += [(_labels(layer, "attn", p, f".kv{h}", kv_head=h), (head, width)) for h in range(KV_HEADS)]
        found += [
            (_labels(layer, "mlp", "gate"), (width + 16, width)),
            (_labels(layer, "mlp", "down"), (width, width + 16)),
        ]
    return found


def _labels(layer: int, block: str, projection: str, end: str = "", **numbers: int) -> dict[str, Any]:
    name = f"L{layer}.{block}.{projection}{end}"
    plain = {"name": name, "tensor": name, "layer": layer, "block": block, "projection": projection}
    return plain | {"head": None, "kv_head": None, "expert": None} | numbers


INTEGERS = dict.fromkeys(("layer", "head", "kv_head", "expert"), pl.Int32)


def _frames(models: dict[str, dict[str, Any]], weights: dict[str, list[Array]], labels: list[dict[str, Any]],
            base: str | None, rng: np.random.Generator) -> dict[str, pl.DataFrame]:  # fmt: skip
    rows, curves = [], []
    for model, extra in models.items():
        for place, label in enumerate(labels):
            w = weights[model][place]
            row, found = single(w, rng)
            if base is not None and model != base:
                numbers, lines = pair(weights[base][place], w)
                row, found = row | numbers, found | lines
            more = {"rows": w.shape[0], "cols": w.shape[1], "dtype": "F32", "status": "ok", "resolved": 0.0}
            rows.append({"model": model, **extra, **label, **more, **row})
            curves += [
                {"model": model, "name": label["name"], "quantity": q, "values": v.tolist()} for q, v in found.items()
            ]
    metrics = pl.DataFrame(rows, schema_overrides=INTEGERS, infer_schema_length=None)
    roles = ["model" if base is None else "base" if m == base else "tuned" for m in models]
    return {
        "metrics": metrics,
        "spectra": pl.DataFrame(curves, schema_overrides={"values": pl.List(pl.Float64)}),
        "models": pl.DataFrame({"model": list(models), "role": roles}),
    }


@cache
def compared(layers: int = LAYERS, width: int = WIDTH, head: int = HEAD, seed: int = 0) -> dict[str, pl.DataFrame]:
    """A base and three domains, with the heads table."""
    rng = np.random.default_rng(seed)
    labels = places(layers, width, head)
    weights = {"base": [matrix(rng, shape) for _, shape in labels]}
    for domain in DOMAINS:
        touched = rng.lognormal(-1.2, 0.7, len(labels))
        weights[domain] = [
            w + t * 0.006 * rng.standard_normal(w.shape) for w, t in zip(weights["base"], touched, strict=True)
        ]
    frames = _frames({name: {} for name in weights}, weights, [label for label, _ in labels], "base", rng)
    return frames | {"heads": heads(frames["metrics"])}


def heads(metrics: pl.DataFrame) -> pl.DataFrame:
    """Change of each query head over its q and o slices."""
    own = metrics.filter(pl.col("projection").is_in(["q", "o"]), pl.col("delta_frobenius").is_not_null())
    norms = [pl.col(c).pow(2).sum().sqrt() for c in ("delta_frobenius", "frobenius_norm")]
    grouped = own.group_by("model", "layer", "block", "head", maintain_order=True).agg(
        head_delta=norms[0], whole=norms[1]
    )
    return grouped.with_columns(head_delta_relative=pl.col("head_delta") / pl.col("whole")).drop("whole")


@cache
def trajectory(checkpoints: int = 9, layers: int = 2, width: int = WIDTH, head: int = HEAD) -> dict[str, pl.DataFrame]:
    """Checkpoints of one training run, each compared with the first: noise that grows spikes."""
    rng = np.random.default_rng(1)
    labels = places(layers, width, head)
    noise = [0.02 * rng.standard_normal(shape) for _, shape in labels]
    learnt = [matrix(rng, shape) for _, shape in labels]
    models, weights = {}, {}
    for order in range(checkpoints):
        t = order / max(1, checkpoints - 1)
        step = 0 if order == 0 else round(10 ** (1 + 3 * t))
        models[f"step{step}"] = {"order": order, "step": step, "tokens": step * 4096}
        weights[f"step{step}"] = [n * (1 - 0.5 * t) + 3 * t * w for n, w in zip(noise, learnt, strict=True)]
    return _frames(models, weights, [label for label, _ in labels], "step0", rng)


ORDERS = ("greedy", "reference", "magnitude", "random", "first-order", "activation")
RULES = ("drop", "energy", "donoho-gavish", "mp-edge", "tail", "random", "random-energy", "dare-energy", "dare-bytes")
TASKS = ("math", "code")


@cache
def searched() -> dict[str, pl.DataFrame]:
    """A search over heads: gains that rise and fall with the share that is rewound."""
    curves = [(order, seed, False) for order in ORDERS for seed in range(2 if order == "random" else 1)]
    curves += [(order, 0, True) for order in ORDERS if order != "random"]
    points = []
    for number, (order, seed, reverse) in enumerate(curves):
        for i, at in enumerate((0.0, 0.25, 0.5, 1.0)):
            where = {"order": order, "seed": seed, "reverse": reverse, "fraction": at}
            points += _measured(where, number * 4 + i if 0 < at < 1 else int(at), at * (0.1 * (6 - number) - 0.5 * at))
    points += _measured({"order": "base", "seed": None, "reverse": None, "fraction": None}, 2, -0.9)
    columns = ("effect", "magnitude", "reference", "first_order", "activation")
    rng = np.random.default_rng(1)
    heads = [{"layer": i, "block": "attn", "head": h, "task": "math"} for i in range(LAYERS) for h in range(HEADS)]
    effects = [{**head, **dict(zip(columns, rng.normal(size=5).tolist(), strict=True))} for head in heads]
    return {"points": pl.DataFrame(points), "effects": pl.DataFrame(effects)}


@cache
def truncated() -> dict[str, pl.DataFrame]:
    """A search over what is kept of a change."""
    points = []
    for number, rule in enumerate(RULES):
        for i, at in enumerate((0.0, 0.5, 1.0)):
            where = {"rule": rule, "seed": 0, "fraction": at, "energy": 1 - at**2, "bytes": 1 - at}
            points += _measured(where, 3 * number + i if at else 0, -at * (0.1 + 0.1 * number))
    points += _measured({"rule": "base", "seed": None, "fraction": None, "energy": None, "bytes": None}, 99, -0.9)
    return {"points": pl.DataFrame(points)}


def factored() -> dict[str, pl.DataFrame]:
    """A search for factors: two layers of one projection, a vector, and three recipes of which one is dominated."""
    factors = [
        {"name": f"L{layer}.mlp.up", "layer": layer, "block": "mlp", "projection": "up", "direction": i,
         "sigma": 2.0 / (i + 1), "factor": 1 + 0.1 * i - layer}
        for layer in range(2)
        for i in range(4)
    ]  # fmt: skip
    factors.append({"name": "norm", "factor": 0.5})
    roles = {"target": 0.3, "kept": 0.2}
    choice, points = [], []
    for number, recipe in enumerate(("directions", "interpolation", "random")):
        for role, gain in roles.items():
            own = gain - 0.1 * number
            ends = {"held_out_gain": own, "held_out_gain_low": own - 0.01, "held_out_gain_high": own + 0.02}
            named = {"recipe": recipe, "at": 0.5, "role": role, "task": role}
            choice.append({**named, "dominated_by": ["directions"] if number == 2 else [], **ends})
            points += [{**named, "at": at, "split": "held-out", "gain": own * at} for at in (0.0, 0.5, 1.0)]
    frames = {"factors": factors, "choice": choice, "points": points}
    return {name: pl.DataFrame(rows, infer_schema_length=None) for name, rows in frames.items()}


def _measured(where: dict[str, Any], state: int, gain: float) -> list[dict[str, Any]]:
    """Rows of one state in both splits and tasks."""
    return [
        {**where, "state": state, "split": split, "task": task, "quality": 2 - gain, "low": 1.9 - gain,
         "high": 2.1 - gain, "gain": gain, "gain_low": gain - 0.02, "gain_high": gain + 0.02}
        for split in ("selection", "held-out")
        for task in TASKS
    ]  # fmt: skip


@cache
def connected() -> dict[str, pl.DataFrame]:
    """Lines between three domains and a base, one with a barrier, and the simplex of the three."""
    pairs = [(a, b) for i, a in enumerate(DOMAINS) for b in DOMAINS[i + 1 :]] + [("base", name) for name in DOMAINS]
    paths, table = [], []
    for number, (a, b) in enumerate(pairs):
        for task in TASKS:
            for at in (0.0, 0.5, 1.0):
                gap = (0.1 * number - 0.2) * 4 * at * (1 - at)
                row = {"a": a, "b": b, "at": at, "task": task, "linear": 2 + at, "gap": gap, "quality": 2 + at + gap}
                paths.append(row | {"low": row["quality"] - 0.1, "high": row["quality"] + 0.1})
            height = max(0.0, 0.1 * number - 0.2)
            ends = {"low": height - 0.01, "high": height + 0.01, "connected": height == 0}
            table.append({"a": a, "b": b, "task": task, "barrier": height, **ends})
    simplex = [
        {"models": list(DOMAINS), "weights": [i / 2, j / 2, (2 - i - j) / 2], "task": task, "quality": 2.0 + i,
         "low": 1.9 + i, "high": 2.1 + i}
        for task in TASKS
        for i in range(3)
        for j in range(3 - i)
    ]  # fmt: skip
    return {"paths": pl.DataFrame(paths), "pairs": pl.DataFrame(table), "simplex": pl.DataFrame(simplex)}


def related() -> dict[str, pl.DataFrame]:
    """A base, two descendants of it, and a stranger of another shape."""
    words = {"a": "descendant or sibling", "b": "descendant or sibling", "other": "stranger"}
    pairs = [("base", "a", 0.96), ("base", "b", 0.95), ("a", "b", 0.91), ("base", "other", 0.001)]
    pairs += [("a", "other", -0.002), ("b", "other", None)]
    lineage = [
        {"a": a, "b": b, "lineage": "cannot tell" if r is None else words[b], "r": r, "matrices": 6, "share": 1.0,
         "shared": ["embed"] if b == "other" else [], "moved": []}
        for a, b, r in pairs
    ]  # fmt: skip
    tree = [{"a": a, "b": b, "r": r, "rooted": True} for a, b, r in pairs[:2]]
    models = [{"model": name, "role": "model"} for name in ("base", "a", "b", "other")]
    return {"lineage": pl.DataFrame(lineage), "tree": pl.DataFrame(tree), "models": pl.DataFrame(models)}


def frames_of(kind: str) -> dict[str, pl.DataFrame]:
    """What a kind of figure is drawn from."""
    if kind in ("rewind", "effects"):
        return searched()
    if kind in ("paths", "connectivity", "simplex"):
        return connected()
    if kind == "truncation":
        return truncated()
    if kind == "lineage":
        return related()
    if kind in ("factors", "front"):
        return factored()
    return trajectory() if kind in ("evolution", "ridge") else compared()


def write(frames: dict[str, pl.DataFrame], folder: Path) -> Path:
    """Write frames as a run folder."""
    folder.mkdir(parents=True)
    for name, frame in frames.items():
        schema = KINDS[kind_of(frames)].get(name, {})
        columns = [pl.col(c) if c in frame.columns else pl.lit(None).alias(c) for c in schema]
        whole = frame.with_columns(c.cast(d) for c, d in zip(columns, schema.values(), strict=True))
        whole.write_parquet(folder / f"{name}.parquet")
    pl.DataFrame({"model": []}).write_parquet(folder / "tensors.parquet")
    manifest = {"format": FORMAT, **{key: {} for key in MANIFEST}, "kind": kind_of(frames)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def kind_of(frames: dict[str, pl.DataFrame]) -> str:
    """The kind of run that such frames make."""
    if "factors" in frames:
        return "search directions"
    if "points" in frames:
        return "search rewind" if "effects" in frames else "search truncate"
    if "tree" in frames:
        return "lineage"
    return "connect" if "paths" in frames else "compare"
