"""Text as streams of tokens, kept by content: what was tokenised once is mapped from its file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import blake3
import numpy as np

from diffract.checkpoints.configurations import refuse_far_tokens
from diffract.checkpoints.open import local_place
from diffract.corpora import read_documents, source_files
from diffract.errors import CorpusError, RecipeError, printable
from diffract.store import cache_folder, whole_file, write_text
from diffract.train.recipe import TrainRecipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


CHUNK = 1 << 24
"""Bytes of a file that are read at once."""


def digest_parts(parts: Iterable[bytes]) -> str:
    """Return a digest of a list of contents; each goes in with its length, so that no two lists look alike."""
    hasher = blake3.blake3()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()


def digest_sources(sources: Iterable[str], data: Path | None) -> str:
    """Return a digest of everything that the text of sources follows from.

    The names of files belong to it, as some are refused. What is on the hub stands there with its name alone.

    Args:
        sources: Files, folders and names, as ``read_documents`` takes them.
        data: The folder that files' names are relative to.

    Raises:
        CorpusError: A source is not there.
    """
    # The code that reads text belongs to it: the same files make other documents where it changes.
    resources = sorted(files("diffract.corpora").iterdir(), key=lambda found: found.name)
    parts = [digest_parts(found.read_bytes() for found in resources if found.is_file()).encode()]
    for source in sources:
        found = source_files(source, data=data)
        parts.append((Path(source).name if found else source).encode())
        parts += [_file_digest(path) for path in found]
    return digest_parts(parts)


def _file_digest(path: Path) -> bytes:
    hasher = blake3.blake3()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return hasher.digest()


STREAM_FORMAT = 1
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
    # All that tokens follow from is in the name: another text or tokenizer finds no file, and makes its own.
    made_by = (f"{STREAM_FORMAT} train", tokenizer.backend_tokenizer.to_str(), str(tokenizer.eos_token_id))
    key = digest_parts(text.encode() for text in (*made_by, digest_sources(sources, data)))
    path = cache_folder() / "tokens" / f"{key}.npy"
    if not path.exists():
        texts = (d.text for d in chain.from_iterable(read_documents(s, "train", data=data) for s in sources))
        _write(path, texts, tokenizer)
    if (found := len(read_stream(path))) < recipe.context:
        raise CorpusError(
            f"mix.{printable(name)} has {found} tokens to train on, expected one window of {recipe.context} at least. "
            "Give it more text, or shorten the context."
        )
    return path


def _write(path: Path, texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the tokens of texts, each ended by the end-of-text token, a batch of texts at a time."""
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    with whole_file(path) as draft, draft.open("wb") as file:
        # How many tokens there are is known at the end only: the header is written first for its length, then again.
        start, count = _write_header(file, dtype, 0), 0
        for batch in _batches(texts):
            encoded = tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            tokens = np.fromiter(chain.from_iterable((*e.ids, tokenizer.eos_token_id) for e in encoded), dtype)
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


END = "<|endoftext|>"
"""What a trained tokenizer calls the end of a text."""

TOKENIZER_FORMAT = 1
"""Raised when the same text would make another tokenizer."""

SAMPLE_CHARACTERS = 20_000_000
"""A tokenizer is trained on so much of the mix, by its shares."""


def make_tokenizer(recipe: TrainRecipe) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a recipe; one that was trained on the same text before is taken from the cache.

    Raises:
        RecipeError: The tokenizer cannot be loaded, or lacks what training needs.
        CorpusError: The text that it is to be trained on cannot be read.
    """
    if recipe.tokenizer is not None and recipe.tokenizer.train is not None:
        return _trained(recipe, recipe.tokenizer.train.vocabulary)
    named = recipe.tokenizer.path if recipe.tokenizer is not None else recipe.model.init
    assert named is not None, "a recipe without an init has a tokenizer"
    return load_tokenizer(named)


def train_bpe(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer whose first token ends texts; each digit is a token of its own.

    Args:
        texts: What the tokenizer is trained on.
        vocabulary: Tokens that the tokenizer has at most.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(named: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer that ends texts and knows batches.

    Raises:
        RecipeError: There is no tokenizer, it has no end-of-text token, or is none of the tokenizers library.
    """
    from transformers import AutoTokenizer

    try:
        found: Any = AutoTokenizer.from_pretrained(local_place(named, weights=False), trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain ones for what is wrong in a file
        raise RecipeError(f"no tokenizer can be loaded from {printable(named)!r}: {printable(error)}.") from error
    refuse_far_tokens(found.get_vocab(), named)
    if getattr(found, "backend_tokenizer", None) is None:
        raise RecipeError(f"the tokenizer of {printable(named)!r} is no fast one, with a tokenizer.json. Convert it.")
    if found.eos_token_id is None:
        raise RecipeError(f"the tokenizer of {printable(named)!r} has no eos_token, which ends texts. Name one in it.")
    return found


def _trained(recipe: TrainRecipe, vocabulary: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, __version__
    from transformers import PreTrainedTokenizerFast

    data = Path(recipe.data) if recipe.data else None
    text = [digest_sources(part.sources, data) for part in recipe.mix.values()]
    made_by = [TOKENIZER_FORMAT, __version__, vocabulary, SAMPLE_CHARACTERS, *recipe.shares.values(), *text]
    path = cache_folder() / "tokenizers" / f"{digest_parts(str(part).encode() for part in made_by)}.json"
    if not path.exists():
        write_text(path, train_bpe(_sample(recipe), vocabulary).to_str())
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(path)),
        eos_token=END,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )


def _sample(recipe: TrainRecipe) -> Iterator[str]:
    """Yield training text of each part, until its share of the sample is reached."""
    data = Path(recipe.data) if recipe.data else None
    for name, share in recipe.shares.items():
        left = int(SAMPLE_CHARACTERS * share)
        for source in recipe.mix[name].sources:
            for document in read_documents(source, "train", data=data):
                if left <= 0:
                    break
                yield document.text[:left]
                left -= len(document.text)


DRAWS, ORDERS = 0, 1
"""What a random stream is for; it stands in its seed."""


class Mixture:
    """The rows of all batches.

    Each row of the run draws its part by the shares, from one seeded generator. It takes the part's next window, in an
    order that is drawn anew for each epoch of the part. Neither how many processes share a batch nor where a run was
    taken up again changes what is in it.

    Args:
        streams: The tokens of each part, by name.
        shares: The share of each part, by name; they sum to 1.
        context: Tokens of a window.
        rows: Windows of a batch.
        steps: Batches of the run.
        seed: The seed of draws and orders.

    Attributes:
        available: Tokens that each part has.
    """

    def __init__(
        self,
        streams: Mapping[str, np.ndarray],
        shares: Mapping[str, float],
        *,
        context: int,
        rows: int,
        steps: int,
        seed: int,
    ) -> None:
        self.names = list(streams)
        self.available = {name: len(stream) for name, stream in streams.items()}
        self.windows = [len(stream) // context for stream in streams.values()]
        self._streams, self._context, self._rows = list(streams.values()), context, rows
        draw = np.random.default_rng([seed, DRAWS])
        drawn = draw.choice(len(self.names), size=(steps, rows), p=[shares[name] for name in self.names])
        self._parts = drawn.astype(np.uint16)
        # How many windows of each part come before a step, so that any step's batch is found without those before it.
        counts = np.stack([(self._parts == part).sum(axis=1) for part in range(len(self.names))], axis=1)
        self._before = np.concatenate([np.zeros_like(counts[:1]), counts.cumsum(axis=0)])
        # an epoch's order is read window by window, and around its end the next one's too
        self._order = lru_cache(maxsize=2 * len(self.names))(
            lambda part, epoch: np.random.default_rng([seed, ORDERS, part, epoch]).permutation(self.windows[part])
        )

    def batch(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """Return some rows of a step's batch.

        Returns:
            Token numbers, shape (rows, context), int64.
        """
        size = self._context
        found = [self._streams[p][w * size : (w + 1) * size] for p, w in self.places(step)[rows]]
        return np.stack([window.astype(np.int64) for window in found])

    def places(self, step: int) -> list[tuple[int, int]]:
        """Return the part and the window of each row of a step's batch."""
        taken = self._before[step].copy()
        found = []
        for part in self._parts[step].tolist():
            epoch, place = divmod(int(taken[part]), self.windows[part])
            found.append((part, int(self._order(part, epoch)[place])))
            taken[part] += 1
        return found

    def tokens(self) -> dict[str, int]:
        """Return how many tokens of each part the run takes."""
        return {name: int(n) * self._context for name, n in zip(self.names, self._before[-1], strict=True)}

    def epochs(self) -> dict[str, float]:
        """Return how often the run takes each part's text, counted in whole windows."""
        rows: Sequence[int] = self._before[-1].tolist()
        return {name: n / w for name, n, w in zip(self.names, rows, self.windows, strict=True)}


def make_mixture(recipe: TrainRecipe, streams: Mapping[str, Path]) -> Mixture:
    """Return the mixture of a recipe.

    Args:
        recipe: Has the shares, sizes and the seed.
        streams: The file of each part's tokens.
    """
    return Mixture(
        {name: read_stream(path) for name, path in streams.items()},
        recipe.shares,
        context=recipe.context,
        rows=recipe.rows,
        steps=recipe.steps,
        seed=recipe.seed,
    )
