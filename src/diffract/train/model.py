"""The model that is trained: made from a config, or loaded; and written as a checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffract.checkpoints import open_checkpoint
from diffract.checkpoints.configurations import own_attention
from diffract.checkpoints.dtypes import TORCH_DTYPES
from diffract.checkpoints.open import local_place
from diffract.errors import RecipeError, printable, suggest
from diffract.train.recipe import TrainRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

LONGEST = "max_position_embeddings"
"""What most configs call the longest text; each maps the name to its own."""

BY_OLD_NAMES = ("rope_theta", "rope_scaling")
"""Fields that configs no longer have but still read."""


def make_model(recipe: TrainRecipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return the model of a recipe in float32, new or loaded.

    Raises:
        RecipeError: The model cannot be made or loaded, or does not fit the tokenizer or the context.
    """
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    config = make_config(recipe, tokenizer)
    if recipe.model.init is None:
        own_attention(recipe.model.config or {}, "model.config")
        with _explained("model.config"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    with _explained("model.init"):
        place = local_place(recipe.model.init)
        own = own_attention(PreTrainedConfig.get_config_dict(place)[0], place)
        return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, trust_remote_code=False, **own)


def make_config(recipe: TrainRecipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Return the config of a recipe's model.

    A new model has as many tokens as its tokenizer, no padding token and the recipe's context as its longest text,
    unless the recipe says otherwise.

    Raises:
        RecipeError: transformers refuses the config, or it does not fit the tokenizer or the context.
    """
    from transformers import AutoConfig

    if recipe.model.init is not None:
        with _explained("model.init"):
            config = AutoConfig.from_pretrained(local_place(recipe.model.init, weights=False), trust_remote_code=False)
    else:
        config = _new_config(recipe, tokenizer)
    _check_fit(config, tokenizer, recipe.context)
    return config


def count_parameters(recipe: TrainRecipe, tokenizer: PreTrainedTokenizerFast) -> int:
    """Return how many parameters a recipe's model has, tied ones once, without making it."""
    from transformers import AutoModelForCausalLM

    config = make_config(recipe, tokenizer)
    with _explained("model"), torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config, trust_remote_code=False).parameters())


def saved_dtype(recipe: TrainRecipe) -> torch.dtype:
    """Return what checkpoints are stored in: what the recipe says, or what most bytes of the init are stored in."""
    if recipe.save_dtype is not None:
        return getattr(torch, recipe.save_dtype)
    if recipe.model.init is None:
        return torch.float32
    with open_checkpoint(recipe.model.init) as checkpoint:
        sizes = Counter[str]()
        for info in checkpoint.infos.values():
            sizes[info.dtype] += info.size_bytes if info.is_float else 0
    return TORCH_DTYPES[sizes.most_common(1)[0][0]]


def write_model(
    folder: Path,
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    *,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
) -> None:
    """Write a checkpoint that transformers loads.

    Args:
        folder: Where to; it is there already.
        model: The model, whose config is written.
        state: The weights of the model, in float32.
        tokenizer: Is written beside the model.
        dtype: What weights are stored in.
    """
    kept = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    # Processes may have gathered tied weights one by one; as one tensor again they are stored once.
    ties = model.all_tied_weights_keys.items()
    kept |= {name: kept[source] for name, source in ties if name in kept and source in kept}
    model.save_pretrained(folder, state_dict=kept)
    path = folder / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
    path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # safetensors lets nobody but the owner read what it writes.
    for weights in folder.glob("*.safetensors"):
        weights.chmod(path.stat().st_mode)
    tokenizer.save_pretrained(folder)


def _new_config(recipe: TrainRecipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    given = dict(recipe.model.config or {})
    kind = given.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise RecipeError(
            f"model.config.model_type: transformers knows no {printable(kind)!r}.{suggest(kind, CONFIG_MAPPING)}"
        )
    usual = CONFIG_MAPPING[kind]()
    known = {*usual.to_dict(), *usual.attribute_map, *BY_OLD_NAMES}
    if strange := [name for name in given if name not in known]:
        raise RecipeError(
            f"model.config: {printable(kind)} has no {printable(strange[0])!r}.{suggest(strange[0], known)}"
        )
    texts = {"bos_token_id": None, "pad_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    longest = usual.attribute_map.get(LONGEST, LONGEST)
    size = {longest: recipe.context} if hasattr(usual, longest) and LONGEST not in given else {}
    with _explained("model.config"):
        return CONFIG_MAPPING[kind](**{"vocab_size": len(tokenizer), **texts, **size, **given})


def _check_fit(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, context: int) -> None:
    text = config.get_text_config()
    if len(tokenizer) > text.vocab_size:
        raise RecipeError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {text.vocab_size}: they do not belong together. "
            "Take the model's own tokenizer."
        )
    longest = getattr(text, LONGEST, None)
    if longest is not None and longest < context:
        raise RecipeError(f"context {context}: the model takes {longest} tokens at most. Shorten the context.")


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn what transformers raises into one message."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"{where}: transformers refuses it: {printable(error)}.") from error
