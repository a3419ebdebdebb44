"""Measure speed and memory on a synthetic checkpoint shaped like OLMo-2-1B.

    python benchmarks/run.py                # everything but the long memory runs
    python benchmarks/run.py --only heads   # one part
    python benchmarks/run.py --memory       # peak memory at 4 and 16 layers

The baseline is ``numpy.linalg.svd(w, full_matrices=False)`` in float32, matrix by matrix, at the better of NumPy's
default number of threads and one. Ratios are taken within one run; every time is the median of several.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits

import diffract
from diffract.linalg import spectrum

WIDTH, HEADS, HEAD_DIM, INNER = 2048, 16, 128, 8192
VALUES = ["norms", "ranks", "shape"]
CONFIG = {
    "model_type": "olmo2",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
}


def build(folder: Path, layers: int, *, seed: int, base: Path | None = None, vocabulary: int = 0) -> Path:
    """Write a checkpoint in bf16, one shard per layer; with ``base``, that one changed by about 3%."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    names = {f"self_attn.{p}_proj": (WIDTH, WIDTH) for p in "qkvo"}
    names |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
    parent = diffract.open(base) if base else {}
    for layer in range(layers):
        tensors = {f"model.layers.{layer}.{name}.weight": shape for name, shape in names.items()}
        if vocabulary and layer == 0:
            tensors["model.embed_tokens.weight"] = (vocabulary, WIDTH)
        shard = {name: _weights(shape, generator, parent.get(name)) for name, shape in tensors.items()}
        save_file(shard, folder / f"model-{layer + 1:05d}-of-{layers:05d}.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    return folder


def _weights(shape: tuple[int, int], generator: torch.Generator, parent: torch.Tensor | None) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator) * 0.02
    if parent is not None:
        return (parent.float() + 0.03 * noise).bfloat16()
    scale = torch.linspace(0.3, 2.0, shape[1])  # a decaying spectrum, as trained matrices have
    return (noise * scale).bfloat16()


def median(work: Callable[[], object], repeats: int) -> float:
    """Seconds, the median of several runs."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def best_threads(work: Callable[[], object], repeats: int) -> float:
    """Seconds at the better of the default threads and one."""
    default = median(work, repeats)
    with threadpool_limits(1):
        return min(default, median(work, repeats))


def row(name: str, ours: float, baseline: float, target: float) -> None:
    ratio = baseline / ours
    verdict = "met" if ratio >= target else "MISSED"
    print(f"| {name} | {ours:.3g} s | {baseline:.3g} s | {ratio:.1f} x | {target:g} x, {verdict} |", flush=True)


def head_slices(model: Path) -> list[np.ndarray]:
    with diffract.open(model) as checkpoint:
        q = checkpoint.read("model.layers.0.self_attn.q_proj.weight").float().numpy()
        o = checkpoint.read("model.layers.0.self_attn.o_proj.weight").float().numpy()
    size = HEAD_DIM
    return [q[i * size : (i + 1) * size] for i in range(4)] + [
        np.ascontiguousarray(o[:, i * size : (i + 1) * size]) for i in range(4)
    ]


def measure_heads(base: Path, tuned: Path, layers: int) -> None:
    count = layers * 4 * HEADS
    slices = head_slices(base)
    svd = best_threads(lambda: [np.linalg.svd(w, full_matrices=False) for w in slices], 3) / len(slices)
    ours = median(lambda: diffract.scan(base, select="attn", metrics=VALUES, cache=False), 3)
    row(f"scan of {count} head slices, values only", ours, svd * count, 30)
    print(f"  per slice: {ours / count * 1e3:.2f} ms against {svd * 1e3:.1f} ms", flush=True)
    limit = _limit(base, layers)
    print(f"  limit (reading, casting, float64 products, eigensolver): {limit / count * 1e3:.2f} ms", flush=True)

    def three(w: np.ndarray) -> None:
        other = w + np.float32(1e-3)
        first = np.linalg.svd(w, full_matrices=False)
        second = np.linalg.svd(other, full_matrices=False)
        np.linalg.svd(other - w, full_matrices=False)
        np.abs(first[0].T @ second[0]), np.abs(first[2] @ second[2].T)

    pairs = best_threads(lambda: [three(w) for w in slices], 3) / len(slices)
    ours = median(lambda: diffract.compare(base, tuned, select="attn", cache=False), 3)
    row(f"compare of {count} head slices, all metrics", ours, pairs * count, 15)


def _limit(model: Path, layers: int) -> float:
    """Time of reading, casting, products and eigensolver alone, on two threads side by side."""
    from diffract.engine import cores, single_threaded
    from diffract.linalg.blas import add_gram
    from diffract.linalg.exact import eigenvalues

    buffer = torch.empty(HEAD_DIM, WIDTH, dtype=torch.float64)

    def work() -> None:
        with diffract.open(model) as checkpoint:
            raw = checkpoint.read("model.layers.0.self_attn.q_proj.weight").view(HEADS, HEAD_DIM, WIDTH)
        grams = torch.zeros(HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64)
        for total, w in zip(grams, raw, strict=True):
            add_gram(total, buffer.copy_(w))
        eigenvalues(grams)

    with single_threaded():
        return median(work, 9) * 4 * layers / cores()


def measure_mlp(base: Path, layers: int) -> None:
    with diffract.open(base) as checkpoint:
        raw = checkpoint.read("model.layers.0.mlp.down_proj.weight")
    w = raw.float().numpy()
    svd = best_threads(lambda: np.linalg.svd(w, full_matrices=False), 1)
    count = 3 * layers
    ours = median(lambda: diffract.scan(base, select="mlp", metrics=VALUES, cache=False), 3)
    row(f"scan of {count} MLP matrices, values only", ours, svd * count, 8)
    ours = median(lambda: spectrum(raw, vectors=True), 3)
    row("one MLP matrix with singular vectors", ours, svd, 5)


def measure_catalog(base: Path, layers: int) -> None:
    """The whole catalog of one matrix (no p-values), against the values-only scan of the same run."""
    slices = layers * 4 * HEADS
    usual = median(lambda: diffract.scan(base, select="attn", metrics=VALUES, cache=False), 5)
    for names in ("all", "heavy_tails", "random_matrix", "spectral_shape"):
        ours = median(lambda n=names: diffract.scan(base, select="attn", metrics=n, cache=False), 5)
        target = " (3 at most)" if names == "all" else ""
        print(
            f"| --metrics {names} | {ours / slices * 1e3:.2f} ms a slice | {ours / usual:.2f} of the usual{target} |",
            flush=True,
        )


def measure_norm(base: Path) -> None:
    names = [n for n in diffract.open(base).names if "attn" in n or "mlp" in n]

    def read() -> None:
        with diffract.open(base) as checkpoint:
            for name in names:
                checkpoint.read(name).double()

    ours = median(lambda: diffract.scan(base, metrics=["frobenius_norm"], cache=False), 5)
    plain = median(read, 5)
    print(
        f"| frobenius_norm alone | {ours:.3g} s | {plain:.3g} s to read and upcast | {ours / plain:.2f} | 2 at most |"
    )


def measure_start(folder: Path) -> None:
    command = [str(Path(sys.executable).parent / "diffract")]
    many = folder / "many"
    many.mkdir(exist_ok=True)
    tensors = {f"model.layers.{i}.self_attn.q_proj.weight": torch.zeros(64, 64) for i in range(1000)}
    save_file(tensors, many / "model.safetensors")
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    (many / "config.json").write_text(json.dumps(config))
    for arguments, target in ((["--help"], 0.3), (["inspect", str(many)], 1.0)):
        seconds = median(lambda a=arguments: subprocess.run(command + a, check=True, capture_output=True), 7)
        print(f"| diffract {arguments[0]} | {seconds:.2f} s | | | {target} s at most |", flush=True)


def measure_memory(folder: Path) -> None:
    # VmHWM, as getrusage's maximum begins with what the parent had when it forked
    peak = "import diffract; {}; print(next(x.split()[1] for x in open('/proc/self/status') if x.startswith('VmHWM')))"
    for layers in (4, 16):
        base = build(folder / f"base-{layers}", layers, seed=0, vocabulary=100_352)
        tuned = build(folder / f"tuned-{layers}", layers, seed=1, base=base, vocabulary=100_352)
        calls = {
            "scan": f"diffract.scan({str(base)!r}, cache=False)",
            "compare": f"diffract.compare({str(base)!r}, {str(tuned)!r}, cache=False)",
        }
        for name, call in calls.items():
            begun = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", peak.format(call)], check=True, capture_output=True, text=True)
            gigabytes = int(done.stdout.split()[-1]) * 1024 / 1e9
            seconds = time.perf_counter() - begun
            print(f"| {name}, {layers} layers and embedding | {gigabytes:.2f} GB peak | {seconds:.0f} s |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["heads", "catalog", "mlp", "norm", "start"])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="keep the synthetic checkpoints here")
    args = parser.parse_args()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    print(f"{processor}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.memory:
            measure_memory(folder)
            return
        base = build(folder / f"base-heads-{args.layers}", args.layers, seed=0)
        tuned = build(folder / f"tuned-heads-{args.layers}", args.layers, seed=1, base=base)
        print("| what | diffract | baseline | ratio | target |\n|---|---|---|---|---|")
        parts = {
            "heads": lambda: measure_heads(base, tuned, args.layers),
            "catalog": lambda: measure_catalog(base, args.layers),
            "mlp": lambda: measure_mlp(base, args.layers),
            "norm": lambda: measure_norm(base),
            "start": lambda: measure_start(folder),
        }
        for name, work in parts.items():
            if args.only in (None, name):
                work()


if __name__ == "__main__":
    main()
