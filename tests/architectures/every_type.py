"""Tiny seeded models of every text model type of transformers: what can be built, and why the rest cannot."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto

import diffract
from diffract.matrices import Matrix, cut, lay_out

MAPPINGS = (
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
)

WIDTH, HEADS, GROUPS, HEAD = 48, 4, 2, 12

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "model_dim"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_query_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), GROUPS),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "attention_head_dim", "d_head"), HEAD),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "d_inner", "encoder_ffn_dim"), 40),
    **dict.fromkeys(("decoder_ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "hidden_dim"), 40),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), 60),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions"), 64),
    **dict.fromkeys(("max_target_positions", "position_buckets", "max_2d_position_embeddings"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k"), 2),
}
"""Sizes that configurations call by these names."""


def text_types() -> dict[str, tuple[type[PretrainedConfig], type[torch.nn.Module]]]:
    """Return every model type of the three mappings, with its configuration and its first model class."""
    found = {}
    for mapping in MAPPINGS:
        for model_type in mapping._model_mapping:
            config_class = configuration_auto.CONFIG_MAPPING[model_type]
            model = mapping._load_attr_from_module(model_type, mapping._model_mapping[model_type])
            found.setdefault(model_type, (config_class, model[0] if isinstance(model, tuple) else model))
    return dict(sorted(found.items()))


LATENT = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "kv_lora_rank": 16, "q_lora_rank": 20}
GATED = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_routed_experts": 4}
HYBRID = {"num_hidden_layers": 4}
OWN: dict[str, dict[str, Any]] = {
    **{
        t: LATENT | {"num_key_value_heads": HEADS, "head_dim": None} | GATED
        for t in ("deepseek_v2", "deepseek_v3", "axk1")
    },
    **{t: LATENT | {"num_key_value_heads": HEADS, "head_dim": None} for t in ("minicpm3", "youtu", "glm4_moe_lite")},
    **{t: LATENT | {"num_key_value_heads": HEADS, "head_dim": None} for t in ("sarvam_mla", "deepseek_v32")},
    **{t: LATENT | {"num_key_value_heads": HEADS, "head_dim": None} for t in ("axk2", "glm_moe_dsa", "longcat_flash")},
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "lfm3", "gemma4_text"), HYBRID
    ),
    **dict.fromkeys(("jamba", "recurrent_gemma", "gemma4_unified_text", "kimi_linear", "bailing_hybrid"), HYBRID),
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["attention", "attention"], "num_local_experts": 4},
    "dots1": {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 60, "mask_token_id": 3, "pad_token_id": 1, "position_embedding_type": "rotary"},
    "esmc": {"num_key_value_heads": HEADS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "stablelm": {"head_dim": None, "hidden_size": 64},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"head_dim": HEAD, "num_key_value_heads": GROUPS},
    "lfm2_moe": {"layer_types": ["full_attention", "full_attention"]},
    "zamba": {"num_hidden_layers": 2, "layer_types": ["hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 2, "layer_types": ["hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 4},
    "reformer": {"is_decoder": True},
    "squeezebert": {"embedding_size": WIDTH},
    "mobilebert": {"embedding_size": WIDTH, "true_hidden_size": 24, "intra_bottleneck_size": 24},
    "neomme": {"head_dim": 16},
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "gpt_oss": {"layer_types": ["full_attention", "full_attention"]},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": WIDTH},
    "emu3": {"pad_token_id": 0},
    "xlstm": {"qk_dim_factor": 0.5},
}
"""What the types need beside small sizes."""


def tiny_config(config_class: type[PretrainedConfig]) -> PretrainedConfig:
    """Return a small configuration: sizes that the defaults state are made small, those of sections too."""
    small = _small(config_class, config_class()) | OWN.get(config_class.model_type, {})
    return config_class(**{key: value for key, value in small.items() if value is not None})


def _small(config_class: type[PretrainedConfig], defaults: PretrainedConfig) -> dict[str, Any]:
    own = {k: v for k, v in vars(defaults).items() if not k.startswith("_")}
    renamed = {v: k for k, v in config_class.attribute_map.items()}
    found = {k: SMALL[n] for k, v in own.items() for n in (k, renamed.get(k)) if isinstance(v, int) and n in SMALL}
    found |= {k: min(v, 3) for k, v in own.items() if isinstance(v, int) and k.endswith("token_id")}
    for name, section in own.items():
        if isinstance(section, PretrainedConfig):
            small = _small(type(section), section)
            found[name] = {"model_type": section.model_type, **small} if section.model_type else small
    return found


LARGE = 40_000_000
"""Parameters from which on a type is not built: some of its sizes have names of their own."""


def build(config_class: type[PretrainedConfig], model_class: type[torch.nn.Module]) -> torch.nn.Module:
    """Return a tiny seeded model; of a larger model's configuration its language model's part counts.

    Raises:
        Exception: Whatever transformers raises, or ``ValueError`` where the model is not tiny.
    """
    whole = tiny_config(config_class)
    for config in (whole, whole.get_text_config(decoder=True)):
        config._attn_implementation = config._experts_implementation = "eager"
        try:
            with torch.device("meta"):
                parameters = sum(p.numel() for p in model_class(config).parameters())
        except AttributeError:
            if config is whole.get_text_config(decoder=True):
                raise
            continue
        if parameters > LARGE:
            raise ValueError(f"{parameters:,} parameters although sizes of the usual names are small")
        torch.manual_seed(0)
        return model_class(config).eval()
    raise AssertionError("the language model's part returns or raises")


@dataclass
class Seen:
    """What one forward pass of a single token showed.

    Attributes:
        inputs: First input of every module with a weight, by the weight's name, shape (width,).
        operands: Everything that was multiplied with something else than a weight.
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    operands: list[torch.Tensor] = field(default_factory=list)


class Products(TorchFunctionMode):
    """Notes both operands of every product of activations."""

    NAMES = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention", "mul", "__mul__")

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            flat = [t for a in (*args, *(kwargs or {}).values()) for t in (a if isinstance(a, tuple | list) else [a])]
            found = [t for t in flat if isinstance(t, torch.Tensor) and t.ndim >= 3 and t.numel() < 1e5]
            self.seen.operands += [t.detach().clone() for t in found]
        return func(*args, **(kwargs or {}))


def look(model: torch.nn.Module, run: Callable[[], object]) -> Seen:
    """Run a model, or a module of it, on one token and note what its attention is given."""
    seen, hooks = Seen(), []

    def note(name: str):
        def hook(_module, args, kwargs):
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            if given:
                seen.inputs.setdefault(name, given[0].detach().reshape(-1, given[0].shape[-1])[0].clone())

        return hook

    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            hooks.append(module.register_forward_pre_hook(note(f"{name}.weight"), with_kwargs=True))
    try:
        with torch.no_grad(), Products(seen):
            run()
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError, StopIteration):
        pass  # some types want more than a token; what was seen until then counts, and no more
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def alone(model: torch.nn.Module, parts: Mapping[str, list[Matrix]]) -> Callable[[], object]:
    """Return a call of one attention module with one random token, for towers that no text reaches."""
    names = [own[0].tensor for own in parts.values()]
    paths = [name.split(".")[: -1 if name.endswith("in_proj_weight") else -2] for name in names]
    common = [words[0] for words in itertools.takewhile(lambda w: len(set(w)) == 1, zip(*paths, strict=False))]
    module = model.get_submodule(".".join(common))
    x, y = (
        torch.randn(1, 1, own[0].shape[1], generator=torch.Generator().manual_seed(3))
        for own in (parts.get("q") or parts["o"], parts.get("k") or parts["o"])
    )
    size = (parts.get("q") or parts["o"])[0].shape[0]
    given: dict[str, object] = {}
    for name, parameter in list(inspect.signature(module.forward).parameters.items())[1:]:
        if "position_embeddings" in name:
            given[name] = (torch.ones(1, 1, size), torch.zeros(1, 1, size))
        elif "cross" in str(parts[next(iter(parts))][0].block) and name in (
            "key_value_states",
            "encoder_hidden_states",
        ):
            given[name] = y
        elif parameter.default is parameter.empty and parameter.kind == parameter.POSITIONAL_OR_KEYWORD:
            given[name] = None
    return lambda: module(x, **given)


def heads_seen(seen: Seen, expected: torch.Tensor) -> bool:
    """Whether some product's operand holds exactly these heads along one axis, shape (heads, size), or each repeated.

    Heads are compared by their entries up to order, sign and scale, as they are or with a mean taken off: rotary
    embeddings at position 0 and norms change no more than that.
    """

    def form(x: torch.Tensor) -> torch.Tensor:
        return (x / (x.norm(dim=-1, keepdim=True) + 1e-30)).abs().sort(dim=-1).values

    count, size = expected.shape
    for operand in seen.operands:
        for view in (operand, operand.mT):
            for axis in range(view.ndim - 1):
                if view.shape[-1] < size or view.shape[axis] % count:
                    continue
                # latent keys stand before rotary ones that all heads share
                found = form(view.movedim(axis, -2).reshape(-1, view.shape[axis], view.shape[-1])[..., :size])
                again = view.shape[axis] // count
                for heads in (expected, expected - expected.mean(dim=-1, keepdim=True), expected - expected.mean()):
                    for wanted in (heads.repeat_interleave(again, 0), heads.repeat(again, 1)):
                        # float32 products of some forty terms; entries of two random heads differ a hundred times more
                        if ((found - form(wanted)).abs().amax(dim=(-1, -2)) < 2e-3).any():
                            return True
    return False


@dataclass(frozen=True)
class Verdict:
    """What became of one type.

    Attributes:
        word: ``right``, ``in part``, ``cut, not judged``, ``generic``, ``not built``, or ``wrong``.
        why: The reason, where the word leaves one open.
        family: How the type was read.
    """

    word: str
    why: str = ""
    family: str = ""


def judge(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> Verdict:
    """Compare the heads that a layout cuts with those that the live attention is given.

    Queries and keys are looked for among the operands of products. Values and outputs are judged by cause and effect:
    when the rows of one value head change, only the columns of its query heads of o may see it.
    """
    layout = lay_out(diffract.open(model))
    family, note = layout.architecture.family, layout.architecture.note
    blocks: dict[tuple[int | None, str | None], dict[str, list[Matrix]]] = {}
    for m in layout.matrices:
        if m.projection in ("q", "k", "v", "o") and (m.head is not None or m.kv_head is not None):
            blocks.setdefault((m.layer, m.block), {}).setdefault(m.projection, []).append(m)
    if not blocks:
        return Verdict("generic", note or "no attention of this model is cut", family)
    weights = dict(model.state_dict(keep_vars=True))
    settle(weights, {m.tensor for parts in blocks.values() for own in parts.values() for m in own})
    whole = look(model, lambda: model(**inputs))
    wrong, unseen = [], []
    for (layer, block), parts in blocks.items():
        where = f"L{layer}.{block}"
        reached = all(own[0].tensor in whole.inputs for own in parts.values())
        run = (lambda: model(**inputs)) if reached else alone(model, parts)
        seen = whole if reached else look(model, run)
        for projection in ("q", "k"):
            if own := parts.get(projection):
                x = seen.inputs.get(own[0].tensor)
                heads = [cut(weights[m.tensor].detach(), [m])[0] for m in own]
                if x is None or not heads_seen(seen, torch.stack([head @ x for head in heads])):
                    unseen.append(f"{where}.{projection} is {'not reached' if x is None else 'in no product'}")
        if {"v", "o"} <= set(parts):
            said = effects(model, run, parts=parts, before=seen)
            if said is not None:
                (wrong if said else unseen).append(f"{where}: {said or 'values reach no output'}")
    if wrong or unseen:
        return Verdict("wrong" if wrong else "cut, not judged", [*wrong, *unseen][0], family)
    lacking = [f"L{k[0]}.{k[1]} lacks {p}" for k, own in blocks.items() for p in "qkvo" if p not in own]
    return Verdict("in part" if lacking or "not cut" in note else "right", (lacking or [note])[0], family)


def settle(weights: Mapping[str, torch.Tensor], attention: set[str]) -> None:
    """Make attention random and its biases nothing: some types begin with zeros, or with what memory held."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in weights.items():
            if name.endswith("bias"):
                weight.zero_()
            elif name.endswith("sinks"):
                weight.fill_(-1e4)  # so that the one token gets all of the attention
            elif name in attention:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def effects(
    model: torch.nn.Module, run: Callable[[], object], *, parts: Mapping[str, list[Matrix]], before: Seen
) -> str | None:
    """Change one value head after the other; return what that reaches wrongly, "" where it reaches nothing."""
    out, weights = parts["o"][0].tensor, dict(model.state_dict(keep_vars=True))
    old = before.inputs.get(out)
    if old is None:
        return ""
    for value in parts["v"]:
        weight = weights[value.tensor]
        kept = weight.detach().clone()
        with torch.no_grad():
            part = cut(weight.detach(), [value])[0]
            part.add_(torch.randn(part.shape, generator=torch.Generator().manual_seed(2)))
            new = look(model, run).inputs[out]
            weight.copy_(kept)
        own = torch.zeros(len(old), dtype=torch.bool)
        for m in parts["o"]:
            if m.kv_head == value.kv_head:
                own[slice(*((m.rows if m.transposed else m.cols) or (0, None)))] = True
        # a norm over all heads scales those that nothing else changed
        scale = (new[~own] @ old[~own]) / (old[~own] @ old[~own]) if not own.all() else torch.tensor(1.0)
        moved = (new - scale * old).abs() > 1e-4 * old.abs().max()
        if not moved.any():
            return ""
        if moved[~own].any():
            return f"a change of value head {value.kv_head} reaches columns of other heads"
        if moved[own].float().mean() < 0.9:  # a random change moves nearly every entry of its heads
            return f"a change of value head {value.kv_head} reaches {int(moved[own].sum())} of {int(own.sum())} columns"
    return None
