"""Measure what ``SpectralCallback`` costs: its share of training at the default interval.

    python benchmarks/callback.py                               # two OLMo-2 models, some minutes on one core
    python benchmarks/callback.py --models small --repeats 3    # the small one alone, three times

Each setting trains a model of its own for a few steps and measures at every one of them, so that caches are as cold as
in training. Both are timed by the processor, all threads together, which is the time by the clock for one thread on an
idle machine, and the one to go by where others use it. Medians over the steps but the first; a share is
``measurement / (every x step)`` at the default ``every``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from itertools import chain, product
from statistics import median
from typing import Any

import polars as pl
import torch
import transformers as tf

from diffract import SpectralCallback
from diffract.callback import EVERY

CONTEXT, VOCABULARY, BATCH = 256, 2048, 16
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "num_attention_heads": 8}
MODELS = {
    "small": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_key_value_heads": 2},
    "large": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_key_value_heads": 2},
}
PAIRS = {"metrics": "norms, ranks, change, agreement", "base": "start"}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "heads=False": {"heads": False},
    "base=start": {"base": "start"},
    "base=start, norms ranks change agreement": PAIRS,
    "all": {"metrics": "all"},
}


class Clock(tf.TrainerCallback):
    """Notes the processor's time at the beginning and the end of each step."""

    def __init__(self) -> None:
        self.begun, self.ended = list[float](), list[float]()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.begun.append(time.process_time())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.ended.append(time.process_time())


def train(shape: dict[str, int], setting: dict[str, Any], steps: int) -> tuple[list[float], list[float], int, int]:
    """Return seconds of steps and of measurements, parameters, and matrices that are measured."""
    torch.manual_seed(0)
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model = tf.Olmo2ForCausalLM(tf.Olmo2Config(**COMMON, **shape, **tokens))
    ids = torch.randint(0, VOCABULARY, (BATCH * steps, CONTEXT))
    before, after = Clock(), Clock()
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
        callbacks = [before, SpectralCallback(every=1, **setting), after]
        trainer = tf.Trainer(model, args, train_dataset=data, callbacks=callbacks)
        trainer.remove_callback(tf.trainer_callback.PrinterCallback)
        trainer.train()
        matrices = pl.read_parquet(f"{folder}/spectra.parquet")["name"].n_unique()
    stepped = [end - begin for begin, end in zip(before.begun, before.ended, strict=True)]
    measured = [end - begin for begin, end in zip(before.ended, after.ended, strict=True)]
    return stepped[1:], measured[1:], model.num_parameters(), matrices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    tf.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "SpectralCallback took")  # at every step it is far too dear
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, every={EVERY}\n")
    print("| model | setting | matrices | a measurement | a step | share |\n|---|---|---|---|---|---|")
    for name, setting in product(args.models, args.settings):
        runs = [train(MODELS[name], SETTINGS[setting], args.steps) for _ in range(args.repeats)]
        stepped, measured = (list(chain(*(run[i] for run in runs))) for i in (0, 1))
        step, seconds, (_, _, parameters, matrices) = median(stepped), median(measured), runs[0]
        shown = f"{seconds:.3f} s ({min(measured):.3f} to {max(measured):.3f}) | {step:.2f} s"
        share = seconds / (EVERY * step)
        print(f"| {parameters / 1e6:.1f}M | {setting} | {matrices} | {shown} | {share:.3%} |", flush=True)


if __name__ == "__main__":
    main()
