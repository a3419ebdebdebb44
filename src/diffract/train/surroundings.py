"""What a run changes of its process while it lasts: threads, random numbers, and the state of libraries."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffract.errors import DiffractError
from diffract.train.settings import TrainRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator


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
