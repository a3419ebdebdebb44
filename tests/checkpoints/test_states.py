"""Training states: the model is found, everything else is set aside and named, and what is undecided is asked."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffract.api import scan, trajectory
from diffract.checkpoints import open_checkpoint
from diffract.checkpoints.states import MEAN, NUMBER, OPTIMIZER
from diffract.errors import CheckpointError

MODEL = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.ones(2)}
ADAM = {
    "state": {0: {"exp_avg": torch.ones(2, 3), "exp_avg_sq": torch.ones(2, 3), "step": torch.tensor(3.0)}},
    "param_groups": [{"lr": 1e-3, "params": [0]}],
}
AVERAGE = {name: value / 2 for name, value in MODEL.items()}

STATES: dict[str, tuple[Any, dict[str, str]]] = {
    "nanoGPT": (
        {"model": MODEL, "optimizer": ADAM, "iter_num": 1, "best_val_loss": torch.tensor(2.0), "config": {"a": 1}},
        {"best_val_loss": NUMBER, "optimizer.state.0.exp_avg": OPTIMIZER},
    ),
    "Lightning": (
        {"state_dict": MODEL, "optimizer_states": [ADAM], "callbacks": {}, "epoch": 2, "hyper_parameters": {"lr": 1.0}},
        {"optimizer_states.0.state.0.exp_avg": OPTIMIZER},
    ),
    "DeepSpeed": (
        {"module": MODEL, "buffer_names": ["x"], "optimizer": None, "ds_config": {}, "args": argparse.Namespace(a=1)},
        {},
    ),
    "average": (
        {"model_state_dict": MODEL, "ema_state_dict": AVERAGE, "optimizer_state_dict": ADAM, "epoch": 1},
        {"ema_state_dict.layer.weight": MEAN, "optimizer_state_dict.state.0.step": OPTIMIZER},
    ),
    "average alone": ({"ema": MODEL, "optimizer": ADAM}, {"optimizer.state.0.exp_avg_sq": OPTIMIZER}),
    "any name": ({"backbone": MODEL, "optim": ADAM, "rng": torch.get_rng_state()}, {"rng": OPTIMIZER}),
    "wrapped twice": ({"app": {"model": MODEL, "optimizer": ADAM}}, {"app.optimizer.state.0.exp_avg": OPTIMIZER}),
    "random states": (
        {"model": MODEL, "numpy": np.random.default_rng(0).bit_generator.state, "where": Path("x"), "keys": {1, 2}},
        {},
    ),
    "jax": (
        {"params": MODEL, "step": torch.tensor(3), "opt_state": [{"mu": {"layer.weight": torch.ones(2, 3)}}]},
        {"step": NUMBER, "opt_state.0.mu.layer.weight": OPTIMIZER},
    ),
    "average among flat names": (
        {"state_dict": {**MODEL, "model_ema.layerweight": torch.ones(2, 3), "model_ema.decay": torch.tensor(0.9)}},
        {"model_ema.layerweight": MEAN, "model_ema.decay": NUMBER},
    ),
    "average of torch": (
        {"n_averaged": torch.tensor(5), **MODEL},
        {"n_averaged": NUMBER},
    ),
    "flat names": (
        {**MODEL, "optimizer.state.layer.weight.exp_avg": torch.ones(2, 3)},
        {"optimizer.state.layer.weight.exp_avg": OPTIMIZER},
    ),
}


@pytest.mark.parametrize("kind", STATES)
def test_the_model_is_found_and_the_rest_is_named(kind: str, tmp_path: Path) -> None:
    state, aside = STATES[kind]
    torch.save(state, tmp_path / "state.ckpt")
    with open_checkpoint(tmp_path / "state.ckpt") as found:
        assert list(found) == list(MODEL)
        assert all(torch.equal(found[name], MODEL[name]) for name in MODEL)
        assert {name: found.set_aside[name].reason for name in aside} == aside


def test_the_old_format_is_taken_apart_alike(tmp_path: Path) -> None:
    torch.save(STATES["average"][0], tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with open_checkpoint(tmp_path / "x.pt") as found:
        assert list(found) == list(MODEL)
        assert found.set_aside["ema_state_dict.layer.bias"].reason == MEAN


def test_a_part_can_be_chosen(tmp_path: Path) -> None:
    torch.save(STATES["average"][0], tmp_path / "x.pt")
    with open_checkpoint(f"{tmp_path / 'x.pt'}#ema_state_dict") as found:
        assert torch.equal(found["layer.weight"], AVERAGE["layer.weight"])
    with pytest.raises(CheckpointError, match=r"no part 'teacher'.*model_state_dict, ema_state_dict"):
        open_checkpoint(f"{tmp_path / 'x.pt'}#teacher")


def test_two_models_are_asked_for(tmp_path: Path) -> None:
    torch.save({"student": MODEL, "teacher": MODEL, "epoch": 1}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"several models: student, teacher\..*FILE#student"):
        open_checkpoint(tmp_path / "x.pt")
    with open_checkpoint(f"{tmp_path / 'x.pt'}#teacher") as found:
        assert list(found) == list(MODEL)


@pytest.mark.parametrize(("one", "other"), [("teacher", "student"), ("actor_model", "critic_model")])
def test_two_models_with_nothing_beside_them_are_asked_for(one: str, other: str, tmp_path: Path) -> None:
    torch.save({one: MODEL, other: MODEL}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"several models: {one}, {other}"):
        open_checkpoint(tmp_path / "x.pt")


def test_an_average_alone_among_flat_names_is_the_model(tmp_path: Path) -> None:
    torch.save({f"ema.{name}": value for name, value in MODEL.items()}, tmp_path / "x.pt")
    assert list(open_checkpoint(tmp_path / "x.pt")) == [f"ema.{name}" for name in MODEL]


def test_an_optimizer_is_no_model(tmp_path: Path) -> None:
    torch.save(ADAM, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="state of an optimizer, no model"):
        open_checkpoint(tmp_path / "state.pt")


def test_an_average_of_other_shapes_is_refused(tmp_path: Path) -> None:
    torch.save({"model": MODEL, "ema": {"layer.weight": torch.ones(3, 3)}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"'layer\.weight' has shape \(3, 3\), in the model \(2, 3\)"):
        open_checkpoint(tmp_path / "x.pt")


def test_nested_parameters_are_no_wrapper(tmp_path: Path) -> None:
    torch.save({"encoder": MODEL, "decoder": MODEL}, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as found:
        assert sorted(found) == [f"{part}.{name}" for part in ("decoder", "encoder") for name in sorted(MODEL)]


def test_strided_and_shared_storages_are_read_as_they_are(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    held = {"t": whole.T, "part": whole[1:3, 2:5], "spread": torch.ones(1, 3).expand(4, 3), "empty": torch.ones(0, 3)}
    torch.save(held, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as found:
        for name, value in held.items():
            assert torch.equal(found[name], value)
        assert torch.equal(found.read("t", (2, 4)), whole.T[2:4])
        assert torch.equal(found.read("part", (1, 2)), held["part"][1:2])


def test_mappings_that_share_each_other_are_refused_quickly(tmp_path: Path) -> None:
    node: dict[str, Any] = {"w": torch.ones(2, 2)}
    for _ in range(40):
        node = {"a": node, "b": node}
    torch.save(node, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="too often"):
        open_checkpoint(tmp_path / "x.pt")


def test_a_folder_of_olmo_holds_one_model(tmp_path: Path) -> None:
    torch.save(MODEL, tmp_path / "model.pt")
    torch.save(ADAM, tmp_path / "optim.pt")
    torch.save({"epoch": 0, "rng": torch.get_rng_state()}, tmp_path / "train.pt")
    assert scan(tmp_path, cache=False).metrics["name"].to_list() == ["layer.weight"]


def test_a_series_of_nanochat_takes_models_alone(tmp_path: Path) -> None:
    for step in (100, 200):
        torch.save(MODEL, tmp_path / f"model_{step:06d}.pt")
        torch.save(ADAM, tmp_path / f"optim_{step:06d}_rank0.pt")
    run = trajectory(tmp_path, by=r"model_(?P<step>\d+)", cache=False)
    assert len(run.models) == 2
