"""``diffract plot``, as it is typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import synthetic
from diffract.cli.main import app
from diffract.plots import KINDS

DOCS = Path(__file__).parents[2] / "docs"
run = CliRunner()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("runs")
    return {kind: synthetic.write(synthetic.frames_of(kind), place / kind) for kind in KINDS}


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_becomes_a_page(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / f"{kind}.html"
    done = run.invoke(app, ["plot", kind, str(folders[kind]), "-o", str(file)])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"plot: {file}\n"
    assert "Plotly.newPlot" in file.read_text()


def test_options_reach_the_figure(folders: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["plot", "density", str(folders["density"]), "-o", str(tmp_path / "a.html"), "-q"]
    done = run.invoke(
        app, [*arguments, "--matrix", "L2.mlp.down", "--model", "code", "--axes", "lin-log", "--width", "640"]
    )
    assert (done.exit_code, done.output) == (0, "")
    page = (tmp_path / "a.html").read_text()
    assert "L2.mlp.down, code" in page
    assert '"width":640' in page


def test_kinds_are_listed_and_documented() -> None:
    done = run.invoke(app, ["plot", "--list"])
    assert done.exit_code == 0
    documented = (DOCS / "commands.md").read_text()
    for name, kind in KINDS.items():
        assert name in done.stdout
        assert kind.summary in done.stdout
        assert f"| `{name}` |" in documented


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["densty", "{run}", "-o", "{out}.html"], 1, "Did you mean 'density'"),
        (["density", "{run}", "-o", "{out}.jpg"], 1, "ends in .html, .png, .svg, .pdf"),
        (["density", "/nowhere", "-o", "{out}.html"], 1, "expected a run folder"),
        (["evolution", "{run}", "-o", "{out}.html"], 1, "diffract trajectory"),
        (["density", "{run}"], 2, "Missing option"),
        (["density", "{run}", "-o", "{out}.html", "--width", "1"], 2, "--width"),
    ],
)
def test_wrong_input_gets_one_clear_error(
    folders: dict[str, Path], tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    filled = [a.format(run=folders["density"], out=tmp_path / "out") for a in arguments]
    done = run.invoke(app, ["plot", *filled])
    assert done.exit_code == code
    assert text in " ".join(done.stderr.split())
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_plotting_needs_no_torch(folders: dict[str, Path], tmp_path: Path) -> None:
    code = "import sys; from diffract.cli.main import app; app(sys.argv[1:], standalone_mode=False)"
    check = f"{code}; assert 'torch' not in sys.modules"
    arguments = ["plot", "violins", str(folders["violins"]), "-o", str(tmp_path / "a.html")]
    subprocess.run([sys.executable, "-c", check, *arguments], check=True, capture_output=True)
