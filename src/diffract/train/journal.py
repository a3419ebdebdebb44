"""The log of a run: one line for each step, and the check that losses are numbers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffract.errors import DiffractError
from diffract.train.records import LOG, cut_log
from diffract.train.settings import TrainRecipe
from diffract.train.states import last_state

if TYPE_CHECKING:
    from accelerate import Accelerator

Progress = Callable[[float, float, str], None]
"""``progress(done, total, what)``, in tokens."""

STEPS_AT_ONCE = 10
"""Steps whose losses a device keeps before they are asked for: each time the processor waits for it."""


class Journal:
    """Collects losses where they are computed, and writes them together.

    Args:
        accelerator: Of the run.
        recipe: Its settings.
        folder: Of the run.
        step: From which it goes on; what the log says of later ones is dropped.
        seconds: How long it took up to there.
        progress: Is told how far it is.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: TrainRecipe,
        folder: Path,
        *,
        step: int,
        seconds: float,
        progress: Progress | None,
    ) -> None:
        self._accelerator, self._recipe, self._folder, self._progress = accelerator, recipe, folder, progress
        self._waiting: list[tuple[int, float, Tensor, Tensor]] = []
        self._at_once = 1 if accelerator.device.type == "cpu" else STEPS_AT_ONCE
        self._begun = time.perf_counter() - seconds
        if accelerator.is_main_process:
            cut_log(folder / LOG, step)

    @property
    def seconds(self) -> float:
        """How long the run has taken, earlier parts included."""
        return time.perf_counter() - self._begun

    def note(self, step: int, rate: float, loss: Tensor, norm: Tensor) -> None:
        """Take down a step, counted from 1: this process's part of the loss, and the norm of the gradient."""
        self._waiting.append((step, rate, loss, norm))
        if len(self._waiting) >= self._at_once:
            self.write()

    def write(self) -> None:
        """Write what waits.

        Raises:
            DiffractError: A loss or a gradient is no number; the steps before are written.
        """
        if not self._waiting:
            return
        losses = torch.stack([loss for _, _, loss, _ in self._waiting]).float()
        norms = torch.stack([norm for *_, norm in self._waiting]).float()
        shown = zip(self._accelerator.reduce(losses, "sum").tolist(), norms.tolist(), strict=True)  # pyright: ignore[reportAttributeAccessIssue] (a tensor stays one)
        taken, self._waiting = self._waiting, []
        lines = []
        for (step, rate, *_), (loss, norm) in zip(taken, shown, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._append(lines)
                self._stop(step, loss, norm)
            lines.append(self._line(step, rate, loss, norm))
        self._append(lines)

    def _line(self, step: int, rate: float, loss: float, norm: float) -> dict[str, float]:
        tokens = step * self._recipe.batch_tokens
        return {
            "step": step,
            "tokens": tokens,
            "loss": loss,
            "rate": rate,
            "grad_norm": norm,
            "seconds": round(self.seconds, 3),
        }

    def _append(self, lines: list[dict[str, float]]) -> None:
        if not lines or not self._accelerator.is_main_process:
            return
        with (self._folder / LOG).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        for line in lines if self._recipe.log else []:
            self._accelerator.log({k: v for k, v in line.items() if k != "step"}, step=int(line["step"]))
        if self._progress:
            total = self._recipe.steps * self._recipe.batch_tokens
            self._progress(lines[-1]["tokens"], total, f"loss {lines[-1]['loss']:.3f}")

    def _stop(self, step: int, loss: float, norm: float) -> None:
        good = last_state(self._folder)
        kept = f"The last good state is {str(good[1])!r}" if good else "There is no earlier state"
        raise DiffractError(
            f"step {step} ({step * self._recipe.batch_tokens:,} tokens): loss {loss}, gradient norm {norm}. Training "
            f"has diverged. {kept}. Lower optimizer.rate, lengthen schedule.warmup, or lower optimizer.clip."
        )
