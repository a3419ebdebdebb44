"""Checkpoints on the hub: headers and tensors by HTTP range requests; nothing is fetched that is not read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
    http_stream_backoff,
)

try:  # the client's own HTTP library, whichever that is
    from huggingface_hub.utils import httpx
except ImportError:
    import httpx  # pyright: ignore[reportMissingImports]

from diffract._version import __version__
from diffract.checkpoints.checkpoint import Checkpoint
from diffract.checkpoints.companions import find_companions
from diffract.checkpoints.header import HEADER_LIMIT
from diffract.checkpoints.sources import (
    SAFETENSORS,
    TORCH_SUFFIXES,
    TRAINER,
    ByteFile,
    TooLargeError,
    find_shards,
    open_shards,
    read_config,
)
from diffract.errors import CheckpointError, printable

HEAD_BYTES = 100_000
"""What the first request of a file asks for: nearly every header is smaller."""

ATTEMPTS = 5
"""Transfers in a row that bring nothing; one that breaks off later is taken up again where it stopped."""

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
"""Configuration and tokenizer, fetched with the weights."""


class HubFile(ByteFile):
    """A file on the hub, read by range requests; the shared client keeps the connections.

    It is opened with one request, which tells the size and brings the first bytes along.
    """

    def __init__(self, url: str, headers: Mapping[str, str], name: str) -> None:
        self.url, self.name = url, name
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self._head = b""
        self.size = 0
        buffer = bytearray(HEAD_BYTES)
        self._head = bytes(buffer[: self._request(memoryview(buffer), 0, HEAD_BYTES)])

    def fetch(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on, from the first bytes where they reach so far."""
        if offset + length <= len(self._head):
            return self._head[offset : offset + length]
        return super().fetch(offset, length)

    def fill(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the bytes from ``offset`` on; a transfer that breaks off is taken up again."""
        done, failures = 0, 0
        while done < len(view):
            got = self._request(view[done:], offset + done, len(view) - done)
            done, failures = done + got, 0 if got else failures + 1
            if failures == ATTEMPTS:
                raise CheckpointError(
                    f"{self.name}: got {done} of {len(view)} bytes from {offset} on, then {ATTEMPTS} "
                    "transfers broke off at once. Try again, or pass --download."
                )

    def close(self) -> None:
        """Nothing is open; the connections belong to the client."""
        self._head = b""

    def _request(self, view: memoryview, offset: int, length: int) -> int:
        """Ask for a range once; return how many bytes came before the transfer ended or broke off."""
        headers = {**self._headers, "Range": f"bytes={offset}-{offset + length - 1}"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with (
            explained(self.name),
            http_stream_backoff("GET", self.url, headers=headers, timeout=timeout) as response,
        ):
            hf_raise_for_status(response)
            self._check_answer(response, offset, length)
            return _copy(response, view, self.name)

    def _check_answer(self, response: httpx.Response, offset: int, length: int) -> None:
        """Refuse an answer that is not the range that was asked for, before its body is read."""
        if response.status_code != 206:
            raise CheckpointError(
                f"{self.name}: asked for {length} bytes, the server answers with {response.status_code} "
                "instead of a range. Pass --download to fetch the whole checkpoint."
            )
        answer = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", answer)
        first, last, size = (int(n) for n in match.groups()) if match else (-1, -1, -1)
        self.size = self.size or size
        if (first, last, size) != (offset, min(offset + length, self.size) - 1, self.size):
            raise CheckpointError(
                f"{self.name}: asked for bytes {offset} to {offset + length - 1}, the server answers with "
                f"{printable(answer)!r}. Try again, or pass --download."
            )


@dataclass(frozen=True)
class HubFolder:
    """One version of a model repository.

    Attributes:
        repo: ``org/name``.
        commit: The full hash of the version; every read is of this one.
        files: Its files, with slashes where they lie in subfolders.
        headers: What the client sends along, the user's token included.
    """

    repo: str
    commit: str
    files: list[str]
    headers: Mapping[str, str]

    @property
    def where(self) -> str:
        """The reference that leads to this very version."""
        return f"{self.repo}@{self.commit}"

    @property
    def names(self) -> list[str]:
        """Its files, those in subfolders left out."""
        return [name for name in self.files if "/" not in name]

    @property
    def nested(self) -> list[str]:
        """Files of its subfolders."""
        return [name for name in self.files if "/" in name]

    def holds(self, name: str) -> bool:
        """Whether a file is the repository's own: there are no links on the hub, but a name may climb."""
        return ".." not in name.split("/") and not name.startswith("/")

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a small file."""
        url, headers, timeout = self._url(name), dict(self.headers), constants.HF_HUB_DOWNLOAD_TIMEOUT
        with explained(f"{self.where}, {name}"):
            size = get_hf_file_metadata(url, headers=headers, timeout=timeout).size or 0
            if size > HEADER_LIMIT:
                raise TooLargeError(f"{self.where}, {name}: {size} bytes are too many for a configuration or an index.")
            response = http_backoff("GET", url, headers=headers, timeout=timeout)
            hf_raise_for_status(response)
        return response.content

    def open(self, name: str) -> HubFile:
        """Open one of its files."""
        return HubFile(self._url(name), self.headers, f"hf://{self.where}/{printable(name)}")

    def _url(self, name: str) -> str:
        return hf_hub_url(self.repo, name, revision=self.commit, endpoint=constants.ENDPOINT)


def find_hub_folder(repo: str, revision: str | None = None) -> HubFolder:
    """Ask the hub which files a model has and which commit a revision is; one request.

    Raises:
        CheckpointError: There is no such model or revision, or the hub cannot be reached.
    """
    where = f"{repo}@{revision}" if revision else repo
    headers = build_hf_headers(library_name="diffract", library_version=__version__)
    with explained(where):
        api = HfApi(endpoint=constants.ENDPOINT, library_name="diffract", library_version=__version__)
        info = api.model_info(repo, revision=revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    files = sorted(file.rfilename for file in info.siblings or [])
    if not info.sha:
        raise CheckpointError(f"{where}: the hub names no commit for it. Pass --download, or a local copy.")
    return HubFolder(repo, info.sha, files, headers)


def open_hub_folder(folder: HubFolder) -> Checkpoint:
    """Open the safetensors files of a version of a repository.

    Raises:
        CheckpointError: It holds none, or they are damaged.
    """
    shards = find_shards(folder, SAFETENSORS, (".safetensors",))
    if not shards.files:
        pickles = any(name.endswith(TORCH_SUFFIXES) for name in folder.names)
        reason = "only PyTorch files, and reading ranges needs safetensors" if pickles else "no weights"
        remedy = " Pass --download to fetch them whole." if pickles else " Is this the right model?"
        raise CheckpointError(f"{folder.where} holds {reason}.{remedy}")
    return replace(open_shards(folder, shards), config=read_config(folder), companions=find_companions(folder))


def download_hub(repo: str, revision: str | None = None) -> Path:
    """Fetch a model's weights, configuration and tokenizer into the hub's cache; what is there is kept.

    safetensors are preferred to PyTorch files, and the model's own files to any others.

    Args:
        repo: ``org/name``.
        revision: Branch, tag or commit; the default branch if ``None``.

    Returns:
        The folder in the cache, named after the commit.

    Raises:
        CheckpointError: There is no such model, it cannot be reached, or it holds no weights.
    """
    leave = ["*/*", *(f"{start}*" for start in TRAINER)]
    for weights in (["model*.safetensors"], ["*.safetensors"], [f"*{suffix}" for suffix in TORCH_SUFFIXES]):
        with explained(f"{repo}@{revision}" if revision else repo):
            found = snapshot_download(
                repo, revision=revision, allow_patterns=[*SMALL_FILES, *weights], ignore_patterns=leave
            )
        folder = Path(found)
        if any(path for pattern in weights for path in folder.glob(pattern)):
            return folder
    raise CheckpointError(f"{repo} holds no weights on the hub. Is this the right model?")


def _copy(response: httpx.Response, view: memoryview, name: str) -> int:
    """Copy a body into ``view``; return how much came, less than all if the transfer broke off."""
    done = 0
    try:
        for chunk in response.iter_bytes():
            if done + len(chunk) > len(view):
                raise CheckpointError(f"{name}: the server sends more than it was asked for. Pass --download.")
            view[done : done + len(chunk)] = chunk
            done += len(chunk)
    except httpx.HTTPError:
        # must not leave through the client's context manager, which would take it for a failed request
        pass
    return done


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn what the hub's client raises into one clear error."""
    try:
        yield
    except CheckpointError:
        raise
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{where}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Say what happened and what to do; the order of the cases is that of the errors' classes."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        return f"not in the cache; {_reason(error.__cause__)}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    detail = printable((str(error).strip() or type(error).__name__).splitlines()[0])
    endpoint = constants.ENDPOINT
    cases: list[tuple[bool, str]] = [
        (
            isinstance(error, GatedRepoError),
            f"access is gated. Accept the conditions on its page at {endpoint}, then log in with "
            "`hf auth login` or HF_TOKEN.",
        ),
        (
            isinstance(error, RepositoryNotFoundError) or status in (401, 403),
            f"no file or folder of that name here, and no model that you may read at {endpoint}. "
            "Check the name; for a private model log in with `hf auth login` or HF_TOKEN.",
        ),
        (
            isinstance(error, RevisionNotFoundError),
            f"there is no such revision at {endpoint}. Check the name after @.",
        ),
        (
            isinstance(error, OfflineModeIsEnabled),
            "no file or folder of that name here, and HF_HUB_OFFLINE forbids to ask the hub. Unset it, pass "
            "--download to use what the cache holds, or pass a local copy.",
        ),
        (
            isinstance(error, EntryNotFoundError),
            f"there is no such file at {endpoint}. Check the revision.",
        ),
        (
            isinstance(error, HFValidationError),
            f"is no name of a model ({detail}). Expected org/name@revision.",
        ),
        (
            status is not None,
            f"{endpoint} answers with an error ({detail}). Try again later, or pass a local copy.",
        ),
        (
            isinstance(error, ValueError),
            f"{endpoint} answers as no hub does ({detail}). Check the network and HF_ENDPOINT.",
        ),
    ]
    unreachable = f"cannot reach {endpoint} ({detail}). Check the network, or pass a local copy."
    return next((text for found, text in cases if found), unreachable)
