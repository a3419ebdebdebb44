"""Models brought into the cache, and read from there without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from polars.testing import assert_frame_equal
from safetensors.torch import load, save_file
from typer.testing import CliRunner

import diffract
from diffract.checkpoints import open_checkpoint
from diffract.checkpoints.fetch import fetch
from diffract.checkpoints.hub import HEAD_BYTES
from diffract.cli.main import app
from diffract.errors import CheckpointError, SelectionError
from diffract.evaluate.model import load_model
from tiny_language_model import tiny_model

COMMIT = "c0ffee" + "0" * 34


@pytest.fixture
def published(hub: Any, sharded: Path) -> int:
    """A model on the hub, with files beside it that no command reads; the bytes of those that are read."""
    hub.add("org/model", sharded)
    wanted = sum(len(content) for content in hub.repos["org/model"].values())
    hub.repos["org/model"] |= {
        "optimizer.bin": b"x" * 999,
        "onnx/model.safetensors": b"x" * 999,
        "pytorch_model.bin": b"x",
    }
    return wanted


@pytest.fixture
def adapted(hub: Any, tmp_path: Path) -> None:
    """An adapter on the hub, over org/model's matrix ``a``."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    factors = {"A": torch.ones(2, 6), "B": torch.ones(8, 2)}
    save_file({f"base_model.model.lin.lora_{s}.weight": factors[s] for s in "AB"}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": 2, "base_model_name_or_path": "org/model", "revision": "v1"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    hub.add("org/adapter", folder)


def test_bytes_are_said_before_they_are_fetched(hub: Any, published: int) -> None:
    said: list[str] = []
    found = fetch("org/model", dry_run=True, say=said.append)
    assert found["fetch_bytes"] == published
    assert found["models"][0]["reference"] == f"org/model@{COMMIT}"
    assert said == [f"org/model@{COMMIT}: 4 of 4 files are to be fetched, {published} B"]
    assert hub.sent == 0
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_what_was_fetched_is_read_without_a_network(hub: Any, published: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch("org/model@v1", say=lambda _: None)
    assert hub.asked("onnx") == hub.asked("optimizer") == hub.asked("pytorch_model") == []
    again = fetch("org/model@v1", say=lambda _: None)
    assert (again["fetch_bytes"], again["models"][0]["absent"]) == (0, ())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    with open_checkpoint("org/model@v1") as found:
        assert sorted(found) == ["a", "b", "c"]
        assert found["a"].shape == (8, 6)
    assert hub.requests == []


def test_an_adapters_base_comes_with_it(hub: Any, published: int, adapted: None) -> None:
    found = fetch("org/adapter", "org/model@v1", say=lambda _: None)
    assert [one["reference"] for one in found["models"]] == [f"org/adapter@{COMMIT}", f"org/model@{COMMIT}"]
    assert found["fetch_bytes"] == published + sum(len(content) for content in hub.repos["org/adapter"].values())


def test_what_was_scanned_is_not_fetched_again(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFRACT_CACHE_DIR", str(tmp_path / "results"))
    (tmp_path / "large").mkdir()
    w = torch.randn(256, 200, generator=torch.Generator().manual_seed(2))
    save_file({"layer.weight": w}, tmp_path / "large" / "model.safetensors")
    hub.add("org/model", tmp_path / "large")
    first = diffract.scan("org/model", metrics="norms")
    assert hub.sent >= w.nbytes
    hub.sent = 0
    again = diffract.scan("org/model", metrics="norms")
    assert hub.sent == HEAD_BYTES
    assert_frame_equal(first.metrics, again.metrics)
    assert first.models["digest"].to_list() == again.models["digest"].to_list() != [None]
    save_file({"layer.weight": w * 2}, tmp_path / "large" / "model.safetensors")
    hub.add("org/model", tmp_path / "large")
    other = diffract.scan("org/model", metrics="norms")
    assert other.metrics["frobenius_norm"][0] == pytest.approx(2 * first.metrics["frobenius_norm"][0])


def test_analyses_need_no_tokenizer(hub: Any, published: int) -> None:
    hub.repos["org/model"] |= {"tokenizer.json": b"{}", "modelling.py": b"pass"}
    analyses = fetch("org/model", for_="compare, heads", dry_run=True, say=lambda _: None)
    assert analyses["fetch_bytes"] == published
    assert fetch("org/model", for_="compare,eval", dry_run=True, say=lambda _: None)["fetch_bytes"] == published + 6
    with pytest.raises(SelectionError, match="unknown command 'comparison'"):
        fetch("org/model", for_="comparison", say=lambda _: None)
    done = CliRunner().invoke(app, ["fetch", "org/model", "--for", "scan", "--json"])
    assert done.exit_code == 0, done.output
    assert hub.asked("tokenizer") == hub.asked("modelling") == []


def test_a_folder_of_a_repository_is_fetched(hub: Any, published: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/model"] |= {f"last/{name}": content for name, content in hub.repos["org/model"].items()}
    found = fetch("org/model/last", say=lambda _: None)
    assert found["models"][0]["reference"] == f"org/model/last@{COMMIT}"
    assert found["fetch_bytes"] == published
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with open_checkpoint("org/model/last") as opened:
        assert sorted(opened) == ["a", "b", "c"]
    with pytest.raises(CheckpointError, match=r"only a part: .* Its subfolders do: last.*diffract fetch org/model`"):
        open_checkpoint("org/model")


@pytest.mark.parametrize("reference", ["nothing", "org/absent", ".", "org/model@v9"])
def test_what_is_no_model_on_the_hub_is_refused(hub: Any, published: int, reference: str) -> None:
    with pytest.raises(CheckpointError, match=r"no model|no such revision"):
        fetch(reference, say=lambda _: None)


def test_a_full_disk_is_refused_before(hub: Any, published: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.lists["model-00001-of-00002.safetensors"] = 1 << 60
    with pytest.raises(CheckpointError, match=r"are to be fetched, and '.*' has room for .* HF_HOME"):
        fetch("org/model", say=lambda _: None)
    assert hub.sent == 0


def test_the_command(hub: Any, published: int) -> None:
    done = CliRunner().invoke(app, ["fetch", "org/model", "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["fetch_bytes"] == published


def test_evaluation_loads_a_folder_of_a_repository(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = tmp_path / "model"
    tiny_model().save_pretrained(local)
    hub.repos["org/model"] = {f"last/{p.name}": p.read_bytes() for p in local.iterdir()}
    expected = load_model(str(local), torch.device("cpu"), "auto").state_dict()
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        found = load_model("org/model/last@v1", torch.device("cpu"), "auto").state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_audit_downloads(hub: Any, published: int, adapted: None, tmp_path: Path) -> None:
    """What only a download can read, an adapter as a pickle, is audited from there."""
    held = load(hub.repos["org/adapter"]["adapter_model.safetensors"])
    torch.save(held, tmp_path / "adapter_model.bin")
    hub.repos["org/adapter"]["adapter_model.bin"] = (tmp_path / "adapter_model.bin").read_bytes()
    del hub.repos["org/adapter"]["adapter_model.safetensors"]
    runner = CliRunner()
    refused = runner.invoke(app, ["lora", "org/adapter", "--audit", "--json"])
    assert refused.exit_code == 1, refused.output
    assert "Pass --download" in refused.stderr
    done = runner.invoke(app, ["lora", "org/adapter", "--audit", "--download", "--json"])
    assert done.exit_code == 0, done.output
    assert [row["name"] for row in json.loads(done.stdout)["modules"]] == ["lin"]
    hub.requests.clear()
    hub.refuses["/api/"] = (503, {})
    done = runner.invoke(app, ["lora", "org/adapter", "--audit", "--json"])
    assert done.exit_code == 0, done.output
