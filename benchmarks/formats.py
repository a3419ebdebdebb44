"""Measure reading of each kind of checkpoint: peak memory at 4 and 16 layers, and plain files against another commit.

    python benchmarks/formats.py                    # opening and reading each format, tensor by tensor
    python benchmarks/formats.py --against COMMIT   # opening and reading safetensors, before and after, in turns

Every measurement is a process of its own. Files lie in a temporary folder, about 2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

WIDTH, INNER, BLOCK = 1024, 4096, 128
SHAPES = {
    **{f"self_attn.{p}_proj": (WIDTH, WIDTH) for p in "qkvo"},
    **{"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)},
}
GGML_Q8_0 = 8

READ = """
import re, sys, time, diffract
begun = time.perf_counter()
with diffract.open(sys.argv[1]) as checkpoint:
    opened = time.perf_counter() - begun
    entries = sum(checkpoint.read(name).numel() for name in checkpoint)
taken = time.perf_counter() - begun
hwm = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())  # a parent's memory is not in it
print(opened, taken, int(hwm[1]) / 1024, entries)
"""


def weights(layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        for name, shape in SHAPES.items():
            yield f"model.layers.{layer}.{name}.weight", torch.randn(shape, generator=generator) * 0.02


def plain(folder: Path, layers: int) -> None:
    save_file({name: w.bfloat16() for name, w in weights(layers)}, folder / "model.safetensors")


def fp8(folder: Path, layers: int) -> None:
    tensors = {}
    for name, w in weights(layers):
        blocks = w.view(w.shape[0] // BLOCK, BLOCK, w.shape[1] // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (blocks / scale[:, None, :, None]).view(w.shape).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}}
    (folder / "config.json").write_text(json.dumps(config))


def distributed(folder: Path, layers: int) -> None:
    dcp.save({"model": {name: w.bfloat16() for name, w in weights(layers)}}, checkpoint_id=folder, no_dist=True)


def gguf(folder: Path, layers: int) -> None:
    """Q8_0: blocks of 32 with one float16 scale each."""
    listed, position, data = b"", 0, []
    for name, w in weights(layers):
        blocks = w.numpy().reshape(-1, 32)
        scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
        codes = np.rint(blocks / scale.astype(np.float32)).astype(np.int8)
        data.append(np.concatenate([scale.view(np.int8), codes], axis=1).tobytes())
        listed += struct.pack("<Q", len(name)) + name.encode()
        listed += struct.pack("<IQQIQ", 2, *w.shape[::-1], GGML_Q8_0, position)
        position += len(data[-1])
    head = b"GGUF" + struct.pack("<IQQ", 3, len(data), 0) + listed
    (folder / "model.gguf").write_bytes(head + bytes(-len(head) % 32) + b"".join(data))


KINDS = {"safetensors, bf16": plain, "FP8 in blocks": fp8, "DCP": distributed, "GGUF, Q8_0": gguf}


def child(path: Path, source: Path) -> list[float]:
    """Read a checkpoint with the package that lies in ``source``; return seconds to open, to read, peak MB, entries."""
    environment = {**os.environ, "PYTHONPATH": str(source)}
    command = [sys.executable, "-c", READ, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def measure_memory(folder: Path, source: Path) -> None:
    print("| all tensors, one after another | 4 layers | 16 layers |\n|---|---|---|")
    for kind, write in KINDS.items():
        told = []
        for layers in (4, 16):
            path = folder / f"{write.__name__}{layers}"
            path.mkdir()
            write(path, layers)
            _, seconds, peak, _ = child(path, source)
            told.append(f"{peak:.0f} MB, {seconds:.1f} s")
        print(f"| {kind} | {' | '.join(told)} |", flush=True)


def measure_against(folder: Path, source: Path, commit: str) -> None:
    (folder / "plain").mkdir()
    plain(folder / "plain", 16)
    before = folder / "before"
    subprocess.run(["git", "worktree", "add", "--detach", "--force", before, commit], check=True, capture_output=True)
    try:
        times: dict[str, list[list[float]]] = {commit: [], "present": []}
        for _ in range(7):  # in turns, so that what else the machine does falls on both
            times[commit].append(child(folder / "plain", before / "src"))
            times["present"].append(child(folder / "plain", source))
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", before], check=True)
    print("| safetensors, 16 layers | open | open and read all |\n|---|---|---|")
    for name, found in times.items():
        opened, read = (statistics.median(column) for column in list(zip(*found, strict=True))[:2])
        print(f"| {name} | {1000 * opened:.1f} ms | {read:.2f} s |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT")
    asked = parser.parse_args()
    source = Path(__file__).parents[1] / "src"
    with tempfile.TemporaryDirectory() as folder:
        if asked.against:
            measure_against(Path(folder), source, asked.against)
        else:
            measure_memory(Path(folder), source)


if __name__ == "__main__":
    main()
