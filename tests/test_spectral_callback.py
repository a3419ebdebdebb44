"""Spectra in training: the numbers of a scan of the checkpoint of that step, and training as if nobody looked."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import transformers as tf
from polars.testing import assert_frame_equal

import diffract
from diffract import SpectralCallback
from diffract.callback import NAMED, medians, refuse_sharded, refuse_shared, rows_before, warn_of_cost
from diffract.errors import CheckpointError, RunError, SelectionError
from families import GROUPED

COSTLY = pytest.mark.filterwarnings("ignore:SpectralCallback took")
"""A step of a tiny model takes a few milliseconds, less than its measurement."""

pytestmark = [
    COSTLY,
    pytest.mark.filterwarnings("ignore:.*'pin_memory' argument is set as true but no accelerator:UserWarning"),
]


class Recorder(tf.TrainerCallback):
    """Keeps what reporters are sent, as they would."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []
        self.steps = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        self.logs.append({**(logs or {}), "step": state.global_step})

    def spectral(self) -> list[dict[str, Any]]:
        return [entry for entry in self.logs if "spectral/seconds" in entry]


def model(**changes: Any) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return tf.Olmo2ForCausalLM(tf.Olmo2Config(**{**GROUPED, "attention_dropout": 0.1, **changes}))


def texts(count: int = 32) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 50, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(folder: Path, *callbacks: tf.TrainerCallback, net: torch.nn.Module | None = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        **{
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
        },
        **{"report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 3},
        **changes,
    }
    args = tf.TrainingArguments(output_dir=str(folder), **settings)
    return tf.Trainer(model() if net is None else net, args, train_dataset=texts(), callbacks=list(callbacks))


def numbers(rows: pl.DataFrame) -> pl.DataFrame:
    """What does not depend on where the model lay."""
    return rows.drop("model", *diffract.schemas.TIMELINE, strict=False)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    tf.logging.set_verbosity_error()
    yield
    tf.logging.set_verbosity_warning()


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_those_of_a_scan_of_the_checkpoint(tmp_path: Path, heads: bool, tied: bool) -> None:
    chosen: dict[str, Any] = {"metrics": ("ranks", "pl_alpha"), "select": "layers 1-, embed", "heads": heads}
    chosen["select"] = "layers 1-, attn" if heads else None
    callback = SpectralCallback(**chosen, every=2)
    trainer(tmp_path, callback, net=model(tie_word_embeddings=tied)).train()
    table = pl.read_parquet(tmp_path / "spectra.parquet")
    assert table["step"].unique(maintain_order=True).to_list() == [0, 2, 4]
    assert table["order"].unique(maintain_order=True).to_list() == [0, 1, 2]
    for step in (2, 4):
        found = table.filter(step=step)
        wanted = diffract.scan(tmp_path / f"checkpoint-{step}", **chosen, cache=False).metrics
        assert set(found["model"]) == {f"step{step}"}
        # tensors lie in another order in the file
        assert_frame_equal(numbers(found).sort("name"), numbers(wanted).sort("name"), check_exact=True)
    assert table.filter(step=0)["stable_rank"].to_list() != table.filter(step=4)["stable_rank"].to_list()


def test_a_base_adds_the_change(tmp_path: Path) -> None:
    net = model()
    net.save_pretrained(tmp_path / "base")
    chosen: dict[str, Any] = {"metrics": "norms, change, agreement", "select": "attn"}
    by_start = SpectralCallback(**chosen, every=2, base="start", output=tmp_path / "one" / "own.parquet")
    trainer(tmp_path / "run", by_start, net=net).train()
    by_path = SpectralCallback(**chosen, every=2, base=tmp_path / "base", output=tmp_path / "two.parquet")
    trainer(tmp_path / "run", by_path).train()
    table = pl.read_parquet(tmp_path / "one" / "own.parquet")
    assert_frame_equal(table, pl.read_parquet(tmp_path / "two.parquet"), check_exact=True)
    assert table.filter(step=0)["delta_frobenius"].to_list() == [0.0] * len(table.filter(step=0))
    run = diffract.compare(tmp_path / "base", f"tuned={tmp_path / 'run' / 'checkpoint-4'}", **chosen, cache=False)
    found, wanted = (numbers(t).sort("name") for t in (table.filter(step=4), run.metrics.filter(model="tuned")))
    assert_frame_equal(found, wanted, check_exact=True)
    assert not (tmp_path / "run" / "spectra.parquet").exists()


def test_the_usual_metrics(tmp_path: Path) -> None:
    assert [m.name for m in SpectralCallback().metrics] == [
        *("frobenius_norm", "spectral_norm", "stable_rank", "effective_rank")
    ]
    assert [m.name for m in SpectralCallback(base="start").metrics][-1] == "delta_relative"
    assert SpectralCallback().every == 500


def test_metrics_of_one_s_own(tmp_path: Path) -> None:
    @diffract.metric
    def sigma_gap(sigmas: torch.Tensor) -> torch.Tensor:
        """Ratio of the two largest singular values."""
        return sigmas[:, 0] / sigmas[:, 1]

    trainer(tmp_path, SpectralCallback([sigma_gap], "attn.q", 2)).train()
    assert pl.read_parquet(tmp_path / "spectra.parquet")["sigma_gap"].min() > 1  # type: ignore[operator]


class Watch(tf.TrainerCallback):
    """What a step leaves behind; stands after the callback under test."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        net = kwargs["model"]
        switches = (net.training, torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype())
        gradients = [p.grad is None and p.requires_grad for p in net.parameters()]
        states = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())  # noqa: NPY002
        self.seen.append((switches, gradients, states, control.should_log, control.should_save))


def test_training_is_what_it_would_be_without(tmp_path: Path) -> None:
    """Dropout makes every loss depend on the random state; the whole catalog is computed, null model and all."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = []
        watched = SpectralCallback("all", "layers 0, mlp.up", 1, base="start")
        for name, callbacks in (("with", [watched]), ("without", [])):
            watch = Watch()
            one = trainer(tmp_path / name, *callbacks, watch)
            one.train()
            losses = [entry["loss"] for entry in one.state.log_history if "loss" in entry]
            runs.append((losses, watch.seen, list(one.model.state_dict().values())))
    finally:
        torch.set_num_threads(before)
    (losses, seen, weights), (other_losses, other_seen, other_weights) = runs
    assert len(set(losses)) == 4
    assert losses == other_losses
    assert seen == other_seen
    assert seen[0][0] == (True, True, 2, torch.float32)
    assert all(map(torch.equal, weights, other_weights))


@pytest.mark.parametrize("base", [None, "start"])
def test_a_resumed_training_goes_on_with_the_table(tmp_path: Path, base: str | None) -> None:
    table, even = tmp_path / "t.parquet", {"lr_scheduler_type": "constant"}  # whatever the number of steps
    chosen: dict[str, Any] = {"select": "layers 0", "every": 2, "base": base, "output": table}
    whole = SpectralCallback(**chosen | {"output": None})
    trainer(tmp_path / "whole", whole, max_steps=8, **even).train()
    # the second run goes beyond its last checkpoint and is then begun again from there
    trainer(tmp_path / "cut", SpectralCallback(**chosen), max_steps=6, save_steps=4, **even).train()
    assert steps(table) == [0, 2, 4, 6]
    again = trainer(tmp_path / "cut", SpectralCallback(**chosen), max_steps=8, **even)
    seen: list[list[int]] = []
    again.add_callback(OnStep(lambda: seen.append(steps(table))))
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert seen[0] == [0, 2, 4]  # step 6 of the run that was given up is gone
    wanted = pl.read_parquet(tmp_path / "whole" / "spectra.parquet")
    assert_frame_equal(pl.read_parquet(table), wanted, check_exact=True)


class OnStep(tf.TrainerCallback):
    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.act()


def steps(table: Path) -> list[int]:
    return pl.read_parquet(table)["step"].unique(maintain_order=True).to_list()


def test_a_new_training_begins_the_table_anew(tmp_path: Path) -> None:
    trainer(tmp_path, SpectralCallback(every=2, base="start")).train()
    trainer(tmp_path, SpectralCallback("norms", every=3, base="start"), max_steps=3).train()
    table = pl.read_parquet(tmp_path / "spectra.parquet")
    assert steps(tmp_path / "spectra.parquet") == [0, 3]
    assert "stable_rank" not in table.columns


def test_other_metrics_after_a_resume_are_further_columns(tmp_path: Path) -> None:
    trainer(tmp_path, SpectralCallback("stable_rank", "attn.q", 2), max_steps=2).train()
    again = trainer(tmp_path, SpectralCallback("spectral_norm", "attn.q", 2), max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    table = pl.read_parquet(tmp_path / "spectra.parquet")
    known = table.select("step", *(pl.col(c).is_not_null() for c in ("stable_rank", "spectral_norm"))).unique()
    assert sorted(known.rows()) == [(0, True, False), (2, False, True), (4, False, True)]


def test_a_start_that_was_not_kept(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).train()
    late = trainer(tmp_path, SpectralCallback(base="start"), max_steps=4)
    with pytest.raises(RunError, match=r"goes on at step 2, but the weights from its beginning are not at .*-start"):
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_tokens_are_noted_where_they_are_counted(tmp_path: Path) -> None:
    trainer(tmp_path, SpectralCallback(every=2), include_num_input_tokens_seen="all").train()
    table = pl.read_parquet(tmp_path / "spectra.parquet").select("step", "tokens").unique().sort("step")
    assert table.rows() == [(0, None), (2, 2 * 4 * 8), (4, 4 * 4 * 8)]


def test_the_last_step_is_measured(tmp_path: Path) -> None:
    trainer(tmp_path, SpectralCallback(every=3)).train()
    assert steps(tmp_path / "spectra.parquet") == [0, 3, 4]


def test_reporters_get_medians(tmp_path: Path) -> None:
    """Reporters of the Trainer's own stand before any callback that is passed, as here."""
    recorder = Recorder()
    one = trainer(tmp_path, recorder, SpectralCallback("stable_rank", "attn.q, mlp.up", 2), logging_steps=4)
    one.train()
    table = pl.read_parquet(tmp_path / "spectra.parquet")
    assert [entry["step"] for entry in recorder.spectral()] == [0, 2, 4]
    last, rows = recorder.spectral()[-1], table.filter(step=4)
    for part, own in (("all", rows), ("attn.q", rows.filter(projection="q")), ("mlp.up", rows.filter(projection="up"))):
        assert last[f"spectral/stable_rank/{part}"] == np.median(own["stable_rank"].to_numpy())
    assert set(last) == {
        *(f"spectral/stable_rank/{part}" for part in ("all", "attn.q", "mlp.up")),
        *("spectral/seconds", "epoch", "step"),
    }
    history = [entry for entry in one.state.log_history if "spectral/seconds" in entry]
    assert history == recorder.spectral()
    assert [entry["step"] for entry in recorder.logs if "loss" in entry] == [4]  # what was due is reported still


def test_called_without_a_trainer_numbers_are_in_the_history(tmp_path: Path) -> None:
    args, state = tf.TrainingArguments(output_dir=str(tmp_path), use_cpu=True), tf.TrainerState()
    SpectralCallback(select="attn.o").on_train_begin(args, state, tf.TrainerControl(), model=model())
    assert state.log_history[0]["spectral/effective_rank/attn.o"] > 1


def test_medians_by_hand() -> None:
    rows = pl.DataFrame(
        {
            "block": ["attn", "attn", "attn", "embed", "other", "mlp"],
            "projection": ["q", "q", "o", "embed", None, "up"],
            "x": [1.0, 3.0, 5.0, None, 8.0, 7.0],
        },
        schema_overrides={"x": pl.Float64},
    )
    # embed has no value; 1 3 5 7 8 has the middle 5
    wanted = {"all": 5.0, "attn.q": 2.0, "attn.o": 5.0, "other": 8.0, "mlp.up": 7.0}
    assert medians(rows) == {f"spectral/x/{part}": value for part, value in wanted.items()}


def test_a_matrix_that_is_not_finite_stops_nothing(tmp_path: Path) -> None:
    net = model()
    with torch.no_grad():
        net.model.layers[0].self_attn.q_proj.weight[0, 0] = torch.nan
    trainer(tmp_path, SpectralCallback("stable_rank", "layers 0, attn.q, attn.v", 2), net=net, max_steps=2).train()
    table = pl.read_parquet(tmp_path / "spectra.parquet").filter(step=0)
    assert table.select(pl.col("stable_rank").is_null(), "status").rows()[0] == (True, "non_finite")
    assert table.filter(projection="v")["status"].to_list() == ["ok"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": "stable_rnk"}, "Did you mean 'stable_rank'"),
        ({"metrics": "delta_relative"}, "no base. Pass base='start'"),
        ({"metrics": ["agreement"]}, "no base. Pass base='start'"),
        ({"select": "layers x"}, "expected numbers such as"),
        ({"every": 0}, "expected a number of steps"),
    ],
)
def test_what_is_wrong_by_itself_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        SpectralCallback(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "attn.z"}, "fits no matrix of this model"),
        ({"select": "layers 7"}, "leaves none of"),
        ({"device": "tpu"}, "unknown device"),
        ({"base": "/nowhere/at-all"}, "no checkpoint at"),
        ({"base": {"w": np.eye(3)}}, "share no tensor"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    recorder = Recorder()
    one = trainer(tmp_path, SpectralCallback(every=500, **options), recorder)
    with pytest.raises(diffract.DiffractError, match=message):
        one.train()
    assert recorder.steps == 0
    assert not (tmp_path / "spectra.parquet").exists()


def test_other_files_are_not_replaced(tmp_path: Path) -> None:
    foreign = tmp_path / "data.parquet"
    pl.DataFrame({"step": [1], "text": ["x"]}).write_parquet(foreign)
    (tmp_path / "notes.parquet").write_text("mine")
    for name, message in (("data", "no table of SpectralCallback"), ("notes", "cannot be read")):
        before = (tmp_path / f"{name}.parquet").read_bytes()
        with pytest.raises(RunError, match=message):
            trainer(tmp_path, SpectralCallback(output=tmp_path / f"{name}.parquet")).train()
        assert (tmp_path / f"{name}.parquet").read_bytes() == before
    assert rows_before(5, tmp_path / "none.parquet").schema == pl.Schema(NAMED)


def test_only_the_main_process_measures(tmp_path: Path) -> None:
    args, state = tf.TrainingArguments(output_dir=str(tmp_path), use_cpu=True), tf.TrainerState()
    state.is_world_process_zero = False
    callback, control = SpectralCallback(every=1, base="start"), tf.TrainerControl()
    assert callback.on_train_begin(args, state, control, model=model()) is None
    assert callback.on_step_end(args, state, control, model=model()) is None
    callback.on_train_end(args, state, control)
    assert list(tmp_path.iterdir()) == []
    assert state.log_history == []


def test_a_base_that_is_the_model_itself(tmp_path: Path) -> None:
    net = model()
    for base in (net, net.state_dict()):
        with pytest.raises(CheckpointError, match="the very tensors that are trained"):
            trainer(tmp_path, SpectralCallback(base=base), net=net).train()
    refuse_shared({name: value.clone() for name, value in net.state_dict().items()}, net)


def test_sharded_models_are_refused_by_every_process(tmp_path: Path) -> None:
    args, state = tf.TrainingArguments(output_dir=str(tmp_path), use_cpu=True), tf.TrainerState()
    state.is_world_process_zero = False
    net = model()
    refuse_sharded(net)
    net.lm_head.weight.ds_id = 3
    with pytest.raises(CheckpointError, match=r"sharded \(DeepSpeed ZeRO-3\)"):
        SpectralCallback().on_train_begin(args, state, tf.TrainerControl(), model=net)
    net = model()
    net._tp_size = 2
    with pytest.raises(CheckpointError, match=r"sharded \(tensor parallelism\)"):
        refuse_sharded(net)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_models_with_an_adapter_are_refused(tmp_path: Path) -> None:
    import peft

    net = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match="trained through an adapter"):
        trainer(tmp_path, SpectralCallback(), net=net).train()


def test_models_that_torch_shards() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        with pytest.raises(CheckpointError, match=r"sharded \(DTensor"):
            refuse_sharded(fully_shard(torch.nn.Linear(4, 4), mesh=mesh))
        wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
        torch.nn.Module.__init__(wrapper)
        with pytest.raises(CheckpointError, match=r"sharded \(FSDP\)"):
            refuse_sharded(torch.nn.Sequential(torch.nn.Linear(4, 4), wrapper))
    finally:
        torch.distributed.destroy_process_group()


def test_a_dear_measurement_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)

    def perf_counter() -> float:
        clock.now += 1.0
        return clock.now

    monkeypatch.setattr("diffract.callback.time", SimpleNamespace(perf_counter=perf_counter))
    with pytest.warns(UserWarning, match="SpectralCallback took 1 s, 100.0% of the 1 s of the 1 steps") as said:
        trainer(tmp_path, SpectralCallback(every=1)).train()
    assert len([w for w in said if "SpectralCallback" in str(w.message)]) == 1


@pytest.mark.filterwarnings("error")
def test_the_warning_names_an_interval_that_is_enough() -> None:
    assert not warn_of_cost(1.0, 50.0, 500)
    # 3 s are 2% of 150 s; a step takes 0.25 s, so that takes 600 steps
    with pytest.warns(UserWarning, match=r"took 3 s, 2.4% of the 125 s of the 500 steps before. every=600 would"):
        assert warn_of_cost(3.0, 125.0, 500)
    # 601.6 steps, to two digits, upwards
    with pytest.warns(UserWarning, match="every=610 "):
        warn_of_cost(3.008, 125.0, 500)
    with pytest.warns(UserWarning, match="every=2 "):
        warn_of_cost(0.03, 1.0, 1)


def test_python_s_random_state_is_left_alone(tmp_path: Path) -> None:
    """In a process of its own, as the checks of types that the tests add to the package draw numbers from it."""
    code = (
        "import random, sys, torch, transformers as tf, diffract; "
        "args = tf.TrainingArguments(output_dir=sys.argv[1], use_cpu=True); net = torch.nn.Linear(8, 9); "
        "before = random.getstate(); "
        "diffract.SpectralCallback('all', base='start').on_train_begin(args, tf.TrainerState(), None, model=net); "
        "print(before == random.getstate())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert done.stdout == "True\n"
    assert len(pl.read_parquet(tmp_path / "spectra.parquet")) == 1


def test_transformers_is_imported_with_the_callback_only() -> None:
    code = (
        "import sys, diffract; from diffract import scan; print('transformers' in sys.modules); "
        "sys.modules['transformers'] = None\n"
        "try: diffract.SpectralCallback\n"
        "except diffract.DiffractError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded, message = done.stdout.splitlines()
    assert loaded == "False"
    assert "pip install 'diffract-llm[train]'" in message


def test_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    (tmp_path / "samples").symlink_to(root / "samples")
    monkeypatch.chdir(tmp_path)
    page = (root / "docs" / "callback.md").read_text(encoding="utf-8")
    known: dict[str, Any] = {}
    for body in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(compile(body, "callback.md", "exec"), known)
    assert steps(tmp_path / "run" / "spectra.parquet") == [0, 20, 40, 60]
    assert (tmp_path / "one.html").stat().st_size > 0
    for option in inspect.signature(SpectralCallback).parameters:
        assert f"| `{option}` |" in page
