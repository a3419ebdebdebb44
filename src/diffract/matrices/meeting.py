"""Two models that meet in an edit: which tensors they share, and what speaks against taking weights from the other.

One place decides for every edit, merge and search: lineage, configuration, tokenizers and shapes are asked here, and
each objection has the name that a user allows it by.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from diffract.architectures.dimensions import TEXT_SECTIONS
from diffract.checkpoints.configurations import OFF_IF_SILENT, compare_configurations
from diffract.errors import SelectionError, printable, suggest
from diffract.matrices.alike import counterparts, renamed_like
from diffract.matrices.layout import Layout
from diffract.matrices.lineage import Lineage, tell_lineage
from diffract.matrices.pairing import split_at_layer, stacks, within_layers
from diffract.matrices.tokens import common_tokens, grown_tables, leading_rows, token_tables
from diffract.settings import PERMISSIONS

Vocabulary = Literal["common", "refuse"]
"""What becomes of tables of tokens that have another number of rows: the common rows are paired, or none."""

STRANGERS, TOKENIZERS, UNMATCHED = PERMISSIONS

TIE = "tie_word_embeddings"

OF_SHAPES = ("vocab_size", "quantization_config", TIE)
"""Keys that are no objection: tensors themselves tell sizes and ties, and codes are read as numbers."""

SHOWN, NAMED = 8, 3
"""Tensors that an error lists, and a sentence."""


class Permissions:
    """What a user allows though it speaks against taking weights from another model, and what of it was needed.

    Args:
        names: ``strangers``, ``tokenizers``, ``unmatched``, or keys of configurations.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        self._needed = set[str]()

    def allows(self, name: str) -> bool:
        """Whether something that speaks against it is allowed; asking says that it had to be."""
        self._needed.add(name)
        return name in self.names

    def check(self, configs: Iterable[Mapping[str, object]]) -> None:
        """Refuse names that can be no permission where models with these configurations meet.

        Raises:
            SelectionError: A name is neither a permission nor a key of a configuration.
        """
        keys = {TIE, *OFF_IF_SILENT}
        for config in configs:
            keys |= config.keys()
            keys |= {key for s in TEXT_SECTIONS if isinstance(own := config.get(s), Mapping) for key in own}
        for name in self.names:
            if name not in PERMISSIONS and name not in keys:
                raise SelectionError(
                    f"unknown permission {printable(name)!r}.{suggest(name, [*PERMISSIONS, *keys])} Known: "
                    f"{', '.join(PERMISSIONS)}, and keys of the models' config.json."
                )

    def unneeded(self) -> list[str]:
        """Say what was allowed though nothing spoke against it, in a sentence if anything was."""
        names = [name for name in self.names if name not in self._needed]
        return [f"Nothing to allow: {', '.join(map(printable, names))}."] if names else []


class Objection(NamedTuple):
    """What speaks against an edit with another model: the reason, and the option that allows it, if anything does."""

    text: str
    option: str | None


@dataclass(frozen=True)
class Meeting:
    """How a model and another one fit together.

    Attributes:
        names: What the other calls each tensor of the model that can be taken from it.
        rows: Of tables of tokens that have another number of rows, how many of the first belong together.
        apart: The model's tensors that cannot be taken from the other, to why.
        extra: Tensors that only the other has, to why.
        matrices: Those of ``apart`` that hold matrices; vectors and buffers never stop an edit.
        within: Those of ``apart`` and ``extra`` that hold matrices of layers which both models have.
        tables: The model's tables of tokens.
        objections: What speaks against any edit.
        tokens: How the tokenizers differ, where the same number is another token; empty if none is.
        by_position: Whether rows are paired by their number alone, since a tokenizer is not known.
        layers: Where layers were moved, dropped or doubled, which of the other's each of the model's is paired with.
    """

    names: Mapping[str, str]
    rows: Mapping[str, int]
    apart: Mapping[str, str]
    extra: Mapping[str, str]
    matrices: frozenset[str]
    within: frozenset[str]
    tables: frozenset[str]
    objections: tuple[Objection, ...]
    tokens: str
    by_position: bool
    layers: Mapping[int, int]

    def against(self, asked: Collection[str], *, chosen: bool, vocabulary: Vocabulary) -> Iterator[Objection]:
        """Yield what speaks against taking some tensors.

        Args:
            asked: The model's names for them.
            chosen: Whether a user named them. Otherwise all is meant that the models share: parts that only one of them
                has stay, but for those within layers of both.
            vocabulary: What becomes of tables with another number of tokens.
        """
        yield from self.objections
        if self.tokens and self.tables.intersection(asked):
            yield Objection(self.tokens, f"--allow {TOKENIZERS}")
        needed = (self.matrices if chosen else self.within).intersection(asked)
        missing = {n: why for n, why in self.apart.items() if n in needed}
        lost = missing if chosen else missing | {n: why for n, why in self.extra.items() if n in self.within}
        if lost:
            told = [f"{printable(name)}: {why}" for name, why in lost.items()]
            more = f"; and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
            yield Objection(f"not of one shape, {'; '.join(told[:SHOWN])}{more}", f"--allow {UNMATCHED}")
        # Tables of other sizes meet in their common rows, unless that is refused.
        resized = [name for name in self.rows if name in asked]
        if resized and vocabulary == "refuse":
            yield Objection(f"another number of tokens in {printable(', '.join(resized))}", "--vocabulary common")

    def stays(self) -> dict[str, str]:
        """Return what is not taken or not used, by name, with the reason."""
        grown = {name: f"rows from {count} on stay as they are in the model" for name, count in self.rows.items()}
        return {**grown, **self.apart, **self.extra}

    def told(self, other: str) -> list[str]:
        """Return the same in sentences.

        Args:
            other: What the other is called.
        """
        found = []
        if moved := [f"{ours} with {theirs}" for ours, theirs in self.layers.items() if ours != theirs]:
            found.append(f"Layers are paired with those of {other} that they come from: {_listed(moved)}.")
        if self.apart:
            found.append(f"As in the model, not from {other}: {_listed(self.apart)}.")
        if self.extra:
            found.append(f"Only in {other}, not used: {_listed(self.extra)}.")
        for count in dict.fromkeys(self.rows.values()):
            tables = [name for name, rows in self.rows.items() if rows == count]
            how = ", by their position alone: no tokenizer lies beside both models" if self.by_position else ""
            found.append(f"Of {_listed(tables)} the first {count:,} rows are paired with those of {other}{how}.")
        return found


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(map(printable, list(names)[:NAMED]))}{more}"


def meet(model: Layout, other: Layout, ties: Mapping[str, str]) -> Meeting:
    """Find out how a model and another one fit together; of weights only a sample of the blocks' matrices is read.

    Args:
        model: What is edited.
        other: What weights are taken from.
        ties: The model's tensors that share another's values, to that other.
    """
    own = {ours: theirs for theirs, ours in counterparts(model, other).items()}
    found = {name: own.get(name) or _called(name, other, ties) for name in model.entries}
    kin = tell_lineage(renamed_like(model, other), model)
    stack, layers = _layers_of(kin, model)
    if layers:
        known = {split_at_layer(other, name): name for name in other.entries}
        parts = {name: split_at_layer(model, name) for name in model.entries}
        inside = {name: (layers.get(n, -1), rest) for name, (own, n, rest) in parts.items() if own == stack}
        found |= {name: known.get((stack, *place)) for name, place in inside.items()}
    shapes = {name: other.checkpoint.info(theirs).shape for name, theirs in found.items() if theirs is not None}
    tables = frozenset(token_tables(model))
    sizes = {name: (model.entries[name].info.shape, shape) for name, shape in shapes.items()}
    grown = grown_tables(sizes, tables, model)
    common, tokens, by_position = common_tokens(model, other)
    rows = {name: leading_rows(sizes[name], common) for name in grown}
    names, apart = {}, {}
    for name, theirs in found.items():
        if theirs is None:
            apart[name] = "only in the model"
        elif len(set(sizes[name])) > 1 and name not in grown:
            apart[name] = " against ".join(str(list(shape)) for shape in sizes[name])
        elif model.entries[name].outcome == "buffer":
            apart[name] = "made anew by the model, no weight"
        else:
            names[name] = theirs
    used = {theirs for theirs in found.values() if theirs is not None}
    unused = (name for name in other.entries if name not in used and other.entries[name].outcome != "tied")
    extra = dict.fromkeys(unused, "only in the other")
    ours, theirs = stacks(model), stacks(other)
    within = [name for name in apart if within_layers(model.entries[name], model, theirs)]
    within += [name for name in extra if within_layers(other.entries[name], other, ours)]
    return Meeting(
        names=names,
        rows=rows,
        apart=apart,
        extra=extra,
        matrices=frozenset(name for name in apart if model.entries[name].matrices),
        within=frozenset(within),
        tables=tables,
        objections=(*_of_kin(kin, layers), *_of_configurations(kin, model, other)),
        tokens=tokens,
        by_position=bool(rows) and by_position,
        layers=layers,
    )


def _layers_of(kin: Lineage, model: Layout) -> tuple[str, dict[int, int]]:
    """Return a model's one stack of layers, and of which layer of the other each is that stands elsewhere there.

    The stack is what its names have before their number. Of several stacks, or where less than whole layers has moved,
    numbers tell nothing.
    """
    layered = (name for name, entry in model.entries.items() if any(m.layer is not None for m in entry.matrices))
    found = {split_at_layer(model, name)[0] for name in layered}
    numbers = [(ours.removeprefix("layer "), theirs.removeprefix("layer ")) for ours, theirs in kin.moved.items()]
    whole = all(ours.isdigit() and theirs.isdigit() for ours, theirs in numbers)
    if len(found) != 1 or not whole or "" in found:
        return "", {}
    return found.pop(), {int(ours): int(theirs) for ours, theirs in numbers}


def _called(name: str, other: Layout, ties: Mapping[str, str]) -> str | None:
    """What another checkpoint calls a tensor; where it ties what the model does not, there is a twin."""
    if name in other.checkpoint:
        return name
    twins = (ties.get(name), other.architecture.tied_to(name, other.checkpoint.infos))
    return next((twin for twin in twins if twin in other.checkpoint), None)


def _of_kin(kin: Lineage, layers: Mapping[int, int]) -> Iterator[Objection]:
    """Yield what speaks against any edit where the models are strangers, or parts of them lie in other places."""
    if kin.word == "stranger":
        told = f"correlation {kin.correlation:.3f} over {kin.matrices} matrices"
        yield Objection(f"a stranger, neither descends from the other ({told})", f"--allow {STRANGERS}")
    if kin.word == "rearranged" and not layers:
        parts = [printable(f"{part} is its {origin}") for part, origin in kin.moved.items() if part != origin]
        yield Objection(
            f"its layers, heads or neurons stand in other places ({_listed(parts)}), so that tensors of one name do "
            "not belong together; take the checkpoint that has them in the same places",
            None,
        )


def _of_configurations(kin: Lineage, model: Layout, other: Layout) -> Iterator[Objection]:
    """Yield the keys that make the two models compute something else, by name."""
    differing: dict[str, list[str]] = {}
    for difference in compare_configurations(*_of_one_level(model, other)):
        words = [word for word in difference.key.split(".") if word not in TEXT_SECTIONS]
        if difference.certain and words[0] not in OF_SHAPES:
            differing.setdefault(words[0], []).append(f"{difference.key} {difference.base} against {difference.tuned}")
    # only entries that are all equal correlate by 1; whether that is so everywhere is asked where it matters
    if differing and kin.correlation == 1 and _equal(model, other):
        return
    for key, texts in differing.items():
        yield Objection("; ".join(texts), f"--allow {key}")
    # a head of the other's own has no place in a model that shares its embedding; the reverse is only stored twice
    if model.architecture.ties and other.checkpoint.config and not other.architecture.ties:
        yield Objection(f"{TIE} true against false", f"--allow {TIE}")


def _equal(model: Layout, other: Layout) -> bool:
    """Whether two models have the same tensors to the bit; both are read."""
    one, two = model.checkpoint, other.checkpoint
    return one.names == two.names and all(one.digest(name) == two.digest(name) for name in one.names)


def _of_one_level(model: Layout, other: Layout) -> list[Mapping[str, object]]:
    """The configurations of two models; of a larger model beside a language model alone that of its language model."""
    configs: list[Mapping[str, object]] = [model.checkpoint.config, other.checkpoint.config]
    texts = [next((config[s] for s in TEXT_SECTIONS if isinstance(config.get(s), Mapping)), None) for config in configs]
    # Two of one level are compared whole: their other sections count too.
    if (texts[0] is None) != (texts[1] is None):
        return [config if text is None else text for config, text in zip(configs, texts, strict=True)]  # type: ignore[misc]
    return configs
