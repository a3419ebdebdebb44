"""What is evaluated: a loaded model with its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
import torch
from torch import Tensor

from diffract.checkpoints import open_checkpoint
from diffract.checkpoints.configurations import own_attention, refuse_far_tokens
from diffract.checkpoints.open import STACK_LIMIT, base_of, local_place
from diffract.engine import choose_device
from diffract.errors import CheckpointError, DiffractError, choose, printable

PIP = "pip install 'diffract-llm[train]'"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(ref: str, device: torch.device, dtype: str) -> torch.nn.Module:
    """Load a causal language model.

    A folder with a config is transformers' own business; an adapter is merged into its base, as everywhere in diffract,
    and rounded to its dtype. A model on the hub is fetched whole.

    Args:
        ref: A folder, ``org/name@revision``, or an adapter.
        device: Where the model goes.
        dtype: ``auto`` is the stored one, on a CPU float32.

    Raises:
        CheckpointError: There is no such model, or tensors of it are missing.
        SelectionError: There is no such dtype.
    """
    choose("dtype", dtype, ["auto", *DTYPES])
    chosen = DTYPES.get(dtype, "auto" if device.type != "cpu" else torch.float32)
    with _explained(ref, "model"):
        place = local_place(ref)
        path = Path(place).expanduser()
        # transformers loads a folder of its own; of an adapter it would load the base alone.
        whole = (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()
        model, lost = (_from_transformers if whole else _from_checkpoint)(place, chosen)
        if lost:
            raise CheckpointError(
                f"{printable(ref)}: {len(lost)} tensors of the model are missing or have another shape, the first is "
                f"{printable(lost[0])}. Is this a whole language model?"
            )
        return model.to(device)


def load_tokenizer(ref: str) -> Any:
    """Load a tokenizer.

    Raises:
        CheckpointError: There is no tokenizer, or it cannot be loaded.
    """
    with _explained(ref, "tokenizer"):
        from transformers import AutoTokenizer

        path = Path(local_place(ref, weights=False)).expanduser()
        for _ in range(STACK_LIMIT):
            if next(path.glob("tokenizer*"), None) is None and (base := base_of(path)) is not None:
                path = Path(local_place(str(base), weights=False)).expanduser()  # it is often saved without one
        found: Any = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        refuse_far_tokens(found.get_vocab(), ref)
        return found


def _from_transformers(place: str, dtype: Any) -> tuple[Any, list[str]]:
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    place = str(Path(place).expanduser())
    own = own_attention(PreTrainedConfig.get_config_dict(place)[0], place)
    found: Any = AutoModelForCausalLM.from_pretrained(
        place, dtype=dtype, trust_remote_code=False, output_loading_info=True, **own
    )
    return found[0], _lost(found[1])


def _from_checkpoint(ref: str, dtype: Any) -> tuple[Any, list[str]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    with open_checkpoint(ref) as checkpoint:
        if not checkpoint.config or "model_type" not in checkpoint.config:
            raise CheckpointError(
                f"{printable(ref)} has no config.json. Pass the folder that holds config and weights."
            )
        own = own_attention(checkpoint.config, ref)
        config = AutoConfig.for_model(**{**checkpoint.config, **own})
        # Only the class is wanted: no memory is taken for weights that are not those of the file.
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
        # An adapter's sum is rounded once, to the dtype that the model is loaded in, not to the stored one before.
        once = set() if dtype == "auto" else checkpoint.unrounded.keys()
        tensors = {
            name: checkpoint.read_unrounded(name).to(dtype) if name in once else checkpoint.read(name)
            for name in checkpoint.names
        }
        model, info = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    return model, _lost(info)


def _lost(info: dict[str, Any]) -> list[str]:
    return sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})


@contextmanager
def _explained(ref: str, what: str) -> Iterator[None]:
    """Turn what transformers raises into one message, and keep its bars off the terminal."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise CheckpointError(f"evaluation needs the transformers package: {PIP}.") from error
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it would warn of, missing tensors, is an error here
    try:
        yield
    except DiffractError:
        raise
    except Exception as error:  # the tokenizers library raises plain ones for what is wrong in a file
        first = printable(str(error).strip().partition("\n")[0].rstrip("."))
        advice = " Pass --tokenizer." if what == "tokenizer" else ""
        raise CheckpointError(f"cannot load the {what} of {printable(ref)!r}: {first}.{advice}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


CHUNK_BYTES = 1 << 26
"""So much of a tensor on another device is copied at a time."""

NOT_PART = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Entries of a config that do not change what a loaded model computes; its dtype is that of its tensors."""


def model_digest(model: torch.nn.Module) -> str:
    """Return a digest of a model: its class, its config, and name, dtype, shape and bytes of every tensor.

    Tensors are read where they lie; tied ones are read once. One changed bit gives another digest.
    """
    hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)
    config: Any = getattr(model, "config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else {}
    own = {k: v for k, v in config.items() if k not in NOT_PART}
    hasher.update(json.dumps([type(model).__name__, own], default=str, sort_keys=True).encode())
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            hasher.update(f"{name} {tensor!r}".encode())
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        # Tied weights are digested once, and that they are tied is part of the digest.
        twin = seen.setdefault(place, name) if tensor.numel() else name
        hasher.update(json.dumps([name, str(tensor.dtype), list(tensor.shape), twin]).encode())
        if twin == name:
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            for begun in range(0, flat.numel(), CHUNK_BYTES):
                hasher.update(flat[begun : begun + CHUNK_BYTES].cpu().numpy().data)
    return hasher.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of a tokenizer: its JSON without padding and truncation, and its special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Scoring itself sets padding and truncation; they say nothing of how a text becomes tokens.
        content = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    return blake3.blake3(json.dumps([content, special], sort_keys=True).encode()).hexdigest()


def has_adapters(model: torch.nn.Module) -> bool:
    """Return whether a model holds adapters of PEFT: their scales and switches are not among what is digested."""
    return bool(getattr(model, "peft_config", None))


CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")
"""What configs call the longest sequence that a model was made for."""

UNLIMITED_CONTEXT = 4096
"""Tokens for a model whose config names no limit."""


@dataclass
class Subject:
    """A loaded model with its tokenizer.

    Attributes:
        model: In evaluation mode; a causal language model of transformers.
        tokenizer: A tokenizer of transformers.
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

    @property
    def recurrent(self) -> bool:
        """Whether a state carries what was read: of such models padding before a text changes what follows."""
        return bool(getattr(self.model, "_is_stateful", False))

    @property
    def ends(self) -> list[int]:
        """Tokens that end what the model says.

        These are the end of the tokenizer, those of the model's generation settings and configuration, and what its
        chat template puts behind a turn.
        """
        model: Any = self.model
        own = [getattr(model, name, None) for name in ("generation_config", "config")]
        found = [self.tokenizer.eos_token_id, *(getattr(settings, "eos_token_id", None) for settings in own)]
        tokens = [token for one in found for token in (one if isinstance(one, list | tuple) else [one])]
        return sorted({t for t in (*tokens, self._turn_end()) if isinstance(t, int) and 0 <= t < self.vocabulary})

    @property
    def stops(self) -> list[str]:
        """Texts that end what the model says, by its generation settings."""
        found = getattr(getattr(self.model, "generation_config", None), "stop_strings", None) or []
        return [found] if isinstance(found, str) else [text for text in found if text]

    def _turn_end(self) -> int | None:
        """Return the special token that the chat template puts behind what an assistant says."""
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        # Words that no template writes by itself, so that their end is found.
        said = "4711 is said"
        turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": said}]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # a template is a program of others, and may fail in any way; then it tells nothing
            return None
        behind = self.tokenizer(text.rpartition(said)[2], add_special_tokens=False)["input_ids"]
        special = set(self.tokenizer.all_special_ids) | set(getattr(self.tokenizer, "added_tokens_decoder", ()))
        return next((token for token in behind if token in special), None)

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
    return Subject(model.eval(), found, where, context=context_of(model), name=name)


def context_of(model: torch.nn.Module) -> int:
    """Return how many tokens a model takes at once, from its config."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(text, name, None) for name in CONTEXT_NAMES)
    return next((value for value in found if isinstance(value, int) and value > 1), UNLIMITED_CONTEXT)
