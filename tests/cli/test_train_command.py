"""``diffract train`` at the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from diffract.cli.main import app

run = CliRunner()

RECIPE = {
    "model": {
        "config": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2},
    },
    "tokenizer": {"train": {"vocabulary": 260}},
    "context": 16,
    "batch_tokens": 32,
    "tokens": 100,
    "checkpoints": [32],
    "threads": 1,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{i} and {i} are {2 * i}"}) + "\n" for i in range(40)))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"mix": {"sums": {"sources": [str(texts)]}}}))
    return path


def test_a_run_says_its_loss_and_where_it_lies(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run.invoke(app, ["train", str(recipe), "-o", str(out)])
    assert first.exit_code == 0, first.output
    assert "after 128 tokens" in first.stdout
    assert f"written: {out}/checkpoints/step4-tokens128" in first.stdout
    again = run.invoke(app, ["train", str(recipe), "-o", str(out), "--json"])
    found = json.loads(again.stdout)
    assert found["final"] == f"{out}/checkpoints/step4-tokens128"
    assert list(found["checkpoints"]) == ["32", "128"]
    assert found["last"]["step"] == 4
    assert run.invoke(app, ["train", str(recipe), "-o", str(out), "--quiet"]).output == ""


def test_a_dry_run_trains_nothing(recipe: Path, tmp_path: Path) -> None:
    shown = run.invoke(app, ["train", str(recipe), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    for text in ("parameters, vocabulary of 260", "4 steps of 32 tokens: 128 tokens", "checkpoints after 32, 128"):
        assert text in shown.stdout
    found = json.loads(run.invoke(app, ["train", str(recipe), "--dry-run", "--json"]).stdout)
    assert found["steps"] == 4
    assert found["parts"]["sums"]["tokens"] == 128
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "texts.jsonl"]


@pytest.mark.parametrize(
    ("recipe_text", "arguments", "message"),
    [
        ("model: {init: a}", ["-o", "{out}"], "mix: this setting is missing"),
        ("- a", ["-o", "{out}"], "expected model, mix and tokens, got list"),
        (None, [], "where to? Pass -o OUT"),
    ],
)
def test_wrong_input_gets_one_message(
    recipe: Path, tmp_path: Path, recipe_text: str | None, arguments: list[str], message: str
) -> None:
    if recipe_text is not None:
        recipe.write_text(recipe_text)
    given = [argument.replace("{out}", str(tmp_path / "out")) for argument in arguments]
    found = run.invoke(app, ["train", str(recipe), *given])
    assert found.exit_code == 1
    assert message in found.stderr
    assert "Traceback" not in found.stderr
