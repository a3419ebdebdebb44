"""A row of checkpoints by one command, and names that no terminal should meet raw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from diffract.cli.main import app

SAMPLES = Path(__file__).parents[2] / "samples" / "tiny-olmo2"
BASE, MATH = str(SAMPLES / "base"), str(SAMPLES / "math")
HOSTILE = "\x1b[2J\x1b]0;owned\x07.weight"


@pytest.mark.parametrize("dry", [True, False])
def test_a_row_is_one_json_document(dry: bool, tmp_path: Path) -> None:
    how = ["--dry-run"] if dry else ["-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["interpolate", BASE, MATH, "--at", "0:1:0.5", "--json", *how])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found) == 3
    assert all(row["steps"][0]["step"] == "interpolate" for row in found)
    assert len(list(tmp_path.glob("out/*"))) == (0 if dry else 3)


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    for name, value in (("base", 1.0), ("tuned", 2.0)):
        (tmp_path / name).mkdir()
        save_file({HOSTILE: torch.full((3, 3), value)}, tmp_path / name / "model.safetensors")
    save_file({HOSTILE: torch.ones(3, 4)}, tmp_path / "other.safetensors")
    base, tuned, out = (str(tmp_path / name) for name in ("base", "tuned", "out"))
    runs = [
        ["rewind", tuned, "--to", base, "--unit", "tensor", "--fraction", "1", "-o", out],
        ["rewind", tuned, "--to", base, "--unit", "tensor", "--fraction", "1", "--dry-run", "--json"],
        ["truncate", tuned, "--base", str(tmp_path / "other.safetensors"), "--rank", "1", "-o", out + "2"],
        ["lora", tuned, "--base", base, "--select", "nothing", "-o", out + "3"],
    ]
    outputs = [CliRunner().invoke(app, command).output for command in runs]
    save_file({HOSTILE: torch.zeros(3, 3), "\x1bmore": torch.ones(2)}, tmp_path / "out" / "model.safetensors")
    outputs.append(CliRunner().invoke(app, ["verify", out]).output)
    assert all("owned" in text for text in (outputs[0], outputs[1], outputs[-1]))
    assert all(character.isprintable() or character == "\n" for text in outputs for character in text)
