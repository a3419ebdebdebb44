"""What two models of different vocabularies have in common: tables of tokens, and how many of their rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from diffract.checkpoints.configurations import vocabulary
from diffract.errors import printable
from diffract.matrices.layout import Entry, Layout

MAY_DIFFER = ("embed", "unembed")
"""Blocks that may be unmatched: a vocabulary grows, a head is tied."""

WORDS_OF_TABLES = ("embed", "wte", "lm_head")
"""What tables of tokens are called where no family is known; a table of positions has one of the next words too."""

OTHER_TABLES = ("pos", "type", "seg")


def token_tables(model: Layout) -> Iterator[str]:
    """Yield the names of tables with a row for each token, biases of the output left out."""
    for name, entry in model.entries.items():
        known = model.architecture.place(name) is not None
        last = name.lower().rpartition(".weight")[0] or name.lower()
        called = any(w in last for w in WORDS_OF_TABLES) and not any(w in last.split(".")[-1] for w in OTHER_TABLES)
        if (known and any(m.projection in MAY_DIFFER for m in entry.matrices)) or (not known and called):
            yield name


Sizes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Shapes of a tensor in the model and in the other."""


def grown_tables(sizes: Sizes, tables: Collection[str], model: Layout) -> list[str]:
    """Tables, and what else goes by tokens (an output of a name of its own, its bias), of another number of rows."""
    differ = {name: (a, b) for name, (a, b) in sizes.items() if a != b and a[1:] == b[1:] and a and b}
    counts = {(a[0], b[0]) for name, (a, b) in differ.items() if name in tables}
    # What stands in a numbered layer does not go by tokens, whatever its size.
    words = {name: model.architecture.bare.get(name, name).split(".") for name in differ}
    outside = [name for name in differ if not any(word.isdigit() for word in words[name])]
    return [name for name in outside if (differ[name][0][0], differ[name][1][0]) in counts]


def common_tokens(model: Layout, other: Layout) -> tuple[Collection[int] | None, str, bool]:
    """Compare tokenizers token by token.

    Returns:
        The numbers that only one of them knows, how they contradict each other, and whether one is not known at all.
    """
    ours, theirs = vocabulary(model.checkpoint), vocabulary(other.checkpoint)
    if not ours or not theirs:
        return (), "", True
    one, two = ({number: token for token, number in known.items()} for known in (ours, theirs))
    other_tokens = [number for number in one if number in two and one[number] != two[number]]
    text = ""
    if other_tokens:
        first = min(other_tokens)
        text = (
            f"the same number is another token in {len(other_tokens):,} of {len(one.keys() & two.keys()):,} cases, "
            f"first {first}: {printable(repr(one[first]), 40)} against {printable(repr(two[first]), 40)}"
        )
    return one.keys() ^ two.keys(), text, False


def leading_rows(shapes: tuple[tuple[int, ...], tuple[int, ...]], alone: Collection[int] | None) -> int:
    """How many of the first rows both models have: the smaller table, without tokens at its end that only one knows."""
    count = min(shape[0] for shape in shapes)
    while count and alone and count - 1 in alone:
        count -= 1
    return count


def with_common_rows(base: Layout, others: Sequence[Layout]) -> tuple[Layout, list[Layout]]:
    """Return layouts in which tables of other numbers of tokens are the rows that all of the models have.

    Tables stay as they are where tokenizers give the same number to other tokens, which no pairing of rows would mend.
    """
    tables, rows, told, strange = frozenset(token_tables(base)), dict[str, int](), dict[int, str](), set[int]()
    for i, other in enumerate(others):
        shared = {name: entry for name, entry in base.entries.items() if name in other.entries}
        sizes = {name: (entry.info.shape, other.entries[name].info.shape) for name, entry in shared.items()}
        whole = [name for name in grown_tables(sizes, tables, base) if _is_table(base.entries[name])]
        grown = [name for name in whole if _is_table(other.entries[name])]
        if not grown:
            continue
        alone, tokens, by_position = common_tokens(base, other)
        if tokens:
            strange.add(i)
            continue
        counts = {name: leading_rows(sizes[name], alone) for name in grown}
        rows |= {name: min(count, rows.get(name, count)) for name, count in counts.items() if count}
        if by_position:
            names = ", ".join(map(printable, grown))
            told[i] = f"{names}: no tokenizer lies beside both models, so that rows are paired by their position alone."
    found = []
    for i, other in enumerate(others):
        cut = other if i in strange else _cut_tables(other, rows)
        found.append(replace(cut, warnings=(*cut.warnings, told[i])) if i in told else cut)
    return _cut_tables(base, rows), found


def _is_table(entry: Entry) -> bool:
    return len(entry.matrices) == 1 and entry.matrices[0].is_whole


def _cut_tables(layout: Layout, rows: Mapping[str, int]) -> Layout:
    entries = dict(layout.entries)
    for name, count in rows.items():
        if name in entries and _is_table(entries[name]) and count <= entries[name].info.shape[0]:
            (whole,) = entries[name].matrices
            common = replace(whole, rows=(0, count), shape=(count, whole.shape[1]))
            note = f"the first {count:,} of {whole.shape[0]:,} rows, which all models have"
            note = "; ".join(filter(None, (entries[name].note, note)))
            entries[name] = replace(entries[name], matrices=(common,), note=note)
    return replace(layout, entries=entries)
