"""Tensors of more than two axes: read as one matrix, written back with the axes that they have."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import diffract
from diffract.checkpoints import open_checkpoint
from diffract.edits import Interpolate, LiveModel, Rewind, Truncate
from diffract.errors import CheckpointError
from diffract.matrices import lay_out
from edit_cases import Tensors, as_module, assert_bits, assert_same, edit, read

ATTENTION = "params.encoder.layers_{}.attention."
HEADS, KV, SIZE, WIDTH = 4, 2, 3, 16


def drawn(seed: int) -> Tensors:
    """A base or a tuned model: two layers of attention as Flax stores it, and convolutions of torch and of Flax."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "tower.conv1.weight": (6, 4, 3),
        "tower.proj.weight": (8, 3, 2, 5),
        "params.patch_embedding.kernel": (2, 2, 3, WIDTH),
        "params.pos_embedding": (1, 5, WIDTH),
    }
    for stem in map(ATTENTION.format, (0, 1)):
        shapes |= {stem + "query.kernel": (WIDTH, HEADS, SIZE), stem + "query.bias": (HEADS, SIZE)}
        shapes |= {stem + f"{name}.kernel": (WIDTH, KV, SIZE) for name in ("key", "value")}
        shapes |= {stem + "out.kernel": (HEADS, SIZE, WIDTH), stem + "out.bias": (WIDTH,)}
    start = torch.Generator().manual_seed(9)
    base = {name: torch.randn(shape, generator=start) for name, shape in shapes.items()}
    return {name: w + 0.1 * torch.randn(w.shape, generator=generator) for name, w in base.items()}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    for seed, name in enumerate(("base", "tuned")):
        (tmp_path / name).mkdir()
        save_file(drawn(seed), tmp_path / name / "model.safetensors")
    return tmp_path / "base", tmp_path / "tuned"


def as_matrix(name: str, w: Tensor) -> Tensor:
    """(out, in) by hand, as these tensors are multiplied with."""
    if name.endswith("out.kernel") or name == "params.patch_embedding.kernel":
        return w.reshape(-1, WIDTH).T
    if name == "params.pos_embedding":
        return w[0]
    return w.flatten(1).T if name.endswith("kernel") else w.flatten(1)


def test_each_is_one_matrix_with_the_numbers_of_numpy(pair: tuple[Path, Path]) -> None:
    run = diffract.compare(*pair, heads=False, metrics=["frobenius_norm", "spectral_norm", "delta_spectral"])
    before, after = drawn(0), drawn(1)
    rows = {row["tensor"]: row for row in run.metrics.filter(model="tuned").iter_rows(named=True)}
    assert sorted(rows) == sorted(name for name in before if not name.endswith("bias"))
    for name, row in rows.items():
        one, two = (as_matrix(name, w[name]).double().numpy() for w in (before, after))
        assert (row["rows"], row["cols"]) == one.shape, name
        # float64 singular values of matrices of at most 16 columns
        assert row["spectral_norm"] == pytest.approx(np.linalg.norm(two, 2), rel=1e-10), name
        assert row["delta_spectral"] == pytest.approx(np.linalg.norm(two - one, 2), rel=1e-10), name
    kinds = {row["tensor"]: row for row in run.tables.tensors.filter(model="tuned").iter_rows(named=True)}
    assert kinds["tower.conv1.weight"]["shape"] == [6, 4, 3]
    assert kinds["tower.conv1.weight"]["note"] == "[6, 4, 3] read as [6, 12]"
    assert kinds[ATTENTION.format(0) + "query.bias"]["outcome"] == "vector"


def test_an_axis_of_heads_counts_them(pair: tuple[Path, Path]) -> None:
    with open_checkpoint(pair[0]) as checkpoint:
        layout = lay_out(checkpoint)
        cut = sorted(m.name for m in layout.matrices if m.layer == 1)
        w = {n: drawn(0)[ATTENTION.format(1) + f"{n}.kernel"] for n in ("query", "key", "out")}
        assert layout.architecture.dimensions.heads == HEADS
        assert layout.architecture.dimensions.kv_heads == KV
        run = diffract.scan(pair[0], metrics=["frobenius_norm"])
    norms = dict(run.metrics.select("name", "frobenius_norm").iter_rows())
    assert cut == sorted(
        [f"L1.attn.{p}.h{h}" for p in "qo" for h in range(HEADS)] + [f"L1.attn.{p}.kv{h}" for p in "kv" for h in (0, 1)]
    )
    for h in range(HEADS):
        # float32 sums of 48 squares against float64 ones
        assert norms[f"L1.attn.q.h{h}"] == pytest.approx(w["query"][:, h].norm().item(), rel=1e-6)
        assert norms[f"L1.attn.o.h{h}"] == pytest.approx(w["out"][h].norm().item(), rel=1e-6)
        assert norms[f"L1.attn.k.kv{h // 2}"] == pytest.approx(w["key"][:, h // 2].norm().item(), rel=1e-6)


def test_heads_that_a_configuration_counts_otherwise_stay_whole() -> None:
    with open_checkpoint(as_module(drawn(0), num_attention_heads=2, model_type="flax")) as checkpoint:
        layout = lay_out(checkpoint)
    assert {m.head for m in layout.matrices} == {None}
    assert any("the configuration states 2 heads, an axis of q counts 4" in text for text in layout.warnings)


def test_stacks_of_experts_and_tensors_of_unknown_axes_are_no_convolutions() -> None:
    held = {
        "moe.input_linear.weight": (2, 5, 4),
        "mlp.experts.conv_gate": (2, 5, 4),
        "decoder.query.kernel": (5, 2, 4, 3),
        "conv.parametrizations.weight.original0": (1, 1, 4),
        "relative.table": (4, 3, 2),
    }
    layout = lay_out(open_checkpoint({name: np.ones(shape, np.float32) for name, shape in held.items()}))
    assert [m.name for m in layout.matrices if m.index is not None] == [
        f"{n}[{i}]" for n in list(held)[:2] for i in (0, 1)
    ]
    assert {n: e.note for n, e in layout.entries.items() if not e.matrices} == {
        name: f"{len(held[name])} axes, and nothing says what they count" for name in list(held)[2:]
    }


def test_heads_are_rewound_with_their_rows_of_biases(pair: tuple[Path, Path], tmp_path: Path) -> None:
    start, end = read(pair[0]), read(pair[1])
    wanted, stem = {name: w.clone() for name, w in end.items()}, ATTENTION.format(1)
    for h in (2, 3):
        for name, place in (("query.kernel", (slice(None), h)), ("query.bias", (h,)), ("out.kernel", (h,))):
            wanted[stem + name][place] = start[stem + name][place]
    for name in ("key", "value"):
        wanted[stem + f"{name}.kernel"][:, 1] = start[stem + f"{name}.kernel"][:, 1]
    step = Rewind(to=pair[0], heads=("L1.h2", "L1.h3"))
    assert_same(edit(tmp_path / "out", pair[1], step), wanted)
    assert_same(read(tmp_path / "out"), wanted)
    live = as_module(end)
    LiveModel(live).apply(Rewind(to=as_module(start), heads=("L1.h2", "L1.h3")))
    assert_same(dict(live.state_dict()), wanted)


def test_heads_of_torch_attention_are_rewound_with_their_rows_of_its_bias(tmp_path: Path) -> None:
    """By rows 2 and 3 of q, k and v each, of four heads of two rows."""
    stem, shapes = "encoder.layers.0.self_attn.", {"in_proj_weight": (24, 8), "in_proj_bias": (24,)}
    shapes |= {"out_proj.weight": (8, 8), "out_proj.bias": (8,)}
    shapes |= {"../linear1.weight": (12, 8), "../linear2.weight": (8, 12)}
    names = {name: f"{stem}{name}".replace("self_attn.../", "") for name in shapes}
    held = {names[name]: torch.arange(1.0, 1 + math.prod(shape)).view(shape) for name, shape in shapes.items()}
    for name, scale in (("base", 1), ("tuned", 1.25)):
        (tmp_path / name).mkdir()
        save_file({n: scale * w for n, w in held.items()}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"nhead": 4}')
    wanted = {name: 1.25 * w for name, w in held.items()}
    for name, rows in ((n, slice(start + 2, start + 4)) for n in list(wanted)[:2] for start in (0, 8, 16)):
        wanted[name][rows] = held[name][rows]
    wanted[f"{stem}out_proj.weight"][:, 2:4] = held[f"{stem}out_proj.weight"][:, 2:4]
    found = edit(tmp_path / "out", tmp_path / "tuned", Rewind(to=tmp_path / "base", heads=("L0.h1",)))
    assert_same(found, wanted)


def test_entries_and_directions_of_a_convolution_are_written_in_its_shape(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    start, end = read(pair[0]), read(pair[1])
    assert_same(edit(tmp_path / "same", pair[1], Truncate(base=pair[0], rank=100)), end)
    half = edit(tmp_path / "half", pair[1], Interpolate(other=pair[0], at=1))
    assert_same(half, start)
    name = "tower.proj.weight"
    found = edit(tmp_path / "one", pair[1], Truncate(base=pair[0], rank=1))[name]
    u, s, vh = np.linalg.svd((end[name] - start[name]).flatten(1).double().numpy(), full_matrices=False)
    best = start[name].double() + torch.from_numpy(s[0] * np.outer(u[:, 0], vh[0])).reshape(start[name].shape)
    # one rounding to float32 of entries below 4, of a rank-one matrix computed in float64
    assert torch.allclose(found.double(), best, rtol=0, atol=4 * 2**-24)
    assert diffract.edits.verify(tmp_path / "one").faults == []


def test_a_live_convolution_is_changed_and_put_back(pair: tuple[Path, Path]) -> None:
    start, conv = drawn(0), torch.nn.Conv2d(3, 8, (2, 5), bias=False)
    other = torch.nn.Conv2d(3, 8, (2, 5), bias=False)
    before = conv.weight.detach().clone()
    with LiveModel(conv).edited(Truncate(base=other, rank=1)):
        change = (conv.weight - other.weight).detach().flatten(1)
        assert torch.linalg.matrix_rank(change, rtol=1e-5) == 1
    assert_bits(conv.weight.detach(), before)
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    with pytest.raises(CheckpointError, match="channels_last"):
        LiveModel(conv).apply(Interpolate(other=other, at=1))
    assert set(start) == set(read(pair[0]))
