"""Measure training: tokens per second, and what the loop costs over a bare one in torch.

    python benchmarks/training.py                 # on one thread
    python benchmarks/training.py --threads 2     # two threads want an idle machine

An OLMo-2 of width 128 with 4 layers and a vocabulary of 2,048 (1.0 million parameters, embeddings tied), context 256,
16 windows a step, on word problems. The bare loop takes the same batches and makes the same steps: forward, backward,
clipping, fused AdamW. Times are medians over steps, by the clock and by the processor (the one to go by where others
use the machine), of several runs in turn.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from diffract.train import TrainRecipe, load_train_recipe, train
from diffract.train.data import make_mixture, make_tokenizer, token_streams
from diffract.train.model import make_model
from diffract.train.steps import make_optimizer, window_loss

STEPS = 30
WARMING_UP = 3

MODEL = {
    "model_type": "olmo2",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def recipe(threads: int) -> TrainRecipe:
    return load_train_recipe(
        {
            "model": {"config": MODEL},
            "tokenizer": {"train": {"vocabulary": 2048}},
            "mix": {"problems": {"sources": ["word-problems:1-2"]}, "code": {"sources": ["stdlib"]}},
            "tokens": STEPS * 4096,
            "threads": threads,
        }
    )


def now() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def per_step(times: list[np.ndarray]) -> np.ndarray:
    """Median seconds of a step by the clock and by the processor."""
    return np.median(np.diff(np.array(times[WARMING_UP:]), axis=0), axis=0)


def bare(made: TrainRecipe) -> np.ndarray:
    tokenizer = make_tokenizer(made)
    mixture = make_mixture(made, token_streams(made, tokenizer))
    model = make_model(made, tokenizer).train()
    optimizer = make_optimizer(model, made)
    times = []
    for step in range(made.steps):
        ids = torch.from_numpy(mixture.batch(step))
        loss = window_loss(model, ids) / (made.rows * (made.context - 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(now())
    return per_step(times)


def ours(made: TrainRecipe) -> np.ndarray:
    times = []
    with tempfile.TemporaryDirectory() as folder:
        train(made, Path(folder) / "run", progress=lambda *told: times.append(now()))
    return per_step(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    made = recipe(options.threads)
    for _ in range(options.runs):
        for name, run in (("bare", bare), ("train", ours)):
            clock, processor = run(made)
            print(
                f"{name:<6} {clock * 1e3:6.1f} ms a step by the clock ({made.batch_tokens / clock:,.0f} tokens/s), "
                f"{processor * 1e3:6.1f} ms by the processor",
                flush=True,
            )


if __name__ == "__main__":
    main()
