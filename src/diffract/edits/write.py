"""Drafts to files: one pass over the model, two threads, flat memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from diffract.checkpoints import TensorInfo, as_bytes
from diffract.checkpoints.checkpoint import digest_as_read, start_digest
from diffract.checkpoints.dtypes import DTYPE_NAMES, TORCH_DTYPES
from diffract.checkpoints.writer import ShardedWriter
from diffract.edits.draft import Draft
from diffract.edits.recipe import Output
from diffract.engine import keep_freed_memory, run_tasks
from diffract.errors import RunError
from diffract.settings import Progress

R = TypeVar("R")

"""``progress(done, total, what)``."""


@dataclass(frozen=True)
class Job:
    """A tensor to write.

    Attributes:
        info: As it will be stored.
        names: What it is called: tied tensors have several names.
        workspace_bytes: Memory that computing it takes, about.
    """

    info: TensorInfo
    names: tuple[str, ...]
    workspace_bytes: int


def written_infos(draft: Draft, output: Output) -> dict[str, TensorInfo]:
    """Return what will be written: the model's tensors, in other dtypes where that was asked for."""
    dtype = None if output.dtype is None else DTYPE_NAMES[getattr(torch, output.dtype)]
    found = {}
    for name, info in draft.checkpoint.infos.items():
        found[name] = replace(info, dtype=dtype) if dtype and info.is_float else info
    return found


def jobs_of(draft: Draft, infos: Mapping[str, TensorInfo]) -> list[Job]:
    """Return one job for each tensor; tied ones are one tensor.

    The largest come first, so that none of them is left for one core while the others have nothing to do.
    """
    twins: dict[str, list[str]] = {name: [name] for name in infos if name not in draft.ties}
    for name, target in draft.ties.items():
        twins[target].append(name)
    jobs = [Job(infos[name], tuple(names), draft.workspace_bytes(name)) for name, names in twins.items()]
    return sorted(jobs, key=lambda job: -job.info.size_bytes)


def write_draft(draft: Draft, folder: Path, output: Output, progress: Progress | None = None) -> dict[str, str]:
    """Compute a draft and write it as a model's safetensors.

    Returns:
        The digest of each tensor written.
    """
    keep_freed_memory()
    infos = written_infos(draft, output)
    jobs = jobs_of(draft, infos)
    digests: dict[str, str] = {}
    with _explained(folder), ShardedWriter(folder, list(infos.values()), shard_bytes=output.shard_size) as writer:
        for job, digest in run_jobs(jobs, partial(compute, draft, write=writer.write), progress):
            digests |= dict.fromkeys(job.names, digest)
    return {name: digests[name] for name in infos}


def run_jobs(jobs: Sequence[Job], work: Callable[[Job], R], progress: Progress | None) -> Iterator[tuple[Job, R]]:
    """Yield jobs with their results as they are finished, and tell how far they are."""
    total, done = sum(job.info.size_bytes for job in jobs), 0
    for job, result in run_tasks(jobs, work, device=torch.device("cpu")):
        done += job.info.size_bytes
        if progress:
            progress(done, total, job.info.name)
        yield job, result


def stored_blocks(draft: Draft, info: TensorInfo) -> Iterator[tuple[int, Tensor]]:
    """Yield a tensor as it is stored, in blocks of rows, each with its first row."""
    dtype = TORCH_DTYPES.get(info.dtype)
    for rows in draft.spans(info.name):
        block = draft.block(info.name, rows) if dtype is None else draft.stored_block(info.name, rows, dtype)
        yield rows[0] if rows else 0, block


def compute(draft: Draft, job: Job, *, write: Callable[[str, Tensor, int], None] | None = None) -> str:
    """Compute a tensor, have its blocks written under each of its names if that is wanted, and return its digest."""
    kept, hasher = draft.keeps(job.info), start_digest(job.info)
    for first, stored in stored_blocks(draft, job.info):
        if not kept:
            hasher.update(as_bytes(stored))
        if write is not None:
            for name in job.names:
                write(name, stored, first)
    return digest_as_read(draft.checkpoint, job.info.name) if kept else hasher.hexdigest()


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write to {str(folder)!r}: {error.strerror or error}. Make room, or choose another folder."
        ) from error
