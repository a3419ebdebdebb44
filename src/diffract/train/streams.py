"""Text as streams of tokens, kept by content: what was tokenised once is mapped from its file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from diffract.cache import cache_folder
from diffract.corpora import read_documents
from diffract.errors import CorpusError, printable
from diffract.folders import whole_file
from diffract.train.digests import digest_parts, digest_sources
from diffract.train.settings import TrainRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
"""Raised when the same text would make other tokens."""

BATCH_CHARACTERS = 4_000_000
"""Text that is tokenised at once."""


def token_streams(recipe: TrainRecipe, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """Return the file of each part's training tokens, by name; tokenise what is not there yet.

    Raises:
        CorpusError: Text cannot be read, is for evaluation only, or makes less than one window.
    """
    return {name: _stream(recipe, name, tokenizer) for name in recipe.mix}


def read_stream(path: Path) -> np.ndarray:
    """Map a stream: uint16 or uint32, shape (tokens,)."""
    return np.load(path, mmap_mode="r")


def _stream(recipe: TrainRecipe, name: str, tokenizer: PreTrainedTokenizerFast) -> Path:
    data = Path(recipe.data) if recipe.data else None
    sources = recipe.mix[name].sources
    path = cache_folder() / "tokens" / f"{_key(sources, data, tokenizer)}.npy"
    if not path.exists():
        texts = (d.text for d in chain.from_iterable(read_documents(s, "train", data=data) for s in sources))
        _write(path, texts, tokenizer)
    if (found := len(read_stream(path))) < recipe.context:
        raise CorpusError(
            f"mix.{printable(name)} has {found} tokens to train on, expected one window of {recipe.context} at least. "
            "Give it more text, or shorten the context."
        )
    return path


def _key(sources: Iterable[str], data: Path | None, tokenizer: PreTrainedTokenizerFast) -> str:
    """Digest everything that tokens follow from."""
    made_by = (f"{FORMAT} train", tokenizer.backend_tokenizer.to_str(), str(tokenizer.eos_token_id))
    return digest_parts(text.encode() for text in (*made_by, digest_sources(sources, data)))


def _write(path: Path, texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> None:
    """Tokenise texts into a file: the header first and, once the length is known, again."""
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    with whole_file(path) as draft, draft.open("wb") as file:
        start, count = _write_header(file, dtype, 0), 0
        for tokens in _tokenised(texts, tokenizer, dtype):
            file.write(tokens.tobytes())
            count += len(tokens)
        file.seek(0)
        end = _write_header(file, dtype, count)
        assert end == start, "NumPy leaves room in the header for the length to grow"


def _write_header(file: BinaryIO, dtype: np.dtype[Any], count: int) -> int:
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    )
    return file.tell()


def _tokenised(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """Yield the tokens of texts, each ended by the end-of-text token."""
    end = [tokenizer.eos_token_id]
    for batch in _batches(texts):
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        yield np.fromiter(chain.from_iterable(chain(e.ids, end) for e in encoded), dtype)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
