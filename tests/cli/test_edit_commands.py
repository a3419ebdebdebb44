"""The commands that edit, in a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from diffract.cli.main import app

SAMPLES = Path(__file__).parents[2] / "samples" / "tiny-olmo2"
BASE, MATH, CODE = (str(SAMPLES / name) for name in ("base", "math", "code"))

COMMANDS = {
    "rewind": ["rewind", MATH, "--to", BASE, "--fraction", "0.1"],
    "truncate": ["truncate", MATH, "--base", BASE, "--band", "0.1,0.5"],
    "interpolate": ["interpolate", MATH, CODE, "--at", "0.5", "--groups", "mlp=0.2"],
    "merge": ["merge", BASE, f"math={MATH}", f"code={CODE}", "--method", "ties", "--weights", "code=0.5"],
    "laser": ["laser", MATH, "--keep", "0.2", "--select", "mlp.up"],
    "scale": ["scale", MATH, "--base", BASE, "--factors", str(SAMPLES / "factors.parquet")],
    "svf": ["svf", MATH, "--z", "1.1", "--select", "mlp"],
    "lora": ["lora", MATH, "--base", BASE, "--rank", "2"],
    "pissa": ["pissa", MATH, "--rank", "2"],
    "delta": ["delta", BASE, MATH],
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_every_edit(command: list[str], tmp_path: Path) -> None:
    planned = run(*command, "--dry-run", "--json")
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["changed"] > 0 or command[0] == "delta"  # which writes what is there
    assert "would read" in run(*command, "--dry-run").stdout
    out = tmp_path / "out"
    done = run(*command, "-o", out, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["steps"][-1]["step"] == command[0]
    assert list(tmp_path.iterdir()) == [out]
    again = run(*command, "-o", out, "--force")
    assert f"{command[0]}:" in again.stdout
    checked = run("verify", out)
    assert (checked.exit_code, "as they were written" in checked.stdout) == (0, True)


def test_a_row_of_checkpoints(tmp_path: Path) -> None:
    assert run("interpolate", BASE, MATH, "--at", "-0.5:0.5:0.5", "-o", tmp_path / "row").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "row").iterdir()) == ["at--0.5", "at-0.0", "at-0.5"]


def test_a_changed_folder_ends_with_an_error(tmp_path: Path) -> None:
    run(*COMMANDS["svf"], "-o", tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    found = run("verify", tmp_path / "out")
    assert found.exit_code == 1
    assert "differs: file 'tokenizer.json'" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["rewind", MATH, "--to", BASE, "--fraction", "0.1"], "where to? Pass -o OUT"),
        (["truncate", MATH, "--base", BASE, "--drop", "x", "-o", "{out}"], "steps.0.truncate.drop"),
        (["interpolate", MATH, CODE, "--at", "1:0:0.1", "-o", "{out}"], "expected a number or FROM:TO:STEP"),
        (["interpolate", MATH, CODE, "--at", "0:1:0", "-o", "{out}"], "expected a number or FROM:TO:STEP"),
        (["interpolate", MATH, CODE, "--at", "0", "--groups", "mlp", "-o", "{out}"], "expected NAME=VALUE"),
        (["merge", BASE, MATH, "-o", "{out}"], "expected at most one base and two or more NAME=MODEL"),
        (["merge", BASE, f"a={MATH}", f"a={CODE}", "-o", "{out}"], "have one name"),
        (["apply", "/nowhere.yaml", "-o", "{out}"], "cannot read recipe"),
        (["verify", "/nowhere"], "no readable manifest.json"),
        (["lora", MATH, "--base", "/nowhere", "-o", "{out}"], "no checkpoint at"),
    ],
)
def test_mistakes(arguments: list[str], text: str, tmp_path: Path) -> None:
    found = run(*(a.format(out=tmp_path / "out") for a in arguments))
    assert found.exit_code == 1
    assert text in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_names_of_tensors_are_untrusted(write_model: Callable[..., Path], tmp_path: Path) -> None:
    hostile = "\x1b[31mred\x07.weight"
    base = write_model("base", {hostile: torch.eye(4)}, model_type="unheard")
    tuned = write_model("tuned", {hostile: torch.full((4, 4), torch.nan)}, model_type="unheard")
    for command in (["truncate", tuned, "--base", base, "--drop", "0.5"], ["rewind", tuned, "--to", base, "--fraction",
                    "1", "--unit", "tensor"]):  # fmt: skip
        found = run(*command, "-o", tmp_path / command[0])
        assert "\x1b" not in found.output
        assert "\x07" not in found.output


def test_help_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, diffract.cli.main; assert not {'torch', 'polars'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
