"""A whole search over the heads of the sample family: its numbers are those of its items; when killed it goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from diffract.api import evaluate
from diffract.edits import LiveModel, Rewind
from diffract.errors import CheckpointError, CorpusError, RunError, SelectionError
from diffract.evaluate import Evaluator, holm, load_subject, load_tasks, paired
from diffract.run import Run
from diffract.schemas import KINDS
from diffract.search import Estimate, search_rewind
from diffract.search.scorer import refuse_overlap
from diffract.search.stage import SearchRequest, working
from diffract.tables import load
from search_cases import BASE, MATH, NATURAL, score_frame

TASKS = "math,easy=word-problems:1"
FAST: dict[str, Any] = {"eval": TASKS, "limit": 3, "fractions": "0,0.25,0.7,1", "seeds": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """One search, of all orders, which also wrote what it chose."""
    folder = tmp_path_factory.mktemp("search")
    found = search_rewind(BASE, MATH, reference=NATURAL, output=folder / "run", write=folder / "out", **FAST)
    assert isinstance(found, Run)
    return found, folder


def test_the_run_folder_is_whole(finished: tuple[Run, Path]) -> None:
    found, folder = finished
    again = load(folder / "run")
    for name in KINDS["search rewind"]:
        assert_frame_equal(getattr(again, name), getattr(found, name))
    assert again.manifest["kind"] == "search rewind"
    assert not (folder / "run.work").exists()
    assert (folder / "run" / "cache" / "results").is_dir()
    assert [m["role"] for m in again.manifest["models"]] == ["base", "tuned"]
    assert len({m["digest"] for m in again.manifest["models"]}) == 2


def test_quality_is_that_of_the_items(finished: tuple[Run, Path]) -> None:
    points, items = finished[0].points, finished[0].items
    sums = items.group_by("state", "split", "task").agg(q=pl.col("value").sum() / pl.col("weight").sum())
    both = points.join(sums, on=["state", "split", "task"], how="left")
    assert (both["quality"] - both["q"]).abs().max() < 1e-12  # sums of three in another order
    tuned = both.filter(pl.col("state") == 0).select("split", "task", zero="q").unique()
    gain = both.join(tuned, on=["split", "task"]).select(wrong=pl.col("gain") - (pl.col("zero") - pl.col("q")))
    assert gain["wrong"].abs().max() < 1e-12  # type: ignore[operator]
    assert (points["gain_low"] <= points["gain"] + 1e-12).all()
    assert (points["gain"] <= points["gain_high"] + 1e-12).all()


def test_ends_are_the_models_themselves(finished: tuple[Run, Path]) -> None:
    points = finished[0].points
    for reference, rows in ((MATH, points.filter(pl.col("fraction") == 0)), (BASE, points.filter(order="base"))):
        alone = evaluate(reference, TASKS, limit=3, cache=False).summary
        for task, quality in alone.select("task", "quality").rows():
            own = rows.filter(split="held-out", task=task)["quality"]
            assert own.len() > 0
            assert (own - quality).abs().max() < 1e-9  # batches of another size


def test_every_curve_begins_and_ends_alike(finished: tuple[Run, Path]) -> None:
    curves = finished[0].points.filter(pl.col("order") != "base")
    assert curves.select("order", "seed", "reverse").unique().height == 6 + 6
    for at in (0.0, 1.0):
        assert curves.filter(pl.col("fraction") == at)["state"].n_unique() == 1
    assert curves.group_by("order", "seed", "reverse", "split", "task").len()["len"].unique().to_list() == [4]


def test_effects_are_those_of_single_heads(finished: tuple[Run, Path]) -> None:
    effects = finished[0].effects
    assert effects.height == 32
    subject, base = load_subject(MATH), load_subject(BASE, device="cpu").model
    tasks = load_tasks(TASKS, split="selection", limit=3)
    live, judge = LiveModel(subject.model), Evaluator(subject, tasks)
    before = judge.scores()
    for name in ("L0.h0", "L2.h2", "L3.h1"):
        with live.edited(Rewind(to=base, heads=name)):
            difference = paired(before, judge.scores(), tasks)
        row = effects.row(by_predicate=pl.col("name") == name, named=True)
        assert row["effect"] == pytest.approx(difference["gain"][0], abs=1e-12)
        assert row["effect_easy"] == pytest.approx(difference["gain"][1], abs=1e-12)
        assert row["low"] is difference["high"][0] is None  # three documents are too few for an interval
    assert effects["p_holm"].to_list() == holm(effects["p"].to_list())


def test_rewind_takes_the_greedy_order_of_the_run(finished: tuple[Run, Path]) -> None:
    found, folder = finished
    live = LiveModel(load_subject(MATH).model)
    step = Rewind(to=BASE, fraction=0.25, order="greedy", scores=str(folder / "run" / "effects.parquet"))
    names = step.plan(live.bench, live.bench.draft()).summary["names"]
    rows = found.points.filter(order="greedy", reverse=False, fraction=0.25)
    assert rows["heads"].to_list() == [names] * rows.height


def test_what_is_chosen_is_chosen_on_selection_and_reported_on_held_out(finished: tuple[Run, Path]) -> None:
    found = finished[0]
    assert found.choice.height == 2 * 12
    for row in found.choice.iter_rows(named=True):
        own = found.points.filter(
            order=row["order"], seed=row["seed"], reverse=row["reverse"], task="math", split="selection"
        )
        if row["which"] == "best":
            assert row["selection_gain"] == own["gain"].max()
        else:
            assert row["fraction"] == own.filter(pl.col("gain_high").fill_null(pl.col("gain")) >= 0)["fraction"].max()
        held = found.points.filter(state=row["state"], split="held-out", task="math")
        assert row["held_out_gain"] == held["gain"][0]
        assert row["held_out_gain_low"] == held["gain_low"][0]
    best = found.choice.filter(pl.col("which") == "best", ~pl.col("control"))["selection_gain"].max()
    assert found.manifest["chosen"]["selection_gain"] == best


def test_the_first_order_ranks_heads_as_effects_do(finished: tuple[Run, Path]) -> None:
    rho = dict(finished[0].orders.select("order", "spearman").rows())
    assert set(rho) == {"reference", "magnitude", "first-order", "activation"}
    assert rho["first-order"] > 0.6  # 0.9 with more items
    assert (
        finished[0].effects.select("magnitude", "reference", "first_order", "activation").null_count().row(0)
        == (0,) * 4
    )


def test_the_written_checkpoint_scores_as_the_live_model_did(finished: tuple[Run, Path]) -> None:
    found, folder = finished
    written = found.manifest["written"]
    assert written["same_scores"] is True
    alone = evaluate(str(folder / "out"), TASKS, limit=3, cache=False).summary
    assert [row["written"] for row in written["held_out"]] == pytest.approx(alone["quality"].to_list(), rel=1e-9)
    assert alone["quality"][0] == pytest.approx(found.manifest["chosen"]["held_out_quality"], rel=1e-9)
    recipe = (folder / "out" / "recipe.yaml").read_text()
    assert ",".join(found.manifest["chosen"]["heads"]) in recipe.replace("\n      ", "")
    assert BASE in recipe


class KilledError(Exception):
    """In place of a signal."""


def test_a_search_that_was_stopped_goes_on(
    finished: tuple[Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, computed = Evaluator._part_scores, []

    def counted(self: Evaluator, task: Any, part: Any, key: str) -> Any:
        if self.cache is None or self.cache.get(key) is None:
            computed.append(key)
            if len(computed) == stop:
                raise KilledError
        return plain(self, task, part, key)

    monkeypatch.setattr(Evaluator, "_part_scores", counted)
    stop = 60
    with pytest.raises(KilledError):
        search_rewind(BASE, MATH, reference=NATURAL, output=tmp_path / "run", **FAST)
    assert (tmp_path / "run.work" / "results").is_dir()
    assert not (tmp_path / "run").exists()
    before, stop = len(set(computed)) - 1, -1
    found = search_rewind(BASE, MATH, reference=NATURAL, output=tmp_path / "run", **FAST)
    assert isinstance(found, Run)
    assert len(computed) == len(set(computed)) + 1  # only the one that was interrupted was begun twice
    assert len(set(computed)) > before
    for name in KINDS["search rewind"]:
        assert_frame_equal(getattr(found, name), getattr(finished[0], name))
    assert not (tmp_path / "run.work").exists()


def test_a_killed_process_is_continued(tmp_path: Path) -> None:
    """SIGKILL in the middle of evaluations: the same search finishes from what the other has left."""
    texts = [json.dumps({"text": f"{n} and {n} is {2 * n}."}) for n in range(99)]
    (tmp_path / "own.jsonl").write_text("\n".join(texts))
    asked: dict[str, Any] = {"order": "greedy", "eval": "own=own.jsonl", "data": str(tmp_path), "limit": 3}
    asked |= {"fractions": "0,1", "output": str(tmp_path / "run")}
    code = (
        "import json, sys; from diffract.search import search_rewind; "
        "search_rewind(*sys.argv[1:3], **json.loads(sys.argv[3]), progress=lambda done, *_: print(done, flush=True))"
    )
    command = [sys.executable, "-c", code, BASE, MATH, json.dumps(asked)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if float(line) >= 10:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "run.work").is_dir()
    search_rewind(BASE, MATH, **asked)
    assert load(tmp_path / "run").effects["effect"].null_count() == 0


def test_another_search_into_the_folder_goes_on_from_its_scores(
    finished: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = finished
    with pytest.raises(RunError, match="exists"):
        search_rewind(BASE, MATH, order="greedy", output=folder / "run", **FAST)

    def refuse(*_: object) -> None:
        raise AssertionError("something was evaluated anew")

    monkeypatch.setattr("diffract.evaluate.run.SCORERS", {"bits": refuse})
    found = search_rewind(BASE, MATH, order="greedy", output=folder / "run", force=True, **FAST)
    assert isinstance(found, Run)
    assert found.orders.is_empty()


def test_a_dry_run_writes_nothing_and_counts_at_most_what_is_done(finished: tuple[Run, Path], tmp_path: Path) -> None:
    found = search_rewind(BASE, MATH, reference=NATURAL, output=tmp_path / "run", dry_run=True, **FAST)
    assert isinstance(found, Estimate)
    assert list(tmp_path.iterdir()) == []
    # ends 3; 32 heads; 12 curves of 2 points; of each 2 chosen points
    assert found.evaluations == {"selection": 3 + 32 + 24, "held-out": 3 + 24 + 24}
    assert found.seconds == pytest.approx(59 * found.seconds_each["selection"] + 51 * found.seconds_each["held-out"])
    assert finished[0].manifest["evaluations"] <= sum(found.evaluations.values())


def test_a_budget_leaves_out_and_says_so() -> None:
    found = search_rewind(BASE, MATH, order="greedy,magnitude", budget=20, eval="math", limit=2, fractions="0:1:0.25")
    assert isinstance(found, Run)
    assert found.manifest["evaluations"] <= 20
    assert found.manifest["left_out"][0] == "effects of 32 single heads, and what needs them"
    assert found.effects["effect"].null_count() == 32
    assert found.effects["magnitude"].null_count() == 0
    assert set(found.choice["order"]) == {"magnitude"}
    assert found.orders.is_empty()


def test_nothing_gained_is_the_tuned_model(tmp_path: Path) -> None:
    """Where nothing helps, what is written is the tuned model, tensor for tensor."""
    fast: dict[str, Any] = {"order": "magnitude", "eval": "math=word-problems:1", "limit": 3, "fractions": "0,1"}
    found = search_rewind(BASE, MATH, write=tmp_path / "out", **fast)
    assert isinstance(found, Run)
    assert found.manifest["chosen"]["fraction"] == 0
    assert found.manifest["written"]["same_scores"] is True
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (Path(MATH) / "model.safetensors").read_bytes()


def test_what_cannot_be_written_is_said_before_anything_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something was evaluated")

    monkeypatch.setattr(Evaluator, "scores", refuse)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    fast: dict[str, Any] = {"eval": "math", "limit": 2, "write": tmp_path / "out"}
    with pytest.raises(RunError, match="exists"):
        search_rewind(BASE, MATH, **fast)
    with pytest.raises(RunError, match=r"holds no manifest\.json of diffract's"):
        search_rewind(BASE, MATH, force=True, **fast)
    with pytest.raises(SelectionError, match="only controls are searched"):
        search_rewind(BASE, MATH, order="random", **fast | {"write": tmp_path / "other"})


def test_a_budget_for_controls_alone_writes_nothing(tmp_path: Path) -> None:
    fast: dict[str, Any] = {"eval": "math", "limit": 2, "fractions": "0,0.5,1", "write": tmp_path / "out"}
    found = search_rewind(BASE, MATH, order="greedy,random", seeds=1, budget=12, **fast)
    assert isinstance(found, Run)
    assert found.manifest["chosen"] is None
    assert found.manifest["written"] is None
    assert "is not written: the budget sufficed for controls alone" in found.manifest["warnings"][-1]
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_searched(tmp_path: Path) -> None:
    fast: dict[str, Any] = {"eval": "math", "limit": 2}
    with pytest.raises(SelectionError, match=r"unknown order 'greedi', expected one of: .*\. Did you mean 'greedy'"):
        search_rewind(BASE, MATH, order="greedi", **fast)
    with pytest.raises(SelectionError, match="unknown kv 'al', expected one of: all, majority, never"):
        search_rewind(BASE, MATH, kv="al", **fast)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="seeds: expected 1 or more, got 0"):
        search_rewind(BASE, MATH, seeds=0, **fast)
    with pytest.raises(SelectionError, match="tolerance: expected a loss from 0, got -1"):
        search_rewind(BASE, MATH, tolerance=-1, **fast)
    with pytest.raises(SelectionError, match="unknown task 'maths'"):
        search_rewind(BASE, MATH, eval="maths")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        search_rewind(str(tmp_path / "none"), MATH, **fast)
    other = tmp_path / "other"
    _narrower(other)
    with pytest.raises(CheckpointError, match="do not belong together"):
        search_rewind(str(other), MATH, **fast)


def _narrower(folder: Path) -> None:
    """Another model with the tuned one's tokenizer."""
    import shutil

    import transformers as tf

    config = tf.AutoConfig.from_pretrained(MATH)
    config.intermediate_size = 32
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(MATH) / name, folder / name)


def test_items_of_both_splits_are_refused() -> None:
    one, two = score_frame("quality", [1, 2, 3]), score_frame("quality", [1, 2, 3], prefix="other")
    refuse_overlap(one, two)
    with pytest.raises(CorpusError, match="'quality': 1 items are in both the selection and the held-out split, first"):
        refuse_overlap(one, pl.concat([two, one[2:]]))
    refuse_overlap(one, one.with_columns(task=pl.lit("another")))


def test_two_searches_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    asked = SearchRequest(models={}, live="tuned", eval="math", output=tmp_path / "run")
    with working(asked), pytest.raises(RunError, match="another process is searching into"), working(asked):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run.work"]
    with working(asked) as cache:
        assert cache is not None


def test_a_place_of_work_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    asked = SearchRequest(models={}, live="tuned", eval="math", output=tmp_path / "run")
    (tmp_path / "run.work").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot write to .*run\.work"), working(asked):
        pass


def test_what_lies_beside_decides_and_without_it_that_is_said() -> None:
    fast: dict[str, Any] = {"order": "magnitude", "eval": "math=word-problems:1", "limit": 3, "fractions": "0,1"}
    bare = search_rewind(BASE, MATH, **fast)
    found = search_rewind(BASE, MATH, beside="harder=word-problems:2", keep="kept=word-problems:3", **fast)
    assert isinstance(bare, Run)
    assert isinstance(found, Run)
    assert any(text.startswith("judged without --beside") for text in bare.manifest["warnings"])
    assert not any("--beside" in text for text in found.manifest["warnings"])
    assert set(bare.choice["task"]) == {"math"}
    assert set(found.choice["task"]) == {"harder"}
    assert found.points["task"].unique(maintain_order=True).to_list() == ["harder", "math", "kept"]
    told = found.manifest["settings"]
    assert (told["eval"], told["beside"], told["keep"]) == (
        "math=word-problems:1",
        "harder=word-problems:2",
        "kept=word-problems:3",
    )
