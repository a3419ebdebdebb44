"""The public functions: one for each command, with the same names and defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffract import tables
from diffract.analysis import Options, Progress, analyse, follow
from diffract.checkpoints import Checkpoint, Reference, TensorWriter, open_checkpoint
from diffract.errors import SelectionError
from diffract.heterogeneity import HeadsRun, heads
from diffract.linalg import Method
from diffract.metrics import Metric

if TYPE_CHECKING:
    import polars as pl
    from torch import Tensor

VECTORS = "vectors"
"""Name of the folder within a run that holds singular vectors."""


@dataclass(frozen=True)
class Run:
    """What a scan or a comparison found.

    Attributes:
        tables: Its tables and manifest.
        vectors: Singular vectors by ``model/matrix.U`` and ``model/matrix.Vh``, float32, if they were asked for.
    """

    tables: tables.Tables
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def metrics(self) -> pl.DataFrame:
        """One row per model and matrix."""
        return self.tables.metrics

    @property
    def spectra(self) -> pl.DataFrame:
        """One row per model, matrix and quantity along the spectrum; values descend with sigma."""
        return self.tables.spectra

    @property
    def heads(self) -> pl.DataFrame:
        """One row per tuned model and attention head: how much it changed; empty where nothing is compared."""
        return self.tables.heads

    @property
    def models(self) -> pl.DataFrame:
        """One row per model."""
        return self.tables.models

    @property
    def tensors(self) -> pl.DataFrame:
        """One row per model and stored tensor: what became of it."""
        return self.tables.tensors

    @property
    def manifest(self) -> dict[str, Any]:
        """Version, settings, models with digests, warnings."""
        return self.tables.manifest

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write a run folder with its report; it appears whole or not at all.

        Args:
            folder: Where; must not exist unless ``force``.
            force: Replace an existing run folder; any other folder is refused.

        Raises:
            RunError: The folder exists, is no run folder, or cannot be written.
        """
        with tables.whole_folder(folder, force=force) as draft:
            if self.vectors:
                with TensorWriter(draft / VECTORS) as writer:
                    for name, tensor in self.vectors.items():
                        writer.add(name, tensor)
            _write(self.tables, draft)
        return Path(folder)

    def report(self, path: str | Path) -> Path:
        """Write the report, one HTML file that opens offline.

        Raises:
            RunError: The file cannot be written.
        """
        from diffract import report

        return report.write(self.tables, path)


def scan(
    ref: Reference,
    *,
    metrics: str | Sequence[str | Metric] | None = None,
    select: str | None = None,
    heads: bool = True,
    circuits: bool = False,
    vectors: bool = False,
    architecture: str | Path | None = None,
    adapter_base: Reference | None = None,
    download: bool = False,
    method: Method = "auto",
    device: str = "auto",
    engine: str = "local",
    cache: bool = True,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Compute spectra and metrics of every matrix and attention head of a checkpoint.

    Args:
        ref: A file, a folder, ``org/name@revision``, a mapping of arrays, an ``nn.Module``, or an open checkpoint.
            Text may begin with ``name=``, which then names the model in the tables.
        metrics: Names of metrics or groups of the catalog (as a list, or separated by commas), or metrics of one's own.
            By default norms, ranks, shape, change and agreement; ``"all"`` is everything but p-values. Only what
            these need is computed.
        select: Which matrices, such as ``"layers 0-7, attn.q, attn.o"``; all by default.
        heads: Cut attention projections into heads.
        circuits: Analyse the circuits W_q^T W_k and W_o W_v of each head too, as rows ``qk`` and ``ov``.
        vectors: Keep singular vectors too.
        architecture: A JSON file that describes the model; by default its config.json's ``model_type`` decides.
        adapter_base: The base of an adapter, where its config does not name one that can be opened.
        download: Fetch a hub reference whole instead of reading byte ranges.
        method: ``auto``, or ``exact`` for LAPACK throughout.
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
        engine: ``local``.
        cache: Use results that are known from earlier, and keep new ones.
        output: Write a run folder here; vectors then go straight to disk.
        force: Replace an existing run folder.
        progress: Called with work done, all work, and what was just finished.

    Returns:
        The run.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.

    >>> import numpy as np
    >>> scan({"w": np.diag([3.0, 4.0])}, cache=False).metrics["spectral_norm"].to_list()
    [4.0]
    """
    options = Options(
        metrics,
        select,
        heads,
        circuits,
        vectors,
        architecture,
        adapter_base,
        download,
        method,
        device,
        engine,
        cache,
        progress,
    )
    return _run([ref], options, output, force=force)


def compare(
    base: Reference,
    *tuned: Reference,
    metrics: str | Sequence[str | Metric] | None = None,
    select: str | None = None,
    heads: bool = True,
    circuits: bool = False,
    vectors: bool = False,
    architecture: str | Path | None = None,
    adapter_base: Reference | None = None,
    allow_unmatched: bool = False,
    download: bool = False,
    method: Method = "auto",
    device: str = "auto",
    engine: str = "local",
    cache: bool = True,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Compare a base with checkpoints that descend from it: both spectra, their alignment, and the change.

    Tensors are paired by exact name and shape.

    Args:
        base: As ``ref`` of ``scan``.
        tuned: One or more; ``"math=PATH"`` names one in the tables.
        metrics: As of ``scan``; metrics of pairs too.
        select: As of ``scan``.
        heads: As of ``scan``.
        circuits: As of ``scan``; of every model by itself.
        vectors: As of ``scan``.
        architecture: As of ``scan``.
        adapter_base: The base of adapters among them, where their config does not name one that can be opened.
        allow_unmatched: Go on when more than embeddings have no partner.
        download: As of ``scan``.
        method: As of ``scan``.
        device: As of ``scan``.
        engine: As of ``scan``.
        cache: As of ``scan``.
        output: As of ``scan``.
        force: As of ``scan``.
        progress: As of ``scan``.

    Returns:
        The run: single metrics on rows of every model, pair metrics on those of the tuned ones.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    if not tuned:
        raise SelectionError("compare needs a base and at least one tuned checkpoint. Use scan for one alone.")
    options = Options(
        metrics,
        select,
        heads,
        circuits,
        vectors,
        architecture,
        adapter_base,
        download,
        method,
        device,
        engine,
        cache,
        progress,
    )
    return _run([base, *tuned], options, output, force=force, allow_unmatched=allow_unmatched)


def trajectory(
    *refs: Reference,
    by: str = "step",
    against: str = "previous",
    metrics: str | Sequence[str | Metric] | None = None,
    select: str | None = None,
    heads: bool = True,
    architecture: str | Path | None = None,
    adapter_base: Reference | None = None,
    allow_unmatched: bool = False,
    download: bool = False,
    method: Method = "auto",
    device: str = "auto",
    engine: str = "local",
    cache: bool = True,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Follow a training run: scan every checkpoint, and compare each with the one before. Two are open at a time.

    Args:
        refs: The checkpoints in any order, each as ``ref`` of ``scan``; or one folder of checkpoint folders or files.
            ``"step500=PATH"`` gives one a name, and a step that its own name does not tell.
        by: What orders them: ``step`` (by stage and step, read from revisions, names and ``trainer_state.json``),
            ``tokens``, ``name``, ``given`` (as they are given), or a regular expression with a group ``step`` or
            ``tokens``, and ``stage`` where steps begin anew.
        against: What each is compared with: ``previous`` or ``first``.
        metrics: As of ``compare``.
        select: As of ``scan``.
        heads: As of ``scan``.
        architecture: As of ``scan``.
        adapter_base: As of ``compare``.
        allow_unmatched: As of ``compare``.
        download: As of ``scan``.
        method: As of ``scan``.
        device: As of ``scan``.
        engine: As of ``scan``.
        cache: As of ``scan``.
        output: As of ``scan``.
        force: As of ``scan``.
        progress: As of ``scan``.

    Returns:
        The run: one model per checkpoint, with ``order``, ``stage``, ``step`` and ``tokens`` in metrics and models.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.

    >>> import numpy as np
    >>> series = [{"w": scale * np.eye(2)} for scale in (1.0, 2.0, 3.0)]
    >>> trajectory(*series, by="given", cache=False).models["delta_relative"].to_list()
    [None, 1.0, 0.5]
    """
    options = Options(
        metrics,
        select,
        heads,
        False,
        False,
        architecture,
        adapter_base,
        download,
        method,
        device,
        engine,
        cache,
        progress,
    )
    how = {"by": by, "against": against}
    if output is None:
        return Run(follow(refs, options, **how, allow_unmatched=allow_unmatched))
    with tables.whole_folder(output, force=force) as draft:
        found = follow(refs, options, **how, allow_unmatched=allow_unmatched)
        _write(found, draft)
    return Run(found)


def load_run(folder: str | Path) -> Run | HeadsRun:
    """Read a run folder, of whichever command.

    Raises:
        RunError: It is no run folder, or damaged.
    """
    if tables.read_manifest(folder)["kind"] in tables.HeadTables.KINDS:
        return HeadsRun(tables.load(folder, tables.HeadTables))
    return _load(folder)


def _load(folder: str | Path) -> Run:
    found = tables.load(folder)
    saved = Path(folder) / VECTORS
    return Run(found, open_checkpoint(saved) if saved.is_dir() else {})


class _Collected(dict[str, "Tensor"]):
    """Vectors in memory, taken as a writer takes them."""

    def add(self, name: str, tensor: Tensor) -> None:
        self[name] = tensor


def _run(
    references: Sequence[Reference],
    options: Options,
    output: str | Path | None,
    *,
    force: bool,
    allow_unmatched: bool = False,
) -> Run:
    if output is None:
        collected = _Collected()
        return Run(analyse(references, options, allow_unmatched=allow_unmatched, vectors_to=collected), collected)
    with tables.whole_folder(output, force=force) as draft:
        if options.vectors:
            with TensorWriter(draft / VECTORS) as writer:
                found = analyse(references, options, allow_unmatched=allow_unmatched, vectors_to=writer)
        else:
            found = analyse(references, options, allow_unmatched=allow_unmatched)
        _write(found, draft)
    return _load(output) if options.vectors else Run(found)


def _write(found: tables.Tables, draft: Path) -> None:
    from diffract import report

    tables.write(found, draft)
    report.write(found, draft / "report.html")


__all__ = ["Checkpoint", "HeadsRun", "Run", "compare", "heads", "load_run", "scan", "trajectory"]
