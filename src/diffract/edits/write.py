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

Write = Callable[[str, Tensor, int], None]
"""``write(name, block, first)`` stores a block of a tensor from its row ``first`` on."""


@dataclass(frozen=True)
class Target:
    """Where an edited model is written.

    Attributes:
        folder: The folder to fill.
        path: What it will be called when it is whole.
        output: How the recipe wants weights to be written.
        progress: Called with work done, all work, and what was just finished.
    """

    folder: Path
    path: Path
    output: Output
    progress: Progress | None = None


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        outputs: For each file or folder of weights the digest of each tensor.
        model: The folder that tokenizer and the like belong to.
        loads_alone: Whether that folder is a whole model with its own configuration.
    """

    outputs: Mapping[str, Mapping[str, str]]
    model: Path
    loads_alone: bool


@dataclass(frozen=True)
class TensorJob:
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


def jobs_of(draft: Draft, infos: Mapping[str, TensorInfo]) -> list[TensorJob]:
    """Return one job for each tensor; tied ones are one tensor.

    The largest come first, so that none of them is left for one core while the others have nothing to do.
    """
    # Loaders look for every name that the model had: a tied tensor is computed once and written under each of them.
    twins: dict[str, list[str]] = {name: [name] for name in infos if name not in draft.ties}
    for name, target in draft.ties.items():
        twins[target].append(name)
    jobs = [TensorJob(infos[name], tuple(names), draft.workspace_bytes(name)) for name, names in twins.items()]
    return sorted(jobs, key=lambda job: -job.info.size_bytes)


def write_draft(draft: Draft, target: Target) -> dict[str, str]:
    """Compute a draft and write it as a model's safetensors.

    Returns:
        The digest of each tensor written.
    """
    keep_freed_memory()
    infos = written_infos(draft, target.output)
    with (
        _explained(target.folder),
        ShardedWriter(target.folder, list(infos.values()), shard_bytes=target.output.shard_size) as writer,
    ):
        return computed(draft, infos, write=writer.write, progress=target.progress)


def write_checkpoint(draft: Draft, target: Target) -> Written:
    """Write a draft as what it is a draft of: one whole model."""
    return Written({".": write_draft(draft, target)}, target.folder, loads_alone=True)


def computed(
    draft: Draft, infos: Mapping[str, TensorInfo], *, write: Write | None = None, progress: Progress | None = None
) -> dict[str, str]:
    """Compute all tensors of a draft, as they are stored, and return the digest of each.

    Args:
        draft: What to compute.
        infos: How tensors are stored, by `written_infos`.
        write: Called with each block that is ready, if it is wanted.
        progress: Called with bytes done, all bytes, and what was just finished.
    """
    digests: dict[str, str] = {}
    for job, digest in run_jobs(jobs_of(draft, infos), partial(_compute, draft, write), progress):
        digests |= dict.fromkeys(job.names, digest)
    return {name: digests[name] for name in infos}


def run_jobs(
    jobs: Sequence[TensorJob], work: Callable[[TensorJob], R], progress: Progress | None
) -> Iterator[tuple[TensorJob, R]]:
    """Yield jobs with their results as they are finished, and tell how far they are."""
    total, done = sum(job.info.size_bytes for job in jobs), 0
    for job, result in run_tasks(jobs, work, device=torch.device("cpu")):
        done += job.info.size_bytes
        if progress:
            progress(done, total, job.info.name)
        yield job, result


def _compute(draft: Draft, write: Write | None, job: TensorJob) -> str:
    """Compute a tensor block by block, have each written under all its names, and return its digest."""
    info, dtype = job.info, TORCH_DTYPES.get(job.info.dtype)
    kept, hasher = draft.keeps(info), start_digest(info)
    for rows in draft.spans(info.name):
        # Of a dtype that this torch has not, reading says so; there is none to convert to.
        stored = draft.block(info.name, rows) if dtype is None else draft.stored_block(info.name, rows, dtype)
        if not kept:
            hasher.update(as_bytes(stored))
        if write is not None:
            for name in job.names:
                write(name, stored, rows[0] if rows else 0)
    return digest_as_read(draft.checkpoint, info.name) if kept else hasher.hexdigest()


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write to {str(folder)!r}: {error.strerror or error}. Make room, or choose another folder."
        ) from error
