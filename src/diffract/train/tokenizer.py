"""Tokenizers: trained on the mix, or taken from where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffract.corpora import read_documents
from diffract.errors import RecipeError, printable
from diffract.train.references import hub_parts
from diffract.train.settings import TrainRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
"""What a trained tokenizer calls the end of a text."""

SAMPLE_CHARACTERS = 20_000_000
"""A tokenizer is trained on so much of the mix, by its shares."""


def make_tokenizer(recipe: TrainRecipe) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a recipe.

    Raises:
        RecipeError: It cannot be loaded, or lacks what training needs.
        CorpusError: The text that it is to be trained on cannot be read.
    """
    if recipe.tokenizer is not None and recipe.tokenizer.train is not None:
        return train_tokenizer(recipe, recipe.tokenizer.train.vocabulary)
    named = recipe.tokenizer.path if recipe.tokenizer is not None else recipe.model.init
    assert named is not None, "a recipe without an init has a tokenizer"
    return load_tokenizer(named)


def train_tokenizer(recipe: TrainRecipe, vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the training text of the mix; each digit is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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
    tokenizer.train_from_iterator(_sample(recipe), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, model_max_length=recipe.context, clean_up_tokenization_spaces=False
    )


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
