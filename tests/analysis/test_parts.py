"""Shares of an analysis, and the run that they are joined to: the same bytes as those of one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import diffract
from diffract.analysis import parts, work
from diffract.cluster import collect
from diffract.errors import RunError, SelectionError
from tiny_llama import llama_tensors

Model = tuple[Path, Path]


def same_files(one: Path, other: Path) -> None:
    """All files are the same but those that hold a date."""
    names = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert names == {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
    for name in names - {Path("manifest.json"), Path("report.html")}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (one, other)]
    for manifest in manifests:
        del manifest["created"], manifest["seconds"]
    assert manifests[0] == manifests[1]


VERBS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "scan": (lambda base, tuned, **how: diffract.scan(base, **how), {"select": "heads 1", "metrics": "all"}),
    "compare": (
        diffract.compare,
        {"circuits": True, "vectors": True, "noise": "all", "metrics": "ranks,change,spectral_shape"},
    ),
    "heads": (lambda base, tuned, **how: diffract.heads(base, f"a={tuned}", f"b={tuned}", **how), {}),
    "trajectory": (diffract.trajectory, {"by": "given"}),
}


@pytest.mark.parametrize("verb", VERBS)
def test_shares_are_joined_to_what_one_process_writes(
    family: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """One share is killed in the middle of its work, and run again."""
    call, how = VERBS[verb]
    call(*family, output=tmp_path / "one", cache=False, **how)
    many = tmp_path / "many"
    with monkeypatch.context() as patched:
        do = work.Worker.__call__

        def killed(self: work.Worker, task: Any) -> Any:
            do(self, task)
            raise KeyboardInterrupt

        patched.setattr(work.Worker, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            call(*family, output=many, cache=False, shard="1/3", **how)
    assert not list(many.glob("parts/*"))
    for index in (2, 0):
        call(*family, output=many, cache=False, shard=f"{index}/3", **how)
    with pytest.raises(RunError, match=r"lacks 1 of 3 shares: 1\..*--shard 1/3"):
        collect(many)
    share = call(*family, output=many, cache=False, shard="1/3", **how)
    assert share.kind == "share"
    assert share["tasks"]["seconds"].min() > 0
    joined = collect(many, cache=False)
    assert joined.kind == verb
    same_files(tmp_path / "one", many)


def test_a_share_that_is_there_is_not_done_again(family: Model, tmp_path: Path) -> None:
    diffract.scan(family[0], output=tmp_path / "run", shard="0/2")
    manifest = tmp_path / "run" / "parts" / "00000-of-00002" / "manifest.json"
    before = manifest.stat()
    diffract.scan(family[0], output=tmp_path / "run", shard="0/2")
    assert manifest.stat() == before
    diffract.scan(family[0], output=tmp_path / "run", shard="0/2", force=True)
    assert manifest.stat().st_ino != before.st_ino


def test_more_shares_than_tasks_leave_some_empty(family: Model, tmp_path: Path) -> None:
    diffract.scan(family[0], select="layers 0, attn.q", output=tmp_path / "one")
    for index in range(3):
        diffract.scan(family[0], select="layers 0, attn.q", output=tmp_path / "run", shard=f"{index}/3")
    collect(tmp_path / "run")
    same_files(tmp_path / "one", tmp_path / "run")


def test_shares_of_other_settings_are_refused_at_once_and_when_they_are_joined(family: Model, tmp_path: Path) -> None:
    diffract.scan(family[0], output=tmp_path / "run", shard="0/2")
    for shard, metrics in (("1/2", "shape"), ("1/3", None)):
        with pytest.raises(RunError, match="share of another run"):
            diffract.scan(family[0], output=tmp_path / "run", shard=shard, metrics=metrics)
    diffract.scan(family[0], metrics="shape", output=tmp_path / "other", shard="1/2")
    shutil.move(tmp_path / "other/parts/00001-of-00002", tmp_path / "run/parts")
    with pytest.raises(RunError, match="differ in models or settings"):
        collect(tmp_path / "run")


def test_weights_that_changed_meanwhile_are_refused(write_model: Callable[..., Path], tmp_path: Path) -> None:
    tensors = llama_tensors(0)
    model = write_model("model", tensors)
    for index in range(2):
        diffract.heads(model, f"tuned={model}", output=tmp_path / "run", shard=f"{index}/2", cache=False)
    name = "model.layers.1.self_attn.k_proj.weight"
    shutil.rmtree(model)
    write_model("model", {**tensors, name: tensors[name] + 1})
    with pytest.raises(RunError, match=rf"{name} of .*model has other weights now"):
        collect(tmp_path / "run", cache=False)


def test_a_mixture_of_processors_is_warned_of(family: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffract.scan(family[0], output=tmp_path / "run", shard="0/2")
    made_on = parts.made_on(torch.device("cpu")) | {"processor": "another one", "threads": 64}
    monkeypatch.setattr(parts, "made_on", lambda device: made_on)
    diffract.scan(family[0], output=tmp_path / "run", shard="1/2")
    (warning,) = [w for w in collect(tmp_path / "run").manifest["warnings"] if "another one, 64 threads" in w]
    assert "1e-13 of a matrix's largest singular value" in warning


def test_damaged_shares_are_told(family: Model, tmp_path: Path) -> None:
    diffract.scan(family[0], output=tmp_path / "run", shard="0/1")
    (tmp_path / "run/parts/00000-of-00001/rows-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="00000-of-00001' is damaged"):
        collect(tmp_path / "run")


def test_what_cannot_be_shared_is_refused(family: Model, tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="--output RUN"):
        diffract.scan(family[0], shard="0/2")
    with pytest.raises(SelectionError, match=r"models: .* got dict"):
        diffract.scan({"w": torch.eye(3)}, shard="0/2", output=tmp_path / "run")
    with pytest.raises(RunError, match="no shares to join"):
        collect(tmp_path)
    diffract.scan(family[0], output=tmp_path / "whole")
    with pytest.raises(RunError, match="is a run already"):
        diffract.scan(family[0], output=tmp_path / "whole", shard="0/2")


def test_what_is_drawn_and_what_is_not_asked_counts_in_what_is_foretold(tmp_path: Path) -> None:
    """The same two tensors: a share is cut by the plan, not by the tensors alone."""

    def foretold(**how: Any) -> float:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        weights = {f"w{i}": torch.randn(64, 96, generator=torch.Generator().manual_seed(i)) for i in range(2)}
        models = [folder / "base.safetensors", folder / "tuned.safetensors"]
        folder.mkdir()
        for scale, path in enumerate(models, start=1):
            save_file({name: w * scale for name, w in weights.items()}, path)
        run = diffract.compare(*models, output=folder / "run", shard="0/1", cache=False, **how)
        return run["tasks"]["foretold_seconds"].sum()

    norm, plain = foretold(metrics="frobenius_norm", noise="none"), foretold(noise="none")
    assert norm < plain / 10
    assert foretold(noise="all") == pytest.approx(3 * plain)  # two kinds of noise beside the change itself
    assert foretold(noise="none", metrics="peak_count_rowcol_pvalue", nulls="all") > plain
