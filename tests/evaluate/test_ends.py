"""Generation ends where a model's own settings end it, and what is said after that is not read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diffract.evaluate import Subject, load_subject
from diffract.evaluate.scoring import BatchLimit, Prompt, generate

WORDS = ["<bos>", "<eos>", "<turn>", "<|im_end|>", "[UNK]", ":", "5", "9", "the", "stop", "<pad>"]
NUMBER = {word: i for i, word in enumerate(WORDS)}
FOLLOWS = {":": "5", "5": "<turn>", "<turn>": "<|im_end|>", "<|im_end|>": "stop", "stop": "9", "9": "<eos>"}
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <|im_end|> {% endfor %}"


@pytest.fixture
def speaker() -> Subject:
    """A model that says ``5 <turn> <|im_end|> stop 9 <eos>`` after a colon; its attention and MLP add nothing."""
    core = Tokenizer(models.WordLevel(NUMBER, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", unk_token="[UNK]", pad_token="<pad>",
        additional_special_tokens=["<turn>", "<|im_end|>"],
    )  # fmt: skip
    rows = len(WORDS) - 1  # the token for padding has no row
    config = LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_() if parameter.ndim == 2 else parameter.fill_(1.0)
        for word, i in list(NUMBER.items())[:rows]:
            model.model.embed_tokens.weight[i, i] = 1.0
            model.lm_head.weight[NUMBER[FOLLOWS.get(word, "<eos>")], i] = 10.0
    model.generation_config = GenerationConfig()
    model.config.eos_token_id = None
    return load_subject(model, tokenizer=tokenizer, device="cpu")


def said(subject: Subject) -> list[str]:
    prompts = [Prompt([0, *[NUMBER["the"]] * n, NUMBER[":"]], 9, str(n)) for n in (0, 3)]
    return generate(subject, prompts, BatchLimit(1000))


@pytest.mark.parametrize(
    ("settings", "config", "template", "answer"),
    [
        ({}, None, None, "5 stop 9"),
        ({"eos_token_id": [1, 2]}, None, None, "5"),
        ({"eos_token_id": 3}, None, None, "5"),
        ({}, [3], None, "5"),
        ({}, None, TEMPLATE, "5"),
        ({"stop_strings": ["stop"]}, None, None, "5"),
        ({"stop_strings": "9"}, None, None, "5 stop"),
        ({}, None, "{{ raise_exception('no') }}", "5 stop 9"),
        ({}, None, "{% for m in messages %}{{ m['content'] }}{% endfor %}", "5 stop 9"),
        ({"eos_token_id": [1000, -1], "temperature": 0.5, "do_sample": True}, None, None, "5 stop 9"),
    ],
)
def test_ends(speaker: Subject, settings: dict[str, Any], config: Any, template: str | None, answer: str) -> None:
    model: Any = speaker.model
    model.generation_config = GenerationConfig(**settings)
    model.config.eos_token_id = config
    speaker.tokenizer.chat_template = template
    assert [text.strip() for text in said(speaker)] == [answer, answer]
    assert model.generation_config.to_dict() == GenerationConfig(**settings).to_dict()


def test_a_chat_model_says_what_transformers_generates(speaker: Subject) -> None:
    model: Any = speaker.model
    model.generation_config = GenerationConfig(eos_token_id=[1, 2], pad_token_id=1)
    ids = model.generate(torch.tensor([[0, NUMBER[":"]]]), max_new_tokens=9, do_sample=False)[0].tolist()
    assert [WORDS[i] for i in ids[2:]] == ["5", "<turn>"]
    assert said(speaker) == ["5", "5"]
