"""The public functions: one for each command, with the same names and defaults.

Nothing heavy is imported before a function is called: commands read their options and help from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffract.errors import SelectionError, choose

if TYPE_CHECKING:
    from diffract.checkpoints import Reference
    from diffract.corpora import Split
    from diffract.linalg import Method
    from diffract.metrics import Metric
    from diffract.run import Run
    from diffract.settings import Progress


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
    shard: str | None = None,
    cache: bool = True,
    nulls: str = "some",
    output: str | Path | None = None,
    force: bool = False,
    timing: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Compute spectra and metrics of every matrix and attention head of a checkpoint.

    Args:
        ref: A file, a folder, or ``org/name@revision`` on the hub; ``name=MODEL`` names it in the tables. In Python
            also a mapping of arrays, an ``nn.Module``, or an open checkpoint.
        metrics: Names of metrics or of groups of them, separated by commas. By default norms, ranks, shape, change and
            agreement; ``all`` is everything but ``peak_nulls`` and ``p_values``. Only what they need is computed. In
            Python also a list, or metrics of one's own.
        select: Which matrices, such as ``"layers 0-7, attn.q, attn.o"``; all by default.
        heads: Cut attention projections into heads.
        circuits: Analyse the circuits W_q^T W_k and W_o W_v of each head too, as rows ``qk`` and ``ov``.
        vectors: Keep singular vectors too, as float32 safetensors in the run folder. In Python also in memory, without
            one.
        architecture: A JSON file that describes the model (docs/architectures.md); by default its config.json's
            ``model_type`` decides.
        adapter_base: The base of an adapter, where its config does not name one that can be opened.
        download: Fetch models of the hub whole instead of reading byte ranges.
        method: ``auto``, or ``exact`` for LAPACK throughout.
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
        engine: What runs the work: ``local``, this process; ``ray``, processes of Ray, here or of the cluster that
            ``RAY_ADDRESS`` names.
        shard: Do one share of the work of several processes, which write to the same folder: ``I/N``, I from 0 on, or
            ``auto``, as the scheduler says. ``diffract collect`` joins them (docs/cluster.md).
        cache: Use results that are known from earlier, and keep new ones; ``DIFFRACT_CACHE_DIR`` says where.
        nulls: For which matrices nulls that take many draws are drawn: ``some`` are at most 32, spread over roles,
            whose draws are foretold to cost no more than the rest; ``all``.
        output: Write a run folder here, with report.html.
        force: Replace an existing run folder.
        timing: Say where the time goes: seconds of all threads together in reading (and hashing), casting, products,
            eigensolvers, tables, and the rest of the work; the manifest keeps them.
        progress: Called with work done, all work, and what was just finished.

    Returns:
        The run: tables ``metrics``, ``spectra``, ``models`` and ``tensors``.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.

    Examples:
        >>> import numpy as np
        >>> scan({"w": np.diag([3.0, 4.0])}, cache=False)["metrics"]["spectral_norm"].to_list()
        [4.0]
    """
    from diffract.analysis import Options, Request
    from diffract.cluster import answer
    from diffract.settings import filled

    return answer(Request("scan", [ref], filled(Options, locals())), output, shard=shard, force=force, timing=timing)


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
    allow: Sequence[str] = (),
    allow_unmatched: bool = False,
    download: bool = False,
    method: Method = "auto",
    device: str = "auto",
    engine: str = "local",
    shard: str | None = None,
    cache: bool = True,
    nulls: str = "some",
    noise: str = "some",
    output: str | Path | None = None,
    force: bool = False,
    timing: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Compare a base with checkpoints that descend from it: both spectra, their alignment, and the change.

    Tensors are paired by exact name and shape.

    Args:
        base: What the others descend from: a file, a folder, or ``org/name@revision`` on the hub; ``name=MODEL`` names
            it in the tables. In Python also a mapping of arrays, an ``nn.Module``, or an open checkpoint.
        tuned: One or more, given like the base; ``math=MODEL`` names one in the tables.
        metrics: Names of metrics or of groups of them, separated by commas. By default norms, ranks, shape, change and
            agreement; ``all`` is everything but p-values. Only what they need is computed. In Python also a list, or
            metrics of one's own, of pairs too.
        select: Which matrices, such as ``"layers 0-7, attn.q, attn.o"``; all by default.
        heads: Cut attention projections into heads.
        circuits: Analyse the qk and ov circuits of each head too, and their change.
        vectors: Keep singular vectors too, as float32 safetensors in the run folder. In Python also in memory, without
            one.
        architecture: A JSON file that describes the model (docs/architectures.md); by default its config.json's
            ``model_type`` decides.
        adapter_base: The base of adapters among the models, where their config does not name one that can be opened.
        allow: ``unmatched``: go on when more than embeddings have no partner. Other permissions of edits change
            nothing.
        allow_unmatched: The same as ``--allow unmatched``.
        download: Fetch models of the hub whole instead of reading byte ranges.
        method: ``auto``, or ``exact`` for LAPACK throughout.
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
        engine: What runs the work: ``local``, this process; ``ray``, processes of Ray, here or of the cluster that
            ``RAY_ADDRESS`` names.
        shard: Do one share of the work of several processes, which write to the same folder: ``I/N``, I from 0 on, or
            ``auto``, as the scheduler says. ``diffract collect`` joins them (docs/cluster.md).
        cache: Use results that are known from earlier, and keep new ones; ``DIFFRACT_CACHE_DIR`` says where.
        nulls: For which matrices nulls that take many draws are drawn: ``some`` are at most 32, spread over roles,
            whose draws are foretold to cost no more than the rest; ``all``.
        noise: For which matrices the numbers of a pair are computed of noise too, of the same norm as the change, as
            ``*_noise``: ``some`` are all where that is cheap, else up to 8 of each role, for a quarter of the work;
            ``all``, also with the change's row and column norms, as ``*_noise_rowcol``; ``none``.
        output: Write a run folder here, with report.html.
        force: Replace an existing run folder.
        timing: Say where the time goes: seconds of all threads together in reading (and hashing), casting, products,
            eigensolvers, tables, and the rest of the work; the manifest keeps them.
        progress: Called with work done, all work, and what was just finished.

    Returns:
        The run: single metrics on rows of every model, pair metrics on those of the tuned ones.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    from diffract.analysis import Options, Request
    from diffract.cluster import answer
    from diffract.settings import filled

    options = filled(Options, locals())
    if not tuned:
        raise SelectionError("compare needs a base and at least one tuned checkpoint. Use scan for one alone.")
    how = {"allow_unmatched": allow_unmatched or _allows_unmatched(allow)}
    return answer(Request("compare", [base, *tuned], options, how), output, shard=shard, force=force, timing=timing)


def trajectory(
    *refs: Reference,
    by: str = "step",
    against: str = "previous",
    metrics: str | Sequence[str | Metric] | None = None,
    select: str | None = None,
    heads: bool = True,
    architecture: str | Path | None = None,
    adapter_base: Reference | None = None,
    allow: Sequence[str] = (),
    allow_unmatched: bool = False,
    download: bool = False,
    method: Method = "auto",
    device: str = "auto",
    engine: str = "local",
    shard: str | None = None,
    cache: bool = True,
    nulls: str = "some",
    noise: str = "some",
    output: str | Path | None = None,
    force: bool = False,
    timing: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Follow a training run: scan every checkpoint, and compare each with the one before. Two are open at a time.

    Args:
        refs: The checkpoints in any order, or one folder of checkpoint folders or files. ``step500=MODEL`` gives one a
            name, and a step that its own name does not tell.
        by: What orders them: ``step`` (by stage and step, read from revisions, names and ``trainer_state.json``),
            ``tokens``, ``name``, ``given`` (as they are given), or a regular expression with a group ``step`` or
            ``tokens``, and ``stage`` where steps begin anew.
        against: What each is compared with: ``previous`` or ``first``.
        metrics: Names of metrics or of groups of them, separated by commas. By default norms, ranks, shape, change and
            agreement; ``all`` is everything but p-values. Only what they need is computed. In Python also a list, or
            metrics of one's own, of pairs too.
        select: Which matrices, such as ``"layers 0-7, attn.q, attn.o"``; all by default.
        heads: Cut attention projections into heads.
        architecture: A JSON file that describes the model (docs/architectures.md); by default its config.json's
            ``model_type`` decides.
        adapter_base: The base of adapters among the models, where their config does not name one that can be opened.
        allow: ``unmatched``: go on when more than embeddings have no partner. Other permissions of edits change
            nothing.
        allow_unmatched: The same as ``--allow unmatched``.
        download: Fetch models of the hub whole instead of reading byte ranges.
        method: ``auto``, or ``exact`` for LAPACK throughout.
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
        engine: What runs the work: ``local``, this process; ``ray``, processes of Ray, here or of the cluster that
            ``RAY_ADDRESS`` names.
        shard: Do one share of the work of several processes, which write to the same folder: ``I/N``, I from 0 on, or
            ``auto``, as the scheduler says. ``diffract collect`` joins them (docs/cluster.md).
        cache: Use results that are known from earlier, and keep new ones; ``DIFFRACT_CACHE_DIR`` says where.
        nulls: For which matrices nulls that take many draws are drawn: ``some`` are at most 32, spread over roles,
            whose draws are foretold to cost no more than the rest; ``all``.
        noise: For which matrices the numbers of a change are computed of noise with its norm too, as ``*_noise``:
            ``some``, which costs at most a quarter more where the series takes long; ``all``; ``none``.
        output: Write a run folder here, with report.html.
        force: Replace an existing run folder.
        timing: Say where the time goes: seconds of all threads together in reading (and hashing), casting, products,
            eigensolvers, tables, and the rest of the work; the manifest keeps them.
        progress: Called with work done, all work, and what was just finished.

    Returns:
        The run: one model per checkpoint, with ``order``, ``stage``, ``step`` and ``tokens`` in metrics and models.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.

    Examples:
        >>> import numpy as np
        >>> series = [{"w": scale * np.eye(2)} for scale in (1.0, 2.0, 3.0)]
        >>> trajectory(*series, by="given", cache=False)["models"]["delta_relative"].to_list()
        [None, 1.0, 0.5]
    """
    from diffract.analysis import Options, Request
    from diffract.cluster import answer
    from diffract.settings import filled

    how = {"by": by, "against": against, "allow_unmatched": allow_unmatched or _allows_unmatched(allow)}
    return answer(
        Request("trajectory", refs, filled(Options, locals()), how), output, shard=shard, force=force, timing=timing
    )


def heads(
    base: Reference,
    *tuned: Reference,
    projections: Sequence[str] = ("q", "k", "v", "o"),
    architecture: str | Path | None = None,
    adapter_base: Reference | None = None,
    allow: Sequence[str] = (),
    allow_unmatched: bool = False,
    download: bool = False,
    device: str = "auto",
    engine: str = "local",
    shard: str | None = None,
    cache: bool = True,
    output: str | Path | None = None,
    force: bool = False,
    timing: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Find out which attention heads change, in one domain or in all.

    This is one pass over the entries of the attention tensors, without spectra. A head's change is that of its slices
    together; several query heads that share a key-value head each count its slices.

    Args:
        base: What the others descend from: a file, a folder, or ``org/name@revision`` on the hub; ``name=MODEL`` names
            it in the tables. In Python also a mapping of arrays, an ``nn.Module``, or an open checkpoint.
        tuned: One or more, one for each domain; ``math=MODEL`` names one. Numbers between domains need two.
        projections: Which slices of a head count: some of q, k, v and o, separated by commas. In Python a list.
        architecture: A JSON file that describes the model (docs/architectures.md); by default its config.json's
            ``model_type`` decides.
        adapter_base: The base of adapters among the models, where their config does not name one that can be opened.
        allow: ``unmatched``: go on when attention tensors have no partner; their heads get a status and no numbers.
        allow_unmatched: The same as ``--allow unmatched``.
        download: Fetch models of the hub whole instead of reading byte ranges.
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
        engine: What runs the work: ``local``, this process; ``ray``, processes of Ray, here or of the cluster that
            ``RAY_ADDRESS`` names.
        shard: Do one share of the work of several processes, which write to the same folder: ``I/N``, I from 0 on, or
            ``auto``, as the scheduler says. ``diffract collect`` joins them (docs/cluster.md).
        cache: Use results that are known from earlier, and keep new ones; ``DIFFRACT_CACHE_DIR`` says where.
        output: Write a run folder here.
        force: Replace an existing run folder.
        timing: Say where the time goes: seconds of all threads together in reading (and hashing), casting, products,
            eigensolvers, tables, and the rest of the work; the manifest keeps them.
        progress: Called with work done, all work, and what was just finished.

    Returns:
        The run: tables of heads, of pairs of domains, of reference-domain scores.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    from diffract.analysis import Options, Request
    from diffract.cluster import answer
    from diffract.settings import filled

    options = filled(Options, locals())
    if not tuned:
        raise SelectionError("heads needs a base and at least one tuned checkpoint.")
    how = {"projections": projections, "allow_unmatched": allow_unmatched or _allows_unmatched(allow)}
    return answer(Request("heads", [base, *tuned], options, how), output, shard=shard, force=force, timing=timing)


def _allows_unmatched(allow: Sequence[str]) -> bool:
    from diffract.settings import PERMISSIONS

    for name in allow:
        choose("permission", name, PERMISSIONS)
    return "unmatched" in allow


def lineage(
    *refs: Reference,
    root: str | None = None,
    architecture: str | Path | None = None,
    adapter_base: Reference | None = None,
    download: bool = False,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Find out which checkpoints descend from each other, and which are strangers.

    The entries of each matrix of the blocks are correlated; the median says how near two models are. Embedding tables
    decide nothing. The tree has no root unless one is named: the numbers are the same both ways.

    Args:
        refs: Two or more: a file, a folder, or ``org/name@revision`` on the hub; ``name=MODEL`` names one. In Python
            also a mapping of arrays, an ``nn.Module``, or an open checkpoint.
        root: The name of the one that the others descend from, where that is known; or ``step``, ``tokens`` or
            ``date``: the earliest model of each tree, by its name or its trainer's note; a date by what manifest, card
            or metadata state, else by steps, else by the time of its files.
        architecture: A JSON file that describes the model (docs/architectures.md); by default its config.json's
            ``model_type`` decides.
        adapter_base: The base of adapters among the models, where their config does not name one that can be opened.
        download: Fetch models of the hub whole instead of reading byte ranges.
        output: Write a run folder here.
        force: Replace an existing run folder.
        progress: Called with pairs done, all pairs, and what was just finished.

    Returns:
        The run: tables ``lineage`` of pairs, ``tree`` and ``models``.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.

    Examples:
        >>> import numpy as np
        >>> seeds = [np.random.default_rng(seed) for seed in (0, 1)]
        >>> one, two = ({f"layers.{i}.w": rng.normal(size=(64, 64)) for i in range(6)} for rng in seeds)
        >>> lineage(one, two)["lineage"]["lineage"].to_list()
        ['stranger']
    """
    from diffract.analysis import Options, relate_all
    from diffract.run import written
    from diffract.settings import filled

    options = filled(Options, locals())
    return written(lambda: relate_all(refs, options, root=root), output, force=force)


def audit(
    ref: Reference,
    *,
    base: Reference | None = None,
    architecture: str | Path | None = None,
    adapter_base: Reference | None = None,
    download: bool = False,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Say what is in a checkpoint that nobody mentioned: its precision, dead and copied parts, unused tokens, code.

    Facts, not judgements. Every tensor is read once.

    Args:
        ref: A file, a folder, or ``org/name@revision`` on the hub; ``name=MODEL`` names it. In Python also a mapping of
            arrays, an ``nn.Module``, or an open checkpoint.
        base: What it is said to descend from; by default the base_model of its card, where that is a folder here.
        architecture: A JSON file that describes the model (docs/architectures.md); by default its config.json's
            ``model_type`` decides.
        adapter_base: The base of an adapter whose config names none that can be opened.
        download: Fetch models of the hub whole instead of reading byte ranges.
        output: Write a run folder here.
        force: Replace an existing run folder.
        progress: Called with tensors done, all tensors, and what was just finished.

    Returns:
        The run: tables ``facts`` and ``models``.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.

    Examples:
        >>> import numpy as np
        >>> audit({"w": np.zeros((2, 3))})["facts"]["fact"].to_list()
        ['all zero']
    """
    from diffract.analysis import Options
    from diffract.analysis.audit import audit as audited
    from diffract.run import written
    from diffract.settings import filled

    options = filled(Options, locals(), heads=False)
    return written(lambda: audited(ref, options, base=base), output, force=force)


def evaluate(
    ref: str | Path | Any,
    tasks: str | Sequence[str] = "math,code,text",
    *,
    split: Split = "held-out",
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: Any = None,
    batch_tokens: int = 16_384,
    cache: bool = True,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Evaluate a model: scores of every item, and the quality in each task with its interval.

    Args:
        ref: A folder with a model of transformers, an adapter folder, or ``org/name@revision`` on the hub. In Python
            also a loaded model.
        tasks: Names of tasks, separated by commas, such as ``math,gsm:1-2,wiki=FILE,lm:NAME`` (docs/evaluate.md). In
            Python also a list, see ``diffract.evaluate.load_tasks``.
        split: ``held-out`` to report, ``selection`` to choose by, or ``train``.
        data: A folder with a folder of files for each domain.
        limit: Items of each task at most.
        shots: Solved examples before each question.
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
        dtype: ``auto`` (as stored, but ``float32`` on a CPU), ``float32``, ``bfloat16`` or ``float16``.
        tokenizer: Where the tokenizer is, if it is not beside the model. In Python also a loaded one.
        batch_tokens: Tokens that are computed at once, padding included.
        cache: Use scores that are known from earlier, and keep new ones; ``DIFFRACT_CACHE_DIR`` says where.
        output: Write a run folder here.
        force: Replace an existing run folder.
        progress: Called with items done, all items, and the task.

    Returns:
        The run: tables ``items`` and ``summary``.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    from diffract.evaluate import load_subject, load_tasks
    from diffract.evaluate.run import own_device, place, score
    from diffract.run import Run
    from diffract.store import refuse_existing

    if output is not None:
        refuse_existing(output, force=force)
    chosen = load_tasks(tasks, split=split, data=data, limit=limit, shots=shots)
    given = own_device()
    subject = load_subject(ref, device=device if given is None else str(given), dtype=dtype, tokenizer=tokenizer)
    settings = {"split": split, "limit": limit, "shots": shots, "data": str(data) if data else None}
    found = Run(score(subject, chosen, settings, cache=cache, batch_tokens=batch_tokens, progress=progress))
    if output is not None and place().rank == 0:
        found.save(output, force=force)
    return found
