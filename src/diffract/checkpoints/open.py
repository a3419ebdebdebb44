"""From a reference to a checkpoint: folder, file, hub name, adapter, mapping, module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from diffract.checkpoints import adapter
from diffract.checkpoints.adapter_parts import (
    MLX_WEIGHTS,
    TORCH_WEIGHTS,
    WEIGHTS,
    Adapter,
    Settings,
    read_adapter,
    read_settings,
)
from diffract.checkpoints.archive import open_pickle, open_pickles
from diffract.checkpoints.checkpoint import Checkpoint
from diffract.checkpoints.companions import Read, find_companions, find_neighbours
from diffract.checkpoints.distributed import INSIDE, METADATA, join_slices, open_distributed
from diffract.checkpoints.files import LocalFile, LocalFolder
from diffract.checkpoints.formats import refuse_format, refuse_lone_part, refuse_parts
from diffract.checkpoints.gguf import open_gguf
from diffract.checkpoints.quantised import dequantised
from diffract.checkpoints.series import nested_adapters, refuse_several, refuse_without_weights
from diffract.checkpoints.sources import (
    CONFIG,
    DELTA,
    GGUF,
    SLICES,
    TORCH_SUFFIXES,
    Folder,
    Shards,
    find_weights,
    open_safetensors,
    open_shards,
    parse_object,
    read_config,
    read_object,
)
from diffract.errors import CheckpointError, printable

if TYPE_CHECKING:
    import torch


Reference: TypeAlias = "str | Path | Mapping[str, Any] | torch.nn.Module | Checkpoint"
"""What ``open`` takes."""

STACK_LIMIT = 4
"""Adapters over adapters that are opened; a chain that is longer may have no end."""

_HUB = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(?P<folder>(?:/[\w-][\w.-]*)*)(?:@(?P<revision>[!-?A-~]+))?", re.ASCII
)


class HubName(NamedTuple):
    """What a reference to the hub says.

    Attributes:
        repo: ``org/name``.
        revision: Branch, tag or commit; ``None`` for the default branch.
        folder: A folder in the repository; empty for all of it.
    """

    repo: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        place = f"{self.repo}/{self.folder}" if self.folder else self.repo
        return f"{place}@{self.revision}" if self.revision else place


def parse_hub_name(text: str) -> HubName | None:
    """Return what a text says that looks like ``org/name/folder@revision``; ``None`` for others and paths.

    >>> parse_hub_name("org/name/sub@step1000")
    HubName(repo='org/name', revision='step1000', folder='sub')
    >>> parse_hub_name("org/name"), parse_hub_name("name")
    (HubName(repo='org/name', revision=None, folder=''), None)
    """
    match = _HUB.fullmatch(text)
    if match is None or Path(text).exists():
        return None
    return HubName(match["repo"], match["revision"], match["folder"].removeprefix("/"))


def open_checkpoint(reference: Reference, *, base: Reference | None = None, download: bool = False) -> Checkpoint:
    """Open a checkpoint; only headers are read, of ``.npz`` and old PyTorch files everything.

    Args:
        reference: A safetensors, ``.bin``/``.pt``/``.pth``/``.ckpt``, ``.gguf`` or ``.npz`` file; a folder of them;
            a PEFT LoRA folder; ``org/name@revision`` on the hub, or ``org/name/folder@revision``; a mapping of arrays;
            an ``nn.Module``. A path may end in ``#key``: the part of a training state that is wanted.
        base: The base of an adapter, where its config does not name one that can be opened.
        download: Fetch a hub reference whole into the hub's cache instead of reading byte ranges.

    Returns:
        The checkpoint, lazily read.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
    """
    found = _open(reference, _How(base, download))
    if not found.infos:
        raise CheckpointError(f"{found.reference}: the checkpoint holds no tensors. Is this the right one?")
    return found


@dataclass(frozen=True)
class _How:
    """The options of ``open_checkpoint``, and how many adapters lie above what is to be opened."""

    base: Reference | None
    download: bool
    above: int = 0
    part: str | None = None


def _open(reference: Reference, how: _How) -> Checkpoint:
    """Open what a reference stands for, as weights and nothing else; an error closes what is open."""
    if isinstance(reference, Checkpoint):
        return reference
    stored = _open_stored(reference, how)
    try:
        return dequantised(stored)
    except BaseException:
        stored.close()
        raise


def _open_stored(reference: Reference, how: _How) -> Checkpoint:
    if not isinstance(reference, str | Path):
        return _open_memory(reference)
    try:
        path = Path(reference).expanduser()
        is_folder, is_file = reference != "" and path.is_dir(), path.is_file()  # Path("") is the folder we are in
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{printable(reference)!r} is no checkpoint: {printable(error)}.") from error
    if is_folder:
        return _open_folder(LocalFolder(path), how)
    if is_file:
        return _open_file(path, how)
    head, _, part = str(reference).rpartition("#")
    if head and part and Path(head).expanduser().exists():
        return _open_stored(head, replace(how, part=part))
    if isinstance(reference, str) and (named := parse_hub_name(reference)):
        return _open_hub(named, how)
    raise CheckpointError(
        f"no checkpoint at {printable(reference)!r}: expected a file, a folder, or org/name@revision on the "
        "hub. Check the name."
    )


def _open_memory(reference: Any) -> Checkpoint:
    import torch

    from diffract.checkpoints.arrays import open_mapping, open_module

    if isinstance(reference, torch.nn.Module):
        return open_module(reference)
    if isinstance(reference, Mapping):
        return open_mapping(reference)
    raise CheckpointError(
        f"a {type(reference).__name__} is no checkpoint: expected a path, org/name@revision on the hub, a mapping of "
        "arrays, or an nn.Module."
    )


def _open_hub(name: HubName, how: _How) -> Checkpoint:
    folder, reached = _hub_folder(name, download=how.download)
    try:
        found = _open_folder(folder, how)
    except CheckpointError as error:
        if reached:
            raise
        raise CheckpointError(
            f"{name}: the hub is not reached, and its client's cache holds only a part: {error} Where there is a "
            f"network, run `diffract fetch {name}`."
        ) from error
    if not isinstance(folder, LocalFolder):
        return found
    commit = folder.path.parts[-1 - len(Path(name.folder).parts)]
    note = () if reached else (f"The hub was not reached: {name.repo} is as its client's cache holds it.",)
    return replace(found, reference=str(name._replace(revision=commit)), notes=(*found.notes, *note))


def _hub_folder(name: HubName, *, download: bool, weights: bool = True) -> tuple[Folder, bool]:
    """Return a folder on the hub, or on disk where it is fetched or the hub is not reached; and whether it was."""
    from diffract.checkpoints import hub
    from diffract.checkpoints.patience import UnreachableError

    try:
        folder = hub.find_hub_folder(*name)
        return LocalFolder(
            hub.download(folder, hub.wanted_files(folder, weights=weights))
        ) if download else folder, True
    except UnreachableError:
        path = hub.cached_version(*name)
        if path is None:
            raise
        return LocalFolder(path), False


def local_place(reference: str, *, weights: bool = True) -> str:
    """Return a name on the hub as the folder in its client's cache, fetched if need be; any other text as it is.

    Args:
        reference: ``org/name@revision``, a path, or what only transformers knows.
        weights: Fetch the weights too, not the configuration and the tokenizer alone.

    Raises:
        CheckpointError: There is no such model, or it can neither be fetched nor lies in the cache.
    """
    name = parse_hub_name(reference)
    if name is None:
        return reference
    folder, _ = _hub_folder(name, download=True, weights=weights)
    assert isinstance(folder, LocalFolder)
    return str(folder.path)


def _open_file(path: Path, how: _How) -> Checkpoint:
    refuse_lone_part(path)
    folder = LocalFolder(path.parent)
    config = read_config(folder)
    if path.suffix == ".npz":
        from diffract.checkpoints.arrays import open_npz

        found = open_npz(path)
    elif path.suffix in TORCH_SUFFIXES:
        found = open_pickle(path, part=how.part)
    elif path.suffix == GGUF:
        found = open_gguf(folder, [path.name], printable(path, 1000))
        config = config or found.config
    elif path.suffix == ".safetensors":
        found, metadata = open_safetensors(LocalFile(path))
        told = metadata.get("config", "")
        if not config and told.lstrip().startswith("{"):  # which a lone file may carry with it
            config = parse_object(told.encode(), f"{found.reference}, config in its metadata")
        if SLICES in metadata:
            if len([name for name in folder.names if name.endswith(".safetensors")]) > 1:
                found.close()
                raise CheckpointError(f"{found.reference}: is one part of a distributed model (DCP). Open its folder.")
            found = join_slices([(found, metadata)], found.reference)
    else:
        with path.open("rb") as file:
            refuse_format(printable(path, 1000), [path.name], file.read(64))
        raise CheckpointError(
            f"{printable(path, 1000)!r}: unknown kind of file, expected .safetensors, .bin, .pt, .pth, .ckpt, .gguf or "
            ".npz."
        )
    return _with_neighbours(found, folder, config, find_neighbours(folder), part=None)


def _with_neighbours(
    found: Checkpoint, folder: Folder, config: Mapping[str, Any], companions: Mapping[str, Read], *, part: str | None
) -> Checkpoint:
    """Return weights with what lies beside them: configuration, tokenizer, the settings of an adapter among them."""
    found = replace(found, config=config, companions=companions)
    try:
        return adapter.unmerged(found, read_object(folder, adapter.CONFIG), name=part)
    except BaseException:
        found.close()
        raise


def _open_folder(folder: Folder, how: _How) -> Checkpoint:
    if DELTA in folder.names:
        return _open_delta(folder, how)
    nested = nested_adapters(folder)
    if how.part in nested:
        return _open_folder(folder.below(how.part), replace(how, part=None))
    beside = adapter.CONFIG in folder.names
    whole = CONFIG in folder.names and any(fnmatchcase(name, "model*.safetensors") for name in folder.names)
    # A model beside an adapter is what is meant, unless a base is given that is elsewhere.
    if beside and not (whole and (how.base is None or how.above > 0)):
        return _open_adapter(folder, how)
    config, part = read_config(folder), None
    path = folder.path if isinstance(folder, LocalFolder) else None
    if path:
        refuse_parts(path, folder.names)
    inside = next((path / name for name in ("", *INSIDE) if (path / name / METADATA).is_file()), None) if path else None
    weights = find_weights(folder) if inside is None else Shards([])
    kind = Path(weights.files[0]).suffix if weights.files else ""
    if inside is not None:
        found = open_distributed(LocalFolder(inside), part=how.part)
    elif kind == ".safetensors":
        found, part = open_shards(folder, weights), how.part  # of a pickle it is the part that was opened
    elif not kind:
        refuse_without_weights(folder)
    elif not isinstance(folder, LocalFolder):
        raise CheckpointError(
            f"{folder.where} holds only {'GGUF' if kind == GGUF else 'PyTorch'} files, and reading ranges needs "
            "safetensors. Pass --download to fetch them whole."
        )
    elif kind == GGUF:
        found = open_gguf(folder, weights.files, folder.where)
        config = config or found.config
    else:
        found = open_pickles(folder, weights, part=how.part)
    found = _with_neighbours(found, folder, config, find_companions(folder), part=part)
    note = "An adapter lies beside the model; it is not applied. To see it, pass --adapter-base with the folder."
    return replace(found, notes=(*found.notes, note)) if beside and not found.factors else found


def _open_adapter(folder: Folder, how: _How) -> Checkpoint:
    if how.above == STACK_LIMIT:
        raise CheckpointError(
            f"{folder.where}: more than {STACK_LIMIT} adapters lie on each other; does one name itself as "
            "its base? Pass --adapter-base MODEL."
        )
    with ExitStack() as opened:
        held = _adapter_parts(folder, how.part)
        opened.callback(held.weights.close)
        found = _adapter_base(folder, held.settings) if how.base is None else how.base
        base = _open_base(found, _How(None, how.download, how.above + 1), folder.where)
        owns_base = base is not found
        if owns_base:
            opened.callback(base.close)
        merged = adapter.open_adapter(held, base, owns_base=owns_base)
        opened.pop_all()
    others = nested_adapters(folder)
    listed = ", ".join(printable(name, 60) for name in others)
    note = f"Other adapters lie in subfolders: {listed}. Name one after #, or its folder." if others else ""
    notes = (*merged.notes, note) if note else merged.notes
    return replace(merged, companions={**merged.companions, **find_companions(folder)}, notes=notes)


def _open_delta(folder: Folder, how: _How) -> Checkpoint:
    from diffract.checkpoints import delta  # here: it loads NumPy, which looking at other models does not need

    found = delta.delta_base(folder) if how.base is None else how.base
    base = _open_base(found, _How(None, how.download, how.above + 1), folder.where)
    try:
        return delta.open_delta(folder, base, owns_base=base is not found)
    except BaseException:
        if base is not found:
            base.close()
        raise


def open_adapter_parts(reference: str | Path, *, download: bool = False) -> Adapter:
    """Open an adapter without its base, as what it holds for each module; only headers are read.

    Args:
        reference: Its folder, one of several as ``FOLDER#name``, or a name on the hub.
        download: Fetch an adapter on the hub whole.

    Raises:
        CheckpointError: There is no adapter, or it is damaged or of a kind that is not read.
    """
    head, _, part = str(reference).rpartition("#")
    text, chosen = (head, part) if head and Path(head).expanduser().is_dir() else (str(reference), None)
    path = Path(text).expanduser()
    if path.is_dir():
        folder = LocalFolder(path)
        nested = nested_adapters(folder)
        if chosen in nested:
            return _adapter_parts(folder.below(chosen), None)
        if adapter.CONFIG not in folder.names:
            refuse_several(folder)
        return _adapter_parts(folder, chosen)
    if named := parse_hub_name(text):
        return _adapter_parts(_hub_folder(named, download=download)[0], None)
    raise CheckpointError(f"no adapter at {printable(text)!r}: expected its folder, or org/name@revision on the hub.")


def _adapter_parts(folder: Folder, name: str | None) -> Adapter:
    config = read_object(folder, adapter.CONFIG)
    if config is None:
        raise CheckpointError(f"{folder.where}: is no adapter, {adapter.CONFIG} is missing. Is this the right folder?")
    settings = read_settings(config, folder.where)
    files = (MLX_WEIGHTS,) if settings.mlx else (WEIGHTS, TORCH_WEIGHTS)
    file = next((name for name in files if name in folder.names), None)
    if file is None:
        raise CheckpointError(f"{folder.where}: the adapter's weights, {' or '.join(files)}, are missing. Fetch them.")
    if file == TORCH_WEIGHTS and not isinstance(folder, LocalFolder):
        raise CheckpointError(f"{folder.where}: {file} is a pickle, which is read from disk only. Pass --download.")
    weights = open_pickle(folder.path / file) if isinstance(folder, LocalFolder) and file == TORCH_WEIGHTS else None
    weights = weights or open_safetensors(folder.open(file))[0]
    try:
        return read_adapter(weights, settings, name=name)
    except BaseException:
        weights.close()
        raise


def _open_base(reference: Reference, how: _How, adapter_name: str) -> Checkpoint:
    """Open an adapter's base; what is wrong with it is said of the adapter, which is what was asked for."""
    try:
        return _open(reference, how)
    except CheckpointError as error:
        if how.above > 1 and "Pass --adapter-base" in str(error):
            raise
        raise CheckpointError(
            f"{adapter_name}: the base of this adapter cannot be opened: {str(error).rstrip('.')}. Pass --adapter-base "
            "with the model that it was trained on."
        ) from error


def _adapter_base(folder: Folder, settings: Settings) -> str | Path:
    """The base that an adapter names: a path, one relative to the adapter, or a name on the hub."""
    found, revision = settings.base, settings.raw.get("revision")
    if not found or not isinstance(found, str):
        raise CheckpointError(f"{folder.where}: {adapter.CONFIG} names no base model. Pass --adapter-base MODEL.")
    beside = folder.path / found if isinstance(folder, LocalFolder) else Path(found)
    for path in (Path(found), beside):
        if path.exists():
            return path
    return f"{found}@{revision}" if revision else found


def base_of(reference: str | Path) -> str | Path | None:
    """Return what an adapter's or a delta's folder names as its base, ``None`` without one."""
    path = Path(reference).expanduser()
    return base_within(LocalFolder(path)) if path.is_dir() else None


def base_within(folder: Folder) -> str | Path | None:
    """Return what an adapter or a delta in a folder names as its base, ``None`` without one."""
    if DELTA in folder.names:
        from diffract.checkpoints.delta import delta_base

        return delta_base(folder)
    config = read_object(folder, adapter.CONFIG)
    if config is None or not Settings(config, folder.where).base:
        return None
    return _adapter_base(folder, Settings(config, folder.where))
