"""Checkpoints on the hub: headers and tensors by HTTP range requests; nothing is fetched that is not read.

What already lies in the cache of the hub's client is read there.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

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
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

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
    LocalFolder,
    TooLargeError,
    find_shards,
    open_shards,
    read_config,
)
from diffract.errors import CheckpointError, DiffractWarning, printable

T = TypeVar("T")

HEAD_BYTES = 100_000
"""What the first request of a file asks for: nearly every header is smaller."""

ATTEMPTS = 5
"""Requests in a row that bring nothing; a transfer that breaks off later is taken up again where it stopped."""

BUSY = (408, 429, 500, 502, 503, 504)
"""Answers after which asking again may help."""

LONGEST_WAIT = 310
"""Seconds that a server may ask to be left alone; the hub counts requests in windows of five minutes."""

TOLD_WAIT = 10
"""Seconds of waiting from which on it is said."""

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
"""Configuration and tokenizer, fetched with the weights."""

WEIGHTS = (("model*.safetensors",), ("*.safetensors",), tuple(f"*{suffix}" for suffix in TORCH_SUFFIXES))
"""Weights, the kind that is preferred first; the first kind that there is, is fetched."""


class HubFile(ByteFile):
    """A file on the hub, read by range requests; the shared client keeps the connections.

    It is opened with one request, which tells the size and brings the first bytes along.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        name: str,
        *,
        listed: int | None = None,
        origin: str | None = None,
    ) -> None:
        self.url, self.name = url, name
        self._listed, self.origin = listed, origin
        # A compressed answer would be other bytes than the range that was asked for.
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

        def ask() -> int:
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            with get_session().stream("GET", self.url, headers=headers, timeout=timeout) as response:
                hf_raise_for_status(response)
                self._check_answer(response, offset, length)
                return _copy(response, view, self.name)

        return patiently(self.name, ask)

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
        if match and self._listed is not None and size != self._listed:
            raise CheckpointError(
                f"{self.name}: the hub lists {self._listed} bytes, and the server has {size}. Try again later, or pass "
                "a local copy."
            )
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
        files: Its files, with slashes where they lie in subfolders, and the bytes of each if the hub tells them.
        headers: What the client sends along, the user's token included.
        hashes: Of large files the SHA-256 of their bytes, as the hub lists them.
        cached: What the cache of the hub's client holds of this version, ``None`` if that is nothing.
    """

    repo: str
    commit: str
    files: Mapping[str, int | None]
    headers: Mapping[str, str]
    hashes: Mapping[str, str] = field(default_factory=dict)
    cached: LocalFolder | None = None

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
        if self.cached and name in self.cached.names:
            return self.cached.read_bytes(name)
        url, headers, timeout = self._url(name), dict(self.headers), constants.HF_HUB_DOWNLOAD_TIMEOUT

        def ask() -> bytes:
            response = get_session().get(url, headers=headers, timeout=timeout)
            hf_raise_for_status(response)
            return response.content

        where = f"{self.where}, {printable(name)}"
        size = patiently(where, lambda: get_hf_file_metadata(url, headers=headers, timeout=timeout).size) or 0
        if size > HEADER_LIMIT:
            raise TooLargeError(f"{where}: {size} bytes are too many for a configuration or an index.")
        return patiently(where, ask)

    def open(self, name: str) -> ByteFile:
        """Open one of its files, from the cache if it lies there."""
        if self.cached and name in self.cached.names:
            return self.cached.open(name)
        shown = f"hf://{self.where}/{printable(name)}"
        origin = f"{_endpoint()} {self.hashes[name]}" if name in self.hashes else None
        return HubFile(self._url(name), self.headers, shown, listed=self.files.get(name), origin=origin)

    def _url(self, name: str) -> str:
        return hf_hub_url(self.repo, name, revision=self.commit, endpoint=constants.ENDPOINT)


def find_hub_folder(repo: str, revision: str | None = None) -> HubFolder:
    """Ask the hub which files a model has and which commit a revision is; one request.

    Raises:
        UnreachableError: The hub does not answer, or may not be asked.
        CheckpointError: There is no such model or revision.
    """
    where = f"{repo}@{revision}" if revision else repo
    headers = build_hf_headers(library_name="diffract", library_version=__version__)
    api = HfApi(endpoint=constants.ENDPOINT, library_name="diffract", library_version=__version__)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    info = patiently(where, lambda: api.model_info(repo, revision=revision, timeout=timeout, files_metadata=True))
    files = {file.rfilename: file.size for file in sorted(info.siblings or [], key=lambda file: file.rfilename)}
    if not info.sha:
        raise CheckpointError(f"{where}: the hub names no commit for it. Pass --download, or a local copy.")
    path = cached_version(repo, info.sha)
    hashes = {file.rfilename: file.lfs.sha256 for file in info.siblings or [] if file.lfs}
    return HubFolder(repo, info.sha, files, headers, hashes=hashes, cached=LocalFolder(path) if path else None)


def cached_version(repo: str, revision: str | None = None) -> Path | None:
    """Return the folder that the cache of the hub's client has for a revision, ``None`` without one.

    Args:
        repo: ``org/name``.
        revision: Branch or tag as it stood when it was last fetched, or a full commit; main if ``None``.
    """
    kept = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    name = revision or constants.DEFAULT_REVISION
    ref = kept / "refs" / name
    # A revision is given by others, and must not lead out of the cache.
    if ref.resolve().is_relative_to(kept.resolve()) and ref.is_file():
        name = ref.read_text(encoding="utf-8", errors="replace").strip()
    found = kept / "snapshots" / name
    return found if re.fullmatch(r"[0-9a-f]{40}", name) and found.is_dir() else None


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
    # Subfolders hold other formats and stages of training; a trainer's own files are no model.
    leave = ["*/*", *(f"{start}*" for start in TRAINER)]
    # One kind of weights only: repositories often hold the same ones twice.
    for weights in WEIGHTS:
        wanted = [*SMALL_FILES, *weights]
        fetch = partial(snapshot_download, repo, revision=revision, allow_patterns=wanted, ignore_patterns=leave)
        folder = Path(patiently(f"{repo}@{revision}" if revision else repo, fetch))
        if any(path for pattern in weights for path in folder.glob(pattern)):
            return folder
    raise CheckpointError(f"{repo} holds no weights on the hub. Is this the right model?")


def wanted_files(names: Sequence[str]) -> list[str]:
    """Return which of a version's files ``download_hub`` fetches."""
    own = [name for name in names if not name.startswith(TRAINER)]
    kinds = ([name for name in own if any(fnmatchcase(name, p) for p in patterns)] for patterns in WEIGHTS)
    weights = next((found for found in kinds if found), [])
    return sorted({*weights, *(name for name in own if any(fnmatchcase(name, p) for p in SMALL_FILES))})


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


class UnreachableError(CheckpointError):
    """The hub does not answer, or may not be asked; what the cache holds may do."""


def patiently(where: str, ask: Callable[[], T]) -> T:
    """Return what a request brings; it is sent again where the server is busy or the connection is dropped.

    Args:
        where: What errors call what is asked for.
        ask: Sends the request; raises what the hub's client raises.

    Raises:
        UnreachableError: No answer came of several requests.
        CheckpointError: The answer is a refusal.
    """
    with explained(where):
        # The last attempt stands behind the loop, where its error is not caught.
        for attempt in range(ATTEMPTS - 1):
            try:
                return ask()
            except (httpx.HTTPError, OSError) as error:
                seconds = _pause(error, attempt)
                if seconds is None:
                    raise
                if seconds >= TOLD_WAIT:
                    told = f"{where}: {_endpoint()} asks to wait; asking again in {seconds:.0f} s."
                    warnings.warn(told, DiffractWarning, stacklevel=2)
                time.sleep(seconds)
        return ask()


def _pause(error: BaseException, attempt: int) -> float | None:
    """Return after how many seconds to ask again, ``None`` where that cannot help."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return 1 if attempt == 0 else None  # there may be no network at all, and a cache to read from
    if isinstance(error, httpx.TransportError):
        return 2**attempt
    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in BUSY:
        return None
    asked = _retry_after(error.response.headers)
    # Whoever asks to be left alone for longer is not waited for.
    return 2**attempt if asked is None else asked if asked <= LONGEST_WAIT else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds a busy server asks to wait: as a number, as a date, or by the hub's own header."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", text, re.ASCII):
        return float(text)
    if limit := re.search(r"\br=0;\s*t=(\d{1,9})\b", headers.get("RateLimit", "")):
        return float(limit[1])
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _endpoint() -> str:
    """Return the hub's address as it may be shown: a user and a password in it are left out."""
    return _without_password(constants.ENDPOINT)


def _host(url: str) -> str:
    """Return the host and port of an address."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _without_password(text: str) -> str:
    return re.sub(r"//[^/\s]*@", "//", text)


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn what the hub's client raises into one clear error."""
    try:
        yield
    except CheckpointError:
        raise
    except (httpx.HTTPError, OSError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        busy = isinstance(cause, HfHubHTTPError) and cause.response.status_code in BUSY
        silent = busy or isinstance(cause, httpx.TransportError | OfflineModeIsEnabled)
        raise (UnreachableError if silent else CheckpointError)(f"{where}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Say what happened and what to do; the order of the cases is that of the errors' classes."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        return f"not in the cache; {_reason(error.__cause__)}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    detail = _without_password(printable((str(error).strip() or type(error).__name__).splitlines()[0]))
    endpoint = _endpoint()
    host = _host(str(error.response.url)) if isinstance(error, HfHubHTTPError) else ""
    elsewhere = host not in ("", _host(constants.ENDPOINT))
    cases: list[tuple[bool, str]] = [
        (
            elsewhere and status in (401, 403),
            f"the hub allows it, but {host}, where the bytes lie, refuses them ({status}). A link may have run out, or "
            "a proxy stands between: try again, or pass a local copy.",
        ),
        (
            elsewhere and status in (404, 410),
            f"the hub lists it, but {host}, where the bytes should lie, has them no longer. Try another revision, or "
            "pass a local copy.",
        ),
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
            isinstance(error, OSError) and not isinstance(error, HfHubHTTPError | ConnectionError | TimeoutError),
            f"fetching failed ({detail}). Is there room in HF_HOME? Try again, or pass a local copy.",
        ),
        (
            isinstance(error, EntryNotFoundError),
            f"there is no such file at {endpoint}: it is gone, or never was. Check the revision.",
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
