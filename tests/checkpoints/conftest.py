"""Tiny seeded tensors, sharded folders, a count of the bytes read, and a hub on this machine."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pytest
import torch
from safetensors.torch import save_file

COMMIT = "c0ffee" + "0" * 34


def make_tensors() -> dict[str, torch.Tensor]:
    """Every dtype once: floating point, scalar, empty, integer and boolean."""
    generator = torch.Generator().manual_seed(7)
    wide = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    floats = {
        "f64": torch.float64,
        "f32": torch.float32,
        "f16": torch.float16,
        "bf16": torch.bfloat16,
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
    }
    tensors = {name: wide.to(dtype) for name, dtype in floats.items()}
    whole = {"i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8}
    tensors |= {name: torch.arange(5).to(dtype) for name, dtype in whole.items()}
    tensors |= {"bool": torch.tensor([True, False, True]), "scalar": torch.tensor(2.5)}
    return tensors | {"empty": torch.zeros(0, 3), "stack": torch.randn(2, 3, 4, generator=generator)}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, dtype and shape included."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    raw_a, raw_b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(raw_a, raw_b)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return make_tensors()


@pytest.fixture(name="same")
def _same() -> Callable[[torch.Tensor, torch.Tensor], bool]:
    return same


@pytest.fixture
def file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A safetensors file of every dtype, written by safetensors itself."""
    path = tmp_path / "every.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two files with an index and a configuration."""
    folder = tmp_path / "sharded"
    write_sharded(folder)
    return folder


def write_sharded(folder: Path) -> dict[str, torch.Tensor]:
    """Write two files with an index; return what is in them."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    held = {name: torch.randn(8, 6, generator=generator) for name in ("a", "b", "c")}
    places = {"a": 1, "b": 1, "c": 2}
    files = {name: f"model-{place:05d}-of-00002.safetensors" for name, place in places.items()}
    for file in set(files.values()):
        save_file({name: held[name] for name in held if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": 576}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return held


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offset and length of every read from a local file, from here on."""
    seen: list[tuple[int, int]] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        got = preadv(descriptor, buffers, offset)
        seen.append((offset, got))
        return got

    monkeypatch.setattr(os, "preadv", counted)
    return seen


@dataclass
class Hub:
    """What a hub of this machine holds, how it behaves, and what it was asked.

    Attributes:
        repos: Files by repository.
        requests: Method, path and headers of every request, in order.
        sent: Bytes of weights that left the server.
        breaks: Bytes after which the next transfers of weights break off, one entry each.
        ranges: Whether it knows of ranges.
        content_range: What it says to have sent, if that is not the truth.
        extra: Bytes sent on top of what was asked for.
        refuses: Status and headers for every path that contains this.
        lists: Sizes of files that it lists, if these are not the true ones.
        delay: Seconds that each answer with weights takes.
        most_at_once: How many of these it has prepared side by side.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    sent: int = 0
    breaks: list[int] = field(default_factory=list)
    ranges: bool = True
    content_range: str | None = None
    extra: bytes = b""
    refuses: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    lists: dict[str, int] = field(default_factory=dict)
    delay: float = 0
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""
    storage: str = ""

    def add(self, repo: str, folder: Path) -> None:
        """Publish the files of a folder."""
        files = (p for p in folder.rglob("*") if p.is_file())
        self.repos[repo] = {str(p.relative_to(folder)): p.read_bytes() for p in files}

    def asked(self, part: str) -> list[str]:
        """The ranges asked for of paths that contain ``part``."""
        return [headers.get("range", "") for _, path, headers in self.requests if part in path]


class _Handler(BaseHTTPRequestHandler):
    """Answers as huggingface.co does: its API, small files itself, weights by redirect to a storage host."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        refusal = next((answer for part, answer in hub.refuses.items() if part in path), None)
        if refusal:
            return self.reply(refusal[0], b"", refusal[1])
        kind, _, rest = path.strip("/").partition("/")
        if kind == "storage":
            org, name, file = rest.split("/", 2)
            return self.weights(hub.repos[f"{org}/{name}"][file])
        return self.api(rest) if kind == "api" else self.resolve(path.strip("/"))

    def api(self, path: str) -> None:
        _, org, name, *rest = path.split("/", 4)
        repo = f"{org}/{name}"
        if repo not in self.hub.repos:
            return self.reply(401, b"", {"X-Error-Code": "RepoNotFound"})
        if rest and rest[1] not in ("main", "v1", COMMIT):
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.repos[repo]
        if rest and rest[0] == "tree":
            tree = [{"type": "file", "path": n, "size": len(c), "oid": f"{len(c):040x}"} for n, c in files.items()]
            return self.reply(200, json.dumps(tree).encode())
        siblings: list[dict[str, object]] = []
        for name, content in files.items():
            size = self.hub.lists.get(name, len(content))
            siblings.append({"rfilename": name, "size": size})
            if name.endswith((".safetensors", ".bin")):
                sha256 = hashlib.sha256(content).hexdigest()
                siblings[-1]["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
        found = {"id": repo, "sha": COMMIT, "siblings": siblings}
        return self.reply(200, json.dumps(found).encode())

    def resolve(self, path: str) -> None:
        org, name, _, revision, file = path.split("/", 4)
        content = self.hub.repos[f"{org}/{name}"].get(file)
        if content is None or revision not in ("main", "v1", COMMIT):
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{file}"'}
        if file.endswith((".safetensors", ".bin")):
            location = f"{self.hub.storage}/storage/{org}/{name}/{quote(file)}"
            return self.reply(302, b"", headers | {"Location": location, "X-Linked-Size": str(len(content))})
        return self.reply(200, content, headers)

    def weights(self, content: bytes) -> None:
        hub = self.hub
        with hub.lock:
            hub.at_once += 1
            hub.most_at_once = max(hub.most_at_once, hub.at_once)
        threading.Event().wait(hub.delay)  # the clients' own sleep is taken from them
        with hub.lock:
            hub.at_once -= 1
        wanted = self.headers.get("Range", "")
        if not (wanted and self.hub.ranges):
            return self.reply(200, content)
        first, last = wanted.removeprefix("bytes=").split("-")
        start, end = int(first), min(int(last or len(content)), len(content) - 1)
        if start > end:
            return self.reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        body = content[start : end + 1] + self.hub.extra
        stated = self.hub.content_range or f"bytes {start}-{end}/{len(content)}"
        broken = self.hub.breaks.pop(0) if self.hub.breaks else len(body)
        self.hub.sent += min(broken, len(body))
        return self.reply(206, body, {"Content-Range": stated}, broken=broken)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, broken: int | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:broken])
        self.close_connection = broken is not None and broken < len(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Keep quiet when a client hangs up, as it does when it refuses an answer."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine with a storage host, which the hub's client takes for the real one; its cache is empty."""
    from huggingface_hub import close_session, constants

    found = Hub()
    handler = type("Handler", (_Handler,), {"hub": found})
    servers = [_Server(("127.0.0.1", 0), handler) for _ in range(2)]
    found.url, found.storage = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in servers]
    for thread in threads:
        thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the client waits for seconds before it tries again
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield found
    close_session()
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        server.server_close()
        thread.join()
