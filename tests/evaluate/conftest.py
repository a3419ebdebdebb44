"""What is evaluated in these tests."""

from __future__ import annotations

import pytest

from diffract.evaluate import Subject, load_subject
from tiny_language_model import byte_tokenizer, tiny_model


@pytest.fixture
def subject() -> Subject:
    return load_subject(tiny_model(), tokenizer=byte_tokenizer(), device="cpu")
