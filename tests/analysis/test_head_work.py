"""Heads: adapters, tensors read in blocks, and what the cache may hand out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors.torch import save_file

import diffract
from diffract.analysis import head_changes, work
from diffract.analysis import held as stack
from diffract.checkpoints import Checkpoint, TensorInfo
from diffract.checkpoints.adapted import Adapted
from diffract.matrices.lineage import Lineage
from tiny_llama import llama_tensors

ATTENTION = "model.layers.{}.self_attn.{}_proj"
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "num_key_value_heads": 4, "n_layer": 1}
TABLES = ("heads", "domains", "scores", "lorenz", "models")


def same(one: diffract.Run, other: diffract.Run, **tolerance: float) -> None:
    for name in TABLES:
        frames = getattr(one, name), getattr(other, name)
        assert_frame_equal(*frames, **(tolerance or {"check_exact": True}))


# Adapters


@pytest.fixture
def adapted(write_model: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base in float32, a LoRA over it, and the adapter's change in float64."""
    tensors = {name: value.float() for name, value in llama_tensors(0).items()}
    base, folder = write_model("plain", tensors), tmp_path / "lora"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    saved, change = {}, {}
    for layer in range(2):
        for p, rows in (("q", 32), ("v", 16), ("o", 32)):
            module = ATTENTION.format(layer, p)
            A, B = torch.randn(4, 32, generator=generator), torch.randn(rows, 4, generator=generator)
            saved |= {f"base_model.model.{module}.lora_{s}.weight": t for s, t in (("A", A), ("B", B))}
            change[f"{module}.weight"] = 2 * B.double() @ A.double()
    save_file(saved, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return base, folder, change


def expected(change: dict[str, torch.Tensor]) -> list[float]:
    """Norms of heads: q rows, o columns, and half of the v rows that two heads share; k is not adapted."""
    found = []
    for layer in range(2):
        q, v, o = (change[ATTENTION.format(layer, p) + ".weight"] for p in "qvo")
        for head in range(4):
            own, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
            found.append(float(sum((part**2).sum() for part in (q[own], o[:, own], v[shared] / 2**0.5)) ** 0.5))
    return found


def test_an_adapter_is_its_factors(adapted: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    base, folder, change = adapted
    read = Adapted.read

    def unmerged(self: Adapted, info: TensorInfo, rows: tuple[int, int] | None) -> torch.Tensor:
        # what lineage is told by is a sample of rows
        assert info.name not in self.changes or rows is not None, "the change was multiplied out"
        return read(self, info, rows)

    monkeypatch.setattr(Adapted, "read", unmerged)
    run = diffract.heads(base, f"lora={folder}")
    # float64 throughout: sums of a thousand products
    assert run.heads["head_delta"].to_list() == pytest.approx(expected(change), rel=1e-12)
    assert run.manifest["warnings"] == []


def test_an_adapter_equals_its_merged_weights(adapted: tuple, write_model: Callable[..., Path]) -> None:
    base, folder, change = adapted
    with diffract.open(base) as checkpoint:
        merged = {name: tensor.clone() for name, tensor in checkpoint.items()}
    merged |= {name: (merged[name].double() + delta).float() for name, delta in change.items()}
    run = diffract.heads(base, f"lora={folder}", f"merged={write_model('merged', merged)}")
    one, other = (run.heads.filter(model=m)["head_delta"].to_list() for m in ("lora", "merged"))
    # merged weights are rounded to float32: relative 6e-8 of the weights, which are no larger than the change
    assert one == pytest.approx(other, rel=1e-6)
    assert run.domains["cosine"][0] == pytest.approx(1.0, abs=1e-12)


def test_a_comparison_takes_an_adapter_of_another_base_merged(
    adapted: tuple, write_model: Callable[..., Path], tmp_path: Path
) -> None:
    base, folder, _ = adapted
    other = write_model("other", {name: value.float() for name, value in llama_tensors(5).items()})
    found = diffract.compare(other, folder, select="attn.q", heads=False, cache=False)
    name = ATTENTION.format(0, "q") + ".weight"
    with diffract.open(folder) as merged, diffract.open(other) as start:
        change = torch.linalg.norm(merged.read(name).double() - start.read(name).double()).item()
    row = found.metrics.filter(model="lora", layer=0).row(0, named=True)
    assert row["delta_frobenius"] == pytest.approx(change, rel=1e-12)
    assert any(f"an adapter over {base}, not over {other}" in text for text in found.manifest["warnings"])


def test_an_adapter_of_another_base_is_told(
    adapted: tuple, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder, _ = adapted
    other = write_model("other", {name: value.float() for name, value in llama_tensors(7).items()})
    run = diffract.heads(other, f"lora={folder}")
    assert [text.split(":")[:2] for text in run.manifest["warnings"]] == [
        ["lora", f" an adapter over {base}, not over {other}"]
    ]
    with diffract.open(folder) as merged:
        full = diffract.heads(other, {name: merged[name] for name in merged})
    assert run.heads["head_delta"].to_list() == full.heads["head_delta"].to_list()
    monkeypatch.chdir(base.parent)
    assert diffract.heads("plain", f"lora={folder}").manifest["warnings"] == []  # the same folder in other words


# Large tensors


def test_tensors_read_in_blocks_give_the_same(
    family: tuple[Path, Path], adapted: tuple, monkeypatch: pytest.MonkeyPatch, write_model: Callable[..., Path]
) -> None:
    fused = {"transformer.h.0.attn.c_attn.weight": (32, 96), "transformer.h.0.attn.c_proj.weight": (32, 32)}
    generator = torch.Generator().manual_seed(0)
    gpt2 = [{name: torch.randn(shape, generator=generator) for name, shape in fused.items()} for _ in range(3)]
    models = [
        (*family, llama_tensors(2)),
        adapted[:2],
        (write_model("gpt2", gpt2[0], **GPT2), *gpt2[1:]),
    ]
    # what tells lineage is read apart
    monkeypatch.setattr(head_changes, "tell_lineage", lambda *_: Lineage("far", 0.5, 8))
    whole = [diffract.heads(*references, cache=False) for references in models]
    read, largest = Checkpoint.read, 0

    def recorded(self: Checkpoint, name: str, rows: tuple[int, int] | None = None, **options: object) -> torch.Tensor:
        nonlocal largest
        found = read(self, name, rows, **options)
        largest = max(largest, found.numel())
        return found

    # blocks of five rows, which end within heads; of fused tensors two
    for module in (work, stack):
        monkeypatch.setattr(module, "KEEP_BYTES", 0)
    monkeypatch.setattr(work, "BLOCK_ENTRIES", 5 * 32)
    monkeypatch.setattr(Checkpoint, "read", recorded)
    for references, want in zip(models, whole, strict=True):
        same(diffract.heads(*references, cache=False), want, rel_tol=1e-12)
    # an adapter's factors are read whole
    assert largest == 5 * 32


def test_transposed_and_fused_slices(write_model: Callable[..., Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"h.0.attn.c_attn.weight": (32, 96), "h.0.attn.c_proj.weight": (32, 32)}
    base, tuned = ({name: torch.randn(s, generator=generator) for name, s in shapes.items()} for _ in range(2))
    run = diffract.heads(write_model("gpt2", base, **GPT2), tuned)
    qkv, o = ((tuned[name].double() - base[name].double()).numpy() for name in shapes)
    for head, found in enumerate(run.heads["head_delta"]):
        own = slice(8 * head, 8 * head + 8)
        parts = [*(qkv[:, 32 * i : 32 * i + 32][:, own] for i in range(3)), o[own]]
        assert found == pytest.approx(np.sqrt(sum((part**2).sum() for part in parts)), rel=1e-13)


# The cache


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of slices in each call that computes something."""
    calls: list[int] = []
    real = work.change_grams

    def counted(base: torch.Tensor, tuned: list) -> torch.Tensor:
        calls.append(len(base))
        return real(base, tuned)

    monkeypatch.setattr(work, "change_grams", counted)
    return calls


def test_a_second_run_computes_nothing(family: tuple[Path, Path], computed: list[int]) -> None:
    first = diffract.heads(*family)
    assert sum(computed) == 2 * (4 + 2 + 2 + 4)
    computed.clear()
    same(first, diffract.heads(*family))
    assert computed == []
    diffract.heads(*family, projections=["q"])  # the same slices
    assert computed == []
    same(first, diffract.heads(*family, cache=False))
    assert sum(computed) == 24


def test_only_a_changed_tensor_is_computed_again(family: tuple[Path, Path], computed: list[int]) -> None:
    diffract.heads(*family)
    computed.clear()
    tensors = llama_tensors(1, llama_tensors(0))
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] += 1
    save_file(tensors, family[1] / "model.safetensors")
    same(diffract.heads(*family), diffract.heads(*family, cache=False))
    assert computed[:1] == [4]


def test_other_domains_are_other_results(family: tuple[Path, Path], computed: list[int]) -> None:
    base, tuned = family
    diffract.heads(base, f"a={tuned}")
    computed.clear()
    both = diffract.heads(base, f"a={tuned}", f"b={base}")
    assert sum(computed) == 24
    assert both.heads.filter(model="b")["head_delta"].to_list() == [0.0] * 8


def test_changed_factors_never_meet_old_results(adapted: tuple) -> None:
    base, folder, _ = adapted
    before = diffract.heads(base, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16}))
    after = diffract.heads(base, folder)
    assert (after.heads["head_delta"] / before.heads["head_delta"]).to_list() == pytest.approx([2.0] * 8, rel=1e-14)


def test_an_interrupted_run_continues_to_the_same_result(family: tuple[Path, Path], computed: list[int]) -> None:
    undisturbed = diffract.heads(*family, cache=False)
    computed.clear()
    steps = 0

    def interrupt(done: float, total: float, what: str) -> None:
        nonlocal steps
        steps += 1
        assert 0 < done <= total
        assert "self_attn" in what
        if steps == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diffract.heads(*family, progress=interrupt)
    assert sum(computed) > 0
    same(diffract.heads(*family), undisturbed)
    assert sum(computed) == 24  # nothing twice


def test_no_cache_writes_nothing(family: tuple[Path, Path], own_cache: Path) -> None:
    diffract.heads(*family, cache=False)
    assert list(own_cache.iterdir()) == []
