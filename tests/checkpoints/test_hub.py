import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from polars.testing import assert_frame_equal
from safetensors.torch import load_file, save_file

import diffract
from diffract.checkpoints import open_checkpoint
from diffract.checkpoints.hub import ATTEMPTS, HEAD_BYTES
from diffract.errors import CheckpointError, DiffractWarning

Same = Callable[[torch.Tensor, torch.Tensor], bool]
REPO, COMMIT = "org/model", "c0ffee" + "0" * 34


@pytest.fixture
def large(hub: Any, tmp_path: Path) -> torch.Tensor:
    """One matrix of several times what the first request of a file brings."""
    w = torch.randn(512, 256, generator=torch.Generator().manual_seed(2))
    (tmp_path / "large").mkdir()
    save_file({"w": w, "other": torch.ones(100)}, tmp_path / "large" / "model.safetensors")
    hub.add(REPO, tmp_path / "large")
    return w


@pytest.fixture
def published(hub: Any, sharded: Path) -> Path:
    """A model in two shards."""
    hub.add(REPO, sharded)
    return sharded


def test_a_sharded_model_reads_as_its_local_copy(hub: Any, published: Path) -> None:
    with open_checkpoint(published) as local, open_checkpoint(REPO) as found:
        assert found.config == local.config == {"model_type": "tiny"}
        assert {n: found.digest(n) for n in found} == {n: local.digest(n) for n in local}
        assert found.info("c").file == f"hf://{REPO}@{COMMIT}/model-00002-of-00002.safetensors"


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMIT])
def test_the_commit_is_pinned(hub: Any, published: Path, revision: str | None) -> None:
    reference = f"{REPO}@{revision}" if revision else REPO
    assert open_checkpoint(reference).reference == f"{REPO}@{COMMIT}"
    resolved = [path for _, path, _ in hub.requests if "/resolve/" in path]
    assert resolved
    assert all(f"/resolve/{COMMIT}/" in path for path in resolved)


def test_opening_asks_for_heads_only(hub: Any, large: torch.Tensor) -> None:
    open_checkpoint(REPO)
    assert hub.asked("/storage/") == [f"bytes=0-{HEAD_BYTES - 1}"]
    assert hub.sent == HEAD_BYTES


def test_one_head_asks_for_its_bytes_only(hub: Any, large: torch.Tensor, same: Same) -> None:
    found = open_checkpoint(REPO)
    hub.requests.clear()
    hub.sent = 0
    assert same(found.read("w", (300, 364)), large[300:364])
    start = found.info("w").offset + 300 * 1024
    assert hub.asked("/storage/") == [f"bytes={start}-{start + 64 * 1024 - 1}"]
    assert hub.sent == 64 * 1024


def test_a_long_header_is_asked_for_once_more(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    held = {f"a rather long name of a tensor {i}": torch.full((1,), float(i)) for i in range(1500)}
    save_file(held, tmp_path / "many" / "model.safetensors")
    hub.add(REPO, tmp_path / "many")
    found = open_checkpoint(REPO)
    assert len(hub.asked("/storage/")) == 2
    assert found["a rather long name of a tensor 1234"].item() == 1234


def test_ranges_are_of_the_bytes_as_they_are_stored(hub: Any, large: torch.Tensor) -> None:
    """A server that compresses would cut ranges out of what it compressed."""
    open_checkpoint(REPO).read("w", (0, 1))
    encodings = {headers["accept-encoding"] for _, path, headers in hub.requests if "/storage/" in path}
    assert encodings == {"identity"}


def test_the_token_stays_with_the_hub(hub: Any, large: torch.Tensor) -> None:
    """Weights lie on another host, to which a link leads; it must not see the user's token."""
    open_checkpoint(REPO).read("w", (0, 1))
    for _, path, headers in hub.requests:
        assert headers.get("authorization") == (None if "/storage/" in path else "Bearer hf_secret"), path


def test_a_transfer_that_breaks_off_goes_on_where_it_stopped(hub: Any, large: torch.Tensor, same: Same) -> None:
    found = open_checkpoint(REPO)
    hub.requests.clear()
    hub.breaks[:] = [1000] * (ATTEMPTS + 2) + [0] * (ATTEMPTS - 1)
    assert same(found["w"], large)
    begin, end = found.info("w").offset, found.info("w").offset + 512 * 1024 - 1
    taken_up = [f"bytes={begin + 1000 * i}-{end}" for i in range(ATTEMPTS + 2)]
    assert hub.asked("/storage/") == taken_up + [f"bytes={begin + 1000 * (ATTEMPTS + 2)}-{end}"] * ATTEMPTS


def test_a_large_range_is_asked_for_in_parts_at_once(
    hub: Any, large: torch.Tensor, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffract.checkpoints.hub.PART_BYTES", 100_000)
    found = open_checkpoint(REPO)
    hub.requests.clear()
    hub.sent, hub.delay = 0, 0.05
    assert same(found["w"], large)
    assert hub.sent == large.nbytes
    assert len(set(hub.asked("/storage/"))) == 6
    assert hub.most_at_once > 1
    hub.refuses["/storage/"] = (404, {})
    with pytest.raises(CheckpointError, match="has them no longer"):
        found["w"]


def test_tensors_are_fetched_while_others_are_computed(
    hub: Any, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffract.checkpoints.hub.HEAD_BYTES", 300)
    monkeypatch.setattr("diffract.engine.cores", lambda: 1)
    with open_checkpoint(REPO) as found:
        hub.delay, hub.most_at_once = 0.05, 0
        from_hub = diffract.scan(found, cache=False)
        assert hub.most_at_once > 1
    assert_frame_equal(from_hub.metrics.drop("model"), diffract.scan(published, cache=False).metrics.drop("model"))


def test_a_transfer_that_never_succeeds_is_given_up(hub: Any, large: torch.Tensor) -> None:
    found = open_checkpoint(REPO)
    hub.breaks[:] = [1000] + [0] * ATTEMPTS
    with pytest.raises(CheckpointError, match=r"model\.safetensors: got 1000 of 524288 bytes.*--download"):
        found["w"]
    assert hub.breaks == []


def test_a_busy_server_is_asked_again(hub: Any, large: torch.Tensor, same: Same) -> None:
    found = open_checkpoint(REPO)
    hub.refuses["model.safetensors"] = (503, {})
    waits: list[float] = []

    def recovers(seconds: float) -> None:
        waits.append(seconds)
        hub.refuses.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", recovers)
        assert same(found.read("w", (0, 2)), large[:2])
    assert len(waits) == 1


@pytest.fixture
def waits(hub: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited; after the first wait the hub is well again."""
    seen: list[float] = []

    def recovers(seconds: float) -> None:
        seen.append(seconds)
        hub.refuses.clear()

    monkeypatch.setattr("time.sleep", recovers)
    return seen


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("part", ["/api/models", "config.json", "model.safetensors.index.json", "00001-of-00002"])
def test_one_busy_answer_anywhere_is_waited_for(
    hub: Any, published: Path, waits: list[float], part: str, status: int
) -> None:
    hub.refuses[part] = (status, {"Retry-After": "7"})
    assert len(open_checkpoint(REPO)) == 3
    assert waits == [7]


@pytest.mark.parametrize("part", ["/api/models", "config.json", "00001-of-00002"])
def test_a_download_waits_for_a_busy_server(hub: Any, published: Path, waits: list[float], part: str) -> None:
    hub.refuses[part] = (429, {"Retry-After": "7"})
    assert len(open_checkpoint(REPO, download=True)) == 3
    assert waits


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "0"}, 0),
        ({"RateLimit": '"api";r=0;t=9'}, 9),
        ({"RateLimit": '"api";r=12;t=9'}, 1),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "soon"}, 1),
        ({}, 1),
    ],
)
def test_a_busy_server_says_how_long(
    hub: Any, published: Path, waits: list[float], headers: dict[str, str], seconds: float
) -> None:
    hub.refuses["/api/models"] = (429, headers)
    open_checkpoint(REPO)
    assert waits == [seconds]


def test_a_long_wait_is_said(hub: Any, published: Path, waits: list[float]) -> None:
    hub.refuses["/api/models"] = (429, {"Retry-After": "60"})
    with pytest.warns(DiffractWarning, match=r"org/model: .* asks to wait; asking again in 60 s"):
        open_checkpoint(REPO)


def test_a_wait_without_end_is_refused(hub: Any, published: Path, waits: list[float]) -> None:
    hub.refuses["/api/models"] = (429, {"Retry-After": "86400"})
    with pytest.raises(CheckpointError, match="429"):
        open_checkpoint(REPO)
    assert waits == []


def test_a_server_without_ranges_is_refused(hub: Any, large: torch.Tensor) -> None:
    hub.ranges = False
    with pytest.raises(CheckpointError, match=r"answers with 200 instead of a range\. Pass --download"):
        open_checkpoint(REPO)


@pytest.mark.parametrize("stated", ["bytes 0-9/20", "bytes 5-14/524800", "items 1-2/3", "", "bytes 0-99999999/*"])
def test_a_range_that_was_not_asked_for_is_refused(hub: Any, large: torch.Tensor, stated: str) -> None:
    found = open_checkpoint(REPO)
    hub.content_range = stated or " "
    with pytest.raises(CheckpointError, match=r"asked for bytes .*, the server answers with|the hub lists"):
        found.read("w", (0, 4))


def test_more_bytes_than_asked_for_are_refused(hub: Any, large: torch.Tensor) -> None:
    found = open_checkpoint(REPO)
    hub.extra = b"more"
    with pytest.raises(CheckpointError, match="sends more than it was asked for"):
        found["w"]


def test_a_file_that_changed_is_noticed(hub: Any, large: torch.Tensor) -> None:
    found = open_checkpoint(REPO)
    hub.repos[REPO]["model.safetensors"] += b"longer"
    with pytest.raises(CheckpointError, match=r"the hub lists \d+ bytes, and the server has \d+"):
        found["w"]


def test_a_hub_that_lies_about_sizes_is_refused(hub: Any, published: Path) -> None:
    hub.lists["model-00002-of-00002.safetensors"] = 5
    with pytest.raises(CheckpointError, match=r"00002\.safetensors: the hub lists 5 bytes, and the server has \d+"):
        open_checkpoint(REPO)


def test_a_lying_header_is_refused_as_on_disk(hub: Any, published: Path) -> None:
    name = "model-00001-of-00002.safetensors"
    hub.repos[REPO][name] = hub.repos[REPO][name][:-8]
    with pytest.raises(CheckpointError, match=f"{COMMIT}/{name}, tensor 'b'.*truncated"):
        open_checkpoint(REPO)


def test_a_file_name_cannot_steer_a_terminal(hub: Any) -> None:
    hub.repos[REPO] = {"x\x1b[31m.safetensors": b"damaged"}
    with pytest.raises(CheckpointError, match="too few") as caught:
        open_checkpoint(REPO)
    assert str(caught.value).isprintable()


def test_an_empty_file_is_refused(hub: Any, published: Path) -> None:
    hub.repos[REPO]["model-00001-of-00002.safetensors"] = b""
    with pytest.raises(CheckpointError, match="model-00001-of-00002"):
        open_checkpoint(REPO)


def test_a_missing_shard_is_named(hub: Any, published: Path) -> None:
    del hub.repos[REPO]["model-00002-of-00002.safetensors"]
    with pytest.raises(CheckpointError, match=f"{REPO}@{COMMIT}: 1 of 2 files are missing: model-00002"):
        open_checkpoint(REPO)


def test_a_configuration_is_never_huge(hub: Any, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[REPO]["config.json"] = b" " * 4000
    monkeypatch.setattr("diffract.checkpoints.hub.HEADER_LIMIT", 3999)
    with pytest.raises(CheckpointError, match=r"config\.json: 4000 bytes are too many"):
        open_checkpoint(REPO)
    assert ("GET", f"/{REPO}/resolve/{COMMIT}/config.json") not in [request[:2] for request in hub.requests]


def test_files_in_subfolders_are_others(hub: Any, published: Path) -> None:
    hub.repos[REPO]["onnx/model.safetensors"] = b"not looked at"
    del hub.repos[REPO]["model.safetensors.index.json"]  # else the index decides
    assert len(open_checkpoint(REPO)) == 3


REFUSALS: dict[str, tuple[int, dict[str, str], str]] = {
    "not found": (401, {"X-Error-Code": "RepoNotFound"}, "no model that you may read at .*Check the name; for a priv"),
    "not found, logged in": (404, {"X-Error-Code": "RepoNotFound"}, "no model that you may read"),
    "forbidden": (403, {}, "no model that you may read.*HF_TOKEN"),
    "wrong token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "hf auth login"),
    "gated": (403, {"X-Error-Code": "GatedRepo"}, "access is gated. Accept the conditions"),
    "no revision": (404, {"X-Error-Code": "RevisionNotFound"}, "no such revision at .*after @"),
    "server error": (500, {}, "answers with an error .*Try again later"),
    "too many": (429, {}, "answers with an error"),
    "teapot": (418, {}, "answers with an error"),
    "a web page": (200, {}, "answers as no hub does"),
}


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_what_to_do(hub: Any, case: str, download: bool) -> None:
    status, headers, message = REFUSALS[case]
    hub.refuses[REPO] = (status, headers)
    with pytest.raises(CheckpointError, match=f"^{REPO}: .*{message}") as caught:
        open_checkpoint(REPO, download=download)
    assert len(str(caught.value).splitlines()) == 1


def test_what_the_storage_host_refuses_is_told_apart(hub: Any, published: Path) -> None:
    hub.refuses["/storage/"] = (403, {})
    with pytest.raises(CheckpointError, match=r"the hub allows it, but 127\.0\.0\.1:\d+, where the bytes lie, refuses"):
        open_checkpoint(REPO)
    hub.refuses["/storage/"] = (404, {})
    with pytest.raises(CheckpointError, match=r"the hub lists it, but .* has them no longer"):
        open_checkpoint(REPO)


def test_a_password_in_the_hubs_address_is_not_shown(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refuses[REPO] = (418, {})
    for address in (hub.url, "http://127.0.0.1:9"):
        monkeypatch.setattr(constants, "ENDPOINT", address.replace("//", "//me:s3cr3t@"))
        with pytest.raises(CheckpointError, match=r"http://127\.0\.0\.1") as caught:
            open_checkpoint(REPO)
        assert "s3cr3t" not in str(caught.value)


def test_an_unknown_revision_is_named(hub: Any, published: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{REPO}@v9: there is no such revision"):
        open_checkpoint(f"{REPO}@v9")


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, "access is gated"),
        (404, {"X-Error-Code": "EntryNotFound"}, "no such file"),
        (500, {}, "answers with an error"),
    ],
)
def test_refusals_of_a_file_name_it(
    hub: Any, published: Path, status: int, headers: dict[str, str], message: str
) -> None:
    """Of a gated model the list of files is public, the files are not."""
    hub.refuses["00001-of-00002.safetensors"] = (status, headers)
    with pytest.raises(CheckpointError, match=rf"model-00001-of-00002\.safetensors: .*{message}"):
        open_checkpoint(REPO)
    hub.refuses.clear()
    hub.refuses["config.json"] = (status, headers)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        open_checkpoint(REPO)


def test_a_hub_that_cannot_be_reached_is_named(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, and never listening
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(CheckpointError, match=r"org/model: cannot reach http://127\.0\.0\.1.*Check the network"):
            open_checkpoint(REPO)
        with pytest.raises(CheckpointError, match="org/model: cannot reach"):
            open_checkpoint(REPO, download=True)


def test_offline_mode_is_obeyed(hub: Any, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for download in (False, True):
        with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE forbids to ask the hub\. Unset it"):
            open_checkpoint(REPO, download=download)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["org/..", "org/a--b", "org/name."])
def test_a_name_that_no_model_can_have_is_refused(hub: Any, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"is no name of a model .*Expected org/name@revision"):
        open_checkpoint(name)
    assert hub.requests == []


def test_pytorch_files_need_a_download(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    torch.save({"w": torch.ones(3)}, tmp_path / "old" / "pytorch_model.bin")
    hub.add(REPO, tmp_path / "old")
    with pytest.raises(CheckpointError, match=r"holds only PyTorch files.*Pass --download"):
        open_checkpoint(REPO)
    with open_checkpoint(REPO, download=True) as found:
        assert found["w"].tolist() == [1, 1, 1]


def test_a_repository_without_weights_is_refused(hub: Any, tmp_path: Path) -> None:
    hub.repos[REPO] = {"README.md": b"", "config.json": b"{}"}
    for download in (False, True):
        with pytest.raises(CheckpointError, match=f"{COMMIT}' holds no weights"):
            open_checkpoint(REPO, download=download)
    hub.repos[REPO]["step-9/model.safetensors"] = b""
    with pytest.raises(CheckpointError, match=r"Its subfolders do: step-9\. Open one of them"):
        open_checkpoint(REPO)


def test_threads_read_one_checkpoint(hub: Any, large: torch.Tensor, same: Same) -> None:
    with open_checkpoint(REPO) as found, ThreadPoolExecutor(8) as pool:
        starts = [i * 32 % 512 for i in range(64)]
        parts = list(pool.map(lambda start: found.read("w", (start, start + 32)), starts))
    assert all(same(part, large[start : start + 32]) for part, start in zip(parts, starts, strict=True))


def test_a_download_fills_the_cache_once(hub: Any, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[REPO] |= {
        "tokenizer.json": b"{}",
        "optimizer.bin": b"large",
        "onnx/config.json": b"{}",
        "onnx/m.onnx": b"",
    }
    expected = load_file(published / "model-00001-of-00002.safetensors")
    with open_checkpoint(f"{REPO}@v1", download=True) as found:
        assert found.reference == f"{REPO}@{COMMIT}"
        assert found.config == {"model_type": "tiny"}
        assert torch.equal(found["a"], expected["a"])
        folder = Path(found.info("a").file).parent
    assert folder.is_relative_to(constants.HF_HUB_CACHE)
    assert (folder / "tokenizer.json").is_file()
    assert not (folder / "optimizer.bin").exists()
    assert not (folder / "onnx").exists()
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with open_checkpoint(f"{REPO}@v1", download=True) as found:
        assert torch.equal(found["a"], expected["a"])
    assert hub.requests == []


def test_what_the_cache_holds_is_read_there(hub: Any, published: Path) -> None:
    open_checkpoint(REPO, download=True).close()
    hub.requests.clear()
    with open_checkpoint(f"{REPO}@v1") as found:
        assert found.reference == f"{REPO}@{COMMIT}"
        assert torch.equal(found["c"], load_file(published / "model-00002-of-00002.safetensors")["c"])
    assert [path for _, path, _ in hub.requests] == [f"/api/models/{REPO}/revision/v1"]


@pytest.mark.parametrize("cause", ["offline", "unreachable", "busy"])
def test_without_a_hub_the_cache_is_read(
    hub: Any, published: Path, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    open_checkpoint(REPO, download=True).close()
    hub.requests.clear()
    if cause == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif cause == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        hub.refuses["/api/"] = (503, {})
    for reference in (REPO, f"{REPO}@{COMMIT}"):
        with open_checkpoint(reference) as found:
            assert found.reference == f"{REPO}@{COMMIT}"
            assert sorted(found) == ["a", "b", "c"]
            assert "The hub was not reached" in found.notes[-1]
    with pytest.raises(CheckpointError, match="org/model@v1"):
        open_checkpoint(f"{REPO}@v1")


@pytest.mark.parametrize("revision", ["../../../secret", "/etc/hostname", "a/../../refs/main"])
def test_a_revision_cannot_climb_out_of_the_cache(
    hub: Any, published: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    open_checkpoint(REPO, download=True).close()
    (Path(constants.HF_HUB_CACHE).parent / "secret").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError):
        open_checkpoint(f"{REPO}@{revision}")


def test_a_download_prefers_the_models_own_safetensors(hub: Any, published: Path) -> None:
    hub.repos[REPO] |= {"pytorch_model.bin": b"large", "consolidated.safetensors": b"large"}
    with open_checkpoint(REPO, download=True) as found:
        assert sorted(found) == ["a", "b", "c"]
    assert hub.asked("pytorch_model.bin") == hub.asked("consolidated") == []


@pytest.mark.parametrize("download", [False, True])
def test_a_folder_in_a_repository_is_a_model(hub: Any, published: Path, download: bool) -> None:
    hub.repos[REPO] = {f"runs/last/{name}": content for name, content in hub.repos[REPO].items()}
    hub.repos[REPO] |= {"model.safetensors": b"another", "runs/last/1_Pooling/config.json": b"{}"}
    with open_checkpoint(f"{REPO}/runs/last@v1", download=download) as found, open_checkpoint(published) as local:
        assert found.reference == f"{REPO}/runs/last@{COMMIT}"
        assert found.config == local.config
        assert {n: found.digest(n) for n in found} == {n: local.digest(n) for n in local}
        assert found.companions["1_Pooling/config.json"]() == b"{}"
    hub.requests.clear()
    hub.refuses["/api/"] = (503, {})
    if download:
        with open_checkpoint(f"{REPO}/runs/last@v1") as found:
            assert found.reference == f"{REPO}/runs/last@{COMMIT}"
    else:
        with pytest.raises(CheckpointError, match="answers with an error"):
            open_checkpoint(f"{REPO}/runs/last@v1")


def test_a_folder_that_a_repository_lacks_is_refused(hub: Any, published: Path) -> None:
    hub.repos[REPO]["one/model.safetensors"] = b""
    with pytest.raises(CheckpointError, match=r"no file or folder of the name 'two' in it.* Its folders: one\."):
        open_checkpoint(f"{REPO}/two")


def test_what_an_edited_model_keeps_is_downloaded(hub: Any, published: Path) -> None:
    beside = {"tokenizer.json": b"{}", "modelling.py": b"pass", "1_Pooling/config.json": b"{}", "LICENSE": b"free"}
    hub.repos[REPO] |= beside
    with open_checkpoint(REPO) as ranges, open_checkpoint(REPO, download=True) as fetched:
        assert set(beside) <= set(fetched.companions)
        assert {n: read() for n, read in ranges.companions.items()} == {
            n: read() for n, read in fetched.companions.items()
        }


def test_a_part_in_the_cache_is_said_to_be_one(hub: Any, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoint(REPO, download=True) as found:
        shard = Path(found.info("c").file)
    shard.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for download in (False, True):
        with pytest.raises(
            CheckpointError,
            match=r"^org/model: the hub is not reached.* holds only a part: .*1 of 2 files are missing: "
            r"model-00002-of-00002.* run `diffract fetch org/model`\.$",
        ):
            open_checkpoint(REPO, download=download)


def test_a_model_beside_an_adapter_is_meant_as_on_disk(hub: Any, tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    save_file({"lin.weight": torch.ones(8, 6)}, both / "model.safetensors")
    save_file({"base_model.model.lin.lora_A.weight": torch.ones(2, 6)}, both / "adapter_model.safetensors")
    (both / "config.json").write_text("{}")
    (both / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/absent"}')
    hub.add(REPO, both)
    for reference in (REPO, both):
        with open_checkpoint(reference) as found:
            assert sorted(found) == ["lin.weight"]
            assert "An adapter lies beside the model" in found.notes[-1]


def test_several_adapters_of_a_repository_are_named(hub: Any, adapted: dict[str, torch.Tensor]) -> None:
    hub.repos["org/adapter"] = {f"one/{name}": content for name, content in hub.repos["org/adapter"].items()}
    with pytest.raises(CheckpointError, match=rf"several adapters: one\. .* such as org/adapter/one@{COMMIT}"):
        open_checkpoint("org/adapter")
    with open_checkpoint("org/adapter/one") as found:
        assert found.reference == f"org/adapter/one@{COMMIT}"
        assert found.factors["lin.weight"]().A.shape == (2, 6)


@pytest.fixture
def adapted(hub: Any, published: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """A hand-made adapter, and its base, both on the hub."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    generator = torch.Generator().manual_seed(4)
    factors = {"A": torch.randn(2, 6, generator=generator), "B": torch.randn(8, 2, generator=generator)}
    save_file({f"base_model.model.lin.lora_{s}.weight": factors[s] for s in "AB"}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "lora_alpha": 6, "base_model_name_or_path": "org/base", "revision": "{COMMIT}"}}'
    )
    hub.add("org/adapter", folder)
    (tmp_path / "base").mkdir()
    save_file({"lin.weight": torch.ones(8, 6)}, tmp_path / "base" / "model.safetensors")
    hub.add("org/base", tmp_path / "base")
    return factors


@pytest.mark.parametrize("download", [False, True])
def test_an_adapter_on_the_hub_lies_over_its_base(hub: Any, adapted: dict[str, torch.Tensor], download: bool) -> None:
    expected = (1 + 3 * adapted["B"].double() @ adapted["A"].double()).float()
    with open_checkpoint("org/adapter", download=download) as found:
        assert found.reference == f"org/adapter@{COMMIT}"
        assert found.base_reference == f"org/base@{COMMIT}"
        assert torch.equal(found["lin.weight"], expected)
        assert found.factors["lin.weight"]().A.shape == (2, 6)
    of_base = [path for _, path, _ in hub.requests if "org/base" in path and "/storage/" not in path]
    assert of_base
    assert all(COMMIT in path for path in of_base), "the revision that the adapter names"


def test_an_adapter_on_the_hub_over_a_base_on_disk(hub: Any, adapted: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with open_checkpoint("org/adapter", base=tmp_path / "base") as found:
        assert found.base_reference == str(tmp_path / "base")
        assert found["lin.weight"].shape == (8, 6)
    assert not any("org/base" in path for _, path, _ in hub.requests)
