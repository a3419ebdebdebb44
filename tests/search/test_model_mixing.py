"""Mixtures of models, against sums of their weights."""

from __future__ import annotations

import pytest
import torch

from diffract.edits import LiveModel
from diffract.errors import SelectionError
from diffract.search.connectivity import BASE, Mixer, named_models, simplex_weights, tasks_that_count
from edit_cases import family_pair

NAMES = ("math", "text", "code")


def family() -> tuple[LiveModel, dict[str, torch.nn.Module], Mixer]:
    base, math = family_pair("llama", torch.float64)
    models = {"math": math}
    for name, scale in (("text", 0.03), ("code", 0.08)):
        models[name] = family_pair("llama", torch.float64, scale=scale)[1]
    start, _ = family_pair("llama", torch.float64)
    return LiveModel(base), {BASE: start, **models}, Mixer(models, start)


def assert_mixture(live: LiveModel, models: dict[str, torch.nn.Module], weights: dict[str, float]) -> None:
    tensors = {name: model.state_dict() for name, model in models.items()}
    for name, tensor in live.bench.checkpoint.infos.items():
        want = sum(weight * tensors[model][name] for model, weight in weights.items())
        got = live.bench.checkpoint.read(name)
        assert (got - want).abs().max() < 1e-14, tensor  # float64 rounding of numbers up to 3


@pytest.mark.parametrize(("a", "b"), [("math", "text"), (BASE, "code")])
@pytest.mark.parametrize("at", [0.0, 0.3, 1.0])
def test_between_two(a: str, b: str, at: float) -> None:
    live, models, mixer = family()
    with live.edited(*mixer.between(a, b, at).steps):
        assert_mixture(live, models, {a: 1 - at, b: at})
    assert_mixture(live, models, {BASE: 1.0})


@pytest.mark.parametrize("weights", [(1, 0, 0), (0.5, 0.5, 0), (0.2, 0.2, 0.6)])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_on_the_simplex(weights: tuple[float, ...], scale: float) -> None:
    live, models, plain = family()
    given = dict(zip(NAMES, weights, strict=True))
    state = Mixer(plain.models, plain.base, scale).mixed(given)
    with live.edited(*state.steps):
        assert_mixture(live, models, {BASE: 1 - scale, **{n: scale * w for n, w in given.items()}})


def test_the_simplex_shares_its_edges_with_the_paths() -> None:
    _, _, mixer = family()
    assert mixer.mixed({"math": 0.7, "text": 0.3, "code": 0}).key == mixer.between("math", "text", 0.3).key
    assert mixer.mixed({"math": 0, "text": 1.0, "code": 0}).key == mixer.alone("text").key
    assert mixer.between("math", "text", 0.3).key != mixer.between("math", "text", 0.7).key
    assert mixer.between("text", "math", 0.7).key == mixer.between("math", "text", 1 - 0.7).key
    scaled = Mixer(mixer.models, mixer.base, 0.7)
    assert scaled.mixed({"math": 0.7, "text": 0.3, "code": 0}).key != mixer.between("math", "text", 0.3).key


def test_pairs_and_grids() -> None:
    _, _, mixer = family()
    assert mixer.pairs()[:3] == [("math", "text"), ("math", "code"), ("text", "code")]
    assert mixer.pairs()[3:] == [(BASE, name) for name in NAMES]
    grid = simplex_weights(NAMES, 4)
    assert len(grid) == 15
    assert all(sum(w.values()) == 1 and min(w.values()) >= 0 for w in grid)
    assert len({tuple(w.values()) for w in grid}) == 15


def test_names_of_models() -> None:
    assert named_models(["math=a=b", ("text", "c")]) == {"math": "a=b", "text": "c"}
    for wrong, message in (
        (["math=a", "b"], r"expected NAME=MODEL, such as math=PATH; got 'b'"),
        (["math=a", "=b"], "expected NAME=MODEL"),
        (["math=a", "math=b"], "two models are called 'math'"),
        (["math=a", "base=b"], "two models are called 'base'"),
        (["math=a"], "expected two or more tuned models, got 1"),
    ):
        with pytest.raises(SelectionError, match=message):
            named_models(wrong)


def test_tasks_of_a_pair_are_those_of_its_names() -> None:
    assert tasks_that_count("math", "text", ["text", "code", "math"]) == ["text", "math"]
    assert tasks_that_count("base", "text", ["text", "code"]) == ["text", "code"]
    assert tasks_that_count("a", "b", ["text"]) == ["text"]
