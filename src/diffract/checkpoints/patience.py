"""Asking the hub: again where it is busy or the connection drops, and what it refuses in words that say what to do."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar
from urllib.parse import urlsplit

from huggingface_hub import constants
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

try:  # the client's own HTTP library, whichever that is
    from huggingface_hub.utils import httpx
except ImportError:
    import httpx  # pyright: ignore[reportMissingImports]

from diffract.errors import CheckpointError, DiffractWarning, printable

T = TypeVar("T")

ATTEMPTS = 5
"""Requests in a row that bring nothing; a transfer that breaks off later is taken up again where it stopped."""

BUSY = (408, 429, 500, 502, 503, 504)
"""Answers after which asking again may help."""

LONGEST_WAIT = 310
"""Seconds that a server may ask to be left alone; the hub counts requests in windows of five minutes."""

TOLD_WAIT = 10
"""Seconds of waiting from which on it is said."""


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
        for attempt in range(ATTEMPTS - 1):
            try:
                return ask()
            except (httpx.HTTPError, OSError) as error:
                seconds = _pause(error, attempt)
                if seconds is None:
                    raise
                if seconds >= TOLD_WAIT:
                    told = f"{where}: {endpoint()} asks to wait; asking again in {seconds:.0f} s."
                    warnings.warn(told, DiffractWarning, stacklevel=2)
                time.sleep(seconds)
        # The last attempt stands behind the loop, where its error is not caught.
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


def endpoint() -> str:
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
    hub = endpoint()
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
            f"access is gated. Accept the conditions on its page at {hub}, then log in with "
            "`hf auth login` or HF_TOKEN.",
        ),
        (
            isinstance(error, RepositoryNotFoundError) or status in (401, 403),
            f"no file or folder of that name here, and no model that you may read at {hub}. "
            "Check the name; for a private model log in with `hf auth login` or HF_TOKEN.",
        ),
        (
            isinstance(error, RevisionNotFoundError),
            f"there is no such revision at {hub}. Check the name after @.",
        ),
        (
            isinstance(error, OfflineModeIsEnabled),
            "no file or folder of that name here, nor in the cache, and HF_HUB_OFFLINE forbids to ask the hub. Unset "
            "it, or run `diffract fetch` where there is a network.",
        ),
        (
            isinstance(error, OSError) and not isinstance(error, HfHubHTTPError | ConnectionError | TimeoutError),
            f"fetching failed ({detail}). Is there room in HF_HOME? Try again, or pass a local copy.",
        ),
        (
            isinstance(error, EntryNotFoundError),
            f"there is no such file at {hub}: it is gone, or never was. Check the revision.",
        ),
        (
            isinstance(error, HFValidationError),
            f"is no name of a model ({detail}). Expected org/name@revision.",
        ),
        (
            status is not None,
            f"{hub} answers with an error ({detail}). Try again later, or pass a local copy.",
        ),
        (
            isinstance(error, ValueError),
            f"{hub} answers as no hub does ({detail}). Check the network and HF_ENDPOINT.",
        ),
    ]
    unreachable = f"cannot reach {hub} ({detail}). Check the network, or pass a local copy."
    return next((text for found, text in cases if found), unreachable)
