"""Training runs followed over several checkpoints."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffract
from diffract import schemas
from diffract.analysis import scan as opening
from diffract.analysis import trajectory, work
from diffract.analysis.trajectory import peaks_appear
from diffract.checkpoints import open_checkpoint
from diffract.metrics import choose_metrics
from diffract.report import headlines
from tiny_llama import LLAMA, llama_tensors

STORIES = Path(__file__).parents[3] / "shared" / "data" / "checkpoints" / "hybrid_stories"
STEPS = (100, 20, 3)
EXACT = {"check_exact": True}
FEW = ["stable_rank", "delta_frobenius"]


def drifting(steps: int) -> list[dict[str, Tensor]]:
    """A model and its descendants, each 5% away from the one before."""
    found = [llama_tensors(0)]
    for seed in range(1, steps):
        found.append(llama_tensors(seed, found[-1]))
    return found


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """A folder of three checkpoints whose names do not sort as text."""
    for step, tensors in zip(sorted(STEPS), drifting(3), strict=True):
        folder = tmp_path / "series" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path / "series"


def columns_of(metrics: pl.DataFrame, model: str) -> pl.DataFrame:
    return metrics.filter(model=model).drop("model")


def test_a_half_written_step_of_a_folder_is_left_out_aloud(series: Path) -> None:
    weights = series / "checkpoint-20" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run = diffract.trajectory(series, metrics=FEW, cache=False)
    assert run.models["model"].to_list() == ["checkpoint-3", "checkpoint-100"]
    assert any("checkpoint-20 is left out, as it cannot be read" in text for text in run.manifest["warnings"])
    with pytest.raises(diffract.CheckpointError):
        diffract.trajectory(*sorted(series.iterdir()), metrics=FEW, cache=False)  # whoever names it means it


def test_every_checkpoint_has_the_numbers_of_its_scan(series: Path) -> None:
    run = diffract.trajectory(series)
    assert run.models["model"].to_list() == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    for step in STEPS:
        scan = diffract.scan(series / f"checkpoint-{step}", cache=False)
        own = columns_of(run.metrics, f"checkpoint-{step}").select(scan.metrics.drop("model").columns)
        assert_frame_equal(own, scan.metrics.drop("model"), **EXACT)
        sigmas = columns_of(run.spectra.filter(quantity="sigma"), f"checkpoint-{step}")
        assert_frame_equal(sigmas, scan.spectra.filter(quantity="sigma").drop("model"), **EXACT)
        for name in ("digest", "parameters", "size_bytes", "tensors", "matrices", "family"):
            assert run.models.filter(step=step)[name][0] == scan.models[name][0] is not None


@pytest.mark.parametrize(("against", "pairs"), [("previous", [(3, 20), (20, 100)]), ("first", [(3, 20), (3, 100)])])
def test_every_change_has_the_numbers_of_its_comparison(
    series: Path, against: str, pairs: list[tuple[int, int]]
) -> None:
    run = diffract.trajectory(series, against=against)
    first = run.models.row(0, named=True)
    assert (first["against"], first["delta_relative"]) == (None, None)
    for base, tuned in pairs:
        name = f"checkpoint-{tuned}"
        both = diffract.compare(series / f"checkpoint-{base}", series / name, cache=False)
        pair = ["name", *(m.name for m in choose_metrics(None, pair=True) if m.pair)]
        expected = columns_of(both.metrics, name).select(pair)
        # the sums are the same, in the same order; only which of them are taken together differs
        close: Any = {"rel_tol": 1e-12, "abs_tol": 1e-12}
        assert_frame_equal(columns_of(run.metrics, name).select(expected.columns), expected, **close)
        assert expected["delta_relative"].null_count() == expected["left_agreement_mean"].null_count() == 0
        curves, others = (columns_of(r.spectra, name).sort("quantity", "name") for r in (run, both))
        assert_frame_equal(curves, others, **close)
        noise = [f"{name}_noise" for name in ("value_share", "delta_spectral", "left_agreement_mean")]
        drawn = both.metrics.filter(model=name).select(noise)
        assert_frame_equal(run.metrics.filter(model=name).select(noise), drawn, **close)
        assert drawn.null_count().row(0) == (0, 0, 0)
        row, other = (r.models.filter(model=name).row(0, named=True) for r in (run, both))
        assert row["value_share_excess"] == pytest.approx(other["value_share_excess"], rel=1e-9)
        assert row["against"] == f"checkpoint-{base}"
        for column in ("delta_relative", "value_share", "changed_share", "head_top10_share", "head_gini"):
            assert row[column] == pytest.approx(other[column], rel=1e-12)


def test_a_series_of_noise_claims_nothing(series: Path) -> None:
    """Each step is Gaussian noise: what its last change has beyond noise stands small, and where noise is not drawn not
    at all."""
    beyond = [one for one in headlines(diffract.trajectory(series, cache=False).tables) if "of noise" in one.text]
    assert len(beyond) == 2
    assert all(one.minor for one in beyond)
    plain = diffract.trajectory(series, cache=False, noise="none")
    assert not [name for name in plain.metrics.columns if name.endswith("_noise")]
    assert not [one for one in headlines(plain.tables) if "of noise" in one.text]


def test_tables_tell_the_place(series: Path) -> None:
    run = diffract.trajectory(f"tokens3B={series / 'checkpoint-20'}", series / "checkpoint-100", by="step")
    assert run.models.select("model", *schemas.TIMELINE).rows() == [
        ("tokens3B", 0, None, 20, 3_000_000_000),
        ("checkpoint-100", 1, None, 100, None),
    ]
    assert dict(run.metrics.select(*schemas.TIMELINE).schema) == schemas.TIMELINE
    assert run.metrics.group_by("model", maintain_order=True).agg(pl.col("order", "step").unique()).rows() == [
        ("tokens3B", [0], [20]),
        ("checkpoint-100", [1], [100]),
    ]
    assert set(run.models["role"]) == {"checkpoint"}


def test_order_does_not_depend_on_how_checkpoints_are_named(series: Path) -> None:
    parts = [series / f"checkpoint-{step}" for step in (100, 3, 20)]
    one, other = (diffract.trajectory(*refs, metrics=FEW) for refs in ([series], parts))
    for name in schemas.KINDS["trajectory"]:
        assert_frame_equal(getattr(one, name), getattr(other, name), **EXACT)
    backwards = diffract.trajectory(*parts, by="given", select="layers 0, attn.q")
    assert backwards.models["step"].to_list() == [100, 3, 20]
    assert backwards.models["digest"].null_count() == 3  # only a part was read


def test_a_run_folder_comes_back_whole(series: Path, tmp_path: Path) -> None:
    run = diffract.trajectory(series, output=tmp_path / "run", against="first")
    loaded = diffract.load_run(tmp_path / "run")
    for name in schemas.KINDS["trajectory"]:
        assert_frame_equal(getattr(run, name), getattr(loaded, name), **EXACT)
    assert loaded.manifest["kind"] == "trajectory"
    assert {k: loaded.manifest["settings"][k] for k in ("by", "against", "heads")} == {
        "by": "step",
        "against": "first",
        "heads": True,
    }
    assert [(m["model"], m["step"], m["against"]) for m in loaded.manifest["models"]] == [
        ("checkpoint-3", 3, None),
        ("checkpoint-20", 20, "checkpoint-3"),
        ("checkpoint-100", 100, "checkpoint-3"),
    ]
    assert loaded.manifest["metrics"]["delta_relative"]["summary"] == "||D||_F / ||W0||_F"
    with pytest.raises(diffract.RunError, match="--force"):
        diffract.trajectory(series, output=tmp_path / "run")


def test_an_unknown_architecture_is_said_once(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_file({"w": step * torch.eye(3), "b": torch.ones(3)}, tmp_path / f"step_{step:05d}.safetensors")
    run = diffract.trajectory(tmp_path)
    assert run.models["delta_relative"].to_list() == pytest.approx([None, 1.0, 0.5])
    assert len(run.manifest["warnings"]) == 1
    assert run.manifest["warnings"][0].startswith("all checkpoints: Generic mode")


def test_what_holds_for_some_is_said_of_these(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_file({"w": (step > 2) * torch.eye(3)}, tmp_path / f"step{step}.safetensors")
        config = {"config": json.dumps({"model_type": f"odd{min(step, 2)}"})}
        save_file(load_file(tmp_path / f"step{step}.safetensors"), tmp_path / f"step{step}.safetensors", config)
    told = diffract.trajectory(tmp_path).manifest["warnings"]
    assert [text.split(":")[0] for text in told] == ["step1", "step2 and 1 more", told[2]]
    assert told[2] == "2 matrices are all zero; their ratios are null, first step1 w."


def test_a_bad_matrix_does_not_touch_the_next_checkpoint(tmp_path: Path) -> None:
    good = torch.arange(12.0).reshape(3, 4)
    for step, w in enumerate([good, good * torch.nan, good + 1, good + 2]):
        save_file({"w": w, "v": good + step}, tmp_path / f"step{step}.safetensors")
    rows = diffract.trajectory(tmp_path).metrics.filter(name="w")
    assert rows["status"].to_list() == ["ok", "non_finite", "ok", "ok"]
    assert rows["frobenius_norm"].is_null().to_list() == [False, True, False, False]
    assert rows["delta_frobenius"].is_null().to_list() == [True, True, True, False]


def test_only_what_is_asked_for_is_computed(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this was not needed")

    for name in ("eigh", "eigvalsh", "svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, refuse)
        monkeypatch.setattr(np.linalg, name, refuse, raising=False)
    run = diffract.trajectory(series, metrics=["delta_relative", "frobenius_norm", "delta_frobenius"], cache=False)
    assert run.metrics.columns[-3:] == ["delta_relative", "frobenius_norm", "delta_frobenius"]
    assert run.models["delta_relative"].null_count() == 1
    monkeypatch.setattr(work, "pair_facts", refuse)
    alone = diffract.trajectory(series, metrics=["frobenius_norm"], cache=False)
    assert alone.metrics["frobenius_norm"].to_list() == run.metrics["frobenius_norm"].to_list()


def test_a_scan_is_not_computed_again(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in STEPS:
        diffract.scan(series / f"checkpoint-{step}")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a scan knows this")

    monkeypatch.setattr(work, "single_facts", refuse)
    run = diffract.trajectory(series)
    assert run.metrics["stable_rank"].null_count() == 0
    monkeypatch.setattr(work, "pair_facts", refuse)
    again = diffract.trajectory(series)
    assert_frame_equal(run.metrics, again.metrics, **EXACT)
    assert_frame_equal(run.spectra, again.spectra, **EXACT)


def test_revisions_of_a_model_on_the_hub(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def from_disk(reference: str, *, base: object, download: bool) -> diffract.Checkpoint:
        asked.append((reference, download))
        return open_checkpoint(series / reference.replace("org/m@step", "checkpoint-"))

    with monkeypatch.context() as patch:
        patch.setattr(opening, "open_checkpoint", from_disk)
        refs = ("org/m@step100", "org/m@step3", "first=org/m@step20")
        run = diffract.trajectory(*refs, by="step", metrics=FEW, download=True)
    assert run.models.select("model", "step").rows() == [("step3", 3), ("first", 20), ("step100", 100)]
    assert asked == 2 * [("org/m@step3", True), ("org/m@step20", True), ("org/m@step100", True)]
    local = diffract.trajectory(series, metrics=FEW)
    assert_frame_equal(run.metrics.drop("model"), local.metrics.drop("model"), **EXACT)


def test_a_tensor_is_read_once_of_each_checkpoint(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    real = diffract.Checkpoint.read

    def counted(self: diffract.Checkpoint, name: str, *rest: Any) -> Tensor:
        # the few rows by which neighbours are told to be of one run are asked for by their range
        reads[f"{Path(self.reference).name} {name}"] += not rest or rest[0] is None
        return real(self, name, *rest)

    monkeypatch.setattr(diffract.Checkpoint, "read", counted)
    diffract.trajectory(series, cache=False)
    for name in llama_tensors(0):
        # once for its scan and its comparison together, and once more as the base of the next
        expected = [1, 1, 1] if "norm" in name else [2, 2, 1]
        assert [reads[f"checkpoint-{step} {name}"] for step in (3, 20, 100)] == expected


# Memory


class Counting:
    """Opens checkpoints, and knows how many are open at any time."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self.most = self.total = 0

    def __call__(self, reference: Any, **options: Any) -> diffract.Checkpoint:
        found = open_checkpoint(reference, **options)
        self.total += 1
        self.open.add(id(found))
        close = found.close

        def closed() -> None:
            self.open.discard(id(found))
            close()

        object.__setattr__(found, "close", closed)
        self.most = max(self.most, len(self.open))
        return found


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counter = Counting()
    monkeypatch.setattr(opening, "open_checkpoint", counter)
    return counter


def write_many(folder: Path, count: int) -> Path:
    """Checkpoints as .npz, which are held in memory whole while anything refers to them."""
    for step in range(1, count + 1):
        np.savez(folder / f"step{step}.npz", w=step * np.eye(3, dtype=np.float32))
    return folder


@pytest.mark.parametrize("against", ["previous", "first"])
def test_two_checkpoints_are_open_at_most(tmp_path: Path, counting: Counting, against: str) -> None:
    folder = write_many(tmp_path, 9)
    run = diffract.trajectory(folder, against=against)
    assert len(run.models) == 9
    # headers first, so that what is wrong is said before hours of work; neighbours, where these are not compared anyway
    assert counting.total == (18 if against == "previous" else 27)
    assert (counting.most, counting.open) == (2, set())


@pytest.mark.parametrize("against", ["previous", "first"])
def test_nothing_of_a_closed_checkpoint_lives_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, against: str) -> None:
    folder = write_many(tmp_path, 9)
    living: weakref.WeakSet[diffract.Checkpoint] = weakref.WeakSet()
    most: list[int] = []

    def opened(reference: Any, **options: Any) -> diffract.Checkpoint:
        found = open_checkpoint(reference, **options)
        living.add(found)
        most.append(len(living))
        return found

    monkeypatch.setattr(opening, "open_checkpoint", opened)
    diffract.trajectory(folder, against=against)
    assert max(most) == 2
    assert len(living) == 0


def test_an_error_closes_what_is_open(tmp_path: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_many(tmp_path, 5)
    interrupt_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        diffract.trajectory(folder)
    assert counting.open == set()


def test_open_checkpoints_stay_open(series: Path) -> None:
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(diffract.open(series / f"checkpoint-{step}")) for step in STEPS]
        run = diffract.trajectory(*opened, select="layers 0, attn.o")
        assert run.models["step"].to_list() == [3, 20, 100]
        assert all(len(one["model.layers.0.self_attn.o_proj.weight"]) == 32 for one in opened)


# Resuming


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let ``count`` comparisons of batches through, then interrupt; returns what is let through."""
    calls: list[str] = []
    real = work.pair_facts

    def facts(*arguments: Any, **named: Any) -> Any:
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append("pair")
        return real(*arguments, **named)

    monkeypatch.setattr(work, "pair_facts", facts)
    return calls


def test_an_interrupted_run_continues_to_the_same_result(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = diffract.trajectory(series, cache=False)
    with monkeypatch.context() as patch:
        patch.setattr("diffract.engine.cores", lambda: 1)
        calls = interrupt_after(20, patch)
        with pytest.raises(KeyboardInterrupt):
            diffract.trajectory(series, output=tmp_path / "run")
    assert len(calls) == 20
    assert not list(tmp_path.glob("run*"))
    calls = interrupt_after(10**6, monkeypatch)
    run = diffract.trajectory(series, output=tmp_path / "run")
    assert len(calls) == 2 * 2 * 16 - 20  # two pairs of 16 tensors, each once more with noise
    for name in schemas.KINDS["trajectory"]:
        assert_frame_equal(getattr(run, name), getattr(undisturbed, name), **EXACT)


def test_progress_is_that_of_the_whole_series(series: Path) -> None:
    seen: list[tuple[float, float, str]] = []
    diffract.trajectory(series, progress=lambda *told: seen.append(told))
    shares = [done / total for done, total, _ in seen]
    assert shares == sorted(shares)
    assert len({total for _, total, _ in seen}) == 1
    assert shares[-1] == pytest.approx(1)
    # of 11 parts (a scan, and two scans with a comparison that counts as four) the first is 1
    assert shares[15] == pytest.approx(1 / 11)
    assert [what.split(": ")[0] for _, _, what in seen] == [f"checkpoint-{s}" for s in sorted(STEPS) for _ in range(16)]


# What is refused, and when


def test_what_is_wrong_is_said_before_any_work(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr(trajectory, "run_all", refuse)
    last = series / "checkpoint-100"
    save_file({k: v for k, v in llama_tensors(0).items() if "gate" not in k}, last / "model.safetensors")
    with pytest.raises(diffract.CheckpointError, match="checkpoint-100: 2 tensors besides embeddings have no partner"):
        diffract.trajectory(series)
    (last / "config.json").write_text('{"model_type": "mine"}')
    with pytest.raises(diffract.CheckpointError, match="'checkpoint-20' is read as llama, 'checkpoint-100' as generic"):
        diffract.trajectory(series)
    (last / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(diffract.CheckpointError, match="checkpoint-100"):
        diffract.trajectory(*series.iterdir())


def test_unmatched_tensors_are_listed(series: Path) -> None:
    fewer = {k: v for k, v in llama_tensors(0).items() if "gate" not in k}
    save_file(fewer, series / "checkpoint-20" / "model.safetensors")
    run = diffract.trajectory(series, metrics=FEW, allow_unmatched=True)
    gate = run.tensors.filter(pl.col("tensor").str.contains("layers.0.mlp.gate"))
    assert gate.select("model", "outcome").rows() == [("checkpoint-3", "analysed"), ("checkpoint-100", "unmatched")]
    rows = run.metrics.filter(name="L0.mlp.gate")
    assert rows["status"].to_list() == ["ok", "unpaired"]
    assert rows["delta_frobenius"].null_count() == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"against": "last"}, "unknown against 'last', expected one of: previous, first"),
        ({"by": "time"}, "unknown order 'time'"),
        ({"metrics": ["stable_rnk"]}, "Did you mean 'stable_rank'"),
        ({"select": "attn.z"}, "fits no matrix"),
        ({"device": "tpu"}, "unknown device"),
    ],
)
def test_wrong_options_are_explained(series: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(diffract.SelectionError) as caught:
        diffract.trajectory(series, **options)
    assert text in str(caught.value)


def test_series_without_matrices_are_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        save_file({"b": torch.ones(3)}, tmp_path / f"step{step}.safetensors")
    with pytest.raises(diffract.CheckpointError, match="holds no matrix"):
        diffract.trajectory(tmp_path)


def test_adapters_change_by_their_difference(series: Path, tmp_path: Path) -> None:
    base = {name: value.float() for name, value in llama_tensors(0).items()}
    folder = series / "checkpoint-3"
    save_file(base, folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj"
    generator = torch.Generator().manual_seed(4)
    products = []
    for step in (1, 2):
        A, B = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
        lora = tmp_path / "lora" / f"checkpoint-{step}"
        lora.mkdir(parents=True)
        saved = {f"base_model.model.{name}.lora_{side}.weight": t for side, t in (("A", A), ("B", B))}
        save_file(saved, lora / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(folder)}
        (lora / "adapter_config.json").write_text(json.dumps(config))
        products.append((B.double() @ A.double()).numpy())
    run = diffract.trajectory(tmp_path / "lora", heads=False, select="layers 0, attn.o")
    expected = np.linalg.norm(products[1] - products[0])
    # merged weights are rounded to float32
    assert run.metrics["delta_frobenius"][1] == pytest.approx(expected, rel=1e-5)


# Peaks


@diffract.metric
def peak_count(sigmas: Tensor) -> Tensor:
    """One peak more for every sigma above 10."""
    return 1.0 + (sigmas > 10).sum(1)


def write_peaks(folder: Path, names: tuple[str, ...]) -> Path:
    """Matrix a has its second peak from the second checkpoint on, b from the third, c never."""
    tops = [(1, 1, 1), (20, 1, 1), (1, 20, 1), (20, 20, 1)]
    for name, (a, b, c) in zip(names, tops, strict=True):
        weights = {
            key: torch.diag(torch.tensor([float(top), 1.0, 2.0])) for key, top in zip("abc", (a, b, c), strict=True)
        }
        save_file(weights, folder / f"{name}.safetensors")
    return folder


def test_when_peaks_appear(tmp_path: Path) -> None:
    folder = write_peaks(tmp_path, ("step10", "step20", "step30", "step40"))
    run = diffract.trajectory(folder, metrics=[peak_count, "frobenius_norm"])
    for order in range(4):
        assert dict(run.metrics.filter(order=order).select("name", "peaks_appear").rows()) == {
            "a": 20.0,
            "b": 30.0,
            "c": None,
        }
    assert run.models["peaked_matrices"].to_list() == [0, 1, 1, 2]
    assert "at least two peaks" in run.manifest["metrics"]["peaks_appear"]["summary"]
    assert_frame_equal(
        peaks_appear(run.metrics.drop("peaks_appear").sample(fraction=1, shuffle=True, seed=1)).sort("name"),
        run.metrics.filter(order=0).select("name", "peaks_appear"),
    )


@pytest.mark.parametrize(
    ("names", "by"),
    [
        (("stage1-step10", "stage1-step20", "stage2-step5", "stage2-step10"), "step"),
        (("a1", "a2", "a3", "a4"), "name"),
    ],
)
def test_places_stand_in_where_steps_do_not_rise(tmp_path: Path, names: tuple[str, ...], by: str) -> None:
    run = diffract.trajectory(write_peaks(tmp_path, names), metrics=[peak_count], by=by)
    assert run.metrics.filter(order=0)["peaks_appear"].to_list() == [1.0, 2.0, None]


def test_peaks_appear_beyond_the_null_of_the_same_step(tmp_path: Path) -> None:
    """Rows of two sizes have two peaks by their norms alone; two levels of sigmas in random directions do not."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(48, 192, generator=draw)
    U, S, Vh = torch.linalg.svd(noise, full_matrices=False)
    levels = (U * torch.where(torch.arange(48) < 24, 6.0, 1.0) * S) @ Vh
    rows = noise * torch.where(torch.arange(48) < 24, 6.0, 1.0)[:, None]
    for step, planted in ((1, noise), (2, levels)):
        save_file({"rows": rows, "planted": planted.contiguous()}, tmp_path / f"step{step}.safetensors")
    chosen = "peak_count,peak_count_rowcol_pvalue"
    run = diffract.trajectory(tmp_path, metrics=chosen)
    assert (run.metrics.filter(name="rows")["peak_count"] >= 2).all()
    assert dict(run.metrics.filter(order=0).select("name", "peaks_appear").rows()) == {"rows": None, "planted": 2.0}
    assert run.models.select("peaked_matrices", "peaked_of").rows() == [(0, 2), (1, 2)]
    assert "more than the norms of their rows and columns alone give" in headlines(run.tables)[-1].text
    # alone, without nulls, both count
    alone = diffract.trajectory(tmp_path, metrics="peak_count")
    assert alone.models["peaked_matrices"].to_list() == [1, 2]


def test_no_peaks_without_their_metric(series: Path) -> None:
    run = diffract.trajectory(series, metrics=["stable_rank"])
    assert "peaks_appear" not in run.metrics.columns
    assert "peaked_matrices" not in run.models.columns


def test_the_middle_leaves_single_rows_out(tmp_path: Path) -> None:
    for step in (1, 2):
        flat = {f"v{i}": torch.ones(1, 4) for i in range(5)}
        save_file({"w": torch.eye(3), **flat}, tmp_path / f"step{step}.safetensors")
    run = diffract.trajectory(tmp_path, metrics=["stable_rank"])
    assert run.models["stable_rank_median"].to_list() == pytest.approx([3.0, 3.0])


# A real training run


@pytest.mark.skipif(not STORIES.is_dir(), reason="the checkpoints of hybrid_stories are not beside this repository")
def test_a_real_run_slows_down_as_its_readme_says() -> None:
    files = [STORIES / f"step_{step:05d}.safetensors" for step in (2000, 4000, 18000, 20000)]
    run = diffract.trajectory(*files, metrics=["frobenius_norm", "delta_frobenius"])
    assert run.models["step"].to_list() == [2000, 4000, 18000, 20000]
    weights = [{k: v.double() for k, v in load_file(f).items()} for f in files]
    of_all = []
    for k, (before, after) in enumerate(pairwise(weights), start=1):
        squares = {n: ((after[n] - w).square().sum().item(), w.square().sum().item()) for n, w in before.items()}
        matrices = [v for n, v in squares.items() if before[n].ndim > 1]  # the 3-D ones are depthwise convolutions
        # sums of 230,000 float64 squares
        assert run.models["delta_relative"][k] == pytest.approx(relative(matrices), rel=1e-10)
        of_all.append(relative(list(squares.values())))
    # the published figures are of all weights; tensors that are no matrices hold 1 to 3% of the squared norm
    assert [round(of_all[0], 3), round(of_all[2], 3)] == [0.445, 0.135]
    assert run.models["delta_relative"][1] == pytest.approx(0.445, rel=0.02)
    assert run.models["delta_relative"][3] == pytest.approx(0.135, rel=0.02)


def relative(squares: list[tuple[float, float]]) -> float:
    """Root of the summed squares of a change over those of what it started from."""
    changed, start = np.sum(squares, axis=0)
    return float(np.sqrt(changed / start))
