import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from diffract.checkpoints import Checkpoint, open_checkpoint
from diffract.checkpoints.adapter_parts import MOVES_BASE, OTHER_SUMS
from diffract.errors import CheckpointError

Same = Callable[[torch.Tensor, torch.Tensor], bool]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Block(torch.nn.Module):
    def __init__(self, linear: Callable[[int, int], torch.nn.Module]) -> None:
        super().__init__()
        self.q_proj, self.o_proj, self.up_proj = linear(8, 8), linear(8, 8), linear(8, 12)


class Model(torch.nn.Module):
    """Two layers; square matrices too, where a wrong orientation would go unnoticed but for the values."""

    def __init__(self, linear: Callable[[int, int], torch.nn.Module]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block(linear) for _ in range(2))
        self.norm = torch.nn.LayerNorm(8)


def train(
    folder: Path, *, conv: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, torch.Tensor]:
    """Write a base and a PEFT adapter for it, random everywhere; return what PEFT's own merge gives."""
    torch.manual_seed(5)
    model = Model(lambda m, n: Conv1D(n, m) if conv else torch.nn.Linear(m, n)).to(dtype)
    for parameter in model.parameters():  # Conv1D's biases and the norm's are constant otherwise
        torch.nn.init.normal_(parameter, std=0.3)
    (folder / "base").mkdir()
    save_file(model.state_dict(), folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text('{"model_type": "tiny"}')
    config = LoraConfig(**{"target_modules": ["q_proj", "up_proj"], "fan_in_fan_out": conv, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on a model that is none of transformers'
        adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        config.base_model_name_or_path = str(folder / "base")
        adapted.save_pretrained(str(folder / "adapter"))
        return dict(adapted.merge_and_unload().state_dict())


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, message: str, **options: Any) -> None:
    pl.Series(["x"]).str.contains("x.*")  # the threads of Polars have descriptors of their own
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder / "adapter", **options)
    assert str(folder / "adapter") in str(caught.value)
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "an error closes what it opened"


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "rank_pattern": {"q_proj": 4, r"layers\.0\.up_proj": 5},
        "alpha_pattern": {r"layers\.1\.q_proj": 11, "up_proj": 7, "proj": 99},
    },
    "patterns, rank-stabilised": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}, "use_rslora": True},
    "from a Gaussian": {"init_lora_weights": "gaussian"},
    "stored transposed": {"conv": True, "r": 3, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "expression": {"target_modules": r".*\.1\.(q|o)_proj", "lora_alpha": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_what_peft_merges(tmp_path: Path, variant: str) -> None:
    merged = train(tmp_path, **VARIANTS[variant])
    base = load_file(tmp_path / "base" / "model.safetensors")
    with open_checkpoint(tmp_path / "adapter") as found:
        assert found.reference == str(tmp_path / "adapter")
        assert found.base_reference == str(tmp_path / "base")
        assert found.config == {"model_type": "tiny"}
        assert set(found) == set(merged)
        changed = {name for name in merged if not torch.equal(merged[name], base[name])}
        assert set(found.factors) == changed != set()
        for name, expected in merged.items():
            # PEFT multiplies and adds in float32, a rank of at most 8: a few roundings of values around 1
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)
            if name not in changed:
                assert torch.equal(found[name], expected)


def test_factors_are_the_change(tmp_path: Path) -> None:
    merged = train(tmp_path, **VARIANTS["patterns"])
    base = load_file(tmp_path / "base" / "model.safetensors")
    with open_checkpoint(tmp_path / "adapter") as found:
        ranks = {name: found.factors[name]().A.shape[0] for name in found.factors}
        assert ranks["layers.0.up_proj.weight"] == 5
        assert ranks["layers.1.up_proj.weight"] == 2
        for name in found.factors:
            factors = found.factors[name]()
            assert factors.A.dtype == factors.B.dtype == torch.float64
            delta = (merged[name].double() - base[name].double()).float()
            torch.testing.assert_close((factors.B @ factors.A).float(), delta, rtol=1e-4, atol=1e-5)


def test_factors_of_a_transposed_matrix_are_in_the_stored_orientation(tmp_path: Path) -> None:
    train(tmp_path, **VARIANTS["stored transposed"])
    with open_checkpoint(tmp_path / "adapter") as found:
        factors = found.factors["layers.0.up_proj.weight"]()
        assert found.info("layers.0.up_proj.weight").shape == (8, 12)
        assert (factors.B.shape, factors.A.shape) == ((8, 3), (3, 12))


@pytest.mark.parametrize("variant", ["plain", "stored transposed"])
def test_rows_and_columns_are_those_of_the_whole(tmp_path: Path, variant: str, same: Same) -> None:
    train(tmp_path, **VARIANTS[variant])
    with open_checkpoint(tmp_path / "adapter") as found:
        for name in ("layers.0.up_proj.weight", "layers.1.o_proj.weight"):
            # a product of fewer rows may be summed in another order: float64, then rounded once
            whole = found[name][2:5, 1:4]
            torch.testing.assert_close(found.read(name, (2, 5), (1, 4)), whole, rtol=1e-6, atol=0)


def test_the_result_is_rounded_once_to_the_dtype_of_the_base(tmp_path: Path) -> None:
    merged = train(tmp_path, dtype=torch.bfloat16, **VARIANTS["plain"])
    base = load_file(tmp_path / "base" / "model.safetensors")
    with open_checkpoint(tmp_path / "adapter") as found:
        for name in found.factors:
            factors = found.factors[name]()
            exact = base[name].double() + factors.B @ factors.A
            assert torch.equal(found[name], exact.bfloat16())
            # PEFT rounds what it adds to bfloat16 first: one unit in the last place, 2^-7, of either
            torch.testing.assert_close(found[name], merged[name], rtol=2**-7, atol=2**-7)


def test_reading_a_head_reads_its_rows_and_the_factors_only(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    train(tmp_path, **VARIANTS["plain"])
    with open_checkpoint(tmp_path / "adapter") as found:
        reads.clear()
        found.read("layers.0.q_proj.weight", (0, 2))
        rows, factors = 2 * 8 * 4, 2 * (8 * 3) * 4
        assert sum(length for _, length in reads) == rows + factors
        reads.clear()
        found.read("norm.weight")
        assert sum(length for _, length in reads) == 8 * 4


def test_the_digest_is_that_of_the_merged_tensor(tmp_path: Path) -> None:
    train(tmp_path, **VARIANTS["plain"])
    with open_checkpoint(tmp_path / "adapter") as found, open_checkpoint(tmp_path / "base") as base:
        assert found.digest("norm.weight") == base.digest("norm.weight")
        name = "layers.0.q_proj.weight"
        assert found.digest(name) == open_checkpoint({name: found[name]}).digest(name) != base.digest(name)


def test_a_base_may_be_passed_and_stays_the_callers(tmp_path: Path) -> None:
    train(tmp_path, **VARIANTS["plain"])
    edit(tmp_path, base_model_name_or_path=None)
    with open_checkpoint(tmp_path / "base") as base:
        with open_checkpoint(tmp_path / "adapter", base=base) as found:
            expected = found["layers.0.q_proj.weight"]
        assert base["norm.weight"].shape == (8,), "not closed with the adapter"
    with open_checkpoint(tmp_path / "adapter", base=tmp_path / "base") as found:
        assert torch.equal(found["layers.0.q_proj.weight"], expected)
    with pytest.raises(CheckpointError, match="is closed"):
        found.read("norm.weight")
    in_memory = load_file(tmp_path / "base" / "model.safetensors")
    assert torch.equal(open_checkpoint(tmp_path / "adapter", base=in_memory)["layers.0.q_proj.weight"], expected)


def test_a_base_may_lie_beside_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, **VARIANTS["plain"])
    edit(tmp_path, base_model_name_or_path="../base")
    monkeypatch.chdir("/")
    assert len(open_checkpoint(tmp_path / "adapter").factors) == 4


def test_names_may_differ_by_a_prefix(tmp_path: Path) -> None:
    """The base was saved without its head, or the adapter trained on a model within another."""
    train(tmp_path, **VARIANTS["plain"])
    base = load_file(tmp_path / "base" / "model.safetensors")
    longer = {f"model.{name}": tensor for name, tensor in base.items()}
    assert "model.layers.0.q_proj.weight" in open_checkpoint(tmp_path / "adapter", base=longer).factors
    twice = longer | {f"draft.{name}": tensor.clone() for name, tensor in base.items()}
    refused(tmp_path, "does not hold. Pass --adapter-base", base=twice)


def test_a_base_that_is_tied_stays_tied_unless_changed(tmp_path: Path) -> None:
    train(tmp_path, **VARIANTS["plain"])
    base: dict[str, torch.Tensor] = load_file(tmp_path / "base" / "model.safetensors")
    base |= {"norm.again": base["norm.weight"], "q_again": base["layers.0.q_proj.weight"]}
    found = open_checkpoint(tmp_path / "adapter", base=base)
    assert found.tied == {"norm.again": "norm.weight"}


def test_adapters_lie_on_each_other(tmp_path: Path) -> None:
    train(tmp_path, **VARIANTS["plain"])
    name = "layers.0.q_proj.weight"
    with open_checkpoint(tmp_path / "adapter") as once:
        twice = open_checkpoint(tmp_path / "adapter", base=once)
        delta = once.factors[name]()
        start = load_file(tmp_path / "base" / "model.safetensors")[name]
        expected = start.double() + 2 * (delta.B @ delta.A)
        # rounded once, at the end; sums of float64 in another order
        torch.testing.assert_close(twice.read_unrounded(name), expected, rtol=0, atol=1e-15)
        assert torch.equal(twice[name], twice.read_unrounded(name).float())


def test_an_adapter_that_names_itself_is_refused(tmp_path: Path) -> None:
    train(tmp_path, **VARIANTS["plain"])
    edit(tmp_path, base_model_name_or_path="../adapter")
    refused(tmp_path, "does one name itself as its base")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({key: {"x": 1}}, key) for key in OTHER_SUMS),
        *(({"init_lora_weights": key}, "changes the base too") for key in (*MOVES_BASE, "pissa_niter_16", "CorDA")),
        ({"peft_type": "IA3"}, "peft_type 'IA3', expected 'LORA'"),
        ({"r": 4}, "have rank 3, and adapter_config.json says 4, so that their scale cannot be known"),
        ({"rank_pattern": {"q_proj": 2}}, "'layers.0.q_proj' have rank 3, and adapter_config.json says 2"),
        ({"r": None}, "expected numbers in r and rank_pattern"),
        ({"use_dora": True}, "no magnitudes, and adapter_config.json says that it is DoRA"),
        ({"trainable_token_indices": [1], "init_lora_weights": "loftq"}, "changes the base too"),
        ({"peft_type": None}, "peft_type 'None'"),
        ({"base_model_name_or_path": None}, "names no base model. Pass --adapter-base"),
        ({"base_model_name_or_path": ["x"]}, "names no base model"),
        ({"lora_alpha": "x"}, "expected numbers"),
        ({"lora_alpha": None}, "expected numbers"),
        ({"alpha_pattern": {"(": 3}}, "expected numbers"),
        ({"alpha_pattern": {"(a{1000}){1000}": 3}}, "expected numbers"),
        ({"alpha_pattern": {"q_proj": []}}, "expected numbers"),
        ({"alpha_pattern": ["q_proj"]}, "expected numbers"),
        ({"fan_in_fan_out": True}, "is square, and nothing tells whether it is stored"),
    ],
)
def test_other_configurations_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    train(tmp_path, **VARIANTS["plain"])
    edit(tmp_path, **changes)
    refused(tmp_path, message)


def test_expressions_take_no_longer_than_the_names_they_are_for(tmp_path: Path) -> None:
    """Python's engine would be at this one for more than a lifetime, PEFT's with it."""
    train(tmp_path, **VARIANTS["plain"])
    with open_checkpoint(tmp_path / "adapter") as found:
        before = {name: found[name] for name in found}
    edit(tmp_path, alpha_pattern={r"((\w|.)+)+!": 50, "(q|o)_proj": 5})
    with open_checkpoint(tmp_path / "adapter") as found:
        assert all(torch.equal(found[name], value) for name, value in before.items())


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter" / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / "adapter" / WEIGHTS)


PREFIX = "base_model.model.layers.0.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{PREFIX}.lora_B.weight"), "'layers.0.q_proj' has A but not B of its factors"),
        (lambda t: t.update({f"{PREFIX}.lora_magnitude_vector": torch.ones(8)}), "magnitudes of DoRA, and"),
        (lambda t: t.update({"base_model.model.e.lora_embedding_A": torch.ones(8)}), "but not embedding_B of its"),
        (lambda t: t.update({"base_model.model.other.weight": torch.ones(8)}), "unexpected tensor"),
        (lambda t: t.update({"base_model.model.norm.weight": torch.ones(8, 2)}), r"has shape \(8, 2\).*another base"),
        (lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(3, 9)}), r"make \(8, 9\), the base holds \(8, 8\)"),
        (lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(2, 8)}), "have no product"),
        (lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(3, 8, 1, 1)}), "have no product"),
        (lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(0)}), "1 tensors of the adapter are empty.*ZeRO-3"),
        (lambda t: t.update({f"{PREFIX}.lora_A.two.weight": torch.ones(3, 8)}), "the same part of one module"),
        (lambda t: t.update({f"{PREFIX}.lora_B.bias": torch.ones(5)}), r"'layers.0.q_proj.bias'|has shape \(5,\)"),
        (
            lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.ones(3, 8, dtype=torch.int8)}),
            "expected floating point",
        ),
        (
            lambda t: t.update({n.replace("base_model.", "base_model.model."): w.clone() for n, w in t.items()}),
            "two adapted modules mean 'layers.0.",
        ),
        (lambda t: t.clear() or t.update({"z.lora_A.weight": torch.ones(1, 1)}), "'z' has A but"),
        (
            lambda t: t.update({f"z.lora_{s}.weight": torch.ones(3, 3) for s in "AB"}),
            "changes 'z.weight', which the base .* does not hold",
        ),
    ],
)
def test_other_weights_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    train(tmp_path, **VARIANTS["plain"])
    rewrite(tmp_path, change)
    refused(tmp_path, message)


def test_names_with_the_adapters_own_name_are_read(tmp_path: Path) -> None:
    """As ``state_dict`` gives them: ``lora_A.default.weight``."""
    train(tmp_path, **VARIANTS["plain"])
    expected = open_checkpoint(tmp_path / "adapter")["layers.0.q_proj.weight"]
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    renamed = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "adapter" / WEIGHTS)
    assert torch.equal(open_checkpoint(tmp_path / "adapter")["layers.0.q_proj.weight"], expected)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    train(tmp_path, **VARIANTS["plain"])
    (tmp_path / "adapter" / WEIGHTS).unlink()
    refused(tmp_path, f"weights, {WEIGHTS} or adapter_model.bin, are missing")


def test_weights_that_are_pickled_are_read(tmp_path: Path) -> None:
    train(tmp_path, **VARIANTS["plain"])
    expected = open_checkpoint(tmp_path / "adapter")["layers.0.q_proj.weight"]
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    (tmp_path / "adapter" / WEIGHTS).unlink()
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")
    with open_checkpoint(tmp_path / "adapter") as found:
        assert torch.equal(found["layers.0.q_proj.weight"], expected)


def test_what_is_wrong_with_a_base_is_said_of_its_adapter(tmp_path: Path) -> None:
    train(tmp_path, **VARIANTS["plain"])
    edit(tmp_path, base_model_name_or_path=str(tmp_path / "gone"))
    refused(tmp_path, r"base of this adapter cannot be opened: no checkpoint at '.*gone'.*Pass --adapter-base with")


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    train(tmp_path, **VARIANTS["plain"])
    base: dict[str, torch.Tensor] = load_file(tmp_path / "base" / "model.safetensors")
    base["layers.0.q_proj.weight"] = torch.ones(8, 8, dtype=torch.int8)
    refused(tmp_path, "is I8 in the base, expected floating point. Pass --adapter-base", base=base)


def test_any_other_checkpoint_has_no_base(tmp_path: Path) -> None:
    found: Checkpoint = open_checkpoint({"w": torch.ones(2)})
    assert found.base_reference is None
    assert found.factors == {}


def saved_whole(folder: Path, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Write base and factors side by side, as a full state dict of a PEFT model has them; return base and change."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((6, 4), (2, 4), (6, 2)))
    stem = "base_model.model.up_proj"
    held = {f"{stem}{layer}.weight": weight, "base_model.model.norm.weight": torch.ones(4)}
    held |= {f"{stem}.lora_A.default.weight": a, f"{stem}.lora_B.default.weight": b}
    save_file(held, folder / "model.safetensors")
    return weight, b @ a


@pytest.mark.parametrize("layer", ["", ".base_layer"])
def test_an_unmerged_model_is_read_with_its_change(layer: str, tmp_path: Path) -> None:
    weight, change = saved_whole(tmp_path / "whole", layer)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
    (tmp_path / "whole" / "config.json").write_text("{}")
    (tmp_path / "whole" / "adapter_config.json").write_text(json.dumps(config))
    with open_checkpoint(tmp_path / "whole") as found:
        assert sorted(found) == ["norm.weight", "up_proj.weight"]
        torch.testing.assert_close(found["up_proj.weight"], weight + 4 * change)
        assert "An adapter was saved with its base" in found.notes[0]
        assert list(found.factors) == ["up_proj.weight"]


def test_an_unmerged_model_without_a_scale_is_refused(tmp_path: Path) -> None:
    saved_whole(tmp_path / "whole", ".base_layer")
    with pytest.raises(CheckpointError, match=r"not merged.*scale is stated nowhere"):
        open_checkpoint(tmp_path / "whole")
