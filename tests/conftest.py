"""Fixtures that all tests share: a cache of their own, and tiny seeded checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

settings.register_profile("untimed", deadline=None)  # time is measured in benchmarks, never asserted in a test
settings.load_profile("untimed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DIFFRACT_CACHE_DIR", str(folder))
    return folder


def llama_tensors(seed: int, base: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """A grouped-query model in bf16; with ``base``, that one changed by 5%."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (50, 32), "lm_head.weight": (50, 32)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{p}_proj.weight": (32, 32) for p in "qo"}
        shapes |= {f"{prefix}self_attn.{p}_proj.weight": (16, 32) for p in "kv"}
        shapes |= {f"{prefix}mlp.{p}_proj.weight": (48, 32) for p in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (32, 48), f"{prefix}input_layernorm.weight": (32,)}
    noise = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if base is None:
        return {name: value.bfloat16() for name, value in noise.items()}
    return {name: (base[name].float() + 0.05 * value).bfloat16() for name, value in noise.items()}


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., Path]:
    """Write tensors as a model folder; keywords change its config."""

    def write(name: str, tensors: dict[str, torch.Tensor], **config: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(LLAMA | config))
        return folder

    return write


@pytest.fixture
def family(write_model: Callable[..., Path]) -> tuple[Path, Path]:
    """A base and its tuned descendant."""
    tensors = llama_tensors(0)
    return write_model("base", tensors), write_model("tuned", llama_tensors(1, tensors))


@pytest.fixture
def page() -> Iterator[Any]:
    """A browser page that notes errors, dialogs and requests to a network in ``problems``."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.problems = []
        opened.on("pageerror", lambda e: opened.problems.append(str(e)))
        opened.on("console", lambda m: opened.problems.append(m.text) if m.type == "error" else None)
        opened.on("dialog", lambda d: opened.problems.append(f"dialog {d.message}"))
        opened.on("request", lambda r: opened.problems.append(r.url) if r.url.startswith("http") else None)
        yield opened
        browser.close()
