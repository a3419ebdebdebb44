"""Training by a recipe: ``train``, ``_prepared`` and ``_run`` tell it from top to bottom as it happens.

The loop is our own so that a run that was killed at any moment goes on to the same bits: a batch is a pure function of
recipe and step, and the last state on disk holds everything else that a step depends on.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffract.errors import RecipeError, printable
from diffract.settings import Progress
from diffract.store import claimed, whole_folder
from diffract.train.data import Mixture, make_mixture, make_tokenizer, token_streams
from diffract.train.model import count_parameters, make_config, make_model, saved_dtype, write_model
from diffract.train.recipe import TrainRecipe, load_train_recipe, rate_factor, require_extra
from diffract.train.records import (
    STATES,
    Journal,
    TrainRun,
    begun,
    checkpoint_folder,
    checkpoint_name,
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
    from transformers import PreTrainedTokenizerFast


@dataclass
class Session:
    """What a run works with.

    Attributes:
        accelerator: Places tensors, and speaks with other processes.
        recipe: The settings of the run.
        folder: Where the run lies.
        tokenizer: Lies beside each checkpoint.
        text: Digest of each part's text.
        mixture: The batches of the run.
        stepper: Makes the steps; holds the model and the optimizer.
        dtype: What checkpoints are stored in.
    """

    accelerator: Accelerator
    recipe: TrainRecipe
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    text: dict[str, str]
    mixture: Mixture
    stepper: Stepper
    dtype: torch.dtype

    def batch(self, step: int) -> Tensor:
        """Return this process's rows of a step's batch, on its device: token numbers, shape (rows, context)."""
        alone = self.recipe.rows // self.accelerator.num_processes
        first = self.accelerator.process_index * alone
        ids = torch.from_numpy(self.mixture.batch(step, slice(first, first + alone)))
        return ids.to(self.accelerator.device, non_blocking=True)

    def write_checkpoint(self, step: int) -> None:
        """Write a checkpoint; all processes give their parts of the weights, the first one writes."""
        accelerator, model = self.accelerator, self.stepper.model
        state: Any = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            with whole_folder(checkpoint_folder(self.folder, self.recipe, step)) as draft:
                write_model(draft, accelerator.unwrap_model(model), state, tokenizer=self.tokenizer, dtype=self.dtype)
        accelerator.wait_for_everyone()


def train(
    recipe: TrainRecipe | Mapping[str, Any] | str | Path, output: str | Path, *, progress: Progress | None = None
) -> TrainRun:
    """Train a model by a recipe.

    A run that is finished is returned as it is; one that was broken off goes on from its last state. On the CPU of one
    machine it then gives the same losses and the same weights as if it had not been broken off. Who interrupts it has
    it save a state after the present step; who does so twice ends it at once.

    Args:
        recipe: A recipe, its settings, or the YAML file that it stands in.
        output: The folder of the run.
        progress: Is told the tokens done, all tokens and the loss.

    Raises:
        RecipeError: The recipe is wrong, does not fit the model, or is another one than the run began with.
        CorpusError: Text cannot be read, is for evaluation only, or is too short.
        RunError: Something else lies in the folder, or it cannot be written.
        DiffractError: The run has diverged, memory does not suffice, or a package is missing.
    """
    recipe, folder = load_train_recipe(recipe), Path(output)
    manifest = read_run(folder, recipe)
    if manifest.get("finished"):
        return finished_run(folder, manifest)
    require_extra()
    with accelerated(recipe, folder) as accelerator, settled(recipe, accelerator.device):
        # The first process is about to change the folder, so all others must have read the manifest by now.
        accelerator.wait_for_everyone()
        with claimed(folder, "trains into") if accelerator.is_main_process else nullcontext():
            session = _prepared(accelerator, recipe, folder)
            _refuse_other_text(session, manifest)
            if accelerator.is_main_process and not manifest:
                write_run(folder, begun(recipe, session.text))
            _run(session, progress)
            accelerator.wait_for_everyone()
    return finished_run(folder, read_run(folder, recipe))


def _prepared(accelerator: Accelerator, recipe: TrainRecipe, folder: Path) -> Session:
    """Make text, model and optimizer; what is made by the first process the others find in the cache."""
    with accelerator.main_process_first():
        tokenizer = make_tokenizer(recipe)
        # Text is tokenised for minutes; a model that does not fit its tokenizer should be refused before.
        make_config(recipe, tokenizer)
        streams = token_streams(recipe, tokenizer)
    # Padding or a smaller last share would make other gradients than one process does.
    if recipe.rows % accelerator.num_processes:
        raise RecipeError(
            f"batch_tokens: {recipe.rows} windows cannot be shared evenly among {accelerator.num_processes} processes."
        )
    made = make_model(recipe, tokenizer).train()
    model, optimizer = accelerator.prepare(made, make_optimizer(made, recipe))
    # New weights came from the recipe's seed, the same in all processes; dropout must differ between them.
    torch.manual_seed(recipe.seed + 1 + accelerator.process_index)
    alone = recipe.rows // accelerator.num_processes
    return Session(
        accelerator=accelerator,
        recipe=recipe,
        folder=folder,
        tokenizer=tokenizer,
        text={name: path.stem for name, path in streams.items()},
        mixture=make_mixture(recipe, streams),
        stepper=Stepper(
            accelerator, model, optimizer, recipe=recipe, micro_batch=min(recipe.micro_batch or alone, alone)
        ),
        dtype=saved_dtype(recipe),
    )


def _refuse_other_text(session: Session, manifest: Mapping[str, Any]) -> None:
    changed = [name for name, key in manifest.get("text", {}).items() if session.text.get(name) != key]
    if changed:
        raise RecipeError(
            f"mix.{printable(changed[0])}: its text, or its tokenizer, is not what the run in "
            f"{printable(session.folder)!r} began with. Put it back, or choose another folder."
        )


def _run(session: Session, progress: Progress | None) -> None:
    """Make all steps that are left, and finish the run."""
    recipe, accelerator, stepper = session.recipe, session.accelerator, session.stepper

    first, seconds = 0, 0.0
    if state := last_state(session.folder):
        first, path = state
        found = load_state(accelerator, path)
        seconds, stepper.warnings = found["seconds"], found["warnings"]
        stepper.micro_batch = min(stepper.micro_batch, found["micro_batch"])
    if accelerator.is_main_process:
        # Whatever was written after the state is made anew, from the same bits; a folder is never written over.
        for stop in recipe.stops:
            if stop > first or first == 0:
                shutil.rmtree(checkpoint_folder(session.folder, recipe, stop), ignore_errors=True)
    accelerator.wait_for_everyone()
    journal = Journal(accelerator, recipe, session.folder, step=first, seconds=seconds, progress=progress)

    if first == 0 and 0 in recipe.stops:
        session.write_checkpoint(0)
    with _interrupted_between_steps(accelerator):
        for step in range(first, recipe.steps):
            rate = recipe.rate * rate_factor(recipe.schedule, step, recipe.steps)
            loss = stepper.gradient(session.batch(step))
            norm = stepper.update(rate)
            done = step + 1
            journal.note(done, rate=rate, loss=loss, norm=norm)
            # The journal raises where a loss is no number, so that nothing is saved of a run that has diverged.
            if done in recipe.stops:
                journal.write()
                session.write_checkpoint(done)
            if done == recipe.steps:
                break
            # A device is not made to wait for this question after each step, but where it waits for the journal.
            interrupted = not journal.waits and accelerator.check_trigger()
            if interrupted or done % recipe.state_every == 0:
                journal.write()
                content = {"seconds": journal.seconds, "warnings": stepper.warnings, "micro_batch": stepper.micro_batch}
                save_state(accelerator, session.folder, step=done, content=content)
            if interrupted:
                raise KeyboardInterrupt

    if accelerator.is_main_process:
        write_run(session.folder, begun(recipe, session.text) | _outcome(session, journal.seconds))
        shutil.rmtree(session.folder / STATES, ignore_errors=True)


@contextmanager
def _interrupted_between_steps(accelerator: Accelerator) -> Iterator[None]:
    """Have the first signal that would raise KeyboardInterrupt set accelerate's trigger, which all processes see.

    Wherever it came, weights, optimizer and random numbers would be those of half a step.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # Only the main thread may ask for signals, and what a program does with its own is left as it is.
    here = threading.current_thread() is threading.main_thread()
    taken = [number for number in numbers if here and signal.getsignal(number) is signal.default_int_handler]

    def give_back() -> None:
        for number in taken:
            signal.signal(number, signal.default_int_handler)

    def note(number: int, frame: object) -> None:
        give_back()
        accelerator.set_trigger()

    for number in taken:
        signal.signal(number, note)
    try:
        yield
    finally:
        give_back()


def _outcome(session: Session, seconds: float) -> dict[str, Any]:
    """Return what the manifest of a finished run has beyond that of one that has begun."""
    recipe, accelerator = session.recipe, session.accelerator
    checkpoints = {
        checkpoint_name(recipe, step): {
            "step": step,
            "tokens": step * recipe.batch_tokens,
            "files": file_digests(checkpoint_folder(session.folder, recipe, step)),
        }
        for step in recipe.stops
    }
    return {
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


@dataclass(frozen=True)
class TrainPreview:
    """What a training run would do.

    Attributes:
        parameters: Parameters of the model; tied ones count once.
        vocabulary: Tokens that the tokenizer has.
        steps: Updates of the weights.
        batch_tokens: Tokens of a step.
        tokens: Tokens of all steps.
        parts: For each part of the mix its share, the tokens that are there and that are taken, and how many epochs
            that makes.
        checkpoints: Tokens after which a checkpoint is written.
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
        recipe: A recipe, its settings, or the YAML file that it stands in.

    Raises:
        RecipeError: The recipe is wrong, or does not fit the model.
        CorpusError: Text cannot be read, is for evaluation only, or is too short.
    """
    recipe = load_train_recipe(recipe)
    require_extra()
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
        parameters=parameters,
        vocabulary=len(tokenizer),
        steps=recipe.steps,
        batch_tokens=recipe.batch_tokens,
        tokens=counts[-1],
        parts=parts,
        checkpoints=counts,
    )
