"""The commands, as they are typed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import diffract
from diffract.api import evaluate
from diffract.checkpoints import Checkpoint
from diffract.cli.main import app
from diffract.metrics import CATALOG, FACTS
from tiny_llama import llama_tensors

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples" / "tiny-olmo2"
run = CliRunner()


def test_compare_writes_a_run_and_says_what_it_found(family: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = map(str, family)
    done = run.invoke(app, ["compare", base, f"math={tuned}", "-o", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "math (tuned, llama): relative change 0.05" in done.stdout
    assert (tmp_path / "run" / "report.html").is_file()
    assert diffract.load_run(tmp_path / "run").manifest["settings"]["heads"] is True
    again = run.invoke(app, ["compare", base, tuned, "-o", str(tmp_path / "run")])
    assert again.exit_code == 1
    assert "--force" in again.stderr
    assert "Traceback" not in again.output
    assert run.invoke(app, ["compare", base, tuned, "-o", str(tmp_path / "run"), "--force", "-q"]).output == ""


def test_scan_summary_is_json(family: tuple[Path, Path]) -> None:
    done = run.invoke(app, ["scan", str(family[0]), "--json", "--metrics", "stable_rank,entry_std", "--select", "mlp"])
    assert done.exit_code == 0
    summary = json.loads(done.stdout)
    assert summary["models"][0]["matrices"] == 6
    assert summary["settings"]["metrics"] == ["stable_rank", "entry_std"]


def test_report_is_redrawn_without_torch(family: tuple[Path, Path], tmp_path: Path) -> None:
    folder = diffract.scan(family[0]).save(tmp_path / "run")
    drawn = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    code = "import sys; from diffract.cli.main import app; app(['report', sys.argv[1]], standalone_mode=False)"
    check = f"{code}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check, str(folder)], check=True, capture_output=True)
    assert (folder / "report.html").read_text() == drawn


def test_inspect_reads_headers_only(family: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "read", refuse)
    done = run.invoke(app, ["inspect", str(family[0])])
    assert done.exit_code == 0, done.output
    assert "architecture  llama (layers 2, width 32, heads 4, kv_heads 2, head_dim 8)" in done.stdout
    assert "8 x attn.q                   8 x 32  BF16" in done.stdout
    found = json.loads(run.invoke(app, ["inspect", str(family[0]), "--json"]).stdout)
    assert found["matrices"] == 2 * (4 + 2 + 2 + 4 + 3) + 2
    assert found["multiplications"] > 0


def test_inspect_shows_how_evenly_the_work_is_cut(family: tuple[Path, Path]) -> None:
    found = json.loads(run.invoke(app, ["inspect", str(family[0]), "--shards", "3", "--json"]).stdout)
    assert len(found["scan_shares"]) == len(found["compare_shares"]) == 3
    assert sum(found["scan_shares"]) == pytest.approx(found["seconds_per_core"])
    assert sum(found["compare_shares"]) == pytest.approx(found["compare_seconds"])
    assert "3 shares" in run.invoke(app, ["inspect", str(family[0]), "--shards", "3"]).stdout
    assert "expected 1 to" in run.invoke(app, ["inspect", str(family[0]), "--shards", "0"]).output


def test_inspect_needs_no_torch(family: tuple[Path, Path]) -> None:
    code = (
        "import sys, diffract; diffract.inspect(sys.argv[1]); print({'torch', 'polars', 'plotly'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(family[0])], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_import_is_light() -> None:
    code = "import sys, diffract; print({'torch', 'plotly', 'transformers', 'polars', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_every_public_name_is_there() -> None:
    for name in diffract.__all__:
        assert getattr(diffract, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'scam'"):
        diffract.scam  # noqa: B018


def test_the_catalog_is_listed_and_documented() -> None:
    text = run.invoke(app, ["metrics"]).stdout
    listed = {row["name"] for row in json.loads(run.invoke(app, ["metrics", "--json"]).stdout)["metrics"]}
    assert listed == set(CATALOG)
    documented = (ROOT / "docs" / "metrics.md").read_text()
    for name in CATALOG:
        assert f"{name}  (" in text
        assert f"`{name}`" in documented


def test_the_catalog_needs_no_torch() -> None:
    code = "import sys; from diffract.cli.commands import metrics; metrics(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("script", ["make_metrics.py", "make_tables.py"])
def test_made_pages_are_up_to_date(script: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "docs" / script), "--check"], check=True)


def test_facts_are_listed() -> None:
    rows = json.loads(run.invoke(app, ["metrics", "--facts", "--json"]).stdout)["facts"]
    assert {row["name"] for row in rows} == set(FACTS)
    assert "left_agreement_window  (needs vectors)" in run.invoke(app, ["metrics", "--facts"]).stdout


@pytest.mark.parametrize("command", sorted(typer.main.get_command(app).commands))
def test_every_command_and_option_is_documented(command: str) -> None:
    documented = (ROOT / "docs" / "commands.md").read_text()
    assert f"## diffract {command}\n" in documented
    for parameter in typer.main.get_command(app).commands[command].params:
        for option in parameter.opts:
            if option.startswith("--"):
                assert f"`{option}" in documented, option


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["scan", "/nowhere/at-all"], 1, "no checkpoint at"),
        (["scan", "{base}", "--metrics", "stable_rnk"], 1, "Did you mean 'stable_rank'"),
        (["scan", "{base}", "--select", "attn.z"], 1, "fits no matrix"),
        (["scan", "{base}", "--device", "tpu"], 1, "unknown device"),
        (["scan", "{base}", "--engine", "spark"], 1, "unknown engine"),
        (["scan", "{base}", "--vectors"], 1, "Pass -o RUN"),
        (["scan", "{base}", "--metrics", "value_share"], 1, "Use it with compare"),
        (["scan", "{base}", "--architecture", "/nowhere.json"], 1, "cannot read architecture file"),
        (["report", "{base}"], 1, "expected a run folder"),
        (["scan", "{base}", "--colour"], 2, "No such option"),
        (["paint"], 2, "No such command"),
        (["demo", "--samples", "/nowhere"], 1, "no sample family"),
    ],
)
def test_wrong_input_gets_one_clear_error(
    family: tuple[Path, Path], arguments: list[str], code: int, text: str
) -> None:
    done = run.invoke(app, [a.format(base=family[0]) for a in arguments])
    assert done.exit_code == code
    assert text in " ".join(done.stderr.split())
    assert done.stdout == ""
    assert "Traceback" not in done.output


def test_control_characters_never_reach_the_terminal(write_model) -> None:
    folder = write_model(
        "m", llama_tensors(0) | {"evil\x1b[31m": llama_tensors(0)["lm_head.weight"][:, :3] * float("nan")}
    )
    for command in ("scan", "inspect"):
        done = run.invoke(app, [command, str(folder)])
        assert done.exit_code == 0
        assert "\x1b" not in done.output


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples are not in this checkout")
def test_the_demo_tells_the_family_apart(tmp_path: Path) -> None:
    """Of one matrix of each model, as every null is drawn; `make demo` takes the whole."""
    for name in ("base", "natural", "math", "code", "instructions"):
        weights = load_file(SAMPLES / name / "model.safetensors")
        (tmp_path / name).mkdir()
        some = {key: value for key, value in weights.items() if ".layers.0.mlp.up" in key}
        save_file(some, tmp_path / name / "model.safetensors")
        config = json.loads((SAMPLES / name / "config.json").read_text(encoding="utf-8"))
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    done = run.invoke(app, ["demo", "--samples", str(tmp_path), "-o", str(tmp_path / "run"), "--json"])
    assert done.exit_code == 0, done.output
    models = {m["model"]: m for m in json.loads(done.stdout)["models"]}
    assert list(models) == ["base", "natural", "math", "code", "instructions"]
    for name in ("natural", "math", "code", "instructions"):
        assert 0.05 < models[name]["delta_relative"] < 0.5
        # the change lies in singular vectors, and yet far more in values than chance would put there
        assert models[name]["value_share_chance"] * 3 < models[name]["value_share"] < 0.2


QUALITY = re.compile(r"\**(\d\.\d{3})\** \((\d\.\d{3})-(\d\.\d{3})\)")
"""A quality and its interval in the table of the samples."""


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples are not in this checkout")
def test_the_page_of_the_samples_tells_what_they_are_worth() -> None:
    lines = (SAMPLES / "README.md").read_text(encoding="utf-8").splitlines()
    columns, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][-6:]
    domains = ["natural", "math", "code", "instructions"]
    assert columns == ["model", *domains, "gsm:1"]
    cells = {(row[0], task): cell for row in rows for task, cell in zip(columns, row, strict=True)}
    said = {place: tuple(map(float, *QUALITY.findall(cell))) for place, cell in cells.items() if place[1] in domains}
    for name in domains:
        assert said[name, name][2] < said["base", name][1]  # the intervals lie apart
    for name in ("base", "math"):
        found = evaluate(SAMPLES / name, "math=word-problems:1", limit=80, cache=False)
        measured = found.summary.select("quality", "low", "high").row(0)
        assert measured == pytest.approx(said[name, "math"], abs=0.001)  # three digits are shown
