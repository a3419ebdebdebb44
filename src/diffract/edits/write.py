"""Drafts to files: one pass over the model, two threads, flat memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from diffract.checkpoints import TensorInfo, as_bytes
from diffract.checkpoints.checkpoint import Recorder, digest_as_read, start_digest
from diffract.checkpoints.dtypes import DTYPE_NAMES, TORCH_DTYPES
from diffract.checkpoints.files import LocalFile
from diffract.checkpoints.writer import PatchingWriter, ShardedWriter, can_clone
from diffract.edits.draft import Draft
from diffract.edits.recipe import Output
from diffract.engine import keep_freed_memory, run_tasks
from diffract.errors import RunError
from diffract.settings import Progress, size_text
from diffract.store import free_bytes

R = TypeVar("R")


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
        written_bytes: Bytes of weights that were written; others are shared with the edited model's files.
    """

    outputs: Mapping[str, Mapping[str, str]]
    model: Path
    loads_alone: bool
    written_bytes: int


@dataclass(frozen=True)
class WrittenDraft:
    """A draft on disk.

    Attributes:
        digests: That of each tensor.
        written_bytes: Bytes of tensors that were written.
    """

    digests: dict[str, str]
    written_bytes: int


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
    # The largest first: begun last, it would be waited for alone.
    return sorted(jobs, key=lambda job: -job.info.size_bytes)


def write_draft(draft: Draft, target: Target) -> WrittenDraft:
    """Compute a draft and write it as a model's safetensors.

    Raises:
        RunError: There is no room, which is found out before anything is written; or the folder cannot be written.
    """
    keep_freed_memory()
    infos = written_infos(draft, target.output)
    with _explained(target.folder), _writer(draft, infos, target) as writer:
        digests = computed(draft, infos, writer=writer, progress=target.progress)
        return WrittenDraft(digests, writer.written_bytes)


def _writer(draft: Draft, infos: Mapping[str, TensorInfo], target: Target) -> ShardedWriter:
    """Return what writes a draft: the model's own files written over where they change, if that saves writing."""
    files = _own_files(draft, target.output)
    changed: dict[str, int] = defaultdict(int)
    for name, info in draft.checkpoint.infos.items():
        if touched := draft.touched_bytes(name):
            changed[info.file] += touched
    clones = bool(files) and can_clone(next(iter(files.values())), target.folder)
    if not clones and not (files and target.output.link):
        _refuse_without_room(sum(info.size_bytes for info in infos.values()), target)
        return ShardedWriter(target.folder, list(infos.values()), shard_bytes=target.output.shard_size)
    # Links cannot be written over, so that files with a change are copied first.
    copied = 0 if clones else sum(files[name].size for name in changed)
    _refuse_without_room(sum(changed.values()) + copied, target)
    return PatchingWriter(target.folder, files, infos=draft.checkpoint.infos, changed=changed)


def _own_files(draft: Draft, output: Output) -> dict[str, LocalFile]:
    """Return the model's files, as tensors' places call them; none where what is written is laid out otherwise."""
    checkpoint, default = draft.checkpoint, Output()
    if output.dtype or output.shard_size != default.shard_size or checkpoint.set_aside:
        return {}
    found: dict[str, LocalFile] = {}
    for name, info in checkpoint.infos.items():
        source = checkpoint.sources[name]
        source = source.checkpoint.sources[name] if isinstance(source, Recorder) else source
        if not isinstance(source, LocalFile) or not fnmatchcase(source.path.name, "model*.safetensors"):
            return {}
        found[info.file] = source
    return found


def _refuse_without_room(size: int, target: Target) -> None:
    free = free_bytes(target.folder)
    if size > free:
        raise RunError(
            f"{str(target.path)!r}: {size_text(size)} are to be written, and {size_text(free)} are free. Make room, or "
            "choose another folder."
        )


def write_checkpoint(draft: Draft, target: Target) -> Written:
    """Write a draft as what it is a draft of: one whole model."""
    stored = write_draft(draft, target)
    return Written({".": stored.digests}, target.folder, loads_alone=True, written_bytes=stored.written_bytes)


def computed(
    draft: Draft,
    infos: Mapping[str, TensorInfo],
    *,
    writer: ShardedWriter | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Compute all tensors of a draft, as they are stored, and return the digest of each.

    Args:
        draft: What to compute.
        infos: How tensors are stored, by `written_infos`.
        writer: Where each block that is ready is written, if it is wanted.
        progress: Called with bytes done, all bytes, and what was just finished.
    """
    digests: dict[str, str] = {}
    for job, digest in run_jobs(jobs_of(draft, infos), partial(_compute, draft, writer), progress):
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


def _compute(draft: Draft, writer: ShardedWriter | None, job: TensorJob) -> str:
    """Compute a tensor block by block, have each written under all its names, and return its digest."""
    info, dtype = job.info, TORCH_DTYPES.get(job.info.dtype)
    kept, hasher = draft.keeps(info), start_digest(info)
    # What is there already is right to the bit.
    if kept and writer and not writer.fresh:
        return digest_as_read(draft.checkpoint, info.name)
    for rows in draft.spans(info.name):
        # Of a dtype that this torch has not, reading says so; there is none to convert to.
        stored = draft.block(info.name, rows) if dtype is None else draft.stored_block(info.name, rows, dtype)
        if not kept:
            hasher.update(as_bytes(stored))
        if writer is None:
            continue
        first = rows[0] if rows else 0
        spans = draft.touched(info.name, rows) if info.shape and not writer.fresh else None
        parts = [(stored, first)] if spans is None else [(stored[a - first : b - first], a) for a, b in spans]
        for name in job.names:
            for part, start in parts:
                writer.write(name, part, start)
    return digest_as_read(draft.checkpoint, info.name) if kept else hasher.hexdigest()


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write to {str(folder)!r}: {error.strerror or error}. Make room, or choose another folder."
        ) from error
