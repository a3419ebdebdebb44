"""Run folders of heads, and the sample family from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

import diffract
from diffract import schemas, tables

SAMPLES = Path(__file__).parents[1] / "samples" / "tiny-olmo2"
DOMAINS = ["natural", "math", "code", "instructions"]


@pytest.fixture
def saved(family: tuple[Path, Path], tmp_path: Path) -> Path:
    base, tuned = family
    diffract.heads(base, f"a={tuned}", f"b={base}", output=tmp_path / "run")
    return tmp_path / "run"


def test_a_run_folder_comes_back_whole(saved: Path, family: tuple[Path, Path]) -> None:
    names = list(schemas.KINDS["heads"])
    assert sorted(p.name for p in saved.iterdir()) == sorted(
        [*(f"{name}.parquet" for name in names), "manifest.json", "report.html"]
    )
    run, loaded = diffract.heads(family[0], f"a={family[1]}", f"b={family[0]}"), diffract.load_run(saved)
    assert isinstance(loaded, diffract.Run)
    for name in names:
        assert_frame_equal(getattr(run, name), getattr(loaded, name), check_exact=True)
    assert loaded.manifest["kind"] == "heads"
    assert loaded.manifest["diffract"] == diffract.__version__
    assert {m["model"] for m in loaded.manifest["models"]} == {"base", "a", "b"}
    assert {"head_delta", "score", "cosine"} <= set(loaded.manifest["metrics"])


def test_columns_are_the_schemas(saved: Path) -> None:
    found = tables.load(saved, "heads")
    for name, schema in schemas.KINDS["heads"].items():
        further = schemas.RELATION if name == "heads" else {}
        own = [item for item in getattr(found, name).schema.items() if item[0] not in further]
        assert dict(own[: len(schema)]) == schema
    assert set(found.models.drop("lineage").schema.dtypes()[len(schemas.MODELS) :]) == {pl.Float64}


def test_folders_are_written_whole_or_not(saved: Path, family: tuple[Path, Path]) -> None:
    run = diffract.load_run(saved)
    with pytest.raises(diffract.RunError, match="--force"):
        run.save(saved)
    with pytest.raises(diffract.RunError, match="--force"):
        diffract.heads("/nowhere", "/nowhere", output=saved)  # before anything is opened
    (saved / "old").write_text("old")
    assert run.save(saved, force=True) == saved
    assert not (saved / "old").exists()
    diffract.scan(family[0], output=saved, force=True)
    assert isinstance(diffract.load_run(saved), diffract.Run)
    assert [p.name for p in saved.parent.glob("run*")] == ["run"]


def test_another_kind_of_run_is_told(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(diffract.RunError, match=r"holds a run of `diffract heads`, expected one of scan or compare"):
        tables.load(saved, "scan", "compare")
    diffract.scan({"w": np.eye(2)}, output=tmp_path / "scan")
    with pytest.raises(diffract.RunError, match=r"holds a run of `diffract scan`, expected one of heads"):
        tables.load(tmp_path / "scan", "heads")


@pytest.mark.parametrize("name", schemas.KINDS["heads"])
def test_a_damaged_table_is_named(saved: Path, name: str) -> None:
    file = saved / f"{name}.parquet"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(diffract.RunError, match="damaged"):
        diffract.load_run(saved)
    column = next(iter(schemas.KINDS["heads"][name]))
    getattr(diffract.load_run(_restored(saved, file, content)), name).drop(column).write_parquet(file)
    with pytest.raises(diffract.RunError, match=rf"{name}\.parquet lacks {column}"):
        diffract.load_run(saved)
    file.unlink()
    with pytest.raises(diffract.RunError, match=rf"expected a run folder with {name}\.parquet"):
        diffract.load_run(saved)


def _restored(folder: Path, file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return folder


# The sample family


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples are not in this checkout")
def test_the_sample_family(tmp_path: Path) -> None:
    run = diffract.heads(SAMPLES / "base", *(f"{d}={SAMPLES / d}" for d in DOMAINS), output=tmp_path / "run")
    assert run.manifest["warnings"] == []
    assert run.heads.height == 4 * 4 * 8
    assert set(run.heads["status"]) == {"ok"}
    assert run.heads["model"].unique(maintain_order=True).to_list() == DOMAINS
    # q and o of 16 x 128 entries each; k and v are shared by 4 heads, whose squares count a quarter in each
    own, shared = 2 * 16 * 128, 2 * 16 * 128
    assert set(run.heads["entries"]) == {round((own + shared / 4) ** 2 / (own + shared / 16))}
    for name in DOMAINS:
        rows = run.heads.filter(model=name)
        assert rows["rank"].sort().to_list() == list(range(1, 33))
        assert rows["change_share"].sum() == pytest.approx(1.0, rel=1e-12)
        points = run.lorenz.filter(model=name)["change_share"].to_numpy()
        assert (points[0], points[-1]) == (0.0, pytest.approx(1.0, rel=1e-12))
        assert (np.diff(points, 2) > -1e-12).all()
    assert run.domains.select("a", "b").rows() == [(a, b) for i, a in enumerate(DOMAINS) for b in DOMAINS[i + 1 :]]
    assert run.domains["cosine"].is_between(-1, 1).all()
    # the same base and optimiser: the changes point the same way far more than random ones would
    assert (run.domains["cosine"] > 10 * run.domains["cosine_chance"]).all()
    assert run.scores.height == 4 * 3 * 32
    assert run.scores["score"].is_between(-1, 1).all()
    compared = diffract.compare(SAMPLES / "base", SAMPLES / "math", metrics=["delta_frobenius"], select="attn")
    assert run.models["head_gini"][2] == pytest.approx(compared.models["head_gini"][1], rel=1e-12)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["settings"]["projections"] == list("qkvo")
