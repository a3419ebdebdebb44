"""Measure edits from files to a file: time against copying, memory, and mergekit beside us.

    python benchmarks/edits.py --folder /tmp/edits                                      # about ten minutes
    python benchmarks/edits.py --folder /tmp/edits --only streams                       # one part
    python benchmarks/edits.py --folder /tmp/edits --mergekit /tmp/mergekit-env/bin     # its environment's commands

Synthetic bf16 checkpoints shaped like a Llama of 1.2e9 parameters: width 2048, 16 heads of 128 over 4 key-value heads,
MLP 8192, a tied embedding of 100,352, 17 layers (2.5 GB) or 6 (1.1 GB), a file of up to 0.6 GB each. Tuned ones are the
base plus noise of 3% of it, rounded to bf16. Every command is a process of its own, its start included; commands that
are compared take turns, and their medians are shown. Peak memory is the process's, by ``getrusage``. The files lie in
the page cache, or with ``--cold`` are put out of it before each command; what a command wrote is deleted after it and
the disk waited for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

# torch is imported where models are built, in another process: a child's peak begins with what its parent held.

WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY = 2048, 16, 4, 128, 8192, 100_352
LAYERS_PER_FILE = 5
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
}
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
    "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
}
DIFFRACT = (sys.executable, "-c", "from diffract.cli.main import main; main()")


@dataclass(frozen=True)
class Models:
    """A base and two tuned ones."""

    base: Path
    one: Path
    two: Path


@dataclass(frozen=True)
class Cost:
    """Seconds and peak gigabytes of a process."""

    seconds: float
    gigabytes: float


def build_all(folder: Path, layers: int) -> Models:
    """Write the checkpoints that are not there yet, in a process of its own."""
    models = Models(*(folder / f"{name}-{layers}" for name in ("base", "one", "two")))
    for seed, path in enumerate((models.base, models.one, models.two)):
        if not (path / "config.json").is_file():
            work = get_context("spawn").Process(target=build, args=(path, layers, seed, models.base if seed else None))
            work.start()
            work.join()
            assert work.exitcode == 0
    os.sync()
    return models


def build(path: Path, layers: int, seed: int, base: Path | None) -> None:
    """Write one checkpoint."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    groups = [range(i, min(i + LAYERS_PER_FILE, layers)) for i in range(0, layers, LAYERS_PER_FILE)]
    weight_map: dict[str, str] = {}
    for number in range(len(groups) + 1):
        file = f"model-{number + 1:05d}-of-{len(groups) + 1:05d}.safetensors"
        parent = load_file(base / file) if base else {}
        shapes: dict[str, tuple[int, ...]] = {}
        if number == 0:
            shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
        for layer in groups[number - 1] if number else ():
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in SHAPES.items()}
        shard = {}
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator) * 0.02
            if base:
                shard[name] = parent[name].float().add_(noise, alpha=0.03).bfloat16()
            else:
                shard[name] = noise.mul_(torch.linspace(0.3, 2.0, shape[-1])).bfloat16()
        save_file(shard, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))


def stored_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def forget(models: Sequence[Path]) -> None:
    """Put files out of the page cache."""
    os.sync()
    for model in models:
        for file in model.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def run(command: Sequence[str], output: Path) -> Cost:
    """Run a command that writes ``output``, and delete that."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)}\n{said.read().decode()[-3000:]}")
    shutil.rmtree(output, ignore_errors=True)
    return Cost(seconds, usage.ru_maxrss * 1024 / 1e9)


def take_turns(
    commands: Mapping[str, Sequence[str]], output: Path, repeats: int, before: Callable[[], None] = lambda: None
) -> dict[str, Cost]:
    """Run commands one after another, again and again; return the median of each one's time, and its highest peak."""
    found: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            before()
            found[name].append(run(command, output))
    for name, costs in found.items():
        print(f"  {name}: {', '.join(f'{c.seconds:.2f}' for c in costs)} s", file=sys.stderr, flush=True)
    return {
        name: Cost(statistics.median(c.seconds for c in costs), max(c.gigabytes for c in costs))
        for name, costs in found.items()
    }


def edit(*words: object) -> tuple[str, ...]:
    return (*DIFFRACT, *map(str, words), "--quiet")


def measure_streams(models: Models, output: Path, repeats: int, *, cold: bool) -> None:
    """Edits that only compute entry by entry, against copying one checkpoint and reading the other."""
    copy = ("sh", "-c", f"cp -r {models.one} {output} && cat {models.base}/*.safetensors > /dev/null")
    to = ("rewind", models.one, "--to", models.base, "--fraction", "0.15", "-o", output)
    commands = {
        "copy one, read the other": copy,
        "interpolate --at 0.5": edit("interpolate", models.one, models.base, "--at", "0.5", "-o", output),
        "rewind 15%, order magnitude": edit(*to),
        "rewind 15%, order reference, from a table": edit(*to, *_reference(models, output.parent)),
    }
    read = (models.base, models.one, models.two)
    commands["start of Python, torch and diffract alone"] = (sys.executable, "-c", "import diffract.edits.to_files")
    costs = take_turns(commands, output, repeats, (lambda: forget(read)) if cold else lambda: None)
    start = costs.pop("start of Python, torch and diffract alone").seconds
    plain, size = costs["copy one, read the other"].seconds, stored_bytes(models.one) / 1e9
    state = "not in the page cache" if cold else "in the page cache"
    print(f"\nThe start alone takes {start:.2f} s.")
    print(
        f"\n| {size:.2f} GB, {state} | time | speed of the copy | without the start | peak memory |"
        "\n|---|---|---|---|---|"
    )
    for name, cost in costs.items():
        net = cost.seconds - (0 if cost.seconds == plain else start)
        shares = f"{plain / cost.seconds:.2f} | {plain / net:.2f}"
        print(f"| {name} | {cost.seconds:.2f} s | {shares} | {cost.gigabytes:.2f} GB |", flush=True)


def _reference(models: Models, folder: Path) -> tuple[str, ...]:
    """Return the settings that order heads by a table, as a comparison of both with the base would have left it."""
    import polars as pl

    layers = json.loads((models.base / "config.json").read_text())["num_hidden_layers"]
    rows = [
        {"model": model, "layer": layer, "head": head, "head_delta": float((layer * 7 + head * 5 + shift) % 11)}
        for shift, model in enumerate(("domain", "reference"))
        for layer in range(layers)
        for head in range(HEADS)
    ]
    path = folder / f"heads-{layers}.parquet"
    pl.DataFrame(rows).write_parquet(path)
    return ("--order", "reference", "--scores", str(path), "--domain", "domain", "--reference", "reference")


def measure_truncate(models: Models, output: Path, repeats: int) -> None:
    """Truncation of every matrix's change, and the share of its time that the decompositions alone would take."""
    commands = {
        "decompositions alone": (sys.executable, str(Path(__file__)), "--decompose", str(models.base), str(models.one)),
        "truncate --drop 0.5": edit("truncate", models.one, "--base", models.base, "--drop", "0.5", "-o", output),
    }
    costs = take_turns(commands, output, repeats)
    alone, ours = (costs[name].seconds for name in commands)
    print(f"\n| {stored_bytes(models.one) / 1e9:.2f} GB | time | peak memory |\n|---|---|---|")
    for name, cost in costs.items():
        print(f"| {name} | {cost.seconds:.1f} s | {cost.gigabytes:.2f} GB |")
    print(f"| share of the decompositions | {alone / ours:.2f} | |", flush=True)


def decompose(base: Path, tuned: Path) -> None:
    """Decompose the change of every matrix with vectors, and do nothing else."""
    import diffract
    from diffract.linalg import spectrum

    with diffract.open(base) as first, diffract.open(tuned) as second:
        for name in second.names:
            if len(second.info(name).shape) == 2:
                spectrum(second.read(name).double() - first.read(name).double(), vectors=True, method="gram")


MERGES = {
    "linear": ("linear", {}, {}),
    "ties": ("ties", {"density": 0.2}, {}),
    "dare-ties": ("dare_ties", {"density": 0.1}, {}),
}
"""Our method: mergekit's, the parameters of its models, and its own."""


def mergekit_recipe(models: Models, folder: Path, method: str) -> Path:
    """Write a recipe of mergekit's; JSON is YAML."""
    theirs, each, whole = MERGES[method]
    merged = [{"model": str(m), "parameters": {"weight": 1.0, **each}} for m in (models.one, models.two)]
    recipe = {"merge_method": theirs, "dtype": "bfloat16", "models": merged, "parameters": whole}
    path = folder / f"mergekit-{method}.yaml"
    path.write_text(json.dumps(recipe | ({} if method == "linear" else {"base_model": str(models.base)})))
    return path


def measure_merges(models: Models, output: Path, repeats: int, mergekit: Path | None) -> None:
    """Merges of two tuned checkpoints, beside mergekit's in its quicker setting."""
    print(f"\n| {stored_bytes(models.one) / 1e9:.2f} GB | time | peak memory |\n|---|---|---|", flush=True)
    for method in MERGES:
        base = () if method == "linear" else (models.base,)
        names = ("merge", *base, f"a={models.one}", f"b={models.two}", "--method", method, "-o", output)
        commands: dict[str, Sequence[str]] = {"diffract": edit(*names)}
        if mergekit:
            recipe = mergekit_recipe(models, output.parent, method)
            theirs = (str(mergekit / "mergekit-yaml"), str(recipe), str(output), "--no-copy-tokenizer", "--quiet")
            commands |= {"mergekit": theirs, "mergekit --lazy-unpickle": (*theirs, "--lazy-unpickle")}
        for name, cost in take_turns(commands, output, repeats).items():
            print(f"| {method}, {name} | {cost.seconds:.1f} s | {cost.gigabytes:.2f} GB |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["streams", "truncate", "merges"])
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 17], help="of the models that are streamed")
    parser.add_argument("--sample", type=int, default=1, help="layers of the model that is truncated")
    parser.add_argument("--merged", type=int, default=6, help="layers of the models that are merged")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="put the files out of the page cache before each command")
    parser.add_argument("--mergekit", type=Path, help="the bin folder of an environment with mergekit")
    parser.add_argument("--folder", type=Path, help="keep the synthetic checkpoints here")
    parser.add_argument("--decompose", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decompose:
        decompose(*args.decompose)
        return
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / "output"
        if args.only in (None, "streams"):
            for layers in args.layers:
                measure_streams(build_all(folder, layers), output, args.repeats, cold=args.cold)
        if args.only in (None, "truncate"):
            measure_truncate(build_all(folder, args.sample), output, args.repeats)
        if args.only in (None, "merges"):
            measure_merges(build_all(folder, args.merged), output, args.repeats, args.mergekit)


if __name__ == "__main__":
    main()
