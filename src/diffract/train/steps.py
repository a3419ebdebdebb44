"""One step of training: the gradient of a batch, in as many pieces as memory asks for, and the update."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
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
"""What torch's cross-entropy takes for a position that is not predicted."""


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
    # In float32: 16 bits would round the logarithm of each of many thousand alternatives.
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NO_TARGET, reduction="sum"
    )


@dataclass
class Stepper:
    """Makes steps, each of a whole batch whatever the size of the pieces.

    Attributes:
        accelerator: Places tensors, and speaks with other processes.
        model: The model as the accelerator prepared it.
        optimizer: The optimizer as the accelerator prepared it.
        recipe: The settings of the run.
        micro_batch: Windows that are computed at once; it is halved when memory does not suffice.
        warnings: Says where that was done.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    recipe: TrainRecipe
    micro_batch: int
    warnings: list[str] = field(default_factory=list)

    def gradient(self, ids: Tensor) -> Tensor:
        """Compute the gradient of a batch, in smaller pieces as long as memory does not suffice.

        Args:
            ids: This process's rows of the batch.

        Returns:
            This process's part of the mean loss.

        Raises:
            DiffractError: Memory does not suffice for one window.
        """
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        while True:
            try:
                return self._gradient_of_pieces(ids)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                self._halve(error)
            # Outside of the handler, as the error's traceback holds the tensors that are to be freed.
            self.optimizer.zero_grad()
            clear_device_cache(garbage_collection=True)

    def update(self, rate: float) -> Tensor:
        """Change the weights by the gradient and forget it; return its norm before it was shortened."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip or inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert norm is not None, "only engines that are not supported give none"
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _gradient_of_pieces(self, ids: Tensor) -> Tensor:
        pieces, processes = ids.split(self.micro_batch), self.accelerator.num_processes
        # Of the whole batch in all processes, so that sums over pieces are the mean whatever the pieces' size.
        positions = ids.numel() // self.recipe.context * (self.recipe.context - 1) * processes
        total = torch.zeros((), device=self.accelerator.device)
        for number, piece in enumerate(pieces, start=1):
            # Processes exchange their gradients once, at the last piece: they are sums over the pieces by then.
            alone = number < len(pieces)
            with self.accelerator.no_sync(self.model) if alone else nullcontext():
                loss = window_loss(self.model, piece) / positions
                # The exchange averages over processes, and their sum is wanted.
                self.accelerator.backward(loss * processes)
            total += loss.detach()
        return total

    def _halve(self, error: RuntimeError) -> None:
        if self.micro_batch == 1:
            raise DiffractError(
                "memory does not suffice for one window. Shorten the context, or share the model (FSDP)."
            ) from error
        # The others wait at the exchange of gradients for as many pieces as before.
        if self.accelerator.num_processes > 1:
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
        accelerator = _make_accelerator(recipe, folder)
        if recipe.log:
            # Trackers store plain values only.
            plain = {k: v for k, v in recipe.as_dict().items() if isinstance(v, int | float | str)}
            accelerator.init_trackers("diffract", config=plain)
        yield accelerator
    finally:
        if accelerator is not None:
            for tracker in accelerator.trackers:
                tracker.finish()
            accelerator.free_memory()
        # accelerate keeps one state for the life of a process and offers no public way to begin another.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def _make_accelerator(recipe: TrainRecipe, folder: Path) -> Accelerator:
    from accelerate import Accelerator, PartialState
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env

    available = {str(tracker) for tracker in get_available_trackers()}
    if missing := [name for name in recipe.log if name not in available]:
        raise DiffractError(f"log: {missing[0]} is not installed: pip install {missing[0]}, or leave it out.")
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=cpu,  # else processes without a GPU would not know of each other
        mixed_precision="bf16" if wants_bf16(recipe, torch.device(PartialState(cpu=cpu).device or "cpu")) else "no",
        log_with=list(recipe.log) or None,
        project_dir=folder,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # micro-batches are added up here
    )
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM") or (kind == "FSDP" and not accelerator.is_fsdp2):
        raise DiffractError(
            f"{kind} is not supported, expected one process, several with copies of the model, or FSDP with "
            "fsdp_version: 2 (docs/train.md)."
        )
    if accelerator.num_processes > 1:
        # torch warns at the end of a process whose group nobody has left; later runs in it need the group still.
        atexit.register(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())
    return accelerator


def wants_bf16(recipe: TrainRecipe, device: torch.device) -> bool:
    """Return whether products are computed in bf16 on a device."""
    if recipe.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return recipe.precision == "bf16"


def device_name(device: torch.device) -> str:
    """Return what a manifest calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
