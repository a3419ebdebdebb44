"""Compare one layer of a 1B shape in one process, and in eight shares of which two are killed: the same bytes.

    python benchmarks/shards.py --folder /tmp/shards

The layer has width 2048, 16 heads of 128 and an MLP of 8192, in bf16; the tuned one is the base plus 3% of noise. Every
process has one thread and no cache. Shares 2 and 5 are killed once they draft their folders, and run again; then all
are joined.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import torch
from safetensors.torch import save_file

SHARES, KILLED = 8, (2, 5)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 1,
    "tie_word_embeddings": True,
}
SHAPES = {f"self_attn.{name}_proj": (2048, 2048) for name in "qkvo"} | {
    "mlp.gate_proj": (8192, 2048),
    "mlp.up_proj": (8192, 2048),
    "mlp.down_proj": (2048, 8192),
    "input_layernorm": (2048,),
}
COMMAND = (sys.executable, "-m", "diffract", "compare", "base", "tuned", "--no-cache", "--quiet")


def build(folder: Path) -> None:
    """Write base and tuned model."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"model.layers.0.{n}.weight": torch.randn(s, generator=generator) / 45 for n, s in SHAPES.items()}
    for name, noise in (("base", 0.0), ("tuned", 0.03)):
        (folder / name).mkdir(parents=True)
        moved = {n: w + torch.randn(w.shape, generator=generator) * noise / 45 for n, w in weights.items()}
        save_file({n: w.bfloat16() for n, w in moved.items()}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(CONFIG))


@contextmanager
def started(folder: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in a folder."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with subprocess.Popen(words, cwd=folder, env=os.environ | threads) as process:
        yield process


def timed(folder: Path, *words: str) -> float:
    """Run a command, and return its seconds."""
    begun = time.perf_counter()
    with started(folder, *words) as process:
        if process.wait():
            raise SystemExit(f"exit code {process.returncode}: {' '.join(words)}")
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    folder: Path = parser.parse_args().folder
    build(folder)
    one = timed(folder, *COMMAND, "-o", "one")
    for share in KILLED:
        with started(folder, *COMMAND, "-o", "joined", "--shard", f"{share}/{SHARES}") as process:
            # As soon as there is anything of a share, the folder that it drafts.
            while process.poll() is None and not list((folder / "joined").glob("parts/*")):
                time.sleep(0.01)
            if process.poll() is not None:
                raise SystemExit(f"share {share} was done before it could be killed")
            process.kill()
    if list((folder / "joined").glob(f"parts/*-of-{SHARES:05d}")):
        raise SystemExit("a share that was killed left its folder")
    each = [timed(folder, *COMMAND, "-o", "joined", "--shard", f"{i}/{SHARES}") for i in range(SHARES)]
    tasks = [pl.read_parquet(folder / "joined/parts" / f"{i:05d}-of-{SHARES:05d}/tasks.parquet") for i in range(SHARES)]
    work = [table["seconds"].sum() for table in tasks]
    join = timed(folder, sys.executable, "-m", "diffract", "collect", "joined", "--quiet")
    tables = sorted(path.name for path in (folder / "one").glob("*.parquet"))
    for name in tables:
        a, b = (hashlib.sha256((folder / run / name).read_bytes()).hexdigest() for run in ("one", "joined"))
        print(f"{name:20s} {a[:16]} {'the same' if a == b else 'OTHER BYTES'}")
        if a != b:
            raise SystemExit(f"{name}: one process and {SHARES} shares differ")
    print(f"\n{len(tables)} tables. One process {one:.1f} s; shares {', '.join(f'{s:.1f}' for s in each)} s")
    print(f"of work {', '.join(f'{s:.1f}' for s in work)} s; joining {join:.1f} s")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
