"""Training by a recipe."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffract.errors import RecipeError, RunError, printable
from diffract.settings import Progress
from diffract.store import held, whole_folder
from diffract.train.data import Mixture, make_mixture, make_tokenizer, token_streams
from diffract.train.model import make_config, make_model, saved_dtype, write_model
from diffract.train.recipe import TrainRecipe, load_train_recipe, rate_factor, require_extra
from diffract.train.records import (
    CHECKPOINTS,
    STATES,
    Journal,
    TrainRun,
    begun,
    file_digests,
    finished_run,
    last_state,
    load_state,
    read_run,
    save_state,
    write_run,
)
from diffract.train.steps import Stepper, accelerated, device_name, make_optimizer, settled

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


"""``progress(done, total, what)``, in tokens."""


def train(
    recipe: TrainRecipe | Mapping[str, Any] | str | Path, output: str | Path, *, progress: Progress | None = None
) -> TrainRun:
    """Train a model by a recipe.

    A run that is finished is returned as it is; one that was broken off goes on from its last state. On the CPU of one
    machine it then gives the same losses and the same weights as if it had not been broken off.

    Args:
        recipe: One, its settings, or the YAML file that it stands in.
        output: The run's folder.
        progress: Is told how far it is.

    Raises:
        RecipeError: The recipe is wrong, does not fit the model, or is another one than the run began with.
        CorpusError: Text cannot be read, is for evaluation only, or is too short.
        RunError: Something else lies in the folder, or it cannot be written.
        DiffractError: The run has diverged, memory does not suffice, or a package is missing.
    """
    recipe, folder = load_train_recipe(recipe), Path(output)
    manifest = read_run(folder, recipe)
    if not manifest.get("finished"):
        require_extra()
        from diffract.train.loop import run_session

        run_session(recipe, folder, manifest, progress)
        manifest = read_run(folder, recipe)
    return finished_run(folder, manifest)


@dataclass(frozen=True)
class TrainPreview:
    """What a training run would do.

    Attributes:
        parameters: Of the model; tied ones count once.
        vocabulary: Tokens that the tokenizer has.
        steps: Updates of the weights.
        batch_tokens: Tokens of a step.
        tokens: Of all steps.
        parts: For each part of the mix its share, the tokens that are there and that are taken, and how many epochs
            that makes.
        checkpoints: Tokens after which one is written.
    """

    parameters: int
    vocabulary: int
    steps: int
    batch_tokens: int
    tokens: int
    parts: dict[str, dict[str, float]]
    checkpoints: list[int]


def preview_training(recipe: TrainRecipe | Mapping[str, Any] | str | Path) -> TrainPreview:
    """Say what a training run would do; text is tokenised for it, and kept in the cache.

    Args:
        recipe: One, its settings, or the YAML file that it stands in.

    Raises:
        RecipeError: The recipe is wrong, or does not fit the model.
        CorpusError: Text cannot be read, is for evaluation only, or is too short.
    """
    recipe = load_train_recipe(recipe)
    require_extra()
    from diffract.train.data import make_mixture, make_tokenizer, token_streams
    from diffract.train.model import count_parameters

    tokenizer = make_tokenizer(recipe)
    parameters = count_parameters(recipe, tokenizer)
    mixture = make_mixture(recipe, token_streams(recipe, tokenizer))
    taken, epochs = mixture.tokens(), mixture.epochs()
    parts = {
        name: {"share": share, "available": mixture.available[name], "tokens": taken[name], "epochs": epochs[name]}
        for name, share in recipe.shares.items()
    }
    counts = [step * recipe.batch_tokens for step in recipe.stops]
    return TrainPreview(
        parameters, len(tokenizer), recipe.steps, recipe.batch_tokens, counts[-1], parts, checkpoints=counts
    )


def checkpoint_name(recipe: TrainRecipe, step: int) -> str:
    """Return what a checkpoint's folder is called: sorted by name, they are in order.

    >>> checkpoint_name(TrainRecipe.model_construct(batch_tokens=4096, context=256, tokens=10**6), 50)
    'step050-tokens0204800'
    """
    last = recipe.steps * recipe.batch_tokens
    return f"step{step:0{len(str(recipe.steps))}d}-tokens{step * recipe.batch_tokens:0{len(str(last))}d}"


@dataclass
class Session:
    """What a run works with.

    Attributes:
        accelerator: Places tensors, and speaks with other processes.
        recipe: Its settings.
        folder: Where it lies.
        tokenizer: Lies beside each checkpoint.
        model: Prepared by the accelerator.
        text: Digest of each part's text.
        mixture: Its batches.
        stepper: Makes its steps.
        dtype: What checkpoints are stored in.
    """

    accelerator: Accelerator
    recipe: TrainRecipe
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    model: PreTrainedModel
    text: dict[str, str]
    mixture: Mixture
    stepper: Stepper
    dtype: torch.dtype


def run_session(recipe: TrainRecipe, folder: Path, manifest: Mapping[str, Any], progress: Progress | None) -> None:
    """Train, from the beginning or from the last state, and write everything that a run leaves.

    Args:
        recipe: What is to be done.
        folder: Where to.
        manifest: What was written there at the beginning; empty if this is the beginning.
        progress: Is told how far it is.
    """
    with accelerated(recipe, folder) as accelerator, settled(recipe, accelerator.device):
        accelerator.wait_for_everyone()  # all have read the manifest
        with claimed(folder) if accelerator.is_main_process else nullcontext():
            tokenizer, streams = _text(accelerator, recipe)
            session = _prepared(accelerator, recipe, folder, tokenizer, streams)
            _refuse_other_text(session, manifest)
            if accelerator.is_main_process and not manifest:
                write_run(folder, begun(recipe, session.text))
            _steps(session, progress)
            accelerator.wait_for_everyone()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder.

    Raises:
        RunError: One is in it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {printable(folder)!r}: {error.strerror}. Choose another folder.") from error
    with held(folder) as free:
        if not free:
            raise RunError(f"another process trains into {printable(folder)!r}. Wait for it, or choose another folder.")
        yield


def _text(accelerator: Accelerator, recipe: TrainRecipe) -> tuple[PreTrainedTokenizerFast, dict[str, Path]]:
    """Return the tokenizer and the files of tokens; the first process makes them, the others wait."""
    with accelerator.main_process_first():
        tokenizer = make_tokenizer(recipe)
        make_config(recipe, tokenizer)  # what does not fit is said before text is tokenised
        return tokenizer, token_streams(recipe, tokenizer)


def _refuse_other_text(session: Session, manifest: Mapping[str, Any]) -> None:
    changed = [name for name, key in manifest.get("text", {}).items() if session.text.get(name) != key]
    if changed:
        raise RecipeError(
            f"mix.{printable(changed[0])}: its text, or its tokenizer, is not what the run in "
            f"{printable(session.folder)!r} began with. Put it back, or choose another folder."
        )


def _prepared(
    accelerator: Accelerator,
    recipe: TrainRecipe,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    streams: Mapping[str, Path],
) -> Session:
    if recipe.rows % accelerator.num_processes:
        raise RecipeError(
            f"batch_tokens: {recipe.rows} windows cannot be shared evenly among {accelerator.num_processes} processes."
        )
    made = make_model(recipe, tokenizer).train()
    model, optimizer = accelerator.prepare(made, make_optimizer(made, recipe))
    torch.manual_seed(recipe.seed + 1 + accelerator.process_index)  # dropout
    alone = recipe.rows // accelerator.num_processes
    stepper = Stepper(accelerator, model, optimizer, recipe, min(recipe.micro_batch or alone, alone))
    mixture = make_mixture(recipe, streams)
    text = {name: path.stem for name, path in streams.items()}
    return Session(accelerator, recipe, folder, tokenizer, model, text, mixture, stepper, saved_dtype(recipe))


def _steps(session: Session, progress: Progress | None) -> None:
    """Make all steps that are left."""
    recipe, accelerator, stepper = session.recipe, session.accelerator, session.stepper
    first, seconds = _take_up(session)
    journal = Journal(accelerator, recipe, session.folder, step=first, seconds=seconds, progress=progress)
    if first == 0 and 0 in recipe.stops:
        _write_checkpoint(session, 0)
    alone = recipe.rows // accelerator.num_processes
    own = slice(accelerator.process_index * alone, (accelerator.process_index + 1) * alone)
    for step in range(first, recipe.steps):
        ids = torch.from_numpy(session.mixture.batch(step, own)).to(accelerator.device, non_blocking=True)
        rate = recipe.rate * rate_factor(recipe.schedule, step, recipe.steps)
        journal.note(step + 1, rate, *stepper.step(ids, rate))
        if step + 1 in recipe.stops:
            journal.write()  # nothing is saved of a run that has diverged
            _write_checkpoint(session, step + 1)
        if (step + 1) % recipe.state_every == 0 and step + 1 < recipe.steps:
            journal.write()
            _write_state(session, step + 1, journal.seconds)
    if accelerator.is_main_process:
        _finish(session, journal.seconds)


def _take_up(session: Session) -> tuple[int, float]:
    """Load the last state, if there is one; return the steps that are done and the seconds that they took."""
    state, step, seconds = last_state(session.folder), 0, 0.0
    if state is not None:
        step, path = state
        found = load_state(session.accelerator, path)
        seconds, session.stepper.warnings = found["seconds"], found["warnings"]
        session.stepper.micro_batch = min(session.stepper.micro_batch, found["micro_batch"])
    if session.accelerator.is_main_process:
        for stop in session.recipe.stops:
            if stop > step or step == 0:
                shutil.rmtree(_place(session, stop), ignore_errors=True)
    session.accelerator.wait_for_everyone()
    return step, seconds


def _write_state(session: Session, step: int, seconds: float) -> None:
    stepper = session.stepper
    content = {"seconds": seconds, "warnings": stepper.warnings, "micro_batch": stepper.micro_batch}
    save_state(session.accelerator, session.folder, step, content)


def _write_checkpoint(session: Session, step: int) -> None:
    """Write a checkpoint; all processes give their parts of the weights, the first one writes."""
    accelerator = session.accelerator
    state: Any = accelerator.get_state_dict(session.model)
    if accelerator.is_main_process:
        with whole_folder(_place(session, step)) as draft:
            write_model(draft, accelerator.unwrap_model(session.model), state, session.tokenizer, session.dtype)
    accelerator.wait_for_everyone()


def _finish(session: Session, seconds: float) -> None:
    """Write the manifest of a finished run; nothing is taken up from its state any more."""
    recipe, accelerator = session.recipe, session.accelerator
    checkpoints = {
        checkpoint_name(recipe, step): {
            "step": step,
            "tokens": step * recipe.batch_tokens,
            "files": file_digests(_place(session, step)),
        }
        for step in recipe.stops
    }
    rest = {
        "finished": True,
        "checkpoints": checkpoints,
        "seconds": round(seconds, 3),
        "warnings": session.stepper.warnings,
        "micro_batch": session.stepper.micro_batch,
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "device": device_name(accelerator.device),
        "threads": torch.get_num_threads(),
    }
    write_run(session.folder, begun(recipe, session.text) | rest)
    shutil.rmtree(session.folder / STATES, ignore_errors=True)


def _place(session: Session, step: int) -> Path:
    return session.folder / CHECKPOINTS / checkpoint_name(session.recipe, step)
