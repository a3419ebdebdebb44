"""A command from a function: arguments, options, defaults and texts follow from its signature and its docstring.

The source of a function is read; the function itself is imported when it is called. A help page so loads neither torch
nor plotly whatever the function's module imports, and annotations are read as the text that they are.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from diffract.cli.console import EXIT_INPUT, explained, note, progress, say_json
from diffract.errors import RunError

Given = dict[str, Any]
"""What was given for a command's arguments and options, by name."""

REQUIRED = inspect.Parameter.empty

TOLD = ("progress", "say")
"""Parameters that are no options: how far the work is, or what is being done, is told to them."""

ONLY_PYTHON = "In Python"
"""What stands behind this in an entry of a docstring is not for the command line, which has text only."""

TYPES: dict[str, tuple[Any, str]] = {
    "flag": (bool, ""),
    "int": (int, "N"),
    "float": (float, "NUMBER"),
    "path": (Path, "FILE"),
    "text": (str, "NAME"),
    "names": (str, "NAMES"),
    "row": (list[str], "NAME"),
    "model": (str, "MODEL"),
    "pairs": (list[str], "NAME=NUMBER"),
}
"""What the command line reads for each kind of parameter, and what help pages call it."""

METAVARS = {
    "axes": "Y-X",
    "budget": "LIMIT",
    "by": "ORDER",
    "data": "FOLDER",
    "eval": "TASKS",
    "fractions": "FROM:TO:STEP",
    "height": "PIXELS",
    "metrics": "NAMES",
    "output": "RUN",
    "ref": "MODEL",
    "refs": "MODEL...",
    "rules": "NAMES",
    "samples": "FOLDER",
    "scale": "FACTOR",
    "select": "TERMS",
    "shard": "I/N",
    "shard_size": "SIZE",
    "tasks": "NAMES",
    "text": "TASK",
    "tokenizer": "MODEL",
    "tolerance": "LOSS",
    "width": "PIXELS",
    "write": "OUT",
}
"""What help pages call values of some names, in every command that does not say otherwise."""

NUMBERS = {"float": "NUMBER", "int": "N"}
"""What help pages call numbers that are read as text."""

SHORT = {"output": "-o", "quiet": "-q"}


@dataclass(frozen=True)
class Parameter:
    """What a command takes in one place.

    Attributes:
        name: The function's name for it.
        kind: One of ``TYPES``.
        default: The value where nothing is given, ``REQUIRED`` where there must be something.
        help: What the docstring says of it.
        argument: Whether it stands before the options.
        many: Whether an argument may be given several times.
        metavar: What help pages call it, where that does not follow from name and kind.
    """

    name: str
    kind: str
    default: Any = REQUIRED
    help: str = ""
    argument: bool = False
    many: bool = False
    metavar: str = ""


@dataclass(frozen=True)
class Signature:
    """What a function takes.

    Attributes:
        text: What it does: the docstring down to its first section.
        parameters: Arguments first.
        told: The one of ``TOLD`` that it takes, if any.
    """

    text: str
    parameters: tuple[Parameter, ...]
    told: str = ""


@dataclass(frozen=True)
class Command:
    """One row of the command line.

    Attributes:
        name: As it is typed; of two words, the first is a group.
        panel: Under which heading it is listed.
        functions: ``module:function``. The first is called; the others are those that it hands options on to, and give
            those options and their texts.
        show: Prints what came out.
        summary: What ``--json`` prints of it; without one there is no such option.
        metavars: What help pages call values, where ``METAVARS`` does not fit.
        helps: Texts where the docstring's does not serve.
        least: Smallest values of numbers.
        hidden: Parameters that are no options of this command.
        label: What the progress bar calls the work; by default the name.
        unit: What the progress bar counts.
        listing: Prints what ``--list`` shows, where there is this option.
        fails: Tells what is wrong, unless it is to be silent; whether anything is.
        edit: The record of an edit, whose fields are options too; the function is called with it.
    """

    name: str
    panel: str
    functions: tuple[str, ...]
    show: Callable[[Any, Given], None]
    summary: Callable[[Any, Given], Any] | None = None
    metavars: Mapping[str, str] = field(default_factory=dict)
    helps: Mapping[str, str] = field(default_factory=dict)
    least: Mapping[str, float] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    label: str = ""
    unit: str = ""
    listing: Callable[[], None] | None = None
    fails: Callable[[Any, bool], bool] | None = None
    edit: Any = None


@cache
def read_signature(reference: str) -> Signature:
    """Read the signature and the docstring of a function from its source.

    Args:
        reference: ``module:function``; the module may be a package that only imports the function.
    """
    module, name = reference.split(":")
    home, function = _definition(module, name)
    assert isinstance(function, ast.FunctionDef), f"{reference} is no function"
    text, helps = read_docstring(ast.get_docstring(function) or "")
    given = function.args
    required = len(given.args) - len(given.defaults)
    places = [*zip(given.args, [None] * required + given.defaults, strict=True)]
    places += zip(given.kwonlyargs, given.kw_defaults, strict=True)
    arguments, options = [], []
    for place, node in places:
        if place.arg in TOLD:
            continue
        default = REQUIRED if node is None else _value(home, node)
        # names that stand in for others come as one text; of those that are added to none each has an option of its own
        kind = "row" if (kind := kind_of(place.annotation)) == "names" and default == () else kind
        found = Parameter(place.arg, kind, default, helps.get(place.arg, ""))
        # Where to write is said with -o by every command, also where the function must be told.
        if place in given.args[:required] and place.arg != "output":
            arguments.append(replace(found, argument=True))
        else:
            options.append(found)
    if given.vararg is not None:
        several = given.vararg
        arguments.append(Parameter(several.arg, "text", REQUIRED, helps.get(several.arg, ""), argument=True, many=True))
    # It is what most people look for on a page, and Python has it near the end.
    options.sort(key=lambda option: option.name != "output")
    told = next((place.arg for place, _ in places if place.arg in TOLD), "")
    return Signature(text, (*arguments, *options), told)


@cache
def _statements(module: str) -> list[ast.stmt]:
    """Read the statements of a module, and those that stand within an ``if`` of it."""
    import diffract

    place = Path(diffract.__file__).parent.joinpath(*module.split(".")[1:])
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    # Packages import what they export for type checkers only, within an ``if``; at run time it is imported when used.
    return [*tree.body, *(inner for outer in tree.body if isinstance(outer, ast.If) for inner in outer.body)]


def _definition(module: str, name: str) -> tuple[str, ast.AST]:
    """Find what a name stands for, in the source of its module or of the one that it is imported from."""
    for node in _statements(module):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return module, node.value
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return _definition(str(node.module), name)
    raise AssertionError(f"{module} has no {name}")


def _value(module: str, node: ast.expr) -> Any:
    """Return a default that is written out, or that is a constant of its module."""
    found: Any = node
    while isinstance(found, ast.Name):
        module, found = _definition(module, found.id)
    return ast.literal_eval(found)


def kind_of(annotation: ast.expr | None) -> str:
    """Return which of ``TYPES`` an annotation asks for; what is none of the others is given as text."""
    words = set(ast.unparse(annotation).split(" | ")) - {"None"} if annotation else set()
    for kind, known in {"flag": {"bool"}, "int": {"int"}, "float": {"float"}, "names": {"Sequence[str]"}}.items():
        if words == known:
            return kind
    if words <= {"str", "Path"} and "Path" in words:
        return "path"
    return "model" if words & {"Reference", "Model"} else "text"


def read_docstring(doc: str) -> tuple[str, dict[str, str]]:
    r"""Return what a Google docstring says before its first section, and the entries of ``Args``, as plain text.

    >>> read_docstring("Do it. In Python, now.\n\nArgs:\n    a: ``x`` or\n        y.\n\nReturns:\n    b: No.")
    ('Do it.', {'a': 'x or y.'})
    """
    text = re.split(r"\n+(?:[A-Z]\w+:\n|>>> )", doc)[0]
    block = re.search(r"^Args:\n((?: .*\n?|\n)*)", doc, re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", block[1] if block else "", re.MULTILINE)
    paragraphs = [_plain(paragraph) for paragraph in text.split("\n\n")]
    return "\n\n".join(filter(None, paragraphs)), {name: _plain(entry) for name, entry in entries}


def _plain(text: str) -> str:
    """Take the marks off code; text of several words keeps quotes, as a shell wants it."""
    words = " ".join(text.split()).partition(ONLY_PYTHON)[0].strip()
    return re.sub(r"``(.*?)``", r"\1", re.sub(r'``"(.*?)"``', r"'\1'", re.sub(r'``"(\S*?)"``', r"\1", words)))


def edit_signature(edit: Any) -> Signature:
    """Return what the record of an edit asks for. Values are text, which the recipe's own validation reads."""
    arguments = [
        Parameter(a.name, "text", help=a.help, argument=True, many=a.many, metavar=a.metavar) for a in edit.arguments
    ]
    options = []
    for name, setting in edit.model_fields.items():
        if name in edit.not_options:
            continue
        written, default = str(setting.annotation), REQUIRED if setting.is_required() else setting.default
        if setting.annotation is bool:
            options.append(Parameter(name, "flag", default, setting.description))
        elif "dict[str" in written:
            options.append(Parameter(name, "pairs", [], setting.description))
        else:
            numeric = next(
                (shown for word, shown in NUMBERS.items() if word in written and "Literal" not in written), ""
            )
            kind = "model" if "typing.Any" in written else "text"
            default = str(default) if isinstance(default, str | int | float) else default
            options.append(Parameter(name, kind, default, setting.description, metavar=numeric))
    return Signature(edit.__doc__, (*arguments, *options))


def signatures(command: Command) -> Iterator[Signature]:
    """Yield what makes up a command's options, in the order of its help page."""
    if command.edit is not None:
        yield edit_signature(command.edit)
    yield from map(read_signature, command.functions)


def parameters(command: Command) -> list[Parameter]:
    """Return what a command takes: arguments, options of its own, and those that all commands have."""
    found: dict[str, Parameter] = {}
    for signature in signatures(command):
        for new in signature.parameters:
            known = found.setdefault(new.name, new)
            found[new.name] = replace(known, help=known.help or new.help)
    own = [p for p in found.values() if p.name not in command.hidden]
    shared = [Parameter("quiet", "flag", False, "Print nothing but errors.")] if "quiet" not in command.hidden else []
    if command.summary is not None:
        shared.append(Parameter("json", "flag", False, "Print a summary as JSON, for scripts."))
    shared.append(Parameter("debug", "flag", False, "Show the traceback of an error."))
    return [*(p for p in own if p.argument), *(p for p in own if not p.argument), *shared]


def function_of(command: Command) -> Callable[..., None]:
    """Return the function that Typer makes a command of."""
    taken = parameters(command)

    def run(**given: Any) -> None:
        carry_out(command, taken, given)

    places = [_typed(parameter, command) for parameter in taken]
    if command.listing is not None:
        places.append(_listing(command.listing, command.helps["list"]))
    run.__signature__ = inspect.Signature(places)
    run.__annotations__ = {place.name: place.annotation for place in places}
    run.__doc__ = next(signatures(command)).text
    return run


def _typed(parameter: Parameter, command: Command) -> inspect.Parameter:
    """Write a parameter as Typer reads it."""
    name = parameter.name
    default: Any = parameter.default
    kind, metavar = TYPES[parameter.kind]
    if parameter.argument:
        metavar = name.upper() + "..." * parameter.many
    metavar = command.metavars.get(name) or parameter.metavar or METAVARS.get(name) or metavar
    text = command.helps.get(name, parameter.help)
    if parameter.argument:
        kind, shown = list[kind] if parameter.many else kind, typer.Argument(metavar=metavar, help=text)
    else:
        flag = f"--{name.rstrip('_').replace('_', '-')}"  # Python's own words take an underscore
        flags = [f"{flag}/--no-{flag[2:]}" if default is True else flag, *filter(None, [SHORT.get(name)])]
        shown = typer.Option(*flags, metavar=metavar or None, help=text, min=command.least.get(name))
    if parameter.kind == "names":
        default = ",".join(parameter.default)
    if parameter.kind == "row":
        default = list(parameter.default)
    if parameter.kind == "path" and isinstance(default, str):
        default = Path(default)
    annotation = Annotated[kind | None if default is None else kind, shown]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _listing(show: Callable[[], None], text: str) -> inspect.Parameter:
    """Return the option ``--list``, which needs none of the arguments."""

    def listed(wanted: bool) -> None:
        if wanted:
            show()
            raise typer.Exit

    option = typer.Option("--list", callback=listed, is_eager=True, help=text)
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter("listing", kind, annotation=Annotated[bool, option], default=False)


def carry_out(command: Command, taken: Sequence[Parameter], given: Given) -> None:
    """Call a command's function with what was given, and print what came out."""
    quiet, json, debug = (given.pop(name, False) for name in ("quiet", "json", "debug"))
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, one speaks for all
    silent = quiet or json or not first
    with explained(debug=debug):
        _require_output(command, given)
        module, name = command.functions[0].split(":")
        # Importing torch takes seconds, which are none of the work that progress measures.
        call = _called(getattr(import_module(module), name), command, taken, given)
        told = read_signature(command.functions[0]).told
        if told == "progress":
            with progress(command.label or command.name, quiet=silent, unit=command.unit) as update:
                found = call(progress=update)
        else:
            found = call(say=(lambda text: None) if silent else note) if told else call()
        if not first:
            return
        if json and command.summary is not None:
            say_json(command.summary(found, given))
        elif not quiet:
            command.show(found, given)
        if command.fails is not None and command.fails(found, json):
            raise typer.Exit(EXIT_INPUT)


def _require_output(command: Command, given: Given) -> None:
    """Say that a place is missing before hours of work, not after."""
    where = command.metavars.get("output", METAVARS["output"])
    if "output" not in given or given["output"] is not None or given.get("audit"):
        return
    # searches, which know --dry-run, have vectors too: norms and biases that get a factor
    if given.get("vectors") and "dry_run" not in given:
        raise RunError(f"--vectors needs a place for them. Pass -o {where}.")
    if given.get("dry_run") is False:
        raise RunError(f"where to? Pass -o {where}, or --dry-run to see what would be done.")


def _called(
    function: Callable[..., Any], command: Command, taken: Sequence[Parameter], given: Given
) -> Callable[..., Any]:
    """Return the call of a function, but for what is told of its work."""
    options = {parameter.name: given[parameter.name] for parameter in taken if parameter.name in given}
    for parameter in taken:
        if parameter.kind in ("names", "row") and parameter.name in options:
            given_text = options[parameter.name] if parameter.kind == "names" else ",".join(options[parameter.name])
            options[parameter.name] = [n.strip() for n in given_text.split(",") if n.strip()]
    if command.edit is not None:
        return partial(function, command.edit, **options)
    positional = []
    for parameter in taken:
        if parameter.argument:
            value = options.pop(parameter.name)
            positional += value if parameter.many else [value]
    return partial(function, *positional, **options)
