"""Checkpoints on the hub: headers and tensors by HTTP range requests; nothing is fetched that is not read.

What already lies in the cache of the hub's client is read there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from diffract._version import __version__
from diffract.checkpoints import delta
from diffract.checkpoints.adapter_parts import CONFIG as ADAPTER
from diffract.checkpoints.adapter_parts import FILES
from diffract.checkpoints.companions import find_companions
from diffract.checkpoints.files import ByteFile, LocalFolder, TooLargeError
from diffract.checkpoints.header import HEADER_LIMIT
from diffract.checkpoints.patience import ATTEMPTS, endpoint, httpx, patiently
from diffract.checkpoints.series import refuse_without_weights
from diffract.checkpoints.sources import CONFIG, DELTA, find_weights
from diffract.errors import CheckpointError, printable, some

HEAD_BYTES = 100_000
"""What the first request of a file asks for: nearly every header is smaller."""


PART_BYTES = 1 << 23
"""Bytes that one request asks for of a larger range."""

REQUESTS = 8
"""Requests at once for the parts of a range."""


class HubFile(ByteFile):
    """A file on the hub, read by range requests; the shared client keeps the connections.

    It is opened with one request, which tells the size and brings the first bytes along.
    """

    remote = True

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
        """Fill ``view`` with the bytes from ``offset`` on, a large one by several requests at once."""
        starts = range(0, len(view), PART_BYTES)
        with ThreadPoolExecutor(min(REQUESTS, len(starts))) as pool:
            list(pool.map(lambda start: self._fill(view[start : start + PART_BYTES], offset + start), starts))

    def _fill(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` by one request; a transfer that breaks off is taken up again."""
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
    """One version of a model repository, or a folder in it.

    Attributes:
        repo: ``org/name``.
        commit: The full hash of the version; every read is of this one.
        files: Its files, with slashes where they lie in subfolders, and the bytes of each if the hub tells them.
        headers: What the client sends along, the user's token included.
        revision: What was asked for: branch, tag or commit; the default branch if ``None``.
        within: Where in the repository the folder is, ``sub/`` or longer; empty for all of it.
        hashes: Of large files the SHA-256 of their bytes, as the hub lists them.
        cached: What the cache of the hub's client holds of this version, ``None`` if that is nothing.
    """

    repo: str
    commit: str
    files: Mapping[str, int | None]
    headers: Mapping[str, str]
    revision: str | None = None
    within: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict)
    cached: LocalFolder | None = None

    @property
    def where(self) -> str:
        """The reference that leads to this very version."""
        return f"{self.repo}/{self.within}".rstrip("/") + f"@{self.commit}"

    @property
    def names(self) -> list[str]:
        """Its files, those in subfolders left out."""
        return [name for name in self.files if "/" not in name]

    @property
    def nested(self) -> list[str]:
        """Files of its subfolders."""
        return [name for name in self.files if "/" in name]

    def below(self, name: str) -> HubFolder:
        """Return a subfolder as a folder of its own."""
        start = f"{name}/"
        files = {file.removeprefix(start): size for file, size in self.files.items() if file.startswith(start)}
        hashes = {file.removeprefix(start): value for file, value in self.hashes.items() if file.startswith(start)}
        path = self.cached and self.cached.path / name
        cached = LocalFolder(path) if path and path.is_dir() else None
        return replace(self, files=files, within=self.within + start, hashes=hashes, cached=cached)

    def holds(self, name: str) -> bool:
        """Whether a file is the repository's own: there are no links on the hub, but a name may climb."""
        return ".." not in name.split("/") and not name.startswith("/")

    def is_cached(self, name: str) -> bool:
        """Whether one of its files lies in the cache of the hub's client."""
        return self.cached is not None and self.holds(name) and (self.cached.path / name).is_file()

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a small file."""
        if self.cached and self.is_cached(name):
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
        if self.cached and self.is_cached(name):
            return self.cached.open(name)
        shown = f"hf://{self.where}/{printable(name)}"
        origin = f"{endpoint()} {self.hashes[name]}" if name in self.hashes else None
        return HubFile(self._url(name), self.headers, shown, listed=self.files.get(name), origin=origin)

    def _url(self, name: str) -> str:
        return hf_hub_url(self.repo, self.within + name, revision=self.commit, endpoint=constants.ENDPOINT)


def find_hub_folder(repo: str, revision: str | None = None, folder: str = "") -> HubFolder:
    """Ask the hub which files a model has and which commit a revision is; one request.

    Args:
        repo: ``org/name``.
        revision: Branch, tag or commit; the default branch if ``None``.
        folder: A folder in the repository; all of it if empty.

    Raises:
        UnreachableError: The hub does not answer, or may not be asked.
        CheckpointError: There is no such model, revision or folder.
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
    cached = LocalFolder(path) if path else None
    found = HubFolder(repo, info.sha, files, headers, revision=revision, hashes=hashes, cached=cached)
    if not folder:
        return found
    below = found.below(folder)
    if not below.files:
        held = some(sorted({name.partition("/")[0] for name in found.nested}))
        raise CheckpointError(
            f"{where}: no file or folder of the name {folder!r} in it, or here. Its folders: {held}. Check the name."
        )
    return below


def cached_version(repo: str, revision: str | None = None, folder: str = "") -> Path | None:
    """Return the folder that the cache of the hub's client has for a revision, ``None`` without one.

    Args:
        repo: ``org/name``.
        revision: Branch or tag as it stood when it was last fetched, or a full commit; main if ``None``.
        folder: A folder in the repository; all of it if empty.
    """
    kept = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    name = revision or constants.DEFAULT_REVISION
    ref = kept / "refs" / name
    # A revision is given by others, and must not lead out of the cache.
    if ref.resolve().is_relative_to(kept.resolve()) and ref.is_file():
        name = ref.read_text(encoding="utf-8", errors="replace").strip()
    found = kept / "snapshots" / name / folder
    return found if re.fullmatch(r"[0-9a-f]{40}", name) and found.is_dir() else None


def wanted_files(folder: HubFolder, *, weights: bool = True, companions: bool = True) -> list[str]:
    """Return which files of a version are fetched.

    Args:
        folder: The version.
        weights: Those that are read when it is opened, of one kind only.
        companions: Tokenizer, and all else that belongs to the model and that an edited one keeps.

    Raises:
        CheckpointError: Weights are wanted, and it holds none, or not all of them.
    """
    read: list[str | None] = [CONFIG, ADAPTER, DELTA]
    if weights and DELTA in folder.names:
        read += [delta.BLOCKS, *(name for name in folder.nested if name.startswith(f"{delta.FILES}/"))]
    elif weights:
        found = find_weights(folder)
        factors = next((name for name in FILES if name in folder.names), None) if ADAPTER in folder.names else None
        if not found.files and not factors:
            refuse_without_weights(folder)
        read += [*found.files, found.index, factors]
    return sorted(
        {name for name in read if name and name in folder.files} | set(find_companions(folder) if companions else ())
    )


def download(folder: HubFolder, files: Sequence[str]) -> Path:
    """Fetch files of a version into the cache of the hub's client; what is there is kept.

    Returns:
        The folder in the cache.

    Raises:
        UnreachableError: The hub does not answer any longer.
        CheckpointError: They cannot be fetched.
    """
    patterns = [escape(folder.within + name) for name in files]
    # By the revision that was asked for, so that the cache knows it by that name where there is no network.
    fetch = partial(snapshot_download, folder.repo, revision=folder.revision, allow_patterns=patterns)
    return Path(patiently(folder.where, fetch)) / folder.within


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
