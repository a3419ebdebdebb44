"""The commands that edit: by a recipe, and one for each edit, whose options are those of its record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffract.cli import experiments
from diffract.cli.generate import Command
from diffract.errors import RecipeError, printable

if TYPE_CHECKING:
    from diffract.checkpoints import Reference
    from diffract.settings import Progress


def apply(
    recipe: Any,
    output: str | Path | None = None,
    *,
    allow: Sequence[str] = (),
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> list[Any]:
    """Apply a recipe: any sequence of edits in one pass over the weights.

    Args:
        recipe: A YAML file (docs/recipes.md).
        output: The folder to write.
        allow: What is allowed though it speaks against taking weights from another model: strangers, tokenizers,
            unmatched, or a key of their configurations such as rope_theta.
        dry_run: Say what would change, how many bytes, how long; write nothing.
        force: Replace a folder that an edit has written.
        progress: Called with bytes done, all bytes, and what was just finished.
    """
    from diffract import edits

    if output is None or dry_run:
        return [edits.preview(recipe, allow=allow)]
    return [edits.apply(recipe, output, allow=allow, force=force, progress=progress)]


def edit(
    record: Any,
    *,
    output: Path | None = None,
    output_dtype: str | None = None,
    shard_size: str = "5GB",
    link: bool = False,
    architecture: str | Path | None = None,
    adapter_base: Reference | None = None,
    download: bool = False,
    allow: Sequence[str] = (),
    vocabulary: str = "common",
    progress: Progress | None = None,
    **given: Any,
) -> list[Any]:
    """Apply one edit, or a row of them for ``--at FROM:TO:STEP``.

    Args:
        record: The edit.
        output: The folder to write.
        output_dtype: Convert weights to float32, bfloat16 or float16; each tensor keeps its own dtype by default.
        shard_size: Most bytes of tensors in a file.
        link: Take files in which nothing changes over as hard links: writing to the model's later changes this too.
        architecture: A JSON file that describes the model (docs/architectures.md).
        adapter_base: The base of a LoRA adapter, where its config does not name one that can be opened.
        download: Fetch models of the hub whole instead of reading byte ranges.
        allow: What is allowed though it speaks against taking weights from another model: strangers, tokenizers,
            unmatched, or a key of their configurations such as rope_theta.
        vocabulary: What becomes of tables with another number of tokens: of common ones the rows are paired and the
            others stay; or refuse.
        progress: Called with bytes done, all bytes, and what was just finished.
        given: The edit's arguments and settings, and how ``apply`` is to be called.
    """
    how = {"progress": progress, **{name: given.pop(name) for name in ("dry_run", "force")}}
    arguments = {argument.name: given.pop(argument.name) for argument in record.arguments}
    # What is as it is by default is left out: a recipe, and the manifest with it, says what was asked.
    asked = {n: v for n, v in given.items() if v not in (None, False, []) and v != str(record.model_fields[n].default)}
    for name, entries in asked.items():
        if isinstance(entries, list):
            pairs = [entry.rpartition("=") for entry in entries]
            if wrong := [entry for entry, (before, *_) in zip(entries, pairs, strict=True) if not before]:
                raise RecipeError(f"--{name}: expected NAME=VALUE, got {printable(wrong[0])!r}.")
            asked[name] = {before: after for before, _, after in pairs}
    recipe = record.as_recipe(arguments, asked)
    written = {"shard_size": shard_size, "dtype": output_dtype, "link": link or None}
    written = {name: value for name, value in written.items() if value is not None}
    further = {"architecture": architecture, "adapter_base": adapter_base}
    recipe |= {"output": written, **{name: str(value) for name, value in further.items() if value is not None}}
    recipe |= {"allow": tuple(allow), "vocabulary": vocabulary, "download": download}
    if ":" not in asked.get("at", ""):
        return apply(recipe, output, **how)
    from diffract.settings import decimal_row

    try:
        row = [str(at) for at in decimal_row(asked["at"])]
    except ValueError as error:
        expected = f"expected a number or FROM:TO:STEP such as 0:1:0.1, got {printable(asked['at'])!r}"
        raise RecipeError(f"--at: {expected}.") from error
    found = []
    for at in row:
        one = {**recipe, "steps": [{record.name: {**recipe["steps"][0][record.name], "at": at}}]}
        found += apply(one, output and output / f"at-{at}", **how)
    return found


def lora(
    record: Any, *, audit: bool = False, against: str | None = None, progress: Progress | None = None, **given: Any
) -> Any:
    """Write a change as an adapter, or say what one holds.

    Args:
        record: The edit.
        audit: Take TUNED for an adapter and say what it holds: rank that is used and that suffices (--energy, 0.99 by
            default), a rank_pattern, what merging in bfloat16 loses (measured with --base); nothing is written.
        against: With --audit, another adapter: how far both change the same directions.
        progress: Called with work done, all work, and what was just finished.
        given: What ``edit`` takes.
    """
    if not audit:
        if against is not None:
            raise RecipeError("--against compares two adapters. Pass --audit with it.")
        return edit(record, progress=progress, **given)
    from diffract.edits.adapter_audit import audit as audited

    try:
        energy = float(given.get("energy") or 0.99)
    except ValueError as error:
        raise RecipeError(f"--energy: expected a number, got {printable(given['energy'])!r}.") from error
    places = {"against": against, "base": given.get("base"), "download": given["download"]}
    return audited(given["model"], **places, energy=energy, progress=progress)


HERE = "diffract.cli.edits"

EDIT = Command(
    name="edit",
    panel="Act",
    functions=(f"{HERE}:edit", f"{HERE}:apply"),
    show=experiments.show_edits,
    summary=experiments.sum_up_edits,
    metavars={"output": "OUT", "factors": "FILE"},
    helps={"groups": "Other weights by selection, such as 'layers 0-7=0.3'; of several that fit the last counts."},
    hidden=("record", "recipe"),
    label="edit",
)
"""What the commands of all edits have in common."""

LORA = {
    "functions": (f"{HERE}:lora", *EDIT.functions),
    "show": experiments.show_lora,
    "summary": experiments.sum_up_lora,
    "metavars": {**EDIT.metavars, "against": "ADAPTER"},
}
"""What is different where a change is written as an adapter: adapters are looked at by the same command."""

APPLY = replace(EDIT, name="apply", functions=(f"{HERE}:apply",), hidden=())
"""The command of recipes, which hold any number of edits."""


def edit_commands() -> Iterator[Command]:
    """Yield a command for each edit: its arguments, options and texts are those of its record."""
    from diffract.edits.recipe import EDITS

    for record in EDITS:
        hidden = EDIT.hidden if record.takes_others else (*EDIT.hidden, "allow", "vocabulary")
        row = replace(EDIT, name=record.name, edit=record, hidden=hidden)
        yield row if record.name != "lora" else replace(row, **LORA)
