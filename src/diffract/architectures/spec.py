"""The JSON that describes a model family: which tensor plays which role, and how heads are packed in it."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from diffract.errors import ArchitectureError
from diffract.settings import read_file

Key = str | int
"""A key of config.json (dots descend), a sum of keys (``a + b``), or a number."""


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str | int | dict) else value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ConditionalKey(_Strict):
    """A value that depends on the configuration: used when the config key ``when`` is true."""

    when: str
    use: Key


Keys = Annotated[tuple[Key | ConditionalKey, ...], BeforeValidator(_as_tuple)]
"""Alternatives in order of preference; the first that the configuration answers counts."""


class ConfigKeys(_Strict):
    """Where the model's dimensions stand in its config.json.

    Attributes:
        section: Names of nested sections to look in first, before those that usually hold the language model.
        layers: Number of layers.
        width: Width of the residual stream.
        heads: Number of query heads.
        kv_heads: Number of key-value heads; as many as ``heads`` when nothing answers.
        head_dim: Rows of one head; ``width // heads`` when nothing answers.
    """

    section: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    layers: Keys = ("num_hidden_layers",)
    width: Keys = ("hidden_size",)
    heads: Keys = ("num_attention_heads",)
    kv_heads: Keys = ("num_key_value_heads",)
    head_dim: Keys = ("head_dim",)


class Role(_Strict):
    """What one tensor is.

    Attributes:
        part: ``block.projection`` (``attn.q``, ``mlp.gate``, ``embed.embed``), or several that are fused in it.
            Projections ``q k v`` of an attention block are cut into heads along the output, ``o`` along the input.
        packing: How fused parts lie along the output: one ``blocks`` after another; in ``groups``, one per key-value
            head, each holding the parts of its heads (q of every head of the group, then k, then v); by ``heads``,
            one per query head, each holding one of every part; or ``interleaved`` row by row, which stays whole.
        transposed: The tensor is stored (in, out), as GPT-2's Conv1D does.
        stacked: A leading axis counts experts.
        head_dim: Config keys of the head size of each part where it differs from the model's.
        whole: Never cut into heads.
    """

    part: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
    packing: Literal["blocks", "groups", "heads", "interleaved"] = "blocks"
    transposed: bool = False
    stacked: bool = False
    head_dim: Annotated[tuple[Key, ...], BeforeValidator(_as_tuple)] = ()
    whole: bool = False


class Spec(_Strict):
    """One model family.

    Attributes:
        family: Name of the family.
        model_types: Values of config.json's ``model_type`` that this file describes.
        config: Where the dimensions stand.
        defaults: Values that count when config.json does not state them; a file that has nothing else adds them to it.
        prefix: What a model with an output head calls its body. Names are read behind any prefix; this one is written
            into adapters over files that lack it.
        tensors: Role of each tensor name template; ``{layer}``, ``{expert}`` and ``{head}`` stand for numbers.
        tied: Tensor name template to the one it shares its values with when the config ties them.
        qk_norm: How gains count with which each head's queries and keys are normed after their projection: by root mean
            square (``rms``), the same with gains stored less one (``rms_one_plus``), or less their mean (``layer``).
        note: What a reader of a report should know (where heads are not defined, for instance).
    """

    family: str
    model_types: tuple[str, ...] = ()
    config: ConfigKeys = Field(default_factory=ConfigKeys)
    defaults: dict[str, Any] = Field(default_factory=dict)
    prefix: str = ""
    tensors: dict[str, Role] = Field(default_factory=dict)
    tied: dict[str, str] = Field(default_factory=dict)
    qk_norm: Literal["", "rms", "rms_one_plus", "layer"] = ""
    note: str = ""


def load_spec(path: str | Path) -> Spec:
    """Read and validate an architecture file.

    Raises:
        ArchitectureError: The file cannot be read, is no JSON, or holds an unknown or wrong key (named with its path).
    """
    try:
        found = json.loads(read_file(Path(path)).decode())
        # JSON can name half a character ("\\ud800"), which no table and no terminal takes
        json.dumps(found, ensure_ascii=False).encode()
        return Spec.model_validate(found)
    except OSError as error:
        raise ArchitectureError(f"cannot read architecture file {str(path)!r}: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "top level"
        raise ArchitectureError(
            f"architecture file {str(path)!r}, {where}: {first['msg']}. docs/architectures.md lists the keys."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ArchitectureError(f"architecture file {str(path)!r} is no JSON in UTF-8: {error}.") from error


@cache
def builtin_specs() -> dict[str, Spec]:
    """Return the shipped specs by family name."""
    folder = files("diffract.architectures") / "specs"
    found = [load_spec(Path(str(entry))) for entry in folder.iterdir() if entry.name.endswith(".json")]
    return {spec.family: spec for spec in sorted(found, key=lambda s: s.family)}
