"""In what two models differ besides their weights: configuration, tokenizer, generation settings, storage. No torch.

A model with another ``rms_norm_eps`` computes something else from the same weights, and one with another chat template
is asked something else. Whoever compares or joins two models asks here: ``compare_configurations`` of two
``config.json``, ``compare_settings`` of everything that lies beside the weights.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from diffract.architectures import builtin_specs
from diffract.checkpoints.checkpoint import Checkpoint
from diffract.checkpoints.companions import is_known
from diffract.checkpoints.sources import CONFIG, parse_object
from diffract.errors import CheckpointError, printable

T = TypeVar("T")

Effect = Literal["computation", "text", "none"]
"""What a difference changes: what the model makes of the same tokens; which tokens a text becomes, and how answers are
drawn; or neither."""

EFFECTS: tuple[Effect, ...] = ("computation", "text", "none")

NOT_STATED = "not stated"

SHOWN_CHARACTERS = 80
"""Of a value."""

DEPTH = 8
"""Sections within sections that are told apart; what lies deeper counts as one value."""

BOOKKEEPING = (
    *("_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures"),
    *("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "auto_map", "classifier_dropout"),
    *("classifier_dropout_prob", "dropout", "dtype", "embd_pdrop", "finetuning_task", "gradient_checkpointing"),
    *("hidden_dropout", "hidden_dropout_prob", "id2label", "initializer_factor", "initializer_range"),
    *("label2id", "layerdrop", "max_position_embeddings", "name_or_path", "num_labels", "output_attentions"),
    *("output_hidden_states", "output_past", "problem_type", "resid_pdrop", "return_dict", "summary_first_dropout"),
    *("task_specific_params", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version"),
    *("unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache"),
)
"""Keys of config.json that change nothing that a trained model computes; an unknown key is taken for one that does."""

DRAWING = (
    *("bad_words_ids", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "do_sample"),
    *("diversity_penalty", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "eos_token_ids"),
    *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty"),
    *("max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences"),
    *("output_scores", "pad_token_id", "prefix", "remove_invalid_values", "repetition_penalty"),
    *("sep_token_id", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p"),
)
"""Keys of config.json that say how text begins, ends and is drawn."""

ASSUMED: dict[str, Any] = {
    **dict.fromkeys(("add_cross_attention", "is_decoder", "is_encoder_decoder", "use_sliding_window"), False),
    **{"attention_bias": False, "chunk_size_feed_forward": 0, "mlp_bias": False, "pretraining_tp": 1},
}
"""What counts where a configuration of any family is silent."""

OFF_IF_SILENT = (
    *("attention_multiplier", "attn_logit_softcapping", "embedding_multiplier", "final_logit_softcapping"),
    *("logit_scale", "logits_scaling", "residual_multiplier", "rope_scaling", "rope_theta", "sliding_window"),
)
"""Keys of config.json that change the computation by being there at all."""

TOKENIZER_NOTES = (
    *("added_tokens_decoder", "auto_map", "backend", "chat_template", "is_local", "local_files_only"),
    *("model_max_length", "name_or_path", "processor_class", "special_tokens_map_file", "tokenizer_class"),
    *("tokenizer_file", "transformers_version"),
)
"""Keys of tokenizer_config.json that do not change what a text becomes, or that stand elsewhere too."""

TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""Where a chat template may lie, first the file that counts before the others."""

ADAPTER_NOTES = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout"),
    *("peft_version", "revision"),
)
"""Keys of adapter_config.json that do not change what the adapter adds."""

ADAPTER, TOKENIZER = "adapter_config.json", "tokenizer.json"


@dataclass(frozen=True)
class Difference:
    """One thing in which two models differ besides the values of their weights.

    Attributes:
        file: Where it is stated: a file's name, ``chat template``, or ``weights`` for how they are stored.
        key: What differs, a key with dots where it lies in sections; empty where it is the file as a whole.
        base: What the first model has, short enough to be shown; ``not stated`` where it has nothing.
        tuned: What the second model has.
        effect: What it changes; see ``Effect``.
    """

    file: str
    key: str
    base: str
    tuned: str
    effect: Effect

    @property
    def certain(self) -> bool:
        """Whether the two models surely compute something else: both state it, or silence means that it is off.

        A key that only one states may be news of another version of the library that wrote it, or the usual value.
        """
        values, words = (self.base, self.tuned), self.key.split(".")
        off = any(word in OFF_IF_SILENT for word in words)
        usual = words[-1] == "rope_theta" and any(value in ("10000", "10000.0") for value in values)
        return self.effect == "computation" and (NOT_STATED not in values or (off and not usual))

    def __str__(self) -> str:
        """What is said of it in a sentence: ``rms_norm_eps 1e-05 -> 0.001``."""
        return f"{self.key or self.file} {self.base} -> {self.tuned}"


def compare_configurations(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[Difference]:
    """Return the keys in which two ``config.json`` differ, those that change the computation first.

    Spellings of one thing are one (``torch_dtype`` and ``dtype``, ``rope_theta`` alone or in ``rope_parameters``), and
    what a silent configuration means counts where it is known. Where one of the two is empty nothing is compared.

    >>> compare_configurations({"rms_norm_eps": 1e-5, "use_cache": True}, {"rms_norm_eps": 1e-3, "use_cache": False})[0]
    Difference(file='config.json', key='rms_norm_eps', base='1e-05', tuned='0.001', effect='computation')
    """
    if not base or not tuned:
        return []
    kind = base.get("model_type") or tuned.get("model_type")  # of a model that does not tell, the other's is believed
    ours, theirs = _stated(base, kind), _stated(tuned, kind)
    # how long a text may be matters only to rotary embeddings that are stretched by it
    stretched = any(key.rpartition(".")[2] == "factor" and "rope" in key for key in (*ours, *theirs))

    def effect(key: str) -> Effect:
        last = key.rpartition(".")[2]
        if last == "max_position_embeddings" and stretched:
            return "computation"
        if key.partition(".")[0] in BOOKKEEPING or last in BOOKKEEPING:
            return "none"
        return "text" if last in DRAWING else "computation"

    return _ordered(Difference(CONFIG, *told, effect(told[0])) for told in _keys(ours, theirs))


def own_attention(config: Mapping[str, Any], where: str) -> dict[str, str]:
    """Return what a loader is to be told so that a configuration brings in no code of others.

    An implementation called ``org/name`` is a kernel that loaders fetch from the hub and run; one such as
    ``flash_attention_2`` may be fetched likewise where it is not installed. The result does not depend on either.

    Args:
        config: As it lies beside the weights, untrusted.
        where: What to call the model in messages.

    Raises:
        CheckpointError: It names a kernel.
    """
    stated = {key: value for key, value in _flat(config).items() if "_implementation" in key or "kernel" in key}
    for key, value in stated.items():
        if "/" in str(value):
            raise CheckpointError(
                f"{printable(where)}, config.json: {printable(key)} is {printable(value)!r}, code that a loader would "
                "fetch and run. Remove the key: the model computes the same without it."
            )
    usual = all(value in ("eager", "sdpa") for key, value in stated.items() if key.endswith("attn_implementation"))
    return {} if usual else {"attn_implementation": "eager"}


def compare_settings(base: Checkpoint, tuned: Checkpoint) -> list[Difference]:
    """Return everything in which two models differ besides the values of their weights, by what it changes.

    That is configuration, code, adapter configuration, generation settings, tokenizer (vocabulary, merges, special
    tokens, and the rest by key), chat template, dtypes and files of the weights. Of tensors only headers are read. A
    file that only one of them has is one difference without effect: which one counts then is not known.
    """
    found = compare_configurations(base.config, tuned.config)
    if base.adapter and tuned.adapter:
        told = _keys(_flat(base.adapter), _flat(tuned.adapter))
        found += [Difference(ADAPTER, *t, "none" if t[0] in ADAPTER_NOTES else "computation") for t in told]
    companions = base.companions, tuned.companions
    for name in sorted(filter(is_known, base.companions.keys() | tuned.companions.keys())):
        if name in (CONFIG, *TEMPLATES[:2]):  # these are asked in full, not file by file
            continue
        if not all(name in own for own in companions):
            there = _both(companions, lambda own, name=name: "there" if name in own else "not there")
            found.append(Difference(name, "", *there, "none"))
        else:
            found += _of_file(name, _read(base.companions, name), _read(tuned.companions, name))
    templates = _template(base.companions), _template(tuned.companions)
    if templates[0] != templates[1]:
        shown = _both(templates, lambda text: NOT_STATED if text is None else f"{len(text):,} characters")
        found.append(Difference("chat template", "", *shown, "text"))
    return _ordered([*found, *_of_storage(base, tuned)])


def token_texts(checkpoint: Checkpoint) -> dict[int, str]:
    """Return the text of each token by its number, as far as a readable tokenizer lies beside the weights; else none.

    Read are ``tokenizer.json``, ``vocab.json`` and ``vocab.txt``. Letters that stand for bytes become these bytes'
    text again, so that a leading space is a space.
    """
    own = checkpoint.companions
    if parsed := _parsed(_read(own, TOKENIZER)):
        tokens = _vocabulary(parsed)
        bytewise = "ByteLevel" in json.dumps([parsed.get("pre_tokenizer"), parsed.get("decoder")])
        return dict(zip(tokens.values(), _from_bytes(tokens) if bytewise else tokens, strict=True))
    if (text := _read(own, "vocab.txt")) is not None:
        tokens = {token: i for i, token in enumerate(text.decode("utf-8", "replace").splitlines())}
    else:
        tokens = _parsed(_read(own, "vocab.json")) or {}
    return {number: str(token) for token, number in tokens.items() if isinstance(number, int)}


def vocabulary(checkpoint: Checkpoint) -> dict[str, int]:
    """Return each token's number, as it is written in ``tokenizer.json``, ``vocab.json`` or ``vocab.txt``; else none.

    Tokens that were added and stand in files of their own, ``added_tokens.json`` or ``tokenizer_config.json``, count.
    """
    own = checkpoint.companions
    if parsed := _parsed(_read(own, TOKENIZER)):
        return _vocabulary(parsed)
    if (text := _read(own, "vocab.txt")) is not None:
        found: dict[str, Any] = {token: i for i, token in enumerate(text.decode("utf-8", "replace").splitlines())}
    else:
        found = _parsed(_read(own, "vocab.json")) or {}
    if not found:
        return {}
    found |= _parsed(_read(own, "added_tokens.json")) or {}
    listed = (_parsed(_read(own, "tokenizer_config.json")) or {}).get("added_tokens_decoder")
    for number, how in listed.items() if isinstance(listed, dict) else ():
        if number.isdecimal() and isinstance(how, Mapping):
            found[str(how.get("content"))] = int(number)
    return {token: number for token, number in found.items() if isinstance(number, int)}


MOST_TOKENS = 1 << 24
"""More than any vocabulary has numbers."""


def refuse_far_tokens(tokens: Mapping[str, int], where: str) -> None:
    """Raise where a token has a number that no vocabulary reaches.

    The tokenizers library writes its vocabulary number by number, and ends the process where 2^31 do not fit memory.

    Args:
        tokens: Each token's number.
        where: Whose tokens they are, for the message.

    Raises:
        CheckpointError: A number is too large.
    """
    far = next((token for token, number in tokens.items() if number >= MOST_TOKENS), None)
    if far is not None:
        raise CheckpointError(
            f"the tokenizer of {printable(where)!r} gives {printable(far)!r} the number {tokens[far]:,}, expected less "
            f"than {MOST_TOKENS:,}. It was damaged: fetch it again."
        )


def _ordered(found: Iterable[Difference]) -> list[Difference]:
    return sorted(found, key=lambda d: EFFECTS.index(d.effect))


def _stated(config: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """A configuration's values by key, in one spelling, with what it means where it is silent."""
    own = {**config, "model_type": config.get("model_type") or kind}
    rotary = own.pop("rope_parameters", None)
    if isinstance(
        rotary, Mapping
    ):  # transformers 5 puts the base and the scaling of rotary embeddings into one section
        own |= {"rope_theta": rotary["rope_theta"]} if "rope_theta" in rotary else {}
        own["rope_scaling"] = {key: value for key, value in rotary.items() if key != "rope_theta"}
    if "torch_dtype" in own:
        own.setdefault("dtype", own.pop("torch_dtype"))
    scaling = own.get("rope_scaling")
    if isinstance(scaling, Mapping):
        own["rope_scaling"] = {"rope_type" if k == "type" else k: v for k, v in scaling.items()}
        if own["rope_scaling"].get("rope_type") == "default":
            own["rope_scaling"].pop("rope_type")
    spec = next((s for s in builtin_specs().values() if own["model_type"] in s.model_types), None)
    # of every family that is described the spec says where embeddings are tied unless the configuration denies it
    family = {"tie_word_embeddings": False, **spec.defaults} if spec else {}
    found = ASSUMED | _flat(family) | _flat(own)
    heads, width = found.get("num_attention_heads"), found.get("hidden_size")
    if isinstance(heads, int):
        found.setdefault("num_key_value_heads", heads)
        if isinstance(width, int) and heads > 0 and width % heads == 0:
            found.setdefault("head_dim", width // heads)
    return found


def _flat(section: Mapping[str, Any], start: str = "", depth: int = 0) -> dict[str, Any]:
    """Values by key, with dots where they lie in sections; what is null is as if it were not there."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping) and depth < DEPTH:
            found |= _flat(value, f"{start}{key}.", depth + 1)
        elif value is not None:
            found[f"{start}{key}"] = value
    return found


def _keys(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield key and both values, to be shown, of what differs."""
    for key in dict.fromkeys((*ours, *theirs)):
        # as text too: what is no number is unequal to itself
        texts = [_text(own.get(key)) for own in (ours, theirs)]
        if ours.get(key) != theirs.get(key) and texts[0] != texts[1]:
            one, other = (printable(text, SHOWN_CHARACTERS) for text in texts)
            yield printable(key), one, other


def _text(value: Any) -> str:
    if value is None:
        return NOT_STATED
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _read(companions: Mapping[str, Callable[[], bytes]], name: str) -> bytes | None:
    """A companion's bytes; ``None`` where it is not there or cannot be read, which is no reason to compare nothing."""
    try:
        return companions[name]() if name in companions else None
    except CheckpointError:
        return None


def _parsed(raw: bytes | None) -> dict[str, Any] | None:
    try:
        return None if raw is None else parse_object(raw, "companion")
    except CheckpointError:
        return None


def _of_file(name: str, one: bytes | None, other: bytes | None) -> list[Difference]:
    """In what two files of a name differ: by key where they are JSON, by line where they are lists, else as a whole."""
    if one == other:
        return []
    ours, theirs = _parsed(one), _parsed(other)
    if name == TOKENIZER and ours and theirs:
        return _of_tokenizers(ours, theirs)
    if name in ("vocab.txt", "merges.txt") and one and other:
        lines = [Counter(text.decode("utf-8", "replace").splitlines()) for text in (one, other)]
        return [Difference(name, "", *_only(lines[0], lines[1]), "text")]
    if name.endswith(".json") and name != "vocab.json" and ours is not None and theirs is not None:
        told = _keys(_flat({**ours, "chat_template": None}), _flat({**theirs, "chat_template": None}))
        notes = (*TOKENIZER_NOTES, "_from_model_config")
        return [Difference(name, *t, "none" if t[0].partition(".")[0] in notes else "text") for t in told]
    effect: Effect = "computation" if name.endswith(".py") else "text"
    if name.startswith(("LICENSE", "NOTICE")):
        effect = "none"
    sizes = _both((one, other), lambda raw: "unreadable" if raw is None else f"{len(raw):,} bytes")
    return [Difference(name, "", *sizes, effect)]


def _of_tokenizers(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Difference]:
    """In what two ``tokenizer.json`` differ; vocabulary, merges and special tokens are counted, not listed."""
    told: list[tuple[str, str, str]] = []
    ids = [_vocabulary(own) for own in (ours, theirs)]
    if ids[0] != ids[1]:
        told.append(("vocabulary", *_only(ids[0], ids[1])))
        moved = [token for token, number in ids[0].items() if ids[1].get(token, number) != number]
        if moved:
            start = f"{len(moved):,} tokens elsewhere, {printable(repr(moved[0]), 40)} at"
            told.append(("vocabulary", *_both((ids[0], ids[1]), lambda own: f"{start} {own[moved[0]]}")))
    listed = [_section(own, "model").get("merges") for own in (ours, theirs)]
    merges = [[str(merge) for merge in found] if isinstance(found, list) else [] for found in listed]
    if merges[0] != merges[1]:
        told.append(("merges", *_only(Counter(merges[0]), Counter(merges[1]))))
    special = _both((ours, theirs), lambda own: ", ".join(t for t, how in _added(own).items() if how.get("special")))
    if special[0] != special[1]:
        told.append(("special tokens", *_both(special, lambda text: printable(text or "none", SHOWN_CHARACTERS))))
    rest = []
    for own in (ours, theirs):
        model = {k: v for k, v in _section(own, "model").items() if k not in ("vocab", "merges")}
        further = ("version", "truncation", "padding", "added_tokens", "model")
        rest.append(_flat({**{k: v for k, v in own.items() if k not in further}, "model": model}))
    return [Difference(TOKENIZER, *row, "text") for row in (*told, *_keys(rest[0], rest[1]))]


def _only(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, str]:
    """How many entries each has that the other lacks, and the first of them."""
    lost, new = ([printable(repr(t), 40) for t in a if t not in b] for a, b in ((ours, theirs), (theirs, ours)))
    if not lost and not new:
        return f"{len(ours):,} entries", f"{len(theirs):,} entries in another order"

    def told(of: tuple[Mapping[str, Any], list[str]]) -> str:
        every, own = of
        first = f" ({own[0]}, ...)" if own else ""
        return f"{len(every):,} entries, {len(own):,} of its own{first}"

    return _both(((ours, lost), (theirs, new)), told)


def _both(pair: tuple[T, T], tell: Callable[[T], str]) -> tuple[str, str]:
    """What is told of the first model and of the second."""
    return tell(pair[0]), tell(pair[1])


def _section(parsed: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = parsed.get(name)
    return found if isinstance(found, Mapping) else {}


def _added(parsed: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    listed = parsed.get("added_tokens")
    known = listed if isinstance(listed, list) else []
    return {str(token.get("content")): token for token in known if isinstance(token, Mapping)}


def _vocabulary(parsed: Mapping[str, Any]) -> dict[str, int]:
    """Each token's number; a Unigram vocabulary is a list of pairs of token and score."""
    found = _section(parsed, "model").get("vocab")
    if isinstance(found, list):
        found = {str(pair[0]): i for i, pair in enumerate(found) if isinstance(pair, list) and pair}
    added = {token: own.get("id") for token, own in _added(parsed).items()}
    tokens = {**(found if isinstance(found, dict) else {}), **added}
    return {str(token): number for token, number in tokens.items() if isinstance(number, int)}


def _template(companions: Mapping[str, Callable[[], bytes]]) -> str | None:
    """The chat template that counts."""
    for name in TEMPLATES:
        raw = _read(companions, name)
        if raw is not None and name.endswith(".jinja"):
            return raw.decode("utf-8", "replace")
        if found := (_parsed(raw) or {}).get("chat_template"):
            return _text(found)
    return None


def _of_storage(base: Checkpoint, tuned: Checkpoint) -> list[Difference]:
    both = [name for name in base.infos if name in tuned.infos]
    found = []
    dtypes = [Counter(own.infos[name].dtype for name in both) for own in (base, tuned)]
    if dtypes[0] != dtypes[1]:
        told = _both((dtypes[0], dtypes[1]), lambda own: ", ".join(f"{d} of {n:,} tensors" for d, n in own.items()))
        found.append(Difference("weights", "dtype", *told, "none"))
    files = _both((base, tuned), lambda own: f"{len({info.file for info in own.infos.values()}):,}")
    if files[0] != files[1]:
        found.append(Difference("weights", "files", *files, "none"))
    return found


def _from_bytes(tokens: Iterable[str]) -> list[str]:
    """Return texts of a byte-level vocabulary, where printable bytes stand for themselves and letters for the rest."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return [
        bytes(map(letters.__getitem__, token)).decode("utf-8", "replace") if letters.keys() >= set(token) else token
        for token in tokens
    ]
