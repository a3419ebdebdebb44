"""The share of a plan that one process does, as a folder; and the outcomes of all shares, read where they are joined.

What a task yields is written as it is: rows in the order in which they came and of the types that they had, digests,
correlations, vectors. So whoever joins shares goes on exactly as one process does that has done all tasks itself, and
finds the same to the last bit.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import polars as pl
import torch
from torch import Tensor

from diffract import tables
from diffract.analysis.held import Held
from diffract.analysis.work import AnyTask, CircuitTask, Outcome, Part, Worker
from diffract.checkpoints import TensorWriter, open_checkpoint
from diffract.engine import in_turn, run_tasks
from diffract.errors import RunError, printable
from diffract.schemas import SHARE_TASKS
from diffract.settings import Progress, read_file
from diffract.shares import Share, cut
from diffract.store import PARTS

ROWS, READ = "rows-{}", "read"
"""Files of a share's rows, one for each set of columns, and of what was read of each tensor."""

KEYS = {"_task": pl.Int64, "_part": pl.Int64, "_model": pl.Int64, "_matrix": pl.String}
"""Columns before those of a part's rows: which task and which of its parts, place of the model, name of the matrix."""

READ_SCHEMA = {"task": pl.Int64, "model": pl.Int64, "digest": pl.String, "correlation": pl.Float64}

LIBRARIES = ("torch", "numpy", "scipy", "polars")
"""What numbers depend on to the last bit, besides the processor and the number of threads."""

TOLERANCE = 1e-13
"""Share of a matrix's largest singular value by which processors, thread counts and libraries move the others: kernels
for AVX-512, AVX2 and SSE4.2 differ by at most 2.6e-14 at 128 x 2048, 512 x 2048 and 1024 x 700, in bfloat16."""


def made_on(device: torch.device) -> dict[str, Any]:
    """Return what numbers depend on in their last bits: processor, threads and versions of libraries."""
    processor = platform.processor() or platform.machine()
    known = Path("/proc/cpuinfo")
    if known.is_file() and (match := re.search(r"^model name\s*:\s*(.+)$", known.read_text(), re.MULTILINE)):
        processor = match[1]
    if device.type != "cpu":
        processor = torch.cuda.get_device_name(device)
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


@dataclass(frozen=True)
class Numbered:
    """A task and its place in the whole plan."""

    number: int
    task: AnyTask

    @property
    def workspace_bytes(self) -> int:
        """Memory that it needs at most, about."""
        return self.task.workspace_bytes


class ShareDraft:
    """The share that this process does, while it is written.

    Args:
        share: Which one.
        folder: Where its files go; whoever made the folder gives it its name when it is whole.
        request: What was asked for, as the manifest keeps it.
    """

    def __init__(self, share: Share, folder: Path, request: Mapping[str, Any]) -> None:
        self._share, self._folder, self._request = share, folder, request
        self._owners: list[int] = []
        self._foretold: Sequence[float] = ()
        self._begun = 0
        self._done = 0.0
        self._rows: dict[tuple[tuple[str, Any], ...], list[pl.DataFrame]] = {}
        self._read: list[dict[str, Any]] = []
        self._tasks: list[dict[str, Any]] = []
        self._made_on: dict[str, Any] = {}

    def cut(self, seconds: Sequence[float]) -> None:
        """Choose the tasks of this share among those of the whole plan, by what each is foretold to take."""
        self._foretold, self._owners = seconds, cut(seconds, self._share.count)

    def do(self, tasks: Sequence[AnyTask], worker: Worker, progress: Progress | None = None) -> None:
        """Do those of the next tasks of the plan that belong to this share."""
        # A trajectory hands its tasks over checkpoint by checkpoint; numbers go on, so that they mean the same to all.
        places = range(self._begun, self._begun + len(tasks))
        self._begun += len(tasks)
        self._made_on = made_on(worker.device)
        numbered = map(Numbered, places, tasks)
        own = [one for one in numbered if self._owners[one.number] == self._share.index]
        total = sum(
            cost for cost, owner in zip(self._foretold, self._owners, strict=True) if owner == self._share.index
        )

        def timed(one: Numbered) -> tuple[Outcome, dict[int, str], float]:
            begun = time.perf_counter()
            outcome = worker(one.task)
            seconds = time.perf_counter() - begun
            return outcome, outcome.digests | _digests(one.task, worker, known=outcome.digests), seconds

        saved = TensorWriter(self._folder / tables.VECTORS) if worker.plan.vectors else nullcontext()
        with saved as writer:
            for one, (outcome, digests, seconds) in run_tasks(own, timed, device=worker.device, remote=worker.remote):
                self._keep(one, outcome, digests, seconds=seconds)
                for part in outcome.parts:
                    for side, found in part.vectors.items():
                        for matrix, vector in zip(part.matrices, found, strict=True):
                            assert writer is not None, "vectors that are not to be saved"
                            writer.add(f"{part.model}/{matrix.name}.{side}", vector.float().cpu().contiguous())
                self._done += self._foretold[one.number]
                if progress:
                    progress(self._done, total, one.task.tensor)

    def _keep(self, one: Numbered, outcome: Outcome, digests: Mapping[int, str], *, seconds: float) -> None:
        self._tasks.append({
            "task": one.number,
            "tensor": one.task.tensor,
            "matrices": sum(len(part.matrices) for part in outcome.parts),
            "foretold_seconds": self._foretold[one.number],
            "seconds": seconds,
        })  # fmt: skip
        for place, part in enumerate(outcome.parts):
            keys = [(one.number, place, part.model, matrix.name) for matrix in part.matrices]
            frame = pl.DataFrame(keys, schema=KEYS, orient="row").hstack(part.rows.get_columns())
            # Parts differ in their columns; to fill them up with nulls would change what is joined.
            self._rows.setdefault(tuple(part.rows.schema.items()), []).append(frame)
        for model in sorted(digests.keys() | outcome.correlations.keys()):
            known = {"digest": digests.get(model), "correlation": outcome.correlations.get(model)}
            self._read.append({"task": one.number, "model": model, **known})

    def tables(self, names: Sequence[str], versions: Sequence[Any]) -> tables.Tables:
        """Write what was found, and return what the share did.

        Args:
            names: What the models are called.
            versions: What of the plan the numbers depend on.
        """
        for place, frames in enumerate(self._rows.values()):
            tables.write_table(pl.concat(frames), self._folder / f"{ROWS.format(place)}.parquet")
        tables.write_table(pl.DataFrame(self._read, schema=READ_SCHEMA), self._folder / f"{READ}.parquet")
        manifest = tables.new_manifest(
            "share",
            models=[{"model": name} for name in names],
            settings=dict(self._request),
            seconds=round(sum(row["seconds"] for row in self._tasks), 3),
            versions=list(versions),
            share={"index": self._share.index, "count": self._share.count, "tasks": len(self._owners)},
            made_on=self._made_on,
        )
        return tables.Tables(manifest, {"tasks": tables.frame(self._tasks, SHARE_TASKS)})


def _digests(task: AnyTask, worker: Worker, *, known: Mapping[int, str] = MappingProxyType({})) -> dict[int, str]:
    """Return digests of what a task reads of each model, so that other weights are told when shares are joined.

    Factors of circuits are read by other tasks, too.
    """
    if isinstance(task, CircuitTask):
        return {}
    models = (task.model, *task.tuned)
    return {i: Held(worker.checkpoints[i], task.matrices, worker.cache).digest for i in models if i not in known}


class Parts:
    """The shares of a run, which together hold what all tasks of its plan yield.

    Args:
        folder: The run's folder, in which the shares lie.

    Raises:
        RunError: There are none, some are missing, or they do not belong together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._shares = folder, _whole_shares(folder)
        self.manifest = self._shares[0][1].manifest
        self._begun = 0
        self._rows: dict[int, dict[int, pl.DataFrame]] = {}
        self._read: dict[int, list[dict[str, Any]]] = {}
        self._tensors: dict[int, str] = {}
        self._vectors: dict[int, Path] = {}
        for place, share in self._shares:
            self._tensors |= dict(share.tasks.select("task", "tensor").iter_rows())
            self._vectors |= dict.fromkeys(share.tasks["task"], place / tables.VECTORS)
            for row in _table(place / f"{READ}.parquet").iter_rows(named=True):
                self._read.setdefault(row["task"], []).append(row)
            for path in sorted(place.glob(f"{ROWS.format('*')}.parquet")):
                groups = _table(path).partition_by("_task", "_part", maintain_order=True, as_dict=True)
                for (task, part), rows in groups.items():
                    self._rows.setdefault(task, {})[part] = rows

    @property
    def mixture(self) -> list[str]:
        """What to know where shares were made on several types of processor, numbers of threads or versions."""
        kinds = {str(share.manifest["made_on"]): share.manifest["made_on"] for _, share in self._shares}
        if len(kinds) == 1:
            return []
        told = [
            f"{one['processor']}, {one['threads']} threads, torch {one['libraries']['torch']}" for one in kinds.values()
        ]
        return [
            f"The shares were made in {len(kinds)} ways ({'; '.join(map(printable, told))}): numbers are the same "
            f"up to about {TOLERANCE:g} of a matrix's largest singular value, not to the last bit."
        ]

    def outcomes(self, tasks: Sequence[AnyTask], worker: Worker) -> Iterator[tuple[AnyTask, Outcome]]:
        """Yield the next tasks of the plan with what they yielded, in the order in which they would be done.

        Raises:
            RunError: The plan is another one now, or the weights are.
        """
        numbered = [Numbered(self._begun + i, task) for i, task in enumerate(tasks)]
        self._begun += len(tasks)
        for group in in_turn(numbered, worker.device):
            for one in group:
                if self._tensors.get(one.number) != one.task.tensor:
                    raise _other(self.folder, f"task {one.number} of the plan is now {printable(one.task.tensor)}")
                known = self._read.get(one.number, [])
                read = {row["model"]: row["digest"] for row in known}
                # Weights that changed since would be joined to numbers of the old ones without a word.
                for i, digest in _digests(one.task, worker).items():
                    if digest != read.get(i):
                        where = printable(worker.checkpoints[i].reference)
                        raise _other(self.folder, f"{printable(one.task.tensor)} of {where} has other weights now")
                # Digests of a part name its place after a blank: they tell changes, and are no digest of a tensor.
                whole = {i: digest for i, digest in read.items() if digest is not None and " " not in digest}
                related = {row["model"]: row["correlation"] for row in known if row["correlation"] is not None}
                yield one.task, Outcome(self._parts(one, worker), whole, related)

    def _parts(self, one: Numbered, worker: Worker) -> list[Part]:
        matrices = {m.name: m for m in (one.task.circuits if isinstance(one.task, CircuitTask) else one.task.matrices)}
        found = []
        for _, rows in sorted(self._rows[one.number].items()):
            model, own = rows["_model"][0], tuple(matrices[name] for name in rows["_matrix"])
            vectors: dict[str, Tensor] = {}
            if worker.plan.vectors and not isinstance(one.task, CircuitTask):
                saved = open_checkpoint(self._vectors[one.number])
                vectors = {side: torch.stack([saved[f"{model}/{m.name}.{side}"] for m in own]) for side in ("U", "Vh")}
            found.append(Part(model, own, rows.drop(*KEYS), vectors))
        return found


def _whole_shares(folder: Path) -> list[tuple[Path, tables.Tables]]:
    """Read every share of a run, and make sure that they are of one run and all there."""
    places = sorted(path for path in (folder / PARTS).glob("*-of-*") if NAME.fullmatch(path.name))
    if not places:
        raise RunError(
            f"{str(folder)!r} holds no shares to join. Make them with --shard, such as "
            "`diffract compare BASE TUNED --shard 0/8 -o RUN` for each of eight."
        )
    # Shares of 4 and of 8 cut the plan in other ways: a mixture would hold tasks twice and lack others.
    counts = sorted({int(path.name[-5:]) for path in places})
    if len(counts) > 1:
        raise RunError(
            f"{str(folder)!r} holds shares of runs in {' and in '.join(map(str, counts))}. "
            f"Remove those that are not wanted from {str(folder / PARTS)!r}."
        )
    there = {int(path.name[:5]) for path in places}
    if missing := [i for i in range(counts[0]) if i not in there]:
        shown = ", ".join(map(str, missing[:SHOWN])) + (f" and {len(missing) - SHOWN} more" if missing[SHOWN:] else "")
        raise RunError(
            f"{str(folder)!r} lacks {len(missing)} of {counts[0]} shares: {shown}. Run the same command again with "
            f"--shard {missing[0]}/{counts[0]}, likewise the others."
        )
    found = [(path, tables.load(path, "share")) for path in places]
    first = found[0][1].manifest
    for path, share in found[1:]:
        for key, what in SAME.items():
            if share.manifest.get(key) != first.get(key):
                raise _other(folder, f"{found[0][0].name} and {path.name} differ in {what}")
    return found


NAME = re.compile(r"\d{5}-of-\d{5}", re.ASCII)

SHOWN = 10
"""Missing shares that a message lists."""

SAME = {
    "diffract": "the version of diffract",
    "settings": "models or settings",
    "versions": "metrics or the choice of draws",
}
"""What of the manifests of all shares must be the same, and what it is."""


def _other(folder: Path, why: str) -> RunError:
    return RunError(
        f"the shares in {str(folder)!r} are not of one run: {why}. Make the shares again that are not as they should "
        f"be, or remove {str(folder / PARTS)!r} and begin anew."
    )


def _table(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(BytesIO(read_file(path)))
    except (OSError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise RunError(
            f"the share {str(path.parent)!r} is damaged: {printable(error)}. Remove it and run its command again."
        ) from error
