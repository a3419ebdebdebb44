"""What the tests of edits share: pairs of tiny models, their tensors, and comparison to the last bit."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import diffract
from diffract.edits import Edited, LiveModel, apply
from diffract.edits.bench import Other
from families import FAMILIES
from tiny_llama import LLAMA

Tensors = dict[str, Tensor]


def assert_bits(found: Tensor, expected: Tensor, name: str = "") -> None:
    """Equal to the last bit, dtype and shape included."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    found, expected = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, expected))
    assert torch.equal(found, expected), f"{name}: {int((found != expected).sum())} bytes differ"


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, and every tensor equal to the last bit."""
    assert sorted(found) == sorted(expected)
    for name in expected:
        assert_bits(found[name], expected[name], name)


def read(reference: Any) -> Tensors:
    """All tensors of a checkpoint, as copies."""
    with diffract.open(reference) as checkpoint:
        return {name: checkpoint[name].clone() for name in checkpoint}


def edit(folder: Path, model: Any, *steps: Any, **recipe: Any) -> Tensors:
    """Apply steps, and return what was written."""
    edited(folder, model, *steps, **recipe)
    return read(folder)


def edited(folder: Path, model: Any, *steps: Any, **recipe: Any) -> Edited:
    """Apply steps."""
    plain = [step if isinstance(step, dict) else {step.name: step} for step in steps]
    return apply({"model": model, "steps": plain, **recipe}, folder)


def everything_of(live: LiveModel, model: torch.nn.Module) -> Other:
    """Another model, as edits of all tensors of a live one take weights from it."""
    (other,) = live.bench.meet([model], live.bench.entries(), chosen=False)
    return other


def family_pair(
    family: str, dtype: torch.dtype = torch.float32, *, scale: float = 0.05
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A seeded model of a family in which no tensor is constant, and one tuned from it; both are the test's own."""
    return copy.deepcopy(_family_pair(family, dtype, scale))


@cache
def _family_pair(family: str, dtype: torch.dtype, scale: float) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    base = FAMILIES[family]().eval()
    moved(base, 0.02, seed=1)
    tuned = copy.deepcopy(base)
    moved(tuned, scale, seed=2)
    return base.to(dtype), tuned.to(dtype)


@torch.no_grad()
def moved(model: torch.nn.Module, scale: float, *, seed: int) -> None:
    """Add noise to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def save_pair(folder: Path, family: str, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Path, Path]:
    """The pair of a family, as transformers writes it: a copy of the test's own."""
    saved = Path(_saved_pair(family, dtype, tuple(config.items())).name)
    for name in ("base", "tuned"):
        shutil.copytree(saved / name, folder / name)
    return folder / "base", folder / "tuned"


@cache
def _saved_pair(family: str, dtype: torch.dtype, config: tuple[tuple[str, Any], ...]) -> TemporaryDirectory[str]:
    """Build and write a pair once for all tests; the folder goes when they have ended."""
    folder = TemporaryDirectory()
    for name, model in zip(("base", "tuned"), family_pair(family, dtype), strict=True):
        model.config.update(dict(config))
        model.save_pretrained(Path(folder.name) / name)
    return folder


def as_module(tensors: Tensors, **config: object) -> torch.nn.Module:
    """A module with these tensors under these names, and the configuration of a llama."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        here = root
        for word in path:
            if word not in here._modules:
                here.add_module(word, torch.nn.Module())
            here = here.get_submodule(word)
        here.register_parameter(last, torch.nn.Parameter(tensor.clone()))
    root.config = type("Config", (), {"to_dict": lambda self: LLAMA | config})()
    return root
