"""What a run changes of its process while it lasts: threads, random numbers, and the state of libraries."""

from __future__ import annotations

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
def settled(recipe: TrainRecipe) -> Iterator[None]:
    """Set threads and the seed, silence progress bars, and put everything back in the end."""
    from transformers.utils import logging

    threads, shown = torch.get_num_threads(), logging.is_progress_bar_enabled()
    with torch.random.fork_rng():
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
        DiffractError: A tracker is not installed.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import GradientAccumulationPlugin

    available = {str(tracker) for tracker in get_available_trackers()}
    if missing := [name for name in recipe.log if name not in available]:
        raise DiffractError(f"log: {missing[0]} is not installed: pip install {missing[0]}, or leave it out.")
    mixed = "bf16" if wants_bf16(recipe, str(PartialState().device)) else "no"
    accelerator = Accelerator(
        mixed_precision=mixed,
        log_with=list(recipe.log) or None,
        project_dir=folder,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # micro-batches are added up here
    )
    try:
        if recipe.log:
            accelerator.init_trackers("diffract", config=_flat(recipe))
        yield accelerator
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.free_memory()
        AcceleratorState._reset_state()
        GradientState._reset_state()


def wants_bf16(recipe: TrainRecipe, device: str) -> bool:
    """Whether products are computed in bf16 on a device, named as torch does."""
    if recipe.precision == "auto":
        return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return recipe.precision == "bf16"


def device_name(device: torch.device) -> str:
    """Name a device in a manifest."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _flat(recipe: TrainRecipe) -> dict[str, int | float | str]:
    """The settings that trackers can store."""
    return {key: value for key, value in recipe.as_dict().items() if isinstance(value, int | float | str)}
