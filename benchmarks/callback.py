"""Measure what ``SpectralCallback`` costs: its share of training at the default interval.

    python benchmarks/callback.py                    # two OLMo-2 models, some minutes on one core
    python benchmarks/callback.py --models small     # the small one alone

Each setting trains a model of its own for a few steps and measures at every one of them, so that caches are as cold as
in training. Seconds are medians over the steps but the first; a step is timed from its beginning to its end, without
the measurement. The share is ``seconds / (every x step)`` at the default ``every``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from typing import Any

import polars as pl
import torch
import transformers as tf

from diffract import SpectralCallback
from diffract.callback.spectral import EVERY

CONTEXT, VOCABULARY, BATCH = 256, 2048, 16
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "num_attention_heads": 8}
MODELS = {
    "small": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_key_value_heads": 2},
    "large": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_key_value_heads": 2},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "default, heads=False": {"heads": False},
    'default, base="start"': {"base": "start"},
    'metrics="norms, ranks, change, agreement", base="start"': {
        "metrics": "norms, ranks, change, agreement",
        "base": "start",
    },
    'metrics="all"': {"metrics": "all"},
}


class Clock(tf.TrainerCallback):
    """Times steps; stands before the callback that is measured."""

    def __init__(self) -> None:
        self.begun, self.seconds = 0.0, list[float]()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it, before anything is measured."""
        self.seconds.append(time.perf_counter() - self.begun)


def train(shape: dict[str, int], setting: dict[str, Any], steps: int) -> tuple[list[float], list[float], int, int]:
    """Return seconds of steps and of measurements, parameters, and matrices that are measured."""
    torch.manual_seed(0)
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model = tf.Olmo2ForCausalLM(tf.Olmo2Config(**COMMON, **shape, **tokens))
    ids = torch.randint(0, VOCABULARY, (BATCH * steps, CONTEXT))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = tf.TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        data = [{"input_ids": row, "labels": row} for row in ids]
        trainer = tf.Trainer(model, args, train_dataset=data, callbacks=[clock, SpectralCallback(every=1, **setting)])
        trainer.remove_callback(tf.trainer_callback.PrinterCallback)
        trainer.train()
        matrices = pl.read_parquet(f"{folder}/spectra.parquet")["name"].n_unique()
    measured = [entry["spectral/seconds"] for entry in trainer.state.log_history if "spectral/seconds" in entry]
    return clock.seconds[1:], measured[2:], model.num_parameters(), matrices  # the first two are before and of step 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    tf.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "SpectralCallback took")  # at every step it is far too dear
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, every={EVERY}\n")
    print("| model | setting | matrices | a measurement | a step | share |\n|---|---|---|---|---|---|")
    for name in args.models:
        for setting, options in SETTINGS.items():
            stepped, measured, parameters, matrices = train(MODELS[name], options, args.steps)
            step, seconds = statistics.median(stepped), statistics.median(measured)
            shown = f"{seconds:.3f} s ({min(measured):.3f} to {max(measured):.3f}) | {step:.2f} s"
            share = seconds / (EVERY * step)
            print(f"| {parameters / 1e6:.1f}M | `{setting}` | {matrices} | {shown} | {share:.3%} |", flush=True)


if __name__ == "__main__":
    main()
