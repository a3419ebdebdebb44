"""A recipe becomes a model that transformers loads."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffract.train import train
from diffract.train.records import read_log

Make = Callable[..., dict[str, Any]]


def test_a_recipe_becomes_models_that_transformers_loads(recipe: Make, tmp_path: Path) -> None:
    run = train(recipe(checkpoints=[0, 300], optimizer={"rate": 0.02}), tmp_path / "out")
    assert list(run.checkpoints) == [0, 320, 768]  # 300 tokens are five steps of 64, rounded up
    assert run.final == run.checkpoints[768]
    tokenizer = AutoTokenizer.from_pretrained(run.final)
    model = AutoModelForCausalLM.from_pretrained(run.final)
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert model.dtype == torch.float32
    assert len({path.stat().st_mode for path in run.final.iterdir()}) == 1  # who may read one may read all
    losses = [line["loss"] for line in read_log(run.log)]
    assert len(losses) == 12
    assert abs(losses[0] - math.log(280)) < 0.2  # a new model says nothing about the next token: ln(vocabulary)
    assert losses[-1] < losses[0] - 0.5
