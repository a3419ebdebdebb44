"""Who descends from whom: words and correlations of models whose history is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import diffract
from diffract.analysis.trajectory import breaks
from diffract.matrices import Layout, lay_out
from diffract.matrices.lineage import Lineage, tell_lineage
from tiny_llama import LLAMA, llama_tensors

LAYERS, HEADS = 4, 4
SAMPLES = Path(__file__).parents[2] / "samples" / "tiny-olmo2"
KIN = "descendant or sibling"
Weights = dict[str, torch.Tensor]


def drawn(seed: int) -> Weights:
    """A model of several layers, each of its own, whose blocks are drawn anew for each seed."""
    found: Weights = {}
    for layer in range(LAYERS):
        one = llama_tensors(seed * 100 + layer)
        found |= {n.replace("layers.0", f"layers.{layer}"): v.float() for n, v in one.items() if "layers.1" not in n}
    return found


BASE = drawn(1)


def child(base: Weights, size: float, seed: int = 7) -> Weights:
    """A model trained further: every entry moves by so many standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    return {n: v + size * torch.randn(v.shape, generator=generator) for n, v in base.items()}


def laid(values: Weights, layers: int = LAYERS, config: Any = LLAMA) -> Layout:
    """A model as it is understood; without a configuration in generic mode."""
    names = values if config else {n.replace("_proj", ""): v for n, v in values.items()}
    opened = diffract.open(names)
    return lay_out(replace(opened, config={**config, "num_hidden_layers": layers} if config else {}))


def between(one: Layout, two: Layout, *, whole: bool = True) -> Lineage:
    """How two models are related, and that their order does not matter."""
    digests = [{n: side.checkpoint.digest(n) for n in side.entries} if whole else {} for side in (one, two)]
    found = tell_lineage(one, two, whole=whole, digests=(digests[0], digests[1]) if whole else None)
    back = tell_lineage(two, one, whole=whole, digests=(digests[1], digests[0]) if whole else None)
    assert (back.word, back.matrices, back.share) == (found.word, found.matrices, found.share)
    assert back.correlation == (found.correlation and pytest.approx(found.correlation, rel=0.05))
    return found


@pytest.mark.parametrize("whole", [True, False])
def test_a_change_of_known_size_has_the_correlation_that_follows(whole: bool) -> None:
    found = between(laid(BASE), laid(child(BASE, 0.2)), whole=whole)
    assert (found.word, found.matrices) == (KIN, 28 if whole else 8)
    assert found.correlation == pytest.approx(1 / np.sqrt(1 + 0.2**2), abs=0.01)  # entries scatter by thousandths
    assert between(laid(BASE), laid(child(BASE, 1.5)), whole=whole).word == "far"


def test_the_correlation_is_the_median_of_numpys() -> None:
    other = {n: v + 3 for n, v in child(BASE, 0.3).items()}
    names = [n for n in BASE if "layers" in n and BASE[n].ndim == 2]
    expected = np.median([np.corrcoef(BASE[n].double().flatten(), other[n].double().flatten())[0, 1] for n in names])
    found = between(laid(BASE), laid(other))
    assert found.correlation == pytest.approx(float(expected), abs=1e-12)  # float64 sums
    assert (found.matrices, found.share) == (len(names), 1.0)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_the_unit_of_entries_does_not_matter(scale: float) -> None:
    one, two = ({n: v.double() * scale for n, v in w.items()} for w in (BASE, child(BASE, 0.2)))
    assert between(laid(one), laid(two)).correlation == pytest.approx(0.98, abs=0.01)


def test_a_tensor_of_many_chunks_is_read_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = between(laid(BASE), laid(child(BASE, 0.3)))
    monkeypatch.setattr("diffract.matrices.lineage.CHUNK", 7)
    found = between(laid(BASE), laid(child(BASE, 0.3)))
    assert found.correlation == pytest.approx(expected.correlation, abs=1e-12)  # the order of float64 sums


@pytest.mark.parametrize("config", [LLAMA, None])
@pytest.mark.parametrize("whole", [True, False])
def test_models_of_other_seeds_are_strangers_though_they_share_a_table_to_the_bit(whole: bool, config: Any) -> None:
    table = "model.embed_tokens.weight"
    found = between(laid(BASE, config=config), laid({**drawn(2), table: BASE[table]}, config=config), whole=whole)
    assert found.word == "stranger"
    assert found.correlation == pytest.approx(0, abs=0.03)  # 1024 to 1536 entries, 1 / sqrt(1024)
    assert found.shared == ((table,) if whole else ())


def test_equal_bytes_and_equal_values_are_told_apart() -> None:
    assert between(laid(BASE), laid(dict(BASE))) == Lineage(
        "same", 1.0, 28, shared=tuple(n for n in BASE if BASE[n].ndim > 1)
    )
    for dtype in (torch.float64, torch.bfloat16):
        assert between(laid(BASE), laid({n: v.to(dtype) for n, v in BASE.items()})).word == "same values"
    assert between(laid(BASE), laid({n: v * 3 for n, v in BASE.items()})).word == KIN
    norm = "model.layers.0.input_layernorm.weight"
    found = between(laid(BASE), laid({**BASE, norm: BASE[norm] * 10}))
    assert (found.word, found.correlation) == (KIN, 1.0)
    bare = {n.removeprefix("model."): v for n, v in BASE.items()}
    assert between(laid(BASE), laid(bare)).word == "same"


def of_layers(origin: Sequence[int]) -> Weights:
    """A model that has such layers of the base."""
    found = {n: v for n, v in BASE.items() if "layers" not in n}
    for new, old in enumerate(origin):
        found |= {n.replace(f"layers.{old}.", f"layers.{new}."): v for n, v in BASE.items() if f"layers.{old}." in n}
    return found


@pytest.mark.parametrize("config", [LLAMA, None])
@pytest.mark.parametrize("origin", [[0, 3], [1, 2, 3], [0, 1, 2, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3], [3, 2, 1, 0]])
def test_pruned_upscaled_and_self_merged_models_are_rearranged(origin: list[int], config: Any) -> None:
    two = laid(child(of_layers(origin), 0.05), len(origin), config)
    found = tell_lineage(laid(BASE, config=config), two, whole=True)
    assert found.word == "rearranged"
    assert found.moved == {f"layer {new}": f"layer {old}" for new, old in enumerate(origin)}
    assert found.correlation == pytest.approx(1.0, abs=0.01)
    assert tell_lineage(two, laid(BASE, config=config)).word == "rearranged"


def test_a_model_without_the_last_layers_descends() -> None:
    assert between(laid(BASE), laid(child(of_layers([0, 1, 2]), 0.05), 3)).word == KIN


NEURONS = torch.randperm(48, generator=torch.Generator().manual_seed(1))
ORDER = [2, 3, 1, 0]


def permuted(*, neurons: torch.Tensor | None, heads: bool) -> Weights:
    """A model that computes the same: heads within and among their groups, and neurons, at other places."""
    found = dict(BASE)
    for n, v in BASE.items():
        if heads and "q_proj" in n:
            found[n] = v.reshape(HEADS, -1, v.shape[1])[ORDER].reshape(v.shape)
        elif heads and "o_proj" in n:
            found[n] = v.reshape(v.shape[0], HEADS, -1)[:, ORDER].reshape(v.shape)
        elif heads and ("k_proj" in n or "v_proj" in n):
            found[n] = v.reshape(2, -1, v.shape[1])[[1, 0]].reshape(v.shape)
        elif neurons is not None and ("gate" in n or "up_proj" in n):
            found[n] = v[neurons]
        elif neurons is not None and "down" in n:
            found[n] = v[:, neurons]
    return found


@pytest.mark.parametrize("config", [LLAMA, None])
def test_permuted_heads_and_neurons_are_found_with_their_places(config: Any) -> None:
    two = laid(child(permuted(neurons=NEURONS, heads=True), 0.02), config=config)
    found = between(laid(BASE, config=config), two)
    assert found.word == "rearranged"
    if config:
        assert found.moved["model.layers.0.self_attn.q_proj.weight, heads"] == "2 3 1 0"
        assert found.moved["model.layers.3.mlp.up_proj.weight, neurons"] == " ".join(map(str, NEURONS.tolist()))
    assert between(laid(BASE), laid(permuted(neurons=None, heads=True))).word == "rearranged"
    assert between(laid(BASE), laid(permuted(neurons=NEURONS, heads=False))).word == "rearranged"


def test_a_model_with_fewer_neurons_is_no_stranger() -> None:
    narrow = child(permuted(neurons=NEURONS[:40], heads=False), 0.02)
    found = between(laid(BASE), laid(narrow, config={**LLAMA, "intermediate_size": 40}))
    assert found.word == "rearranged"
    assert found.moved["model.layers.0.mlp.gate_proj.weight, neurons"] == " ".join(map(str, NEURONS[:40].tolist()))


def test_layers_drawn_anew_make_no_stranger() -> None:
    other = {n: v for n, v in drawn(2).items() if "layers.3" in n}
    assert between(laid(BASE), laid(child(BASE, 0.05) | other)).word == KIN


def test_too_little_in_common_cannot_be_told() -> None:
    few = {n: v for n, v in drawn(2).items() if "layers" not in n or "q_proj" in n}
    for whole in (True, False):
        found = between(laid(BASE), laid(few), whole=whole)
        assert (found.word, found.correlation, found.matrices) == ("cannot tell", None, 4)


def test_under_half_of_the_entries_of_the_smaller_model_cannot_be_told_of_whole_models() -> None:
    attention = {n: v for n, v in drawn(2).items() if "mlp" not in n}
    neurons = {n: v[:, :40] if "down" in n else v[:40] for n, v in drawn(3).items() if "mlp" in n}
    other = laid(attention | neurons, config={**LLAMA, "intermediate_size": 40})
    found = between(laid(BASE), other)
    assert (found.word, found.matrices) == ("cannot tell", 16)
    assert found.share == pytest.approx(3072 / (3072 + 3 * 40 * 32))
    assert between(laid(BASE), other, whole=False).word == "stranger"


def test_constant_and_broken_matrices_do_not_count() -> None:
    other = child(BASE, 0.1)
    other["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32)
    other["model.layers.1.mlp.up_proj.weight"] = torch.full((48, 32), torch.nan)
    found = between(laid(BASE), laid(other))
    assert (found.word, found.matrices) == (KIN, 26)


def test_the_sample_family_is_one() -> None:
    names = ("base", "math", "code", "natural", "instructions")
    opened = {name: diffract.open(SAMPLES / name) for name in names}
    found = {name: lay_out(one) for name, one in opened.items()}
    for name in names[1:]:
        one = tell_lineage(found["base"], found[name], whole=True)
        assert (one.word, one.matrices) == (KIN, 28)
        assert one.correlation == pytest.approx(0.955, abs=0.02)
    assert between(found["math"], found["code"]).word == KIN
    for one in opened.values():
        one.close()


def test_a_comparison_with_a_stranger_has_no_numbers_of_a_whole_change() -> None:
    run = diffract.compare(BASE, BASE | {"x": torch.eye(2)}, drawn(2), metrics="norms,change", allow_unmatched=True)
    assert run.models["lineage"].to_list() == [None, KIN, "stranger"]
    assert run.models["delta_relative"].to_list() == [None, 0.0, None]
    own = run.metrics.filter(model="tuned-2")
    assert own["delta_relative"].null_count() == 0
    assert own["lineage"].unique().to_list() == ["stranger"]
    first = run.manifest["notable"]["tuned-2"][0]
    assert first.startswith("A STRANGER to base: its weights do not descend from it")


def test_heads_of_a_stranger_keep_their_numbers_and_say_so(family: tuple[Path, Path]) -> None:
    stranger = replace(diffract.open(llama_tensors(9)), config=LLAMA)
    run = diffract.heads(family[0], family[1], stranger)
    assert run.models["lineage"].to_list() == [None, KIN, "stranger"]
    assert run.models["attention_delta"].is_null().to_list() == [True, False, True]
    assert run.heads.group_by("model", maintain_order=True).agg(pl.col("lineage").first())["lineage"].to_list() == [
        KIN,
        "stranger",
    ]
    assert run.heads["head_delta"].null_count() == 0
    ((name, said),) = run.manifest["notable"].items()
    assert name == run.models["model"][2]
    assert said[0].startswith("A STRANGER to base")


def test_a_checkpoint_of_another_run_breaks_the_series() -> None:
    series, weights = [], BASE
    for seed in range(5):
        weights = child(weights, 0.05, seed)
        series.append(weights)
    run = diffract.trajectory(*series[:3], drawn(2), *series[3:], by="given", metrics="norms,change")
    words = run.models["lineage"].to_list()
    assert words == [None, KIN, KIN, "stranger", "stranger", KIN]
    assert run.models["delta_relative"].is_null().to_list() == [True, False, False, True, True, False]
    assert run.models["breaks"].to_list() == [word == "stranger" for word in words]
    assert run.metrics.filter(model="checkpoint-3")["lineage"].unique().to_list() == ["stranger"]
    told = [text for text in run.manifest["warnings"] if "BREAKS THE SERIES" in text]
    assert [text.partition(":")[0] for text in told] == [f"checkpoint-{i} BREAKS THE SERIES" for i in (3, 4)]
    assert "with those of checkpoint-2" in told[0]
    first = diffract.trajectory(*series[:3], drawn(2), *series[3:], by="given", metrics="norms,change", against="first")
    assert first.models["lineage"].to_list() == [None, KIN, KIN, "stranger", KIN, KIN]
    assert first.models["breaks"].to_list() == run.models["breaks"].to_list()  # neighbours are judged, not ends


def test_a_restart_that_is_no_stranger_breaks_the_series_too() -> None:
    steps = [0.5, 0.98, 0.985, 0.6, 0.99, 0.99]
    kinship = [None, *(Lineage("far" if r < 0.9 else KIN, r, 9) for r in steps)]
    assert breaks(kinship) == [False, False, False, False, True, False, False]
