"""The public functions of searches that learn factors on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from diffract.errors import SelectionError, choose, printable
from diffract.settings import filled

if TYPE_CHECKING:
    from diffract.run import Run
    from diffract.search.directions import Control, Per
    from diffract.search.plan import Estimate
    from diffract.search.stage import Model
    from diffract.settings import Progress


def search_directions(
    base: Model,
    tuned: Model,
    *,
    eval: str | Sequence[str],
    keep: str | Sequence[str],
    beside: str | Sequence[str] | None = None,
    output: str | Path | None = None,
    per: Per = "direction",
    embeddings: bool = True,
    vectors: bool = True,
    rate: float = 0.03,
    passes: int = 3,
    batch_tokens: int = 1024,
    tokens: int = 40_000,
    seed: int = 0,
    polish: int = 0,
    rates: str | Sequence[float] = "0.0001,0.0003,0.001",
    controls: str | Sequence[str] = "interpolation,random,fine-tuning",
    write: str | Path | None = None,
    dry_run: bool = False,
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
    """Learn a factor for each singular direction of what training changed, for a target and what must be kept.

    A factor of 1 is the tuned model, 0 the base. Factors are learned on two thirds of the selection split's documents
    by T + lambda G, each divided by what training gained and forgot; on the others is chosen, and the held-out split
    reports.

    Args:
        base: The model that the tuned one descends from.
        tuned: The model that is searched.
        eval: The tasks of the target, as a list or separated by commas; all are text.
        keep: The tasks of what must be kept, likewise.
        beside: Tasks that nobody optimises and that are reported: text of the target's domain that training did not see
            the like of, and sentinels.
        output: The run folder to write. Scores of a search that was killed are used when it is started again.
        per: What has a factor: each singular ``direction``, each ``head`` (its slice of each matrix) or each
            ``matrix``.
        embeddings: Give each table of tokens one factor.
        vectors: Give each vector one factor.
        rate: The step of Adam.
        passes: How often the text is read.
        batch_tokens: Tokens of each step, of the longest text; of others as large a share.
        tokens: The most tokens of each task that are learned on.
        seed: The order in which the text is read, and the random change of the control.
        polish: Passes of fine-tuning of all weights that follow, from the model that was found, on the same text.
        rates: The rates that fine-tuning is tried at, for polish and as a control.
        controls: What stands beside: ``interpolation`` of the whole model, factors of a ``random`` change, and
            ``fine-tuning`` of all weights with as many passes on the same text; or ``none``.
        write: The folder to write the chosen checkpoint to, which is then loaded and scored.
        dry_run: Say what the evaluations would cost, and write nothing. One of each split is timed; learning comes on
            top.
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
    return _learned("change", locals())


def search_svf(
    base: Model,
    tuned: Model,
    *,
    eval: str | Sequence[str],
    keep: str | Sequence[str],
    beside: str | Sequence[str] | None = None,
    output: str | Path | None = None,
    rate: float = 0.003,
    passes: int = 3,
    batch_tokens: int = 1024,
    tokens: int = 40_000,
    seed: int = 0,
    polish: int = 0,
    rates: str | Sequence[float] = "0.0001,0.0003,0.001",
    controls: str | Sequence[str] = "interpolation,random,fine-tuning",
    write: str | Path | None = None,
    dry_run: bool = False,
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
    """Learn a factor for each singular value of the tuned model's matrices, for a target and what must be kept.

    It is Transformer-squared's expert vector (Sun, Cetin and Tang 2025), learned as ``search directions`` learns its
    factors, of the matrices of blocks alone; the base stands for what training gained and forgot.

    Args:
        base: The model that the tuned one descends from.
        tuned: The model that is searched.
        eval: The tasks of the target, as a list or separated by commas; all are text.
        keep: The tasks of what must be kept, likewise.
        beside: Tasks that nobody optimises and that are reported: text of the target's domain that training did not see
            the like of, and sentinels.
        output: The run folder to write. Scores of a search that was killed are used when it is started again.
        rate: The step of Adam.
        passes: How often the text is read.
        batch_tokens: Tokens of each step, of the longest text; of others as large a share.
        tokens: The most tokens of each task that are learned on.
        seed: The order in which the text is read, and the random change of the control.
        polish: Passes of fine-tuning of all weights that follow, from the model that was found, on the same text.
        rates: The rates that fine-tuning is tried at, for polish and as a control.
        controls: What stands beside: ``interpolation`` of the whole model, factors of a ``random`` change, and
            ``fine-tuning`` of all weights with as many passes on the same text; or ``none``.
        write: The folder to write the chosen checkpoint to, which is then loaded and scored.
        dry_run: Say what the evaluations would cost, and write nothing. One of each split is timed; learning comes on
            top.
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
    return _learned("weights", locals())


def _learned(of: Literal["change", "weights"], given: Mapping[str, Any]) -> Run | Estimate:
    """Learn the factors that a verb asks for.

    Args:
        of: What has singular directions with a factor each: the change, or the tuned weights themselves.
        given: The verb's arguments by name.
    """
    from diffract.search.directions import Asked, DirectionsSearch, Per
    from diffract.search.fit import FitSettings
    from diffract.search.run import run_search
    from diffract.search.stage import SearchRequest

    choose("per", given.get("per", "direction"), get_args(Per))
    parsed = {"rates": parse_rates(given["rates"]), "controls": parse_controls(given["controls"])}
    wanted = filled(Asked, given, of=of, fit=filled(FitSettings, given), **parsed)
    asked = filled(SearchRequest, given, models={"base": given["base"], "tuned": given["tuned"]}, live="tuned")
    return run_search(asked, partial(DirectionsSearch, wanted=wanted))


def parse_rates(given: str | Sequence[float]) -> tuple[float, ...]:
    """Read rates of fine-tuning, ascending.

    Raises:
        SelectionError: One is no number between 0 and 1, or there are none.

    >>> parse_rates("0.001,0.0001")
    (0.0001, 0.001)
    """
    try:
        found = sorted({float(v) for v in (given.split(",") if isinstance(given, str) else given)})
    except (TypeError, ValueError):
        found = []
    if not found or not all(0 < v < 1 for v in found):
        raise SelectionError(f"rates: expected numbers between 0 and 1, as 0.0001,0.001; got {printable(given)!r}.")
    return tuple(found)


def parse_controls(given: str | Sequence[str]) -> tuple[Control, ...]:
    """Read names of controls, separated by commas; ``none`` stands for none.

    Raises:
        SelectionError: One is unknown.
    """
    from diffract.search.directions import Control

    words = [word.strip() for word in (given.split(",") if isinstance(given, str) else given) if word.strip()]
    if words in ([], ["none"]):
        return ()
    wanted = [choose("control", word, get_args(Control), further="none") for word in words]
    return tuple(control for control in get_args(Control) if control in wanted)
