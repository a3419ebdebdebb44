"""Scores by all that they depend on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffract.cache import Cache
from diffract.evaluate import Evaluator, Subject, load_tasks, paired, summarise
from diffract.evaluate import evaluator as module
from diffract.evaluate.digests import model_digest


def test_one_ulp_of_one_weight_gives_another_digest(subject: Subject) -> None:
    before = model_digest(subject.model)
    weight = dict(subject.model.named_parameters())["model.layers.1.mlp.up_proj.weight"].data
    old = weight[3, 5].clone()
    weight[3, 5] = torch.nextafter(old, torch.tensor(torch.inf))
    assert model_digest(subject.model) != before
    weight[3, 5] = old
    assert model_digest(subject.model) == before


def test_what_was_scored_is_not_scored_again(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = load_tasks("math,gsm:1", limit=70)
    with Cache(tmp_path) as cache:
        first = Evaluator(subject, tasks, cache=cache).scores()
        monkeypatch.setattr(module, "SCORERS", {})
        assert Evaluator(subject, tasks, cache=cache).scores().equals(first)
    assert first["task"].to_list() == ["math"] * 70 + ["gsm:1"] * 70
    assert first.select("task", "item").is_unique().all()


def test_an_edited_model_is_scored_as_it_stands(subject: Subject, tmp_path: Path) -> None:
    tasks = load_tasks("math", limit=5)
    with Cache(tmp_path) as cache:
        run = Evaluator(subject, tasks, cache=cache)
        before = run.scores()
        subject.model.lm_head.weight.data.zero_()  # all tokens are equally likely then: log2(257) bits each
        after = run.scores()
    assert after["value"].to_list() == pytest.approx([8.005625 * w for w in after["weight"]], rel=1e-6)  # float32
    assert paired(before, after, tasks)["difference"][0] == pytest.approx(
        summarise(after, tasks)["quality"][0] - summarise(before, tasks)["quality"][0], abs=1e-12
    )
