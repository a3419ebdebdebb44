"""The run of every kind: in memory, as a folder, as a figure, in a notebook."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
from polars.testing import assert_frame_equal

import diffract
from diffract.report import PAGES
from diffract.schemas import KINDS
from diffract.tables import MANIFEST, new_manifest

EARLIER = Path(__file__).parent / "earlier"
"""A run folder of each kind as the first version of the layout wrote them."""


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_the_first_layout_are_read(kind: str) -> None:
    run = diffract.load_run(EARLIER / kind.replace(" ", "-"))
    assert run.kind == kind
    assert set(MANIFEST) <= set(run.manifest)
    for name, schema in KINDS[kind].items():
        assert dict(list(run[name].schema.items())[: len(schema)]) == schema
    assert len(run[next(iter(KINDS[kind]))]) > 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "study"])
def test_what_is_saved_comes_back(kind: str, tmp_path: Path) -> None:
    run = diffract.load_run(EARLIER / kind.replace(" ", "-"))
    again = diffract.load_run(run.save(tmp_path / "run"))
    assert again.manifest == run.manifest
    for name in KINDS[kind]:
        assert_frame_equal(again[name], run[name], check_exact=True)
    assert (tmp_path / "run" / "report.html").exists() == (kind in PAGES)


def test_a_study_is_read_from_its_numbers() -> None:
    run = diffract.load_run(EARLIER / "study")
    assert run["findings"].rows() == [("budget", "holds", None), ("heads", "cannot tell", None)]
    assert run["numbers"].row(0) == ("budget", "gain", 0.05, 0.04, 0.06, "bits per byte", 0.0)
    assert run["numbers"]["value"].to_list() == [0.05, None]


def test_a_damaged_study_is_told(tmp_path: Path) -> None:
    for name in ("manifest.json", "numbers.json"):
        (tmp_path / name).write_bytes((EARLIER / "study" / name).read_bytes())
    (tmp_path / "numbers.json").write_text('{"budget": {"numbers": []}}')
    with pytest.raises(diffract.RunError, match="damaged"):
        diffract.load_run(tmp_path)
    (tmp_path / "numbers.json").unlink()
    with pytest.raises(diffract.RunError, match=r"numbers\.json"):
        diffract.load_run(tmp_path)


def test_tables_are_items_and_attributes() -> None:
    run = diffract.load_run(EARLIER / "connect")
    assert run["items"] is run.items
    assert {"paths", "items", "save"} <= set(dir(run))
    with pytest.raises(diffract.RunError, match=r"run of `diffract connect` has no table 'spectra'; it has paths"):
        run["spectra"]
    with pytest.raises(AttributeError, match="no table 'spectra'"):
        _ = run.spectra


def test_a_run_can_be_copied() -> None:
    run = diffract.scan({"w": np.diag([3.0, 4.0])}, cache=False)
    for other in (copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        assert_frame_equal(other["metrics"], run["metrics"])


def test_a_figure_of_a_run() -> None:
    run = diffract.load_run(EARLIER / "heads")
    assert run.figure("lorenz") == diffract.plot("lorenz", EARLIER / "heads")
    with pytest.raises(diffract.RunError, match=r"needs paths\.parquet"):
        run.figure("paths")


def test_kinds_without_a_page_say_so(tmp_path: Path) -> None:
    with pytest.raises(diffract.RunError, match="a run of `diffract eval` has no report"):
        diffract.load_run(EARLIER / "eval").report(tmp_path / "report.html")


@pytest.mark.parametrize("kind", KINDS)
def test_a_notebook_shows_the_main_table(kind: str) -> None:
    run = diffract.load_run(EARLIER / kind.replace(" ", "-"))
    shown = run._repr_html_()
    main = next(iter(KINDS[kind]))
    assert f"<b>diffract {kind}</b>: {main}, {len(run[main])} rows" in shown
    assert ("<li>" in shown) == (kind in PAGES)


def test_untrusted_names_are_text_in_a_notebook() -> None:
    run = diffract.scan({"<script>alert(1)</script>": np.eye(3)}, cache=False)
    assert "<script>" not in run._repr_html_()


def test_a_manifest_says_who_made_it() -> None:
    made = new_manifest("scan", models=[{"model": "a"}], settings={"heads": True})
    assert set(MANIFEST) <= set(made)
    assert made["diffract"] == diffract.__version__
    assert (made["settings"], made["warnings"]) == ({"heads": True}, [])
