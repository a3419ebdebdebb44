"""The gallery shows every kind, is what its script writes, and its series can be made without any data."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import diffract
from diffract.plots import KINDS

DOCS = Path(__file__).parents[2] / "docs"
LARGEST_BYTES = 100_000


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_gallery", DOCS / "make_gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_gallery"] = module  # where dataclasses look for their own annotations
    spec.loader.exec_module(module)
    return module


def test_every_kind_is_there_with_options_that_it_takes(script: ModuleType) -> None:
    assert {picture.kind for picture in script.PICTURES} == set(KINDS)
    for picture in script.PICTURES:
        assert set(picture.options) <= set(KINDS[picture.kind].options)


def test_the_page_is_what_the_script_writes(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "series").mkdir()
    pages = [script.page(tmp_path / series) for series in ("series", "absent")]
    assert (DOCS / "gallery.md").read_text() in pages


def test_pictures_are_there_and_small() -> None:
    linked = set(re.findall(r"\(gallery/(\S+\.png)\)", (DOCS / "gallery.md").read_text()))
    assert linked == {file.name for file in (DOCS / "gallery").iterdir()}
    assert all((DOCS / "gallery" / name).stat().st_size < LARGEST_BYTES for name in linked)


def test_the_made_series_can_be_followed(script: ModuleType) -> None:
    series = script.synthetic_series(checkpoints=3, width=12, layers=1)
    run = script.follow(series, metrics=["effective_rank", "delta_relative"], by="given", select="mlp")
    for picture in (p for p in script.PICTURES if p.run == "series"):
        assert len(diffract.plot(picture.kind, run, **picture.options).data) > 0
