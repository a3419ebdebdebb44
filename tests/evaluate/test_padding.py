"""Padding does not count, however a model knows the places of its tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    Mamba2Config,
    MambaConfig,
    Qwen3NextConfig,
    RwkvConfig,
)

from diffract.evaluate import Subject, load_subject
from diffract.evaluate.scoring import BatchLimit, Prompt, generate, score_texts, shorten
from diffract.evaluate.tasks import Piece
from tiny_language_model import byte_tokenizer

SPECIAL: dict[str, Any] = {"vocab_size": 257, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": None}
CONFIGS = {
    "learned positions": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, **SPECIAL),
    "biases by distance": BloomConfig(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, **SPECIAL),
    "a sliding window": Gemma2Config(
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64, "sliding_window": 16},
        initializer_range=0.3,
        **SPECIAL,
    ),
    "a state": MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3, **SPECIAL),
    "a state by head": Mamba2Config(
        **{"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
        **{"chunk_size": 16, "initializer_range": 0.3},
        **SPECIAL,
    ),
    "a state without a mask": RwkvConfig(hidden_size=32, num_hidden_layers=2, context_length=256, **SPECIAL),
    "states and attention": Qwen3NextConfig(
        **{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        **{"num_experts": 4, "num_experts_per_tok": 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "initializer_range": 0.3},
        **SPECIAL,
    ),
}
TEXTS = ["Question: 1+1?\nAnswer:", "a", "Anna has", "to be or not to be, that", "12", "x" * 40]


@pytest.fixture(params=CONFIGS)
def any_subject(request: pytest.FixtureRequest) -> Subject:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).float()
    return load_subject(model, tokenizer=byte_tokenizer(), device="cpu")


def test_texts_and_answers_are_those_without_padding(any_subject: Subject) -> None:
    pieces = [Piece(str(i), text) for i, text in enumerate(TEXTS)]
    alone = [score_texts(any_subject, [piece], BatchLimit(1))[0].value for piece in pieces]
    together = [score.value for score in score_texts(any_subject, pieces, BatchLimit(10_000))]
    assert together == pytest.approx(alone, rel=1e-5)  # float32; measured 2e-7
    prompts = [Prompt([256, *ids], 20, str(i)) for i, ids in enumerate(any_subject.encode(TEXTS))]
    answers = generate(any_subject, prompts, BatchLimit(1))
    assert len(set(answers)) > 3
    assert generate(any_subject, prompts, BatchLimit(10_000)) == answers


def test_answers_are_those_of_the_model_alone(any_subject: Subject) -> None:
    """One by one and unpadded, as transformers generates them; cut where an answer ends."""
    prompts = [Prompt([256, *ids], 12, str(i)) for i, ids in enumerate(any_subject.encode(TEXTS))]
    model: Any = any_subject.model
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        known = torch.ones_like(ids)
        found = model.generate(ids, attention_mask=known, do_sample=False, max_new_tokens=12, eos_token_id=256)
        new = found[0, ids.shape[1] :].tolist()
        wanted.append(shorten(any_subject.decode(new[: new.index(256)] if 256 in new else new)))
    assert generate(any_subject, prompts, BatchLimit(10_000)) == wanted
