"""Drafts to files: one pass over the model, two threads, flat memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from diffract.checkpoints import TensorInfo, as_bytes
from diffract.checkpoints.dtypes import DTYPE_NAMES, TORCH_DTYPES
from diffract.checkpoints.reader import start_digest
from diffract.checkpoints.sharded import ShardedWriter
from diffract.edits.draft import Draft
from diffract.edits.recipe import Output
from diffract.errors import RunError

Progress = Callable[[float, float, str], None]
"""``progress(done, total, what)``."""

WORKERS = 2
"""Threads: one computes while another reads, hashes or writes."""


def written_infos(draft: Draft, output: Output) -> dict[str, TensorInfo]:
    """Return what will be written: the model's tensors, in other dtypes where that was asked for."""
    dtype = None if output.dtype is None else DTYPE_NAMES[getattr(torch, output.dtype)]
    found = {}
    for name, info in draft.checkpoint.infos.items():
        found[name] = replace(info, dtype=dtype) if dtype and info.is_float else info
    return found


def write_draft(draft: Draft, folder: Path, output: Output, progress: Progress | None = None) -> dict[str, str]:
    """Compute a draft and write it as a model's safetensors.

    Returns:
        The digest of each tensor written.
    """
    infos = written_infos(draft, output)
    aliases: dict[str, list[str]] = {name: [name] for name in infos if name not in draft.ties}
    for name, target in draft.ties.items():
        aliases[target].append(name)
    total, done = sum(infos[name].size_bytes for name in aliases), 0
    digests: dict[str, str] = {}
    with (
        _explained(folder),
        one_thread(),
        ShardedWriter(folder, list(infos.values()), shard_bytes=output.shard_size) as writer,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        jobs = {pool.submit(_write_one, draft, writer, infos[name], twins): name for name, twins in aliases.items()}
        try:
            for job in as_completed(jobs):
                name = jobs[job]
                digests |= dict.fromkeys(aliases[name], job.result())
                done += infos[name].size_bytes
                if progress:
                    progress(done, total, name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: digests[name] for name in infos}


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread each: several tensors at once use the cores better, and sums come out the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_one(draft: Draft, writer: ShardedWriter, info: TensorInfo, names: list[str]) -> str:
    """Write a tensor, under each of its names; return its digest."""
    hasher = start_digest(info)
    dtype = TORCH_DTYPES.get(info.dtype)
    for rows, block in draft.blocks(info.name):
        stored = block if dtype is None else block.to(dtype)
        hasher.update(as_bytes(stored))
        for name in names:
            writer.write(name, stored, rows[0] if rows else 0)
    return hasher.hexdigest()


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write to {str(folder)!r}: {error.strerror or error}. Make room, or choose another folder.") from error

