"""Figures by name: what is drawn by default, what is refused and how, and what becomes of hostile names."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import polars as pl
import pytest

import diffract
import synthetic
from diffract import plots
from diffract.errors import RunError, SelectionError
from diffract.plots.catalog import KINDS
from diffract.tables import Tables

HOSTILE = "<script>alert(1)</script>" + "<img src=x onerror=alert(2)>" * 20
NAMED = ("model", "name", "projection", "task", "order", "rule", "a", "b")
"""Columns of names that others have given."""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def held(frames: dict[str, pl.DataFrame]) -> diffract.Run:
    """A run in memory."""
    return diffract.Run(Tables({"kind": synthetic.kind_of(frames)}, frames))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(synthetic.compared(), tmp_path_factory.mktemp("plots") / "run")


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_is_drawn_from_a_run(kind: str, tmp_path: Path) -> None:
    frames = synthetic.frames_of(kind)
    drawn = diffract.plot(kind, held(frames))
    assert isinstance(drawn, go.Figure)
    assert any(t["a" if t.type == "scatterternary" else "y"] is not None for t in drawn.data)
    assert diffract.plot(kind, synthetic.write(frames, tmp_path / "run")) == drawn


@pytest.mark.parametrize("kind", list(KINDS))
def test_hostile_names_stay_text(kind: str) -> None:
    frames = synthetic.frames_of(kind)
    hostile = {}
    for table, frame in frames.items():
        known = [name for name in NAMED if frame.schema.get(name) == pl.String]
        lists = [pl.col(n).list.eval(pl.lit(HOSTILE) + pl.element()) for n in {"models"} & set(frame.columns)]
        hostile[table] = frame.with_columns(**{name: pl.lit(HOSTILE) + pl.col(name) for name in known}).with_columns(
            lists
        )
    text = diffract.plot(kind, held(hostile)).to_json()
    assert text is not None
    assert "<script" not in text.replace("\\u003c", "<")
    assert "<img" not in text.replace("\\u003c", "<")
    assert HOSTILE[:200] not in text


@pytest.mark.parametrize("kind", list(KINDS))
def test_tables_without_rows_are_told_or_drawn_empty(kind: str) -> None:
    empty = {name: frame.clear() for name, frame in synthetic.frames_of(kind).items()}
    try:
        assert isinstance(diffract.plot(kind, held(empty)), go.Figure)
    except diffract.DiffractError as error:
        assert "the run" in str(error)  # noqa: PT017 (either is right, and nothing else)


def test_the_largest_matrix_that_changed_most_is_drawn() -> None:
    frames = synthetic.compared()
    rows = frames["metrics"].filter(model="math", block="mlp").sort("delta_relative", descending=True)
    figure = diffract.plot("agreement", held(frames))
    assert figure.layout.title.text == f"{rows['name'][0]}, math"
    scan = frames | {"models": frames["models"].with_columns(role=pl.lit("model"))}
    assert diffract.plot("density", held(scan)).layout.title.text == "L0.mlp.gate, base"  # nothing changed: the first


def test_a_trajectory_shows_its_last_checkpoint_against_its_own_base() -> None:
    frames = synthetic.trajectory()
    names = frames["models"]["model"].to_list()
    models = pl.DataFrame({"model": names, "role": ["checkpoint"] * len(names), "against": [None, *names[:-1]]})
    figure = diffract.plot("spectrum", held(frames | {"models": models}), matrix="L1.mlp.gate")
    curves = {
        model: frames["spectra"].filter(model=model, name="L1.mlp.gate", quantity="sigma")["values"][0].to_list()
        for model in names
    }
    assert [list(t.y) for t in figure.data[:2]] == [curves[names[-2]], curves[names[-1]]]
    first = diffract.plot("spectrum", held(frames | {"models": models}), matrix="L1.mlp.gate", model=names[0])
    assert [list(t.y) for t in first.data] == [curves[names[0]]]


def test_options_choose() -> None:
    run = held(synthetic.compared())
    assert len(diffract.plot("heads", run, model="code").data) == 1
    assert len(diffract.plot("scores", run, model="code", reference="math").data) == 1
    assert diffract.plot("head_heatmap", run, projection="k", metric="pl_alpha").layout.title.text == "attn.k, math"
    shown = diffract.plot("violins", run, projection="mlp.down", model="code")
    assert (len(shown.data[1].y), shown.layout.title.text) == (4, "mlp.down, code")
    series = held(synthetic.trajectory())
    assert len(diffract.plot("evolution", series, projection="q").data) == 2
    assert diffract.plot("ridge", series, layer=1, projection="q").layout.title.text == "layer 1, q"


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("densty", {}, "unknown kind of plot 'densty', expected one of: density, ks"),
        ("zzz", {}, "expected one of: density, ks"),
        ("density", {"matrix": "L0.mlp.gat"}, "more. Did you mean 'L0.mlp.gate'"),
        (
            "density",
            {"model": "maths"},
            "expected one of: base, math, code, natural. Did you mean 'math'",
        ),
        ("density", {"axes": "log-lin"}, "unknown axes 'log-lin'"),
        ("density", {"metric": "pl_alpha"}, "density takes no metric; it takes matrix, model, axes."),
        ("violins", {"metric": "pl_alhpa"}, "Did you mean 'pl_alpha'"),
        ("violins", {"metric": "rows"}, "unknown metric 'rows'"),
        ("violins", {"projection": "z"}, "unknown projection 'z'"),
        (
            "heads",
            {"metric": "pl_alpha"},
            "'pl_alpha', expected one of: head_delta, head_delta_relative.",
        ),
        ("scores", {"reference": "base"}, "unknown reference 'base'"),
        ("ridge", {"layer": 9}, "unknown layer '9', expected one of: 0, 1."),
        ("ridge", {"layer": 1, "matrix": "L0.mlp.gate"}, "Leave out one of the two"),
        ("evolution", {"over": "epochs"}, "unknown time axis 'epochs', expected one of: tokens, step, order."),
    ],
)
def test_unknown_names_get_one_clear_error(kind: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(SelectionError) as error:
        diffract.plot(kind, held(synthetic.frames_of(kind)), **options)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("density", "pl_alpha or mp_variance in metrics.parquet"),
        ("ks", "pl_ks_scan in spectra.parquet"),
        ("agreement", "left_agreement in spectra.parquet"),
        ("heads", "heads.parquet, which the run does not have. Make one with `diffract heads BASE TUNED -o RUN`"),
        ("lorenz", "lorenz.parquet"),
        ("scores", "heads.parquet"),
        ("evolution", "order in metrics.parquet, which the run does not have. Make one with `diffract trajectory"),
        ("ridge", "order in metrics.parquet"),
    ],
)
def test_what_a_run_lacks_is_told_with_the_command_that_makes_it(kind: str, text: str) -> None:
    frames = synthetic.compared()
    plain = {
        "metrics": frames["metrics"].filter(model="base").select("model", "name", "layer", "block", "projection"),
        "spectra": frames["spectra"].filter(model="base", quantity="sigma"),
        "models": frames["models"].filter(model="base"),
    }
    with pytest.raises(RunError) as error:
        diffract.plot(kind, held(plain))
    assert text in str(error.value)
    assert f"`{KINDS[kind].make}`" in str(error.value)


def test_one_domain_has_no_scores() -> None:
    frames = synthetic.compared()
    with pytest.raises(SelectionError, match="two tuned models"):
        diffract.plot("scores", held({"heads": frames["heads"].filter(model="math")}))


def test_folders_that_are_no_runs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected a run folder"):
        diffract.plot("density", tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(RunError, match="layout 99"):
        diffract.plot("density", tmp_path)
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "spectra.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="damaged"):
        diffract.plot("density", tmp_path / "run")


def test_pages_are_whole_and_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    figure = diffract.plot("density", folder)
    page = plots.save(figure, tmp_path / "a.html", width=700, height=300).read_text()
    assert page == plots.save(figure, tmp_path / "b.HTML", width=700, height=300).read_text()
    own = page[: page.index("<script")] + page[page.rindex("<script") :]  # without Plotly's code
    assert "http" not in own.replace("http-equiv", "")
    assert '"showSendToCloud": false' in own  # no button that sends data away
    assert '"width":700' in own
    assert figure.layout.width is None  # the figure is left as it was


def test_endings_and_places_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    figure = diffract.plot("density", folder)
    with pytest.raises(SelectionError, match=r"ends in \.html, \.png, \.svg, \.pdf, got 'a\.jpeg'"):
        plots.save(figure, tmp_path / "a.jpeg")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(RunError, match="cannot write"):
        plots.save(figure, tmp_path / "folder.html")


def test_images_without_kaleido_name_the_extra(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("kaleido"):
            raise ImportError(name)
        return whole(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RunError, match=r"pip install 'diffract-llm\[images\]'"):
        plots.save(diffract.plot("ks", folder), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_images_without_a_browser_say_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kaleido", reason="kaleido is not installed")
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chrome")
    with pytest.raises(RunError, match="BROWSER_PATH"):
        plots.save(diffract.plot("ks", folder), tmp_path / "a.svg")


@pytest.mark.browser
@pytest.mark.parametrize(
    ("ending", "begin"),
    [
        ("png", b"\x89PNG"),
        pytest.param("svg", b"<svg", marks=pytest.mark.slow),
        pytest.param("pdf", b"%PDF", marks=pytest.mark.slow),
    ],
)
def test_images_are_images(folder: Path, tmp_path: Path, ending: str, begin: bytes) -> None:
    pytest.importorskip("kaleido", reason="kaleido is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    figure = diffract.plot("ks", folder)
    content = plots.save(figure, tmp_path / f"a.{ending}", width=500, scale=1).read_bytes()
    assert content.startswith(begin)
    if ending == "png":
        size = [int.from_bytes(content[at : at + 4]) for at in (16, 20)]
        assert size == [500, figure.layout.height]
