"""The searches as they are called: one function for each command, with the same names and defaults.

Nothing heavy is imported before a function is called: commands read their options and help from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffract.errors import SelectionError, choose
from diffract.search.plan import parse_fractions
from diffract.settings import filled

if TYPE_CHECKING:
    from diffract.checkpoints.provenance import Verdict
    from diffract.edits.edit import Shared
    from diffract.run import Run
    from diffract.search.plan import Estimate, Which
    from diffract.search.stage import Model
    from diffract.settings import Progress


def search_rewind(
    base: Model,
    tuned: Model,
    *,
    order: str | Sequence[str] | None = None,
    reference: Model | None = None,
    eval: str | Sequence[str] = "math",
    beside: str | Sequence[str] | None = None,
    keep: str | Sequence[str] | None = None,
    output: str | Path | None = None,
    fractions: str | Sequence[float] = "0:1:0.125",
    seeds: int = 3,
    kv: Shared = "all",
    tolerance: float | None = None,
    choose_by: Which = "best",
    write: str | Path | None = None,
    dry_run: bool = False,
    budget: str | int | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int = 0,
    text: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: Any = None,
    architecture: str | Path | None = None,
    allow: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Run | Estimate:
    """Find which heads can go back to the base: curves of quality in several orders, and the best point.

    Everything is chosen on the selection split: the effect of each head alone, the greedy order by it (the best first;
    effects are not measured again after each step), and of each order the best fraction. The held-out split reports.

    Args:
        base: The model that the tuned one descends from, and that its heads go back to.
        tuned: The model that is searched.
        order: The orders in which heads go back, as a list or separated by commas: ``greedy``, ``reference``,
            ``magnitude``, ``random``, ``first-order``, ``activation``. By default all that can be had. Each is
            taken in reverse too, as a control.
        reference: The base tuned on reference text, which order ``reference`` needs.
        eval: The tasks that measure quality, as a list or separated by commas. The first decides, unless there are
            tasks beside; the others are reported.
        beside: Tasks of the same domain that training did not see the like of; then the first of them decides.
        keep: Tasks of what must be kept, which are reported.
        output: The run folder to write. A search that was killed continues when it is started again.
        fractions: The shares of heads that are rewound, as ``FROM:TO:STEP`` or as a list such as ``0,0.1,0.5``.
        seeds: How many random orders stand beside the others.
        kv: When a key-value head that several query heads share goes back: with ``all`` of them, with the
            ``majority``, or ``never``.
        tolerance: The largest loss that still counts as no loss: the interval of a point's gain must exclude a larger
            one. By default a point is without loss where none is shown: its interval reaches 0.
        choose_by: Which point is written: ``best``, of the highest gain, or ``without-loss``, the furthest that loses
            nothing.
        write: The folder to write the chosen checkpoint to, which is then loaded and scored.
        dry_run: Say what the search would cost, and write nothing. One evaluation of each split is timed.
        budget: The most evaluations, such as ``200``, or the most time that they may take, such as ``30m``. What is
            left out is said.
        data: The folder with the files of tasks, which has a folder for each domain.
        limit: The most items of each task, in each split.
        shots: How many solved examples stand before each question.
        text: The task of text that orders ``first-order`` and ``activation`` take a sample of. By default it is the
            first task.
        device: The device that computes: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
        dtype: The precision that models are evaluated in: ``auto`` (as stored on a GPU, float32 on a CPU),
            ``float32``, ``bfloat16`` or ``float16``.
        tokenizer: The model or folder to take the tokenizer from, where none is beside the tuned model.
        architecture: The JSON file that describes the model, where its configuration does not suffice.
        allow: What is allowed though it speaks against mixing the models' weights: ``strangers``, ``tokenizers``,
            ``unmatched``, or a key of their configurations such as ``rope_theta``.
        force: Replace an existing run folder, whose scores are used again, and the checkpoint.
        progress: Called with evaluations done, all of them, and what is done now.

    Returns:
        The run; of a dry run the estimate.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    from typing import get_args

    from diffract.edits.edit import Shared
    from diffract.search.rewind import RewindSearch, parse_orders
    from diffract.search.run import run_search
    from diffract.search.stage import SearchRequest

    choose("kv", kv, get_args(Shared))
    orders, at = parse_orders(order, reference=reference is not None), parse_fractions(fractions)
    asked = filled(SearchRequest, locals(), models={"base": base, "tuned": tuned}, live="tuned")
    return run_search(asked, partial(RewindSearch, orders=orders, at=at, kv=kv, reference=reference, text=text))


def verify(folder: str | Path, *, replay: bool = False) -> Verdict:
    """Say whether an edited checkpoint is what its manifest says, and its certificate where it has one.

    Args:
        folder: The folder that an edit wrote.
        replay: Compute the recipe anew, too, and compare what comes out; of a certificate evaluate again.

    Returns:
        What was compared, and what differs.

    Raises:
        DiffractError: There is no manifest, or nothing can be opened.
    """
    from diffract.edits.to_files import verify as verify_edit
    from diffract.search.certificate import check_certificate

    verdict = verify_edit(folder, replay=replay)
    check_certificate(folder, verdict, replay=replay)
    return verdict


def search_truncate(
    base: Model,
    tuned: Model,
    *,
    rules: str | Sequence[str] | None = None,
    eval: str | Sequence[str] = "math",
    beside: str | Sequence[str] | None = None,
    keep: str | Sequence[str] | None = None,
    output: str | Path | None = None,
    fractions: str | Sequence[float] = "0:1:0.125",
    seeds: int = 3,
    tolerance: float | None = None,
    choose_by: Which = "best",
    write: str | Path | None = None,
    dry_run: bool = False,
    budget: str | int | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: Any = None,
    architecture: str | Path | None = None,
    allow: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Run | Estimate:
    """Find how much of the change is needed: curves of several rules, against controls of equal energy and bytes.

    Singular directions of the change are dropped by each rule. What is chosen is chosen on the selection split; the
    held-out split reports.

    ``drop`` keeps the largest directions, ``energy`` the fewest that hold a share, ``donoho-gavish`` and ``mp-edge``
    what rises above noise. Controls are matched to ``drop`` at each fraction: ``tail`` keeps as many of the smallest;
    ``random`` as many by chance, so as many bytes; ``random-energy`` by chance until they hold as much energy;
    ``dare-energy`` and ``dare-bytes`` single entries by chance, scaled up, that hold as much energy or take as many
    bytes.

    Args:
        base: The model that the tuned one descends from.
        tuned: The model that is searched.
        rules: The rules that say what is kept, as a list or separated by commas: ``drop``, ``energy``,
            ``donoho-gavish``, ``mp-edge``, and the controls ``tail``, ``random``, ``random-energy``, ``dare-energy``,
            ``dare-bytes``. By default all of them.
        eval: The tasks that measure quality, as a list or separated by commas. The first decides, unless there are
            tasks beside; the others are reported.
        beside: Tasks of the same domain that training did not see the like of; then the first of them decides.
        keep: Tasks of what must be kept, which are reported.
        output: The run folder to write. A search that was killed continues when it is started again.
        fractions: The shares of directions that are dropped, as ``FROM:TO:STEP`` or as a list such as ``0,0.1,0.5``.
        seeds: How many of each control by chance stand beside the others.
        tolerance: The largest loss that still counts as no loss: the interval of a point's gain must exclude a larger
            one. By default a point is without loss where none is shown: its interval reaches 0.
        choose_by: Which point is written: ``best``, of the highest gain, or ``without-loss``, the fewest bytes that
            lose nothing.
        write: The folder to write the chosen checkpoint to, which is then loaded and scored.
        dry_run: Say what the search would cost, and write nothing. One evaluation of each split is timed.
        budget: The most evaluations, such as ``200``, or the most time that they may take, such as ``30m``. What is
            left out is said.
        data: The folder with the files of tasks, which has a folder for each domain.
        limit: The most items of each task, in each split.
        shots: How many solved examples stand before each question.
        device: The device that computes: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
        dtype: The precision that models are evaluated in: ``auto`` (as stored on a GPU, float32 on a CPU),
            ``float32``, ``bfloat16`` or ``float16``.
        tokenizer: The model or folder to take the tokenizer from, where none is beside the tuned model.
        architecture: The JSON file that describes the model, where its configuration does not suffice.
        allow: What is allowed though it speaks against mixing the models' weights: ``strangers``, ``tokenizers``,
            ``unmatched``, or a key of their configurations such as ``rope_theta``.
        force: Replace an existing run folder, whose scores are used again, and the checkpoint.
        progress: Called with evaluations done, all of them, and what is done now.

    Returns:
        The run; of a dry run the estimate.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    from diffract.search.run import run_search
    from diffract.search.stage import SearchRequest
    from diffract.search.truncate import TruncateSearch, parse_rules

    wanted, at = parse_rules(rules), parse_fractions(fractions)
    asked = filled(SearchRequest, locals(), models={"base": base, "tuned": tuned}, live="tuned")
    return run_search(asked, partial(TruncateSearch, rules=wanted, at=at))


def connect(
    base: Model,
    *models: str | tuple[str, Model],
    eval: str | Sequence[str],
    output: str | Path | None = None,
    steps: int = 11,
    grid: int = 5,
    scale: float = 1.0,
    tolerance: float = 0.01,
    dry_run: bool = False,
    budget: str | int | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    shots: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: Any = None,
    architecture: str | Path | None = None,
    allow: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Run | Estimate:
    """Find whether models of several domains are connected: quality on the lines between them, and barriers.

    Of three models the simplex is measured too. Nothing is chosen, so that only the held-out split is needed.

    Args:
        base: The model that all the others descend from. Its tokenizer serves for all, and theirs must be the same.
        models: Two or more tuned models with their names, such as ``math=PATH``. In Python, pairs of a name and a model
            will do too.
        eval: The tasks that measure quality, as a list or separated by commas. Between two models those count that are
            called like them; where there are not two such, all do.
        output: The run folder to write. A search that was killed continues when it is started again.
        steps: How many places are measured on each line, both ends included.
        grid: How many steps there are on an edge of the simplex of three models.
        scale: The factor of the weighted sum of changes that is added to the base on the simplex.
        tolerance: The height that a barrier must not reach, in the unit of the task: models are connected where its
            interval ends below, in all tasks that count.
        dry_run: Say what the search would cost, and write nothing. One evaluation is timed.
        budget: The most evaluations, such as ``200``, or the most time that they may take, such as ``30m``. What is
            left out is said.
        data: The folder with the files of tasks, which has a folder for each domain.
        limit: The most items of each task.
        shots: How many solved examples stand before each question.
        device: The device that computes: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
        dtype: The precision that models are evaluated in: ``auto`` (as stored on a GPU, float32 on a CPU),
            ``float32``, ``bfloat16`` or ``float16``.
        tokenizer: The model or folder to take the tokenizer from, where none is beside the base.
        architecture: The JSON file that describes the model, where its configuration does not suffice.
        allow: What is allowed though it speaks against mixing the models' weights: ``strangers``, ``tokenizers``,
            ``unmatched``, or a key of their configurations such as ``rope_theta``.
        force: Replace an existing run folder, whose scores are used again.
        progress: Called with evaluations done, all of them, and what is done now.

    Returns:
        The run; of a dry run the estimate.

    Raises:
        DiffractError: The input is wrong; the message says what, where, and what to do.
    """
    from diffract.search.connectivity import BASE, ConnectSearch, named_models
    from diffract.search.run import run_search
    from diffract.search.stage import SearchRequest

    named = named_models(models)
    if steps < 3 or grid < 1 or not scale > 0 or not tolerance >= 0:
        raise SelectionError(
            f"expected steps from 3, grid from 1, scale above 0, tolerance from 0; got {steps}, {grid}, {scale}, "
            f"{tolerance}."
        )
    asked = filled(
        SearchRequest, locals(), models={BASE: base, **named}, live=BASE, splits=("held-out",), tolerance=None
    )  # its tolerance is of barriers, not of what counts as no loss
    return run_search(asked, partial(ConnectSearch, steps=steps, grid=grid, scale=scale, tolerance=tolerance))
