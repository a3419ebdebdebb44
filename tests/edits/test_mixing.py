"""Interpolation and merges of whole models, against plain NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from diffract.edits import Interpolate, Merge
from diffract.edits.mixing import dare, seeded
from diffract.errors import CheckpointError, RecipeError, SelectionError
from edit_cases import Tensors, as_module, assert_bits, assert_same, edit, edited, family_pair, moved, read
from families import GROUPED
from tiny_llama import llama_tensors

Arrays = list[np.ndarray]


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def near(found: torch.Tensor, wanted: np.ndarray, name: str = "") -> None:
    """Equal but for the rounding to what is stored, half a unit of the largest entry, and float64's own."""
    unit = torch.finfo(found.dtype).eps / 2
    assert np.abs(array(found) - wanted).max() <= unit * np.abs(wanted).max() * 1.001 + 1e-12, name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three models tuned from it, which tests only read."""
    return save_models(tmp_path_factory.mktemp("models"), "qwen2", torch.float32)


def save_models(folder: Path, family: str, dtype: torch.dtype) -> list[Path]:
    found = []
    for number in range(4):
        model, _ = family_pair(family)
        moved(model, 0.05 * (number > 0), seed=number)
        model.to(dtype).save_pretrained(folder / f"model{number}")
        found.append(folder / f"model{number}")
    return found


@pytest.mark.parametrize("at", [0.3, 0.5, -0.5, 1.7])
def test_interpolate(at: float, models: list[Path], tmp_path: Path) -> None:
    one, two = read(models[1]), read(models[2])
    found = edit(tmp_path / "out", models[1], Interpolate(other=models[2], at=at))
    for name in one:
        near(found[name], (1 - at) * array(one[name]) + at * array(two[name]), name)


def test_groups(models: list[Path], tmp_path: Path) -> None:
    """Of several groups the last counts; biases and norms go with what they belong to."""
    one, two = read(models[1]), read(models[2])
    groups = {"layers 0": 0.25, "mlp": 0.75, "layers 1, mlp.down": 1, "layers 1, attn.q, heads 2": 0}
    found = edit(tmp_path / "out", models[1], Interpolate(other=models[2], at=0.5, groups=groups))
    for name in one:
        a, b = array(one[name]), array(two[name])
        at = np.full(a.shape, 0.5)
        if ".0." in name:
            at[:] = 0.25
        if "mlp." in name:
            at[:] = 0.75
        if name.startswith("model.layers.1.self_attn.q_proj."):
            at[16:24] = 0
        if name == "model.layers.1.mlp.down_proj.weight":
            at[:] = 1
            assert_bits(found[name], two[name])
        near(found[name], (1 - at) * a + at * b, name)
    for kind in ("weight", "bias"):
        q = f"model.layers.1.self_attn.q_proj.{kind}"
        assert_bits(found[q][16:24], one[q][16:24])


def test_norms_of_a_group(tmp_path: Path) -> None:
    """A norm of queries goes with the queries, one of a layer with the layer, the last one with the whole model."""
    base, one, *_ = save_models(tmp_path, "qwen3", torch.float32)
    groups = {"layers 0": 0.0, "attn.q": 1.0}
    found, a, b = edit(tmp_path / "out", base, Interpolate(other=one, at=0.5, groups=groups)), read(base), read(one)
    for name in a:
        if "norm" in name:
            at = 1.0 if "q_norm" in name else 0.0 if ".layers.0." in name else 0.5
            near(found[name], (1 - at) * array(a[name]) + at * array(b[name]), name)
    whole = edit(tmp_path / "all", base, Interpolate(other=one, at=0.5, groups={"*": 1.0}))
    assert_same(whole, b)


def test_a_selection_moves_alone(models: list[Path], tmp_path: Path) -> None:
    one, two = read(models[1]), read(models[2])
    found = edit(tmp_path / "out", models[1], Interpolate(other=models[2], at=1, select="layers 1, attn.k, mlp.up"))
    chosen = {f"model.layers.1.{name}.weight" for name in ("self_attn.k_proj", "mlp.up_proj")}
    assert_same(found, {name: two[name] if name in chosen else one[name] for name in one})


def arc(a: np.ndarray, b: np.ndarray, at: float) -> np.ndarray:
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    angle = np.arccos(np.clip(cosine, -1, 1))
    return (np.sin((1 - at) * angle) * a + np.sin(at * angle) * b) / np.sin(angle)


@pytest.mark.parametrize("at", [0.3, 1.5])
def test_slerp(at: float, models: list[Path], tmp_path: Path) -> None:
    one, two = read(models[1]), read(models[2])
    found = edit(tmp_path / "out", models[1], Interpolate(other=models[2], at=at, method="slerp"))
    shares = {"model": 1 - at, "x": at}
    merged = edit(tmp_path / "merge", models[1], Merge(models={"x": models[2]}, method="slerp", weights=shares))
    for name in one:
        near(found[name], arc(array(one[name]), array(two[name]), at), name)
        near(merged[name], arc(array(one[name]), array(two[name]), at), name)


def test_slerp_of_a_group_follows_the_whole_tensors_arc(models: list[Path], tmp_path: Path) -> None:
    one, two = read(models[1]), read(models[2])
    step = Interpolate(other=models[2], at=0.4, method="slerp", select="layers 1, attn.q, heads 1")
    found = edit(tmp_path / "out", models[1], step)
    q = "model.layers.1.self_attn.q_proj.weight"
    near(found[q][8:16], arc(array(one[q]), array(two[q]), 0.4)[8:16])
    assert_bits(found[q][16:], one[q][16:])


def kept_largest(delta: np.ndarray, density: float) -> np.ndarray:
    count = max(1, round(density * delta.size))
    threshold = np.sort(np.abs(delta).ravel())[-count]
    return np.where(np.abs(delta) >= threshold, delta, 0)


def disjoint_mean(deltas: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    stack, shares = np.stack(deltas), np.array(weights).reshape(-1, *[1] * deltas[0].ndim)
    elected = np.sign((stack * shares).sum(0))
    agree = (np.sign(stack) == elected) & (stack != 0)
    mass = (shares * agree).sum(0)
    return np.where(mass > 0, (stack * shares * agree).sum(0) / np.where(mass > 0, mass, 1), 0)


def masks(name: str, shape: tuple[int, ...], drop: float, seed: int, labels: Sequence[str]) -> Arrays:
    """The seeded masks, each 0 or 1 / (1 - p): by the seed, the model's name, the tensor's, and where in it."""
    where = str([(0, n) for n in shape])
    ones = torch.ones(shape, dtype=torch.float64)
    return [array(dare(ones, drop, seeded(seed, label, name, where))) for label in labels]


def singular_values_joined(deltas: Arrays) -> np.ndarray:
    """TSV-M: of T changes the top M / T directions each, made orthogonal side by side."""
    count = min(deltas[0].shape) // len(deltas)
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    U = np.concatenate([U[:, :count] for U, _, _ in parts], 1)
    S = np.concatenate([S[:count] for _, S, _ in parts])
    Vh = np.concatenate([Vh[:count] for _, _, Vh in parts])

    def polar(x: np.ndarray) -> np.ndarray:
        left, _, right = np.linalg.svd(x, full_matrices=False)
        return left @ right

    return (polar(U) * S) @ polar(Vh)


def all_equal(deltas: Arrays) -> np.ndarray:
    """Iso-C: the sum with every singular value their mean."""
    U, S, Vh = np.linalg.svd(sum(deltas), full_matrices=False)
    return S.mean() * U @ Vh


def of_matrices(merge: Callable[[Arrays], np.ndarray]) -> Callable[..., np.ndarray]:
    """Vectors get the mean change."""
    return lambda deltas, *_: merge(deltas) if deltas[0].ndim == 2 else np.mean(deltas, 0)


WEIGHTS, LABELS = [1.0, 2.0, 0.5], ["math", "code", "natural"]
Reference = Callable[[Arrays, str], np.ndarray]
MERGES: dict[str, tuple[dict[str, Any], Reference]] = {
    "task-arithmetic": ({}, lambda deltas, _: sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True))),
    "ties": ({"density": 0.3}, lambda deltas, _: disjoint_mean([kept_largest(d, 0.3) for d in deltas], WEIGHTS)),
    "dare": (
        {"drop": 0.6, "seed": 5},
        lambda deltas, name: sum(
            w * m * d for w, m, d in zip(WEIGHTS, masks(name, deltas[0].shape, 0.6, 5, LABELS), deltas, strict=True)
        ),
    ),
    "dare-ties": (
        {"drop": 0.6, "seed": 5},
        lambda deltas, name: disjoint_mean(
            [m * d for m, d in zip(masks(name, deltas[0].shape, 0.6, 5, LABELS), deltas, strict=True)], WEIGHTS
        ),
    ),
    "tsv": ({}, of_matrices(singular_values_joined)),
    "iso-c": ({}, of_matrices(all_equal)),
}


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("method", MERGES)
def test_merges_against_plain_references(method: str, scale: float, models: list[Path], tmp_path: Path) -> None:
    settings, reference = MERGES[method]
    if method not in ("tsv", "iso-c"):
        settings = settings | {"weights": dict(zip(LABELS, WEIGHTS, strict=True))}
    step = Merge(
        base=models[0],
        models={"code": models[2], "natural": models[3]},
        called="math",
        method=method,
        scale=scale,
        **settings,
    )
    found = edit(tmp_path / "out", models[1], step)
    start, *tuned = map(read, models)
    for name in start:
        deltas = [array(one[name]) - array(start[name]) for one in tuned]
        near(found[name], array(start[name]) + scale * reference(deltas, name), name)


def test_linear(models: list[Path], tmp_path: Path) -> None:
    others = {"code": models[2], "natural": models[3]}
    weights = {"math": 1, "code": 2, "natural": 0.5}
    step = Merge(models=others, called="math", method="linear", weights=weights)
    found, tuned = edit(tmp_path / "out", models[1], step), [read(model) for model in models[1:]]
    for name in found:
        wanted = sum(w * array(one[name]) for w, one in zip(WEIGHTS, tuned, strict=True)) / 3.5
        near(found[name], wanted, name)
    soup = edit(tmp_path / "soup", models[1], Merge(models=others, method="linear"))
    for name in soup:
        near(soup[name], np.mean([array(one[name]) for one in tuned], 0), name)


def test_stacks_and_fused_parts_are_merged_matrix_by_matrix(tmp_path: Path) -> None:
    """In bf16: computed from Gram matrices, and rounded once."""
    models = save_models(tmp_path, "phi3", torch.bfloat16)
    found = edit(tmp_path / "out", models[1], Merge(base=models[0], models={"x": models[2]}, method="tsv"))
    start, one, two = (read(model) for model in models[:3])
    name = "model.layers.1.self_attn.qkv_proj.weight"
    for span in (slice(0, 32), slice(32, 48), slice(48, 64)):
        deltas = [array(x[name][span]) - array(start[name][span]) for x in (one, two)]
        near(found[name][span], array(start[name][span]) + singular_values_joined(deltas))


def test_merged_with_the_base_itself_it_comes_back(models: list[Path], tmp_path: Path) -> None:
    """What did not change adds nothing, and has no vote."""
    one = read(models[1])
    for method in ("task-arithmetic", "ties"):
        step = Merge(base=models[0], models={"base": models[0]}, method=method, density=1)
        found = edit(tmp_path / method, models[1], step)
        for name in one:
            near(found[name], array(one[name]), name)


def test_dare_is_reproducible(models: list[Path], tmp_path: Path) -> None:
    def merged(out: str, seed: int) -> Tensors:
        step = Merge(base=models[0], models={"x": models[2]}, method="dare", drop=0.5, seed=seed)
        return edit(tmp_path / out, models[1], step)

    one = merged("a", 0)
    assert_same(merged("b", 0), one)
    other = merged("c", 1)
    assert all(not torch.equal(other[name], one[name]) for name in one)


def test_a_selection_is_merged_alone(models: list[Path], tmp_path: Path) -> None:
    for method in ("task-arithmetic", "tsv"):
        step = Merge(base=models[0], models={"x": models[2]}, method=method, select="layers 1, mlp")
        found, one = edit(tmp_path / method, models[1], step), read(models[1])
        for name in one:
            inside = ".1.mlp." in name
            assert torch.equal(found[name], one[name]) != inside


def test_ties_elects_by_hand(tmp_path: Path) -> None:
    """Half of four entries stay; signs are elected by the weighted sum."""
    base = {"w.weight": torch.zeros(2, 2, dtype=torch.float64)}
    one = {"w.weight": torch.tensor([[4.0, -3.0], [1.0, 0.5]], dtype=torch.float64)}
    two = {"w.weight": torch.tensor([[-2.0, -1.0], [0.5, 5.0]], dtype=torch.float64)}
    step = Merge(base=base, models={"two": two}, method="ties", density=0.5)
    # trimmed: [[4, -3], [0, 0]] and [[-2, 0], [0, 5]]
    assert edit(tmp_path / "out", one, step)["w.weight"].tolist() == [[4, -3], [0, 5]]
    step = Merge(base=base, models={"two": two}, method="ties", density=0.5, weights={"two": 3}, scale=2)
    assert edit(tmp_path / "weighted", one, step)["w.weight"].tolist() == [[-4, -6], [0, 10]]


def test_the_manifest_names_all_models(models: list[Path], tmp_path: Path) -> None:
    step = Merge(base=models[0], models={"code": models[2]}, called="math")
    summary = edited(tmp_path / "out", models[1], step).manifest["steps"][0]["summary"]
    assert summary["models"] == {"math": str(models[1]), "code": str(models[2])}
    assert summary["method"] == "task-arithmetic"
    assert summary["tensors"] == len(read(models[1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "models: this setting is missing"),
        ({"models": {}}, "at least 1 item"),
        ({"models": {"x": "y"}}, "method task-arithmetic needs a base"),
        ({"models": {"model": "y"}, "base": "b"}, "two models are called 'model'"),
        ({"models": {"x": "y"}, "base": "b", "weights": {"z": 1}}, "no model is called 'z', expected some of model, x"),
        ({"models": {"x": "y", "z": "y"}, "method": "slerp"}, "slerp goes between two models, got 3"),
        ({"models": {"x": "y"}, "base": "b", "method": "tsv", "weights": {"x": 2}}, "method tsv knows no weights"),
        ({"models": {"x": "y"}, "method": "linear", "weights": {"x": -1}}, "the weights sum to 0"),
        ({"models": {"x": "y"}, "base": "b", "method": "ties", "weights": {"x": -1}}, "above zero"),
        ({"models": {"x": "y"}, "base": "b", "drop": 1}, "less than 1"),
        ({"models": {"x": "y"}, "base": "b", "density": 0}, "greater than 0"),
        ({"models": {"x": ""}, "base": "b"}, "expected a checkpoint, got an empty text"),
        ({"models": {"x": "y"}, "base": "b", "scale": float("nan")}, "finite"),
        ({"models": {"x": "y"}, "base": "b", "method": "tie"}, "'ties'"),
        ({"models": {"x": "y"}, "method": "linear", "scale": 0.5}, "method linear knows no scale"),
    ],
)
def test_impossible_merges(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        edit(tmp_path / "out", "model", {"merge": settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": {"layers 7": 0.5}}, "leaves none of 32 matrices"),
        ({"groups": {"mpl": 0.5}}, "'mpl' fits no matrix.*Did you mean 'mlp'"),
        ({"select": "mpl"}, "'mpl' fits no matrix"),
        ({"select": "layers x"}, "x"),
    ],
)
def test_selections_that_name_nothing(settings: dict, message: str, models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match=message):
        edit(tmp_path / "out", models[1], {"interpolate": {"with": models[2], "at": 0.5, **settings}})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"intermediate_size": 32}, "intermediate_size 24 against 32"),
    "heads": ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}, "num_attention_heads 4 against 8"),
    "layers": ({"num_hidden_layers": 3}, "num_hidden_layers 2 against 3"),
    "fewer layers": ({"num_hidden_layers": 1}, "num_hidden_layers 2 against 1"),
    "architecture": ({"model_type": "mistral"}, "model_type qwen2 against mistral"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("step", ["rewind", "truncate", "interpolate", "merge", "lora"])
def test_models_that_do_not_fit(step: str, kind: str, models: list[Path], tmp_path: Path) -> None:
    """Each difference by name; nothing is written, and no weights are read."""
    change, message = REFUSED[kind]
    if "model_type" in change:
        other = tf.MistralForCausalLM(tf.MistralConfig(**GROUPED))
    else:
        other = tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED | change))
    other.save_pretrained(tmp_path / "other")
    place, ok = tmp_path / "other", models[2]
    recipe: dict[str, Any] = {
        "rewind": {"steps": [{"rewind": {"to": place, "fraction": 0.5}}]},
        "truncate": {"steps": [{"truncate": {"base": place, "rank": 1}}]},
        "interpolate": {"steps": [{"interpolate": {"with": place, "at": 0.5}}]},
        "merge": {"steps": [{"merge": {"base": ok, "models": {"x": place}}}]},
        "lora": {"export": {"lora": {"base": place}}},
    }[step]
    with pytest.raises(CheckpointError, match=f"do not belong together.*{message}"):
        edited(tmp_path / "out", models[1], *recipe.pop("steps", []), **recipe)
    assert not (tmp_path / "out").exists()


def test_one_tied_and_one_not(tmp_path: Path) -> None:
    """A head that one stores and the other shares with the embedding is one tensor to both."""
    untied = llama_tensors(0)
    tied = llama_tensors(1, untied)
    tied["lm_head.weight"] = tied["model.embed_tokens.weight"]
    stored = {name: tensor for name, tensor in tied.items() if name != "lm_head.weight"}
    model, other = as_module(untied), as_module(stored, tie_word_embeddings=True)
    found = edit(tmp_path / "out", model, Interpolate(other=other, at=1))
    assert_same(found, tied)
