"""Run folders and the tables that they hold."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

import diffract
from diffract import schemas, store, tables


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return diffract.scan({"w": np.diag([3.0, 4.0]), "v": np.ones((2, 5))}).save(tmp_path / "run")


def test_columns_are_the_schemas(saved: Path) -> None:
    found = tables.load(saved)
    first = {**schemas.LABELS, **schemas.OUTCOME}
    assert dict(list(found.metrics.schema.items())[: len(first)]) == first
    assert set(found.metrics.schema.dtypes()[len(first) :]) == {pl.Float64}
    assert dict(found.spectra.schema) == schemas.SPECTRA
    assert dict(found.models.schema) == schemas.MODELS
    assert dict(found.tensors.schema) == schemas.TENSORS
    assert found.manifest["kind"] == "scan"
    assert found.manifest["diffract"] == diffract.__version__


def test_spectra_survive_to_the_bit(saved: Path) -> None:
    run = diffract.scan({"w": np.diag([3.0, 4.0]), "v": np.ones((2, 5))}, cache=False)
    assert_frame_equal(run.spectra, tables.load(saved).spectra, check_exact=True)
    assert run.spectra.filter(name="w")["values"][0].to_list() == [4.0, 3.0]


@pytest.mark.parametrize("name", ["metrics", "spectra", "models", "tensors"])
@pytest.mark.parametrize("keep", [0, 4, 0.5])
def test_a_damaged_table_is_named(saved: Path, name: str, keep: float) -> None:
    file = saved / f"{name}.parquet"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else int(keep)])
    with pytest.raises(diffract.RunError, match="damaged"):
        tables.load(saved)


def test_a_damaged_manifest_is_named(saved: Path) -> None:
    for content in (b"", b"{", b"\xff\xfe"):
        (saved / "manifest.json").write_bytes(content)
        with pytest.raises(diffract.RunError, match="damaged"):
            tables.load(saved)


def test_a_newer_layout_is_refused(saved: Path) -> None:
    (saved / "manifest.json").write_text(json.dumps({"format": tables.FORMAT + 1}))
    with pytest.raises(diffract.RunError, match=f"has layout {tables.FORMAT + 1}"):
        tables.load(saved)


def test_an_interruption_leaves_nothing(saved: Path) -> None:
    before = sorted(saved.parent.iterdir())

    def interrupted() -> None:
        with store.whole_folder(saved, force=True) as draft:
            (draft / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(saved.parent.iterdir()) == before
    assert not (saved / "half").exists()


@pytest.mark.parametrize("name", ["metrics", "tensors"])
def test_a_disk_that_fills_up_midway(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = diffract.load_run(saved)
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    write = pl.DataFrame.write_parquet

    def full(frame: pl.DataFrame, path: Path, **options: object) -> None:
        if path.stem == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(frame, path, **options)

    monkeypatch.setattr(pl.DataFrame, "write_parquet", full)
    for folder in (saved, saved.parent / "new"):
        with pytest.raises(diffract.RunError, match=r"No space left on device\. Nothing was changed"):
            run.save(folder, force=True)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["run"]


def test_force_clears_what_was_there(saved: Path) -> None:
    (saved / "old.txt").write_text("old")
    diffract.scan({"w": np.eye(2)}).save(saved, force=True)
    assert not (saved / "old.txt").exists()
    assert tables.load(saved).metrics["name"].to_list() == ["w"]
    assert [p.name for p in saved.parent.iterdir()] == ["run"]


def test_what_may_be_written_to(tmp_path: Path) -> None:
    store.refuse_existing(tmp_path / "new", force=False)
    (tmp_path / "empty").mkdir()
    store.refuse_existing(tmp_path / "empty", force=False)
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(diffract.RunError):
            diffract.scan({"w": np.eye(2)}, output=path, force=True)
    assert (tmp_path / "file").read_text() == "x"


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    store.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        store.write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_comparison_of_before_gets_its_heads_when_it_is_read(family: tuple[Path, Path], tmp_path: Path) -> None:
    run = diffract.compare(*family, output=tmp_path / "run")
    kept = pl.read_parquet(tmp_path / "run" / "heads.parquet")
    assert dict(kept.schema) == schemas.HEADS
    assert_frame_equal(kept, run.heads)
    drawn = [diffract.plot(kind, tmp_path / "run").to_json() for kind in ("heads", "lorenz")]
    (tmp_path / "run" / "heads.parquet").unlink()
    assert_frame_equal(tables.load(tmp_path / "run").heads, kept, check_exact=True)
    assert [diffract.plot(kind, tmp_path / "run").to_json() for kind in ("heads", "lorenz")] == drawn
    assert diffract.plot("lorenz", run).to_json() == drawn[1]
    assert not (diffract.scan(family[0]).save(tmp_path / "scan") / "heads.parquet").exists()
    with pytest.raises(diffract.RunError, match="heads needs heads"):
        diffract.plot("heads", tmp_path / "scan")
