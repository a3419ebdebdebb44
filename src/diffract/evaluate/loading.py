"""Models and tokenizers by transformers, from any reference; code that comes with a model is never run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffract.checkpoints import open_checkpoint
from diffract.errors import CheckpointError, DiffractError, SelectionError, printable, suggest

PIP = "pip install 'diffract-llm[train]'"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_HUB = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[!-?A-~]+))?", re.ASCII)


def load_model(ref: str, device: torch.device, dtype: str) -> torch.nn.Module:
    """Load a causal language model.

    A folder with a config and a name on the hub are transformers' own business; an adapter is merged into its base, as
    everywhere in diffract, and rounded to its dtype.

    Args:
        ref: A folder, ``org/name@revision``, or an adapter.
        device: Where it goes.
        dtype: ``auto`` is the stored one, on a CPU float32.

    Raises:
        CheckpointError: There is no such model, or tensors of it are missing.
        SelectionError: There is no such dtype.
    """
    if dtype != "auto" and dtype not in DTYPES:
        known = f"auto or one of: {', '.join(DTYPES)}.{suggest(dtype, DTYPES)}"
        raise SelectionError(f"unknown dtype {printable(dtype)!r}, expected {known}")
    chosen = DTYPES.get(dtype, "auto" if device.type != "cpu" else torch.float32)
    with _explained(ref, "model"):
        own = _own_place(ref)
        model, lost = _from_checkpoint(ref, chosen) if own is None else _from_transformers(own, chosen)
        if lost:
            raise CheckpointError(
                f"{printable(ref)}: {len(lost)} tensors of the model are missing or have another shape, the first is "
                f"{printable(lost[0])}. Is this a whole language model?"
            )
        return model.to(device)


def load_tokenizer(ref: str) -> Any:
    """Load a tokenizer.

    Raises:
        CheckpointError: There is none.
    """
    with _explained(ref, "tokenizer"):
        from transformers import AutoTokenizer

        place, options = _own_place(ref) or (str(Path(ref).expanduser()), {})
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)


def _own_place(ref: str) -> tuple[str, dict[str, Any]] | None:
    """Return what transformers is asked for, or ``None`` where diffract has to read the weights."""
    path = Path(ref).expanduser()
    if path.is_dir():
        whole = (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()
        return (str(path), {}) if whole else None
    match = None if path.exists() else _HUB.fullmatch(ref)
    if match is None:
        return None
    return match["repo"], {"revision": match["revision"]} if match["revision"] else {}


def _from_transformers(place: tuple[str, dict[str, Any]], dtype: Any) -> tuple[Any, list[str]]:
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM.from_pretrained(
        place[0], dtype=dtype, trust_remote_code=False, output_loading_info=True, **place[1]
    )
    return found[0], _lost(found[1])


def _from_checkpoint(ref: str, dtype: Any) -> tuple[Any, list[str]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    with open_checkpoint(ref) as checkpoint:
        if not checkpoint.config or "model_type" not in checkpoint.config:
            raise CheckpointError(
                f"{printable(ref)} has no config.json. Pass the folder that holds config and weights."
            )
        config = AutoConfig.for_model(**checkpoint.config)
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config))
        tensors = {name: checkpoint.read(name) for name in checkpoint.names}
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
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        first = printable(str(error).strip().partition("\n")[0].rstrip("."))
        advice = " Pass --tokenizer." if what == "tokenizer" else ""
        raise CheckpointError(f"cannot load the {what} of {printable(ref)!r}: {first}.{advice}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
