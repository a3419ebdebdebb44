"""Fixtures that all tests share: a cache of their own, and tiny seeded checkpoints."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tiny_llama import llama_tensors, save_llama

# Threads that share products of a few hundred numbers wait for each other most of the time; a machine with other work
# to do takes several times as long. Processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Time is measured in benchmarks, never asserted in a test. The default suite draws the same examples each time, so that
# it fails for a change and not by chance; `make test-slow` draws new ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("new", deadline=None)
settings.load_profile("same")


def pytest_collection_finish() -> None:
    """Leave what all tests have imported out of garbage collections, which accelerate asks for after each training."""
    gc.freeze()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(autouse=True, scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What fixtures of a module compute reaches no cache of the user's."""
    os.environ["DIFFRACT_CACHE_DIR"] = str(tmp_path_factory.mktemp("shared-cache"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DIFFRACT_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., Path]:
    """Write tensors as a model folder; keywords change its config."""

    def write(name: str, tensors: dict[str, torch.Tensor], **config: object) -> Path:
        return save_llama(tmp_path / name, tensors, **config)

    return write


@pytest.fixture
def family(write_model: Callable[..., Path]) -> tuple[Path, Path]:
    """A base and its tuned descendant."""
    tensors = llama_tensors(0)
    return write_model("base", tensors), write_model("tuned", llama_tensors(1, tensors))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A browser page that notes errors, dialogs and requests to a network in ``problems``."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.problems = []
    opened.on("pageerror", lambda e: opened.problems.append(str(e)))
    opened.on("console", lambda m: opened.problems.append(m.text) if m.type == "error" else None)
    opened.on("dialog", lambda d: opened.problems.append(f"dialog {d.message}"))
    opened.on("request", lambda r: opened.problems.append(r.url) if r.url.startswith("http") else None)
    yield opened
    opened.close()
