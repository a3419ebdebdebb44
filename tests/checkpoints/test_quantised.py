"""Quantised weights against codes that are packed here, entry by entry, as each format defines them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffract.api import scan
from diffract.checkpoints import open_checkpoint
from diffract.edits.to_files import apply
from diffract.errors import CheckpointError

OUT, IN = 48, 128
STEM = "model.layers.0.mlp.up_proj"
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]

Stored = tuple[dict[str, Tensor], dict[str, Any], Tensor]
"""Tensors by the end of their names, the configuration's part, and what the weight truly is."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def pack(codes: np.ndarray, bits: int, axis: int = -1) -> Tensor:
    """Pack whole numbers into 32-bit words, the first in the lowest bits."""
    moved = np.moveaxis(codes, axis, -1).astype(np.int64)
    words = moved.reshape(*moved.shape[:-1], -1, 32 // bits)
    packed = sum(words[..., i] << (bits * i) for i in range(32 // bits)).astype(np.uint32).view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, -1, axis)))


def fp4(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return bytes of two codes, the first in the low bits, and the numbers they stand for."""
    codes = rng.integers(0, 16, shape)
    return torch.from_numpy((codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)), torch.tensor(FP4)[codes]


def scales(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.uniform(0.01, 0.1, shape).astype(np.float32))


def grown(scale: Tensor, rows: int, columns: int) -> Tensor:
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:OUT, :IN]


def fp8(rng: np.random.Generator, how: str) -> Stored:
    codes = torch.from_numpy(rng.normal(0, 10, (OUT, IN)).astype(np.float32)).to(torch.float8_e4m3fn)
    config: dict[str, Any] = {"quant_method": "fp8"}
    if how == "tensor":
        scale, wide = scales(rng), None
    elif how == "row":
        scale = scales(rng, OUT, 1)
        wide = scale
    elif how == "vector":
        scale = scales(rng, OUT)
        wide = scale[:, None]
    else:  # blocks that the last row and column of blocks do not fill
        scale = scales(rng, 2, 4)
        config["weight_block_size"] = [32, 40]
        wide = grown(scale, 32, 40)
    name = "weight_scale_inv" if how == "block" else "weight_scale"
    true = codes.float() * (scale if wide is None else wide)
    return {"weight": codes, name: scale, "input_scale": torch.ones(1)}, {"quantization_config": config}, true


def int8(rng: np.random.Generator, ends: tuple[str, str, str]) -> Stored:
    codes = torch.from_numpy(rng.integers(-127, 128, (OUT, IN)).astype(np.int8))
    zero, scale = torch.from_numpy(rng.integers(-5, 6, (OUT, 1)).astype(np.int8)), scales(rng, OUT, 1)
    stored = {ends[0]: codes, ends[1]: scale}
    if ends[2]:
        return stored | {ends[2]: zero}, {}, (codes.float() - zero) * scale
    return stored, {}, codes.float() * scale


def bnb_int8(rng: np.random.Generator) -> Stored:
    codes = torch.from_numpy(rng.integers(-127, 128, (OUT, IN)).astype(np.int8))
    scale = scales(rng, OUT)
    parts = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, {"quantization_config": {"load_in_8bit": True}}, codes.float() * scale[:, None] / 127


def bnb_4bit(rng: np.random.Generator, nested: bool) -> Stored:
    codes, table = rng.integers(0, 16, OUT * IN), torch.linspace(-1, 1, 16)
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [OUT, IN], "dtype": "bfloat16"}
    parts = {
        "weight": torch.from_numpy((codes[::2] << 4 | codes[1::2]).astype(np.uint8))[:, None],
        "weight.quant_map": table,
    }
    blocks = OUT * IN // 64
    if nested:
        fine, fine_table, coarse = (
            rng.integers(0, 256, blocks),
            torch.linspace(-1, 1, 256),
            scales(rng, -(-blocks // 32)),
        )
        absmax = fine_table[fine] * coarse.repeat_interleave(32)[:blocks] + 0.25
        parts |= {"weight.absmax": torch.from_numpy(fine.astype(np.uint8)), "weight.nested_absmax": coarse}
        parts["weight.nested_quant_map"] = fine_table
        state |= {"nested_blocksize": 32, "nested_dtype": "float32", "nested_offset": 0.25}
    else:
        absmax = scales(rng, blocks)
        parts["weight.absmax"] = absmax
    text = json.dumps(state).encode()
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    true = (table[codes] * absmax.repeat_interleave(64)).reshape(OUT, IN)
    return parts, {"quantization_config": {"quant_method": "bitsandbytes"}}, true


def int4(rng: np.random.Generator, bits: int, zero: bool, order: bool) -> Stored:
    half, groups = 1 << (bits - 1), 4
    codes, scale = rng.integers(0, 2 * half, (OUT, IN)), scales(rng, OUT, groups)
    group = rng.permutation(IN) % groups if order else np.arange(IN) // (IN // groups)
    zeros = rng.integers(0, 2 * half, (OUT, groups)) if zero else np.full((OUT, groups), half)
    parts = {"weight_packed": pack(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor([OUT, IN])}
    if zero:
        parts["weight_zero_point"] = pack(zeros, bits, axis=0)
    if order:
        parts["weight_g_idx"] = torch.from_numpy(group.astype(np.int32))
    config = {"config_groups": {"group_0": {"weights": {"num_bits": bits}}}, "format": "pack-quantized"}
    true = torch.from_numpy(codes - zeros[:, group]).float() * scale[:, group]
    return parts, {"quantization_config": config}, true


def mlx(rng: np.random.Generator, bits: int) -> Stored:
    codes, scale, bias = rng.integers(0, 1 << bits, (OUT, IN)), scales(rng, OUT, 2), scales(rng, OUT, 2)
    stream = (codes[..., None] >> np.arange(bits) & 1).reshape(OUT, -1).astype(np.uint8)  # bit by bit, lowest first
    words = np.packbits(stream, axis=1, bitorder="little").view(np.uint32)
    true = torch.from_numpy(codes).float() * scale.repeat_interleave(64, 1) + bias.repeat_interleave(64, 1)
    parts = {"weight": torch.from_numpy(words.view(np.int32)).view(torch.uint32), "scales": scale, "biases": bias}
    return parts, {"quantization": {"group_size": 64, "bits": bits}}, true


def mlx_fp4(rng: np.random.Generator) -> Stored:
    held, values = fp4(rng, (OUT, IN))
    exponents = rng.integers(120, 130, (OUT, IN // 32))
    true = values * torch.from_numpy(np.exp2(exponents - 127.0)).float().repeat_interleave(32, 1)
    parts = {"weight": held.view(torch.uint32), "scales": torch.from_numpy(exponents.astype(np.uint8))}
    return parts, {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, true


def nvfp4(rng: np.random.Generator, packed: bool) -> Stored:
    held, values = fp4(rng, (OUT, IN))
    local, whole = scales(rng, OUT, IN // 16).mul(100).to(torch.float8_e4m3fn), torch.tensor([0.37])
    wide = local.float().repeat_interleave(16, 1)
    if packed:
        return {"weight_packed": held, "weight_scale": local, "weight_global_scale": whole}, {}, values * (wide / whole)
    return {"weight": held, "weight_scale": local, "weight_scale_2": whole[0]}, {}, values * (wide * whole)


def gptq(rng: np.random.Generator, bits: int, order: bool, version: str) -> Stored:
    groups = 4
    codes, scale = rng.integers(0, 1 << bits, (IN, OUT)), scales(rng, groups, OUT)
    group = rng.permutation(IN) % groups if order else np.arange(IN) // (IN // groups)
    less = 0 if version == "gptq_v2" else 1
    zeros = rng.integers(1, 1 << bits, (groups, OUT))
    parts = {"qweight": pack(codes, bits, axis=0), "qzeros": pack(zeros - less, bits), "scales": scale}
    if order:
        parts["g_idx"] = torch.from_numpy(group.astype(np.int32))
    config = {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}
    true = (torch.from_numpy(codes - zeros[group]).float() * scale[group]).T
    return parts, {"quantization_config": config}, true


def awq(rng: np.random.Generator) -> Stored:
    def packed(codes: np.ndarray) -> Tensor:
        return pack(codes.reshape(len(codes), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(codes), -1), 4)

    codes, zeros, scale = rng.integers(0, 16, (IN, OUT)), rng.integers(0, 16, (4, OUT)), scales(rng, 4, OUT)
    group = np.arange(IN) // 32
    true = (torch.from_numpy(codes - zeros[group]).float() * scale[group]).T
    config = {"quant_method": "awq", "bits": 4, "version": "gemm"}
    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scale}, {"quantization_config": config}, true


KINDS: dict[str, Callable[[np.random.Generator], Stored]] = {
    **{f"FP8 of one scale a {how}": lambda rng, how=how: fp8(rng, how) for how in ("tensor", "row", "vector", "block")},
    "INT8": lambda rng: int8(rng, ("weight", "weight_scale", "")),
    "INT8 with zero points": lambda rng: int8(rng, ("weight", "weight_scale", "weight_zero_point")),
    "torchao": lambda rng: int8(rng, ("_weight_qdata", "_weight_scale", "")),
    "quanto": lambda rng: int8(rng, ("weight._data", "weight._scale", "")),
    "bitsandbytes 8-bit": bnb_int8,
    "bitsandbytes NF4": lambda rng: bnb_4bit(rng, nested=False),
    "bitsandbytes NF4, nested": lambda rng: bnb_4bit(rng, nested=True),
    "packed int4": lambda rng: int4(rng, 4, zero=False, order=False),
    "packed int4 with zero points": lambda rng: int4(rng, 4, zero=True, order=False),
    "packed int4 in another order": lambda rng: int4(rng, 4, zero=True, order=True),
    "packed int8": lambda rng: int4(rng, 8, zero=True, order=False),
    **{f"MLX {bits} bits": lambda rng, bits=bits: mlx(rng, bits) for bits in (2, 3, 4, 5, 6, 8)},
    "MLX MXFP4": mlx_fp4,
    "NVFP4 of compressed-tensors": lambda rng: nvfp4(rng, packed=True),
    "NVFP4 of ModelOpt": lambda rng: nvfp4(rng, packed=False),
    "GPTQ": lambda rng: gptq(rng, 4, order=False, version="gptq"),
    "GPTQ in another order": lambda rng: gptq(rng, 4, order=True, version="gptq"),
    "GPTQ, second version, 8 bits": lambda rng: gptq(rng, 8, order=False, version="gptq_v2"),
    "AWQ": awq,
}


def write(folder: Path, parts: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    tensors = {f"{STEM}.{end}": tensor.contiguous() for end, tensor in parts.items()}
    tensors["model.norm.weight"] = torch.ones(IN, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "none", "torch_dtype": "bfloat16", **config}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_one_weight(kind: str, rng: np.random.Generator, tmp_path: Path) -> None:
    parts, config, true = KINDS[kind](rng)
    with open_checkpoint(write(tmp_path / "model", parts, config)) as found:
        assert sorted(found) == [f"{STEM}.weight", "model.norm.weight"]
        info = found.info(f"{STEM}.weight")
        assert (info.shape, info.dtype) == ((OUT, IN), "F32")
        weight = found[f"{STEM}.weight"]
        # float32 codes times scales differ by a rounding or two from those of another order of the factors
        torch.testing.assert_close(weight, true.float(), rtol=3e-7, atol=1e-7)
        for rows in ((0, 1), (5, 9), (7, OUT), (32, 33)):
            assert torch.equal(found.read(info.name, rows), weight[slice(*rows)])
        aside = {f"{STEM}.{end}" for end in parts} - {name for name in parts if name in found}
        assert set(found.set_aside) == aside - {f"{STEM}.weight", *coded(parts)}
        assert "quantised" in found.notes[0]
        assert found.config == {"model_type": "none", "dtype": "float32"}
        assert "config.json" not in found.companions


def coded(parts: dict[str, Tensor]) -> set[str]:
    """The codes are the weight itself, under whatever name."""
    names = ("weight_packed", "_weight_qdata", "weight._data", "qweight")
    return {f"{STEM}.{end}" for end in parts if end in names}


def test_experts_of_gpt_oss_are_as_transformers_reads_them(tmp_path: Path, rng: np.random.Generator) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.from_numpy(rng.integers(0, 256, (3, 8, 2, 16)).astype(np.uint8))
    exponents = torch.from_numpy(rng.integers(120, 130, (3, 8, 2)).astype(np.uint8))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    bias = torch.ones(3, 8)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": exponents, f"{name}_bias": bias}
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as found:
        assert list(found) == [f"{name}_bias", name]
        true = convert_moe_packed_tensors(blocks, exponents).float()
        assert found.info(name).shape == (3, 64, 8)
        assert torch.equal(found[name], true)
        assert torch.equal(found.read(name, (1, 3)), true[1:])


def test_bits_may_differ_from_layer_to_layer(tmp_path: Path, rng: np.random.Generator) -> None:
    (four, _, a), (six, _, b) = mlx(rng, 4), mlx(rng, 6)
    tensors = {f"x.{end}": t for end, t in four.items()} | {f"y.{end}": t for end, t in six.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quantization": {"group_size": 64, "bits": 4, "y": {"group_size": 64, "bits": 6}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_checkpoint(tmp_path) as found:
        torch.testing.assert_close(found["x.weight"], a)
        torch.testing.assert_close(found["y.weight"], b)


@pytest.mark.parametrize(
    ("parts", "config", "words"),
    [
        ({"weight_packed": torch.zeros(8, 4, dtype=torch.int32)}, {"quant_method": "vptq"}, "vptq"),
        ({"codes": torch.zeros(8, 4, dtype=torch.uint8)}, {"quant_method": "aqlm"}, "aqlm"),
        (
            {
                "codes": torch.zeros(8, 4, 1, dtype=torch.int16),
                "codebooks": torch.zeros(1, 16, 1, 8),
                "scales": torch.ones(8, 1, 1, 1),
            },
            {"quant_method": "aqlm"},
            "aqlm",
        ),
        ({"Qidxs": torch.zeros(8, 4, dtype=torch.int64), "SU": torch.ones(8)}, {"quant_method": "quip"}, "quip"),
        ({"dense_weights": torch.zeros(300, dtype=torch.int64)}, {"quant_method": "spqr"}, "spqr"),
        (
            {"W_q": torch.zeros(8, 4, dtype=torch.uint8), "scale": torch.ones(8, 1), "zero": torch.ones(8, 1)},
            {},
            "a way that is not stated",
        ),
        (
            {"weight": torch.zeros(8, 4, dtype=torch.int8), "weight_scale": torch.ones(3, 1)},
            {"quant_method": "x"},
            "do not fit",
        ),
        (
            {"weight_packed": torch.zeros(8, 4, dtype=torch.int32), "weight_scale": torch.ones(8, 1)},
            {"format": "marlin-24"},
            "marlin-24",
        ),
        (
            {
                "weight_packed": torch.zeros(8, 3, dtype=torch.int32),
                "weight_scale": torch.ones(8, 1),
                "bits": torch.ones(1),
            },
            {"bits": 3},
            "3 bits",
        ),
        (
            {"weight": torch.zeros(8, 4, dtype=torch.int32), "scales": torch.zeros(8, 1, dtype=torch.uint8)},
            {"mode": "mxfp8"},
            "mxfp8",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(
    parts: dict[str, Tensor], config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "model", parts, {"quantization_config": config})
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


def test_whole_numbers_that_are_no_codes_are_left_alone(tmp_path: Path) -> None:
    """A model may state how it is quantised when it is loaded, and be stored plain."""
    parts = {"weight": torch.ones(8, 4), "position_ids": torch.arange(300)[None], "steps": torch.tensor([3])}
    with open_checkpoint(write(tmp_path / "model", parts, {"quantization_config": {"quant_method": "fp8"}})) as found:
        assert sorted(name.rpartition(".")[2] for name in found) == ["position_ids", "steps", "weight", "weight"]
        assert not found.set_aside


@pytest.mark.parametrize(("rows", "columns"), [(300, 200), (130, 257), (128, 512)])
def test_blocks_that_nothing_states_are_square(
    rng: np.random.Generator, rows: int, columns: int, tmp_path: Path
) -> None:
    """Of 300 rows and three scales a scale counts for 128 rows, the last for what is left, not for 100 each."""
    codes = torch.from_numpy(rng.normal(0, 10, (rows, columns)).astype(np.float32)).to(torch.float8_e4m3fn)
    scale = scales(rng, -(-rows // 128), -(-columns // 128))
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    with open_checkpoint(write(tmp_path / "model", {"weight": codes, "weight_scale_inv": scale}, {})) as found:
        assert torch.equal(found[f"{STEM}.weight"], codes.float() * wide)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bits_are_told_by_zero_points_where_nothing_states_them(
    rng: np.random.Generator, bits: int, tmp_path: Path
) -> None:
    parts, _, true = gptq(rng, bits, order=True, version="gptq")
    with open_checkpoint(write(tmp_path / "model", parts, {})) as found:
        torch.testing.assert_close(found[f"{STEM}.weight"], true)


def test_tiles_of_old_bitsandbytes_are_refused_when_read(rng: np.random.Generator, tmp_path: Path) -> None:
    parts, config, _ = bnb_int8(rng)
    parts["weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with (
        open_checkpoint(write(tmp_path / "model", parts, config)) as found,
        pytest.raises(CheckpointError, match="tiles"),
    ):
        found.read(f"{STEM}.weight")


def test_codes_without_scales_are_no_weights(rng: np.random.Generator, tmp_path: Path) -> None:
    parts, config, _ = fp8(rng, "row")
    folder = write(tmp_path / "model", parts, config)
    save_file({"lost.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, folder / "more.safetensors")
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    with open_checkpoint(folder) as found:
        assert found.set_aside["lost.weight"].reason == "codes without scales"


def test_a_plain_float8_model_stays_as_it_is(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(4, 4).to(torch.float8_e5m2), "a.scale": torch.ones(4, dtype=torch.float64)}
    save_file({"a.weight": tensors["a.weight"]}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as found:
        assert found.info("a.weight").dtype == "F8_E5M2"
        assert not found.notes


def test_unknown_dtypes_are_set_aside_and_the_rest_is_read(tmp_path: Path) -> None:
    header = {
        "odd": {"dtype": "F4", "shape": [4, 4], "data_offsets": [0, 8]},
        "plain": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    }
    raw = json.dumps(header).encode()
    data = np.array([0, 0, 1, 2], dtype=np.float32).tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    with open_checkpoint(tmp_path) as found:
        assert list(found) == ["plain"]
        assert found["plain"].tolist() == [1, 2]
        assert (found.set_aside["odd"].shape, found.set_aside["odd"].size_bytes) == ((4, 4), 8)


def test_a_model_and_its_float8_release_differ_by_its_rounding(rng: np.random.Generator, tmp_path: Path) -> None:
    parts, config, true = fp8(rng, "block")
    noisy = true * torch.from_numpy(1 + rng.uniform(-0.03, 0.03, true.shape)).float()
    plain = write(tmp_path / "plain", {"weight": noisy}, {})
    from diffract.api import compare

    run = compare(plain, write(tmp_path / "fp8", parts, config), cache=False)
    change = run.metrics.filter(model="fp8")["delta_relative"][0]
    assert 0.01 < change < 0.03  # uniform in +-3% has a standard deviation of 1.7%
    assert any("quantisation" in text for text in run.manifest["warnings"])


def test_scan_lists_what_is_set_aside(rng: np.random.Generator, tmp_path: Path) -> None:
    parts, config, true = fp8(rng, "row")
    run = scan(write(tmp_path / "model", parts, config), cache=False)
    assert run.metrics["tensor"].to_list() == [f"{STEM}.weight"]
    assert run.metrics["spectral_norm"][0] == pytest.approx(float(torch.linalg.matrix_norm(true.double(), 2)), rel=1e-6)
    listed = (
        run.tables.tensors.filter(outcome="set_aside")
        if hasattr(run.tables, "tensors")
        else run["tensors"].filter(outcome="set_aside")
    )
    assert sorted(listed["tensor"]) == [f"{STEM}.input_scale", f"{STEM}.weight_scale"]
    assert any("Set aside" in text for text in run.manifest["warnings"])


def test_edits_write_plain_weights_and_a_configuration_that_says_so(rng: np.random.Generator, tmp_path: Path) -> None:
    parts, config, true = fp8(rng, "block")
    apply({"model": str(write(tmp_path / "model", parts, config)), "steps": []}, tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as found:
        assert torch.equal(found[f"{STEM}.weight"], true)
        assert found.config == {"model_type": "none", "dtype": "float32"}
        assert not found.set_aside
