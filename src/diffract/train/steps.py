"""One step of training: the gradient of a batch, in as many pieces as memory asks for, and the update."""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from diffract.errors import DiffractError
from diffract.train.recipe import TrainRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator


NO_TARGET = -100


def make_optimizer(model: nn.Module, recipe: TrainRecipe) -> torch.optim.AdamW:
    """Return AdamW; matrices decay, vectors do not."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in wanted if p.ndim >= 2], "weight_decay": recipe.optimizer.weight_decay},
        {"params": [p for p in wanted if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=recipe.optimizer.betas, fused=True)


def window_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the sum of -ln p(next token) over all positions but the last of each window.

    Args:
        model: A causal language model of transformers.
        ids: Token numbers, shape (rows, context).
    """
    logits = model(input_ids=ids, use_cache=False).logits
    targets = functional.pad(ids[:, 1:], (0, 1), value=NO_TARGET)
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NO_TARGET, reduction="sum"
    )


class Stepper:
    """Makes steps, each of a whole batch whatever the size of the pieces.

    Args:
        accelerator: Of the run.
        model: Prepared by it.
        optimizer: Prepared by it.
        recipe: The run's settings.
        micro_batch: Windows that are computed at once.

    Attributes:
        micro_batch: As it is now: it is halved when memory does not suffice.
        warnings: What was changed so.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: TrainRecipe,
        micro_batch: int,
    ) -> None:
        self._accelerator, self._model, self._optimizer, self._recipe = accelerator, model, optimizer, recipe
        self.micro_batch = micro_batch
        self.warnings: list[str] = []

    def step(self, ids: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """Make one step.

        Args:
            ids: This process's rows of the batch.
            rate: The learning rate.

        Returns:
            This process's part of the mean loss, before the step, and the norm of the whole gradient.

        Raises:
            DiffractError: Memory does not suffice for one window.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        loss = self._gradient_with_room(ids)
        norm = self._accelerator.clip_grad_norm_(self._model.parameters(), self._recipe.optimizer.clip or inf)
        self._optimizer.step()
        self._optimizer.zero_grad()
        assert norm is not None, "only engines that are not supported give none"
        return loss, norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _gradient_with_room(self, ids: Tensor) -> Tensor:
        """Compute the gradient, in smaller pieces as long as memory does not suffice."""
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        while True:
            try:
                return self._gradient(ids.split(self.micro_batch), ids.numel())
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                self._halve(error)
            self._optimizer.zero_grad()
            clear_device_cache(garbage_collection=True)

    def _gradient(self, pieces: Iterable[Tensor], tokens: int) -> Tensor:
        """Add up the gradients of pieces; processes' gradients are averaged, so each is weighted with their number."""
        pieces, processes = list(pieces), self._accelerator.num_processes
        positions = tokens // self._recipe.context * (self._recipe.context - 1) * processes
        total = torch.zeros((), device=self._accelerator.device)
        for number, piece in enumerate(pieces, start=1):
            alone = number < len(pieces)
            with self._accelerator.no_sync(self._model) if alone else nullcontext():
                loss = window_loss(self._model, piece) / positions
                self._accelerator.backward(loss * processes)
            total += loss.detach()
        return total

    def _halve(self, error: RuntimeError) -> None:
        if self.micro_batch == 1:
            raise DiffractError(
                "memory does not suffice for one window. Shorten the context, or share the model (FSDP)."
            ) from error
        if self._accelerator.num_processes > 1:
            raise DiffractError(
                f"memory does not suffice for {self.micro_batch} windows, and one process cannot change that for all. "
                f"Set micro_batch: {self.micro_batch // 2}."
            ) from error
        self.warnings.append(
            f"memory did not suffice for {self.micro_batch} windows at once: micro_batch is {self.micro_batch // 2} now"
        )
        self.micro_batch //= 2


@contextmanager
def settled(recipe: TrainRecipe, device: torch.device) -> Iterator[None]:
    """Set threads and the seed, silence progress bars, and put everything back in the end."""
    from transformers.utils import logging

    threads, shown = torch.get_num_threads(), logging.is_progress_bar_enabled()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            torch.manual_seed(recipe.seed)
            torch.set_num_threads(recipe.threads or threads)
            logging.disable_progress_bar()
            yield
        finally:
            torch.set_num_threads(threads)
            if shown:
                logging.enable_progress_bar()


@contextmanager
def accelerated(recipe: TrainRecipe, folder: Path) -> Iterator[Accelerator]:
    """Yield accelerate's accelerator, and let the next run in this process have other settings.

    Raises:
        DiffractError: A tracker is not installed, or processes were started in a way that is not supported.
    """
    from accelerate.state import AcceleratorState, GradientState

    accelerator = None
    try:
        accelerator = _accelerator(recipe, folder)
        _refuse_others(accelerator)
        if recipe.log:
            accelerator.init_trackers("diffract", config=_flat(recipe))
        yield accelerator
    finally:
        if accelerator is not None:
            for tracker in accelerator.trackers:
                tracker.finish()
            accelerator.free_memory()
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate offers no public way
        GradientState._reset_state()


def wants_bf16(recipe: TrainRecipe, device: str) -> bool:
    """Whether products are computed in bf16 on a device, named as torch does."""
    if recipe.precision == "auto":
        return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return recipe.precision == "bf16"


def device_name(device: torch.device) -> str:
    """Name a device in a manifest."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _accelerator(recipe: TrainRecipe, folder: Path) -> Accelerator:
    from accelerate import Accelerator, PartialState
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env

    available = {str(tracker) for tracker in get_available_trackers()}
    if missing := [name for name in recipe.log if name not in available]:
        raise DiffractError(f"log: {missing[0]} is not installed: pip install {missing[0]}, or leave it out.")
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    mixed = "bf16" if wants_bf16(recipe, str(PartialState(cpu=cpu).device)) else "no"
    return Accelerator(
        cpu=cpu,  # else processes without a GPU would not know of each other
        mixed_precision=mixed,
        log_with=list(recipe.log) or None,
        project_dir=folder,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # micro-batches are added up here
    )


def _refuse_others(accelerator: Accelerator) -> None:
    """Raise for engines that want a loop of their own."""
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM") or (kind == "FSDP" and not accelerator.is_fsdp2):
        raise DiffractError(
            f"{kind} is not supported, expected one process, several with copies of the model, or FSDP with "
            "fsdp_version: 2 (docs/train.md)."
        )
    if accelerator.num_processes > 1:
        atexit.register(_leave)


def _leave() -> None:
    """End a group of processes as torch wants it, where that has not been done."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _flat(recipe: TrainRecipe) -> dict[str, int | float | str]:
    """The settings that trackers can store."""
    return {key: value for key, value in recipe.as_dict().items() if isinstance(value, int | float | str)}
