"""Recipes: every mistake gets one message that says where it is, before any weights are read."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

import diffract
from diffract.checkpoints import Checkpoint
from diffract.edits import (
    Interpolate,
    Lora,
    Output,
    Recipe,
    Rewind,
    Truncate,
    apply,
    load_recipe,
    preview,
    recipe_schema,
)
from diffract.edits.recipe import EDITS
from diffract.errors import DiffractError, RecipeError
from edit_cases import assert_same, edited, read

DOCS = Path(__file__).parents[2] / "docs"

STEPS, EXPORTS = ([edit.name for edit in EDITS if edit.writes_adapter == adapter] for adapter in (False, True))

GOOD: dict[str, dict[str, Any]] = {
    "nothing": {"model": "m"},
    "all steps": {
        "model": "org/name@main",
        "steps": [
            {"rewind": {"to": "b", "fraction": 0.3, "order": "reference", "reference": "r", "kv": "majority"}},
            {"rewind": {"to": "b", "heads": "L3.h5,L7.h0", "amount": 0.5}},
            {"truncate": {"base": "b", "drop": 0.2, "side": "tail", "per": "head"}},
            {"truncate": {"base": "b", "band": [0.1, 0.5]}},
            {"interpolate": {"with": "o", "at": 0.3, "groups": {"layers 0-7": 0.1, "mlp": -1}, "method": "slerp"}},
            {"merge": {"models": {"x": "o"}, "base": "b", "method": "dare-ties", "weights": {"x": 2, "model": 1}}},
            {"laser": {"keep": 0.1, "select": "layers 20-, mlp.up"}},
            {"scale": {"base": "b", "factors": "run/factors.parquet"}},
            {"svf": {"z": 0.9, "select": "attn"}},
            {"svf": {"factors": "z.npz"}},
        ],
        "architecture": "mine.json",
        "adapter_base": "b",
        "allow": "strangers,rope_theta",
        "vocabulary": "refuse",
        "output": {"dtype": "bfloat16", "shard_size": "2GB"},
    },
    "lora": {"model": "m", "export": {"lora": {"base": "b", "rank": "full", "dtype": "float16"}}},
    "lora by rank": {"model": "m", "export": {"lora": {"base": "b", "rank": 8}}},
    "pissa": {"model": "m", "steps": [], "export": {"pissa": {"rank": 8, "select": "attn"}}},
    "delta": {"model": "m", "export": {"delta": {"base": "b"}}},
}


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "read", refuse)


def fits(schema: Mapping[str, Any], value: Any, whole: Mapping[str, Any]) -> bool:
    """Whether a value fits a schema, as far as recipes' use JSON Schema's words."""
    if "$ref" in schema:
        return fits(whole["$defs"][schema["$ref"].rpartition("/")[2]], value, whole)
    if "anyOf" in schema:
        return any(fits(option, value, whole) for option in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if "const" in schema:
        return value == schema["const"]
    kinds = {
        "string": lambda: isinstance(value, str),
        "number": lambda: isinstance(value, int | float) and not isinstance(value, bool),
        "integer": lambda: isinstance(value, int) and not isinstance(value, bool),
        "boolean": lambda: isinstance(value, bool),
        "null": lambda: value is None,
        "array": lambda: isinstance(value, list) and all(fits(s, v, whole) for s, v in _items(schema, value)),
        "object": lambda: isinstance(value, dict) and _object_fits(schema, value, whole),
    }
    bounds = (
        ("minimum", lambda limit: value >= limit),
        ("maximum", lambda limit: value <= limit),
        ("exclusiveMinimum", lambda limit: value > limit),
        ("exclusiveMaximum", lambda limit: value < limit),
    )
    wanted = schema.get("type", [])
    wanted = [wanted] if isinstance(wanted, str) else wanted
    known = any(kinds[kind]() for kind in wanted) or not wanted
    return known and all(holds(schema[word]) for word, holds in bounds if word in schema)


def _items(schema: Mapping[str, Any], value: list[Any]) -> list[tuple[Any, Any]]:
    first = schema.get("prefixItems", [])
    rest = [schema.get("items", {})] * (len(value) - len(first))
    return list(zip([*first, *rest], value, strict=True))


def _object_fits(schema: Mapping[str, Any], value: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
    if not set(schema.get("required", ())) <= set(value):
        return False
    for key, inner in value.items():
        if key not in known and more is False:
            return False
        kind = known.get(key, more if isinstance(more, dict) else {})
        if not fits(kind, inner, whole):
            return False
    return True


@pytest.mark.parametrize("name", GOOD)
def test_the_schema_knows_what_is_right(name: str) -> None:
    schema = json.loads(recipe_schema())
    assert fits(schema, GOOD[name], schema)
    plain = Recipe.model_validate(GOOD[name]).as_dict()
    assert fits(schema, plain, schema)
    assert Recipe.model_validate(plain).as_dict() == plain


def test_the_schema_explains_every_setting() -> None:
    schema = json.loads(recipe_schema())
    steps, exports = (set(schema["$defs"][item]["properties"]) for item in ("StepItem", "ExportItem"))
    assert steps == set(STEPS) >= {"rewind", "truncate", "interpolate", "merge", "laser", "scale", "svf"}
    assert exports == set(EXPORTS) >= {"lora", "pissa"}
    assert schema["$defs"]["Rewind"]["properties"]["to"]["description"] == "The base."
    assert "with" in schema["$defs"]["Interpolate"]["properties"]
    for name, part in schema["$defs"].items():
        if name not in ("StepItem", "ExportItem"):
            assert all("description" in setting for setting in part["properties"].values()), name
    assert all("description" in setting for setting in schema["properties"].values())


def test_the_published_schema_is_up_to_date() -> None:
    assert (DOCS / "recipe.schema.json").read_text(encoding="utf-8") == recipe_schema(), "run make docs"


def test_the_tables_of_settings_are_up_to_date() -> None:
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(DOCS / "make_recipe_schema.py"))["commands"](page) == page, "run make docs"


BAD: dict[str, tuple[Any, str]] = {
    "unknown at the top": ({"model": "m", "stpes": []}, "stpes: unknown setting. Did you mean 'steps'? Known: model, "),
    "unknown in a step": (
        {"model": "m", "steps": [{"rewind": {"to": "b", "fracton": 0.5}}]},
        "steps.0.rewind.fracton: unknown setting. Did you mean 'fraction'? Known: to, fraction, ",
    ),
    "unknown in interpolate": (
        {"model": "m", "steps": [{"interpolate": {"wiht": "b", "with": "c", "at": 1}}]},
        "steps.0.interpolate.wiht: unknown setting. Did you mean 'with'?",
    ),
    "unknown in an export": (
        {"model": "m", "export": {"lora": {"base": "b", "rnak": 2}}},
        "export.lora.rnak: unknown setting. Did you mean 'rank'?",
    ),
    "unknown in output": (
        {"model": "m", "output": {"dtyp": "float32"}},
        "output.dtyp: unknown setting. Did you mean 'dtype'? Known: dtype, shard_size, link.",
    ),
    "unknown step": (
        {"model": "m", "steps": [{"rewnd": {"to": "b"}}]},
        "steps.0.rewnd: unknown setting. Did you mean 'rewind'? Known: rewind, truncate, ",
    ),
    "no model": ({"steps": []}, "model: this setting is missing."),
    "empty model": ({"model": ""}, "model: expected a checkpoint, got an empty text."),
    "missing base": ({"model": "m", "steps": [{"truncate": {"rank": 2}}]}, "steps.0.truncate.base: this setting is"),
    "second step": (
        {"model": "m", "steps": [{"laser": {"keep": 0.5, "select": "mlp"}}, {"svf": {"select": "mlp"}}]},
        "steps.1.svf: expected either z or a file of factors.",
    ),
    "two in one": (
        {"model": "m", "steps": [{"laser": {"keep": 0.5, "select": "mlp"}, "svf": {"z": 1, "select": "mlp"}}]},
        f"steps.0: expected one of {', '.join(STEPS)}, with its settings.",
    ),
    "none in one": ({"model": "m", "steps": [{}]}, "steps.0: expected one of rewind, "),
    "empty step": ({"model": "m", "steps": [{"rewind": None}]}, "steps.0: expected one of rewind, "),
    "output of lora": (
        {"model": "m", "export": {"lora": {"base": "b"}}, "output": {"dtype": "float16"}},
        "it takes no output settings",
    ),
    "two exports": (
        {"model": "m", "export": {"lora": {"base": "b"}, "pissa": {}}},
        f"export: expected one of {', '.join(EXPORTS)}, with its settings.",
    ),
    "steps are no list": ({"model": "m", "steps": "rewind"}, "steps: input should be a valid tuple, got 'rewind'."),
    "a step is a word": ({"model": "m", "steps": ["rewind"]}, "steps.0: "),
    "fraction": (
        {"model": "m", "steps": [{"rewind": {"to": "b", "fraction": 1.5}}]},
        "steps.0.rewind.fraction: input should be less than or equal to 1, got '1.5'.",
    ),
    "a word for a number": (
        {"model": "m", "steps": [{"rewind": {"to": "b", "fraction": "half"}}]},
        "steps.0.rewind.fraction: input should be a valid number, unable to parse string as a number, got 'half'.",
    ),
    "infinite": (
        {"model": "m", "steps": [{"interpolate": {"with": "b", "at": float("inf")}}]},
        "steps.0.interpolate.at: input should be a finite number, got 'inf'.",
    ),
    "order": (
        {"model": "m", "steps": [{"rewind": {"to": "b", "fraction": 1, "order": "best"}}]},
        "steps.0.rewind.order: input should be 'reference', 'magnitude', 'random' or 'greedy', got 'best'.",
    ),
    "rank": (
        {"model": "m", "export": {"lora": {"base": "b", "rank": "most"}}},
        "export.lora.rank: expected a whole number",
    ),
    "rank zero": ({"model": "m", "export": {"lora": {"base": "b", "rank": 0}}}, "auto or full, got '0'."),
    "size": (
        {"model": "m", "output": {"shard_size": "huge"}},
        "output.shard_size: expected a size such as 5GB or 200MB, got 'huge'.",
    ),
    "size zero": ({"model": "m", "output": {"shard_size": 0}}, "output.shard_size: input should be greater than or"),
    "dtype": ({"model": "m", "output": {"dtype": "int8"}}, "output.dtype: input should be 'float64', "),
    "a hostile key": ({"model": "m", "\x1b[2J": 1}, r"\x1b[2J: unknown setting."),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_explained(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, message = BAD[name]
    monkeypatch.setattr("diffract.edits.to_files.open_bench", lambda _: pytest.fail("a checkpoint was opened"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    for how in (lambda: load_recipe(path), lambda: apply(recipe, tmp_path / "out"), lambda: preview(path)):
        with pytest.raises(RecipeError) as caught:
            how()
        text = str(caught.value)
        assert message in text
        assert text.isprintable()
        assert text.endswith(".")
    assert str(path) in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "expected model and steps, got list"),
        ("", "expected model and steps, got NoneType"),
        ("model: [a\n", "is no YAML"),
        ("model: !!python/object/apply:os.system ['true']\n", "is no YAML"),
        (b"\xff\xfe\xfa", "is no YAML"),
        ("model: a\nmodel: \x07\n", "is no YAML"),
    ],
)
def test_what_is_no_recipe(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert str(caught.value).isprintable()


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(RecipeError, match=f"cannot read recipe .*{reason}"):
            load_recipe(path)


def test_python_and_files_say_the_same(family: tuple[Path, Path], tmp_path: Path) -> None:
    """Steps as objects, as mappings, and in a file."""
    base, tuned = map(str, family)
    made = Recipe(model=tuned, steps=(Rewind(to=base, fraction=0.5), Truncate(base=base, rank=2)))  # type: ignore[arg-type]
    steps = [{"rewind": {"to": base, "fraction": 0.5}}, {"truncate": {"base": base, "rank": 2}}]
    plain = {"model": tuned, "steps": steps}
    assert made.as_dict() == plain
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    outputs = [apply(recipe, tmp_path / f"out{i}") for i, recipe in enumerate((made, plain, tmp_path / "recipe.yaml"))]
    assert outputs[0].manifest["outputs"] == outputs[1].manifest["outputs"] == outputs[2].manifest["outputs"]
    assert Recipe(model=Path("x"), export=Lora(base="b", rank=4)).as_dict() == {  # type: ignore[arg-type]
        "model": "x",
        "steps": [],
        "export": {"lora": {"base": "b", "rank": 4}},
    }


def test_defaults_are_not_written_and_nothing_else_is_lost() -> None:
    recipe = Recipe.model_validate(GOOD["all steps"])
    plain = recipe.as_dict()
    assert plain["steps"][4] == GOOD["all steps"]["steps"][4]
    assert "order" not in plain["steps"][1]["rewind"]
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert Recipe.model_validate(plain) == recipe


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("200 mb", 2 * 10**8), ("1.5K", 1500), ("17", 17), (17, 17), ("2T", 2 * 10**12)],
)
def test_sizes(text: object, size: int) -> None:
    assert Output(shard_size=text).shard_size == size  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "nan", "inf GB", "5 XB", "1e400GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValidationError):
        Output(shard_size=text)  # type: ignore[arg-type]


def test_settings_stay_as_they_are() -> None:
    step = Interpolate(other="x", at=1)
    with pytest.raises(ValidationError, match="frozen"):
        step.at = 2  # type: ignore[misc]


@pytest.mark.parametrize("kind", EDITS, ids=lambda kind: kind.name)
def test_every_setting_is_explained(kind: Any) -> None:
    assert kind.name == kind.__name__.lower()
    assert kind.__doc__
    assert f"diffract {kind.name} " in kind.usage
    for name, field in kind.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_errors_come_before_weights(family: tuple[Path, Path], tmp_path: Path, no_weights: None) -> None:
    """What headers show is found without reading."""
    base, tuned = map(str, family)
    for step in (
        {"rewind": {"to": base, "heads": "L9.h0"}},
        {"rewind": {"to": base, "fraction": 0.5, "select": "mpl"}},
        {"truncate": {"base": base, "rank": 1, "select": "layers 7"}},
        {"interpolate": {"with": str(tmp_path / "nowhere"), "at": 0.5}},
        {"merge": {"base": base, "models": {"x": "no/where/at/all"}}},
        {"laser": {"keep": 0.5, "select": "nothing"}},
        {"svf": {"factors": str(tmp_path / "nothing.npz")}},
    ):
        with pytest.raises(DiffractError):
            apply({"model": tuned, "steps": [{"laser": {"keep": 0.5, "select": "mlp"}}, step]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_preview_says(family: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = map(str, family)
    steps = [{"rewind": {"to": base, "heads": "L1.h0,L1.h1"}}]
    recipe = {"model": tuned, "steps": steps, "output": {"dtype": "float32"}}
    found = preview(recipe)
    held = read(tuned)
    touched = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"]
    assert (found.tensors, found.changed) == (len(held), 4)
    assert found.written_bytes == 2 * sum(t.nbytes for t in held.values())
    assert found.read_bytes == sum(t.nbytes for t in held.values()) + sum(held[name].nbytes for name in touched)
    assert found.seconds > 0
    (step,) = edited(tmp_path / "out", tuned, *steps).manifest["steps"]
    assert found.steps == [{"step": "rewind", "summary": step["summary"]}]
    lora = preview({"model": tuned, "export": {"lora": {"base": base, "rank": 2}}})
    assert lora.written_bytes is None
    assert lora.steps[-1]["summary"]["modules"] == 2 * 7 + 1


def test_the_architecture_of_an_unknown_model(tmp_path: Path) -> None:
    """Without one a model is read generically: heads are not known."""
    held = {"w.weight": torch.randn(4, 4), "b": torch.ones(4)}
    with pytest.raises(DiffractError, match="no head among what is selected"):
        apply({"model": held, "steps": [{"rewind": {"to": held, "fraction": 0.5}}]}, tmp_path / "out")
    other = {name: tensor + 1 for name, tensor in held.items()}
    edited(tmp_path / "out", held, Rewind(to=other, fraction=1, unit="tensor"))
    assert_same(read(tmp_path / "out"), other)


def test_an_adapter_as_the_model(family: tuple[Path, Path], tmp_path: Path) -> None:
    """Merged into its base; where its own is gone, into the one that is given."""
    base, tuned = family
    edited(tmp_path / "lora", tuned, export={"lora": {"base": base, "rank": 2}})
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(re.sub(r'("base_model_name_or_path": ")[^"]*', r"\1gone/away", config.read_text()))
    edited(tmp_path / "out", tmp_path / "lora", adapter_base=base)
    with diffract.open(tmp_path / "lora", base=base) as wanted:
        assert_same(read(tmp_path / "out"), wanted)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
