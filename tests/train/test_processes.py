"""Several processes train the model that one trains: with copies of it, and with parts of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from diffract.train import train
from diffract.train.records import read_log

pytestmark = pytest.mark.slow

Make = Callable[..., dict[str, Any]]

LOSS_RTOL = 1e-5
"""Two halves of a batch are added up in another order in float32; twelve steps of AdamW carry that on."""

SECONDS = 240
"""A run takes ten on an idle machine; a launcher that hangs does so for ever."""

FSDP = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "num_machines": 1,
    "num_processes": 2,
    "machine_rank": 0,
    "mixed_precision": "no",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
    },
}

SHARDED = """
import os, sys
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from diffract.train import train

# accelerate shards on GPUs alone; torch does so on CPUs too, and only the choice of a backend stands between
PartialState._prepare_backend = lambda self, *given: ("gloo", DistributedType.MULTI_GPU)
torch.accelerator.is_available = lambda: True

def progress(done, total, what):
    if done == int(sys.argv[3]):
        os._exit(9)

train(sys.argv[1], sys.argv[2], progress=progress)
"""


def launched(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the launchers that come with torch and accelerate; what it has started ends with it."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command, pipe = [sys.executable, "-m", *arguments], subprocess.PIPE
    with subprocess.Popen(command, env=os.environ | settings, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # launchers pass it on; killed, they would leave their processes behind
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


@pytest.fixture
def made(recipe: Make, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(checkpoints=[7 * 64], micro_batch=1)))
    return path


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder / "log.jsonl")]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_processes_with_copies(made: Path, tmp_path: Path) -> None:
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "diffract.cli.main"]
    done = launched([*start, "train", str(made), "-o", str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written:") == 1  # one process speaks for all
    one = train(made, tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(one.folder), rel=LOSS_RTOL)
    assert [p.name for p in one.checkpoints.values()] == names(tmp_path / "two" / "checkpoints")


def test_a_batch_that_cannot_be_shared_is_refused(made: Path, tmp_path: Path) -> None:
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "diffract.cli.main"]
    done = launched([*start, "train", str(made), "-o", str(tmp_path / "three")])
    assert done.returncode != 0
    assert "4 windows cannot be shared evenly among 3 processes" in done.stderr


def test_two_processes_with_parts_of_the_model_that_go_on(made: Path, tmp_path: Path) -> None:
    script, config = tmp_path / "sharded.py", tmp_path / "fsdp.yaml"
    script.write_text(SHARDED)
    config.write_text(yaml.safe_dump(FSDP))
    start = ["accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0", str(script)]
    given = [*start, str(made), str(tmp_path / "parts")]
    stopped = launched([*given, str(8 * 64)], ACCELERATE_TORCH_DEVICE="cpu")
    assert stopped.returncode != 0
    assert names(tmp_path / "parts" / "state") == ["step000000005"]
    done = launched([*given, "-1"], ACCELERATE_TORCH_DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    one = train(made, tmp_path / "one")
    assert losses(tmp_path / "parts") == pytest.approx(losses(one.folder), rel=LOSS_RTOL)
    expected = load_file(one.final / "model.safetensors")
    found = load_file(tmp_path / "parts" / "checkpoints" / one.final.name / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-4  # AdamW makes a rounding of a tiny gradient a part of its rate
