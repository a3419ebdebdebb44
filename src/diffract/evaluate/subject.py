"""What is evaluated: a loaded model with its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffract.errors import CheckpointError, SelectionError, printable
from diffract.evaluate.loading import load_model, load_tokenizer

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")
"""What configs call the longest sequence that a model was made for."""

UNLIMITED_CONTEXT = 4096
"""Tokens for a model whose config names no limit."""


@dataclass
class Subject:
    """A loaded model with its tokenizer.

    Attributes:
        model: In evaluation mode; a causal language model of transformers.
        tokenizer: Of transformers.
        device: Where the model is.
        context: Tokens that the model takes at once.
        name: What to call it in messages.
    """

    model: torch.nn.Module
    tokenizer: Any
    device: torch.device
    context: int
    name: str = "the model"

    @property
    def start(self) -> list[int]:
        """What every text begins with: the tokenizer's token for a beginning, else for an end, else nothing."""
        found = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next(([token] for token in found if token is not None), [])

    @property
    def vocabulary(self) -> int:
        """Rows of the model's embedding."""
        embedding: Any = self.model.get_input_embeddings()  # pyright: ignore[reportCallIssue] (transformers)
        return int(embedding.weight.shape[0])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts, without special tokens.

        Raises:
            CheckpointError: A token has no row in the model's embedding: the tokenizer is another model's.
        """
        if not texts:
            return []
        found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        highest, rows = max((max(ids, default=0) for ids in found), default=0), self.vocabulary
        if max(highest, *self.start, 0) >= rows:
            raise CheckpointError(
                f"{printable(self.name)}: the tokenizer gives token {max(highest, *self.start, 0)}, the model has "
                f"{rows} of them. They do not belong together; pass the model's own with --tokenizer."
            )
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load_subject(
    ref: str | Path | torch.nn.Module, *, device: str = "auto", dtype: str = "auto", tokenizer: Any = None
) -> Subject:
    """Load a model and its tokenizer.

    Args:
        ref: A folder with a model of transformers, ``org/name@revision`` on the hub, an adapter, or a loaded model.
        device: ``auto`` is CUDA where there is one.
        dtype: ``float32``, ``bfloat16``, ``float16``; ``auto`` is the stored one on a GPU and float32 on a CPU, which
            holds the same weights and computes more exactly. A loaded model stays as it is.
        tokenizer: A reference, or a loaded one, where it is not beside the model.

    Raises:
        CheckpointError: There is no such model, its tokenizer is missing, or transformers is.
        SelectionError: There is no such device or dtype.
    """
    where = choose_device(device)
    if isinstance(ref, str | Path):
        model, name, beside = load_model(str(ref), where, dtype), str(ref), str(ref)
    else:
        where = next(ref.parameters()).device if device == "auto" else where
        model, name, beside = ref.to(where), "the model", None
    found = beside if tokenizer is None else tokenizer
    if found is None:
        raise CheckpointError("a loaded model needs its tokenizer: pass tokenizer=.")
    found = load_tokenizer(str(found)) if isinstance(found, str | Path) else found
    return Subject(model.eval(), found, where, context_of(model), name)


def choose_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is CUDA where there is one.

    Raises:
        SelectionError: There is no such device.
    """
    available = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if name == "auto":
        return torch.device(available[-1])
    if name.partition(":")[0] not in available:
        raise SelectionError(f"no device {printable(name)!r}, expected auto or one of: {', '.join(available)}.")
    return torch.device(name)


def context_of(model: torch.nn.Module) -> int:
    """Return how many tokens a model takes at once, from its config."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(text, name, None) for name in CONTEXT_NAMES)
    return next((value for value in found if isinstance(value, int) and value > 1), UNLIMITED_CONTEXT)
