"""Checkpoints and recipes are of others: nothing that they hold is run, whatever command reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from diffract.checkpoints.configurations import own_attention
from diffract.cli.commands import all_commands
from diffract.cli.main import app
from diffract.errors import CheckpointError, RecipeError
from diffract.evaluate.model import load_model
from diffract.studies import run_study
from diffract.studies.recipe import StudyRecipe

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "samples" / "tiny-olmo2"
LITTLE = "--limit 2 --device cpu"
TEXTS = "--eval target=word-problems:1 --keep kept=word-problems:2 --limit 16 --device cpu"
CALLS = {
    "scan": "base -o out",
    "compare": "base math -o out --metrics change",
    "trajectory": "base math --by given -o out --metrics change",
    "heads": "base math -o out",
    "lineage": "base math",
    "audit": "math --base base",
    "inspect": "base",
    "rewind": "math --to base --fraction 0.1 -o out",
    "truncate": "math --base base --drop 0.5 -o out",
    "interpolate": "math base --at 0.5 -o out",
    "merge": "base a=math b=base -o out",
    "laser": "math --select attn.o --keep 0.5 -o out",
    "scale": f"math --base base --factors {SAMPLES / 'factors.parquet'} -o out",
    "svf": "math --z 0.5 --select attn.o -o out",
    "lora": "math --base base --rank 2 -o out",
    "pissa": "math --rank 2 -o out",
    "delta": "base math -o out",
    "apply": "recipe.yaml -o out",
    "eval": f"math --tasks math {LITTLE} --no-cache -o out",
    "connect": f"base a=math b=base --eval math --dry-run {LITTLE}",
    "search rewind": f"base math --dry-run {LITTLE}",
    "search truncate": f"base math --dry-run {LITTLE}",
    "search directions": f"base math --dry-run {TEXTS}",
    "search svf": f"base math --dry-run {TEXTS}",
    "train": "train.yaml --dry-run -o out",
}
WITHOUT_MODELS = ("collect", "fetch", "report", "plot", "metrics", "cache", "demo", "verify", "study run")


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models, base and math, whose folders hold code that makes a file when it is run: the file."""
    mark = tmp_path / "was-run"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name in ("base", "math"):
        shutil.copytree(SAMPLES / name, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        told = tmp_path / name / "tokenizer_config.json"
        text = json.loads(told.read_text()) if told.exists() else {}
        told.write_text(json.dumps({**text, "auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}))
        (tmp_path / name / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    (tmp_path / "recipe.yaml").write_text("model: math\nsteps: []\n")
    train = {"model": {"init": "base"}, "mix": {"text": {"sources": ["text.jsonl"]}}, "tokens": 512, "context": 32,
             "batch_tokens": 256}  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"one two {n} " * 20}) + "\n" for n in range(60)))
    return mark


def test_every_command_is_tried_or_takes_no_model() -> None:
    assert {*CALLS, *WITHOUT_MODELS} == {command.name for command in all_commands()}


@pytest.mark.parametrize("command", CALLS)
def test_no_command_runs_code_that_lies_beside_weights(command: str, hostile: Path) -> None:
    done = CliRunner().invoke(app, [*command.split(), *CALLS[command].split()])
    assert done.exit_code == 0, done.output
    assert not hostile.exists()


KERNELS = [
    {"attn_implementation": "someone/kernel"},
    {"_attn_implementation": "paged|someone/kernel@main:f"},
    {"text_config": {"attn_implementation": "someone/kernel"}},
    {"experts_implementation": "someone/kernel"},
    {"use_kernels": {"RMSNorm": "someone/kernel:RMSNorm"}},
]


@pytest.mark.parametrize("config", KERNELS)
def test_kernels_of_a_configuration_are_refused(config: dict, hostile: Path) -> None:
    base = hostile.parent / "base"
    text = json.loads((base / "config.json").read_text()) | config
    (base / "config.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=r"someone/kernel.*, code that a loader would fetch and run"):
        load_model(str(base), torch.device("cpu"), "auto")


@pytest.mark.parametrize(
    ("stated", "told"), [(None, None), ("sdpa", None), ("eager", None), ("flash_attention_2", "eager")]
)
def test_attention_is_computed_by_what_is_here(stated: str | None, told: str | None) -> None:
    found = own_attention({"model_type": "llama", "attn_implementation": stated}, "model")
    assert found.get("attn_implementation") == told


def test_a_model_that_asks_for_an_implementation_that_is_not_here_loads(hostile: Path) -> None:
    base = hostile.parent / "base"
    plain = load_model(str(base), torch.device("cpu"), "auto")
    text = json.loads((base / "config.json").read_text()) | {"attn_implementation": "flash_attention_2"}
    (base / "config.json").write_text(json.dumps(text))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        found = load_model(str(base), torch.device("cpu"), "auto")(input_ids=ids).logits
        torch.testing.assert_close(found, plain(input_ids=ids).logits)


def recipe_that_launches(launch: list[str]) -> StudyRecipe:
    return StudyRecipe.model_construct(launch=launch)


@pytest.mark.parametrize(
    "launch",
    [
        *(["sh", "-c", "id"], ["./torchrun"], ["/tmp/accelerate"], ["torchrun", "--no-python", "evil"]),
        *(["torchrun", "evil.py"], ["torchrun", "-m", "evil"], ["accelerate", "launch", "--module", "evil"]),
        *(["accelerate", "launch", "--main_training_function=evil"], ["env", "accelerate"], ["torchrun", "../x.yaml"]),
    ],
)
def test_a_study_starts_no_program_of_its_recipe_without_permission(launch: list[str]) -> None:
    with pytest.raises(RecipeError, match="--allow launch"):
        recipe_that_launches(launch).check_launch(())
    recipe_that_launches(launch).check_launch(("launch",))


@pytest.mark.parametrize(
    "launch",
    [
        *([], ["torchrun", "--nproc-per-node", "2"], ["accelerate", "launch", "--num_processes=8"]),
        ["accelerate", "launch", "--config_file", "fsdp.yaml", "--mixed_precision", "bf16"],
    ],
)
def test_usual_launchers_need_no_permission(launch: list[str]) -> None:
    recipe_that_launches(launch).check_launch(())


def test_a_study_asks_before_anything_is_done(tmp_path: Path) -> None:
    recipe = yaml.safe_load((ROOT / "studies" / "tiny.yaml").read_text()) | {"launch": ["touch", str(tmp_path / "x")]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match="starts a program of the recipe's choice"):
        run_study(tmp_path / "study.yaml", tmp_path / "out", data=ROOT / "studies")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "x").exists()
