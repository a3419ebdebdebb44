"""One analysis by one process or several: each does a share of it, and whoever comes last joins the shares."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffract.errors import RunError, SelectionError
from diffract.shares import read_share
from diffract.store import PARTS, whole_folder
from diffract.tables import Tables, load, read_manifest

if TYPE_CHECKING:
    from diffract.analysis import Request
    from diffract.run import Run
    from diffract.settings import Progress


def answer(request: Request, output: str | Path | None, *, shard: str | None, force: bool, timing: bool = False) -> Run:
    """Do an analysis, or a share of it.

    Args:
        request: The analysis.
        output: The run's folder, if one is to be written.
        shard: Which share is done; all of it for ``None``.
        force: Replace what is there.
        timing: Note in the manifest where the time goes.

    Raises:
        SelectionError: Time is asked for that other processes spend.
    """
    from diffract.run import Run, load_run, run_folder, write
    from diffract.timing import stopwatch

    if timing and (shard is not None or request.options.engine != "local"):
        raise SelectionError(
            "timing is of one process: leave shard and engine out. The seconds of each task of a share are in its "
            "tasks.parquet."
        )
    if shard is not None:
        return do_share(request, shard, output, force=force)
    with run_folder(output, force=force) as draft:
        with stopwatch() if timing else nullcontext() as watch:
            found, vectors = request.answered(draft)
        if watch is not None:
            found.manifest["timing"] = {piece: round(seconds, 3) for piece, seconds in watch.seconds.items()}
        if draft is not None:
            write(found, draft)
    return load_run(str(output)) if output is not None and request.options.vectors else Run(found, vectors)


def do_share(request: Request, text: str, output: str | Path | None, *, force: bool = False) -> Run:
    """Do a share of an analysis, and keep it within the run's folder; a share that is there already is not done again.

    Args:
        request: The analysis.
        text: Which share, as ``shares.read_share`` reads it.
        output: The run's folder, the same for all shares.
        force: Do the share anew though it is there.

    Raises:
        SelectionError: There is no such share, or the request speaks of objects of this process.
        RunError: The folder is taken by something else, or holds shares of another request.
    """
    from diffract.analysis.parts import ShareDraft
    from diffract.run import Run, write

    share = read_share(text)
    if request.options.engine != "local":
        raise SelectionError("--shard: a share is done by the engine local. Choose one of both, shares or Ray.")
    if output is None:
        raise SelectionError("--shard: shares meet in a folder. Name the same one for all of them with --output RUN.")
    folder, wanted = Path(output), request.written()
    if (folder / "manifest.json").is_file():
        raise RunError(f"{str(folder)!r} is a run already. Choose another name, or remove it.")
    # Found out before the work: whoever comes to join the shares comes hours later.
    for other in sorted((folder / PARTS).glob("*-of-*/manifest.json")):
        found = read_manifest(other.parent)
        if found["settings"] != wanted or other.parent.name[-5:] != share.name[-5:]:
            raise RunError(
                f"{str(other.parent)!r} is a share of another run: its models, settings or number of shares differ. "
                f"Choose another folder, or remove {str(folder / PARTS)!r}."
            )
    own = folder / PARTS / share.name
    # A scheduler may start all tasks of an array again when a few were killed.
    if (own / "manifest.json").is_file() and not force:
        return Run(load(own, "share"))
    with whole_folder(own, force=True) as draft:
        options = replace(request.options, share=ShareDraft(share, draft, wanted))
        found, _ = replace(request, options=options).answered()
        write(found, draft)
    return Run(found)


def collect(run: str | Path, *, cache: bool = True, progress: Progress | None = None) -> Run:
    """Join the shares of a run, in place: what one process that did all of it would have written.

    What needs more than one matrix is computed here: numbers of whole models, pooled peaks, lineage, sentences. The
    weights are read once, to make sure that they are those that were analysed.

    Args:
        run: The run's folder, in which the shares lie. They give way to the run.
        cache: Use results that are known from earlier, and keep new ones; ``DIFFRACT_CACHE_DIR`` says where.
        progress: Called with work done, all work, and what was just finished.

    Returns:
        The run, of the kind that was asked for.

    Raises:
        RunError: Shares are missing, damaged, or of other settings, versions or weights.
    """
    from diffract.analysis import Request
    from diffract.analysis.parts import Parts
    from diffract.run import load_run, write

    folder = Path(run)
    parts = Parts(folder)
    request = Request.read(parts.manifest["settings"], cache=cache, progress=progress, parts=parts)
    with whole_folder(folder, force=True) as draft:
        found, _ = request.answered(draft)
        # How shares were made is known to no single one of them, and belongs to the run.
        told = {**found.manifest, "warnings": [*parts.mixture, *found.manifest["warnings"]]}
        write(Tables(told, found.frames), draft)
    return load_run(folder)
