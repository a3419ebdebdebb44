"""A tiny seeded model of every family, built by transformers: one row each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf

SMALL = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
GROUPED = SMALL | NO_TOKENS | {"num_key_value_heads": 2}
WIDE_HEADS = GROUPED | {"head_dim": 12}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50} | NO_TOKENS
DEEPSEEK = {
    **{"moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    **{"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6},
    **{"first_k_dense_replace": 1, "num_key_value_heads": 4},
}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 50, "n_positions": 16}
OPT = {"hidden_size": 32, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
T5 = {"d_model": 32, "d_kv": 12, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 50}

FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    "olmo": lambda: tf.OlmoForCausalLM(tf.OlmoConfig(**GROUPED)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**GROUPED)),
    "olmo3": lambda: tf.Olmo3ForCausalLM(tf.Olmo3Config(**GROUPED)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**WIDE_HEADS)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**WIDE_HEADS)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**WIDE_HEADS)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**WIDE_HEADS)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, **NO_TOKENS)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL, **NO_TOKENS)),
    "falcon_multi_query": lambda: tf.FalconForCausalLM(tf.FalconConfig(**FALCON)),
    "falcon_grouped": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2)
    ),
    "falcon_full": lambda: tf.FalconForCausalLM(tf.FalconConfig(**FALCON, multi_query=False)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT, max_position_embeddings=16, word_embed_proj_dim=16)),
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=50, **NO_TOKENS)
    ),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**SMALL)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "t5_gated": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**GROUPED, **EXPERTS)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**WIDE_HEADS, **EXPERTS, moe_intermediate_size=12)),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**SMALL, **NO_TOKENS, **DEEPSEEK)),
}


def build(family: str) -> torch.nn.Module:
    """Return the seeded model, in float64, so that products compare to rounding error."""
    torch.manual_seed(0)
    return FAMILIES[family]().double().eval()
