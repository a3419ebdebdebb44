"""A tiny untrained language model with a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 64


def byte_tokenizer(*, end: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes, and a token for an end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | ({"<|end|>": 256} if end else {})
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": "<|end|>"} if end else {}))


def tiny_model(seed: int = 0, *, vocabulary: int = 257, context: int = CONTEXT) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.3,  # so that predictions differ from the uniform ones
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=256,
    )
    return LlamaForCausalLM(config).eval()


def write_language_model(folder: Path, seed: int = 0) -> Path:
    """Write such a model with its tokenizer, as transformers keeps them."""
    tiny_model(seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
