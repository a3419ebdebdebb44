"""Tokenizers: trained on the mix, or taken from where they lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffract.cache import cache_folder
from diffract.corpora import read_documents
from diffract.errors import RecipeError, printable
from diffract.folders import write_text
from diffract.train.digests import digest_parts, digest_sources
from diffract.train.references import hub_parts
from diffract.train.settings import TrainRecipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
"""What a trained tokenizer calls the end of a text."""

FORMAT = 1
"""Raised when the same text would make another tokenizer."""

SAMPLE_CHARACTERS = 20_000_000
"""A tokenizer is trained on so much of the mix, by its shares."""


def make_tokenizer(recipe: TrainRecipe) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a recipe; one that was trained on the same text before is taken from the cache.

    Raises:
        RecipeError: It cannot be loaded, or lacks what training needs.
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
        texts: What it is trained on.
        vocabulary: Tokens that it has at most.
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
        RecipeError: There is none, or it has no end-of-text token, or is none of the tokenizers library.
    """
    from transformers import AutoTokenizer

    name, revision = hub_parts(named)
    try:
        found: Any = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"no tokenizer can be loaded from {printable(named)!r}: {printable(error)}.") from error
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
    made_by = [FORMAT, __version__, vocabulary, SAMPLE_CHARACTERS, *recipe.shares.values(), *text]
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
