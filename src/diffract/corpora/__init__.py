"""Text by domain, split by document: for training, for choosing, and for reporting."""

from diffract.corpora.sources import (
    HUB,
    RECORDS,
    STANDARD_LIBRARY,
    WORD_PROBLEMS,
    read_documents,
    read_records,
    read_texts,
    source_files,
)
from diffract.corpora.splits import (
    Document,
    Split,
    chat_turns,
    digest,
    instruction_text,
    question_text,
    record_text,
    refuse_evaluation_only,
    split_documents,
    split_of,
)
from diffract.corpora.word_problems import Problem, make_problems

__all__ = [
    "HUB",
    "RECORDS",
    "STANDARD_LIBRARY",
    "WORD_PROBLEMS",
    "Document",
    "Problem",
    "Split",
    "chat_turns",
    "digest",
    "instruction_text",
    "make_problems",
    "question_text",
    "read_documents",
    "read_records",
    "read_texts",
    "record_text",
    "refuse_evaluation_only",
    "source_files",
    "split_documents",
    "split_of",
]
