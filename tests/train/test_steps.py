"""Steps: the loss, its gradient in pieces, and what happens when memory or numbers give out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from diffract.errors import DiffractError
from diffract.train import load_train_recipe, steps, train
from diffract.train.records import read_log
from diffract.train.steps import make_optimizer, window_loss

Make = Callable[..., dict[str, Any]]

PIECES_RTOL = 1e-5
"""float32 sums in another order, a few steps of AdamW long."""


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    settings = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=11, pad_token_id=None, bos_token_id=1, eos_token_id=2, **settings)
    return AutoModelForCausalLM.from_config(config)


def log_of(run: Any) -> list[float]:
    return [line["loss"] for line in read_log(run.log)]


def test_the_loss_is_that_of_every_next_token(model: nn.Module) -> None:
    ids = torch.arange(15).reshape(3, 5) % 11
    expected = 0.0
    for row in ids:
        chances = model(input_ids=row[None]).logits[0].double().softmax(-1)
        expected -= sum(chances[i, row[i + 1]].log().item() for i in range(4))
    assert window_loss(model, ids).item() == pytest.approx(expected, rel=1e-6)  # float32 against float64


def test_vectors_do_not_decay(model: nn.Module, recipe: Make) -> None:
    decaying, rest = make_optimizer(model, load_train_recipe(recipe(optimizer={"weight_decay": 0.3}))).param_groups
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decaying["params"]} == {2}
    assert {p.ndim for p in rest["params"]} == {1}
    assert len(decaying["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_pieces_make_the_same_batch(recipe: Make, tmp_path: Path) -> None:
    whole = train(recipe(), tmp_path / "whole")
    pieces = train(recipe(micro_batch=3), tmp_path / "pieces")  # four windows: three and one
    assert log_of(pieces) == pytest.approx(log_of(whole), rel=PIECES_RTOL)


def test_memory_that_does_not_suffice_halves_the_pieces(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(recipe(), tmp_path / "whole")

    def short_of_memory(model: nn.Module, ids: Tensor) -> Tensor:
        if len(ids) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return window_loss(model, ids)

    monkeypatch.setattr(steps, "window_loss", short_of_memory)
    run = train(recipe(), tmp_path / "pieces")
    assert log_of(run) == pytest.approx(log_of(whole), rel=PIECES_RTOL)
    assert run.warnings == (
        "memory did not suffice for 4 windows at once: micro_batch is 2 now",
        "memory did not suffice for 2 windows at once: micro_batch is 1 now",
    )
    assert run == train(recipe(), tmp_path / "pieces")  # warnings stay with the run


def test_memory_for_less_than_a_window_ends_the_run(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(model: nn.Module, ids: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(steps, "window_loss", no_memory)
    with pytest.raises(DiffractError, match="memory does not suffice for one window"):
        train(recipe(), tmp_path / "out")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_run_that_diverges_stops_and_keeps_its_last_state(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    calls = []

    def diverging(model: nn.Module, ids: Tensor) -> Tensor:
        calls.append(1)
        return window_loss(model, ids) * (bad if len(calls) == 10 else 1)

    monkeypatch.setattr(steps, "window_loss", diverging)
    with pytest.raises(DiffractError, match=rf"step 10 \(640 tokens\): loss {bad}.*last good state is .*step000000005"):
        train(recipe(checkpoints=[6 * 64, 10 * 64]), tmp_path / "out")
    assert len(read_log(tmp_path / "out" / "log.jsonl")) == 9
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step06-tokens384"]
    monkeypatch.undo()
    assert len(log_of(train(recipe(checkpoints=[6 * 64, 10 * 64]), tmp_path / "out"))) == 12


def test_settings_of_the_process_are_put_back(recipe: Make, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(7)
    train(recipe(tokens=64, threads=threads + 1), tmp_path / "one")
    assert torch.get_num_threads() == threads
    assert (torch.rand(3) == expected).all()
    train(recipe(tokens=64, precision="bf16"), tmp_path / "two")  # another precision in one process
