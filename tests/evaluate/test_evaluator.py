"""Scores by all that they depend on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffract.evaluate import Evaluator, Subject, load_tasks, model, paired, summarise
from diffract.evaluate import run as evaluating
from diffract.evaluate.model import model_digest, tokenizer_digest
from diffract.evaluate.scoring import score_texts
from diffract.store import Cache
from tiny_language_model import byte_tokenizer, tiny_model


def test_a_digest_is_of_all_that_a_model_computes_with() -> None:
    found = {model_digest(tiny_model())}
    assert found == {model_digest(tiny_model())}
    other = tiny_model()
    other.config.rms_norm_eps *= 2
    found.add(model_digest(other))
    found.add(model_digest(tiny_model().to(torch.bfloat16)))
    found.add(model_digest(tiny_model(seed=1)))
    assert len(found) == 4


def test_tied_tensors_are_read_once(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Counting:
        """A hasher that counts bytes of tensors, which alone come as memory views."""

        def update(self, data: bytes | memoryview) -> None:
            read.append(data.nbytes if isinstance(data, memoryview) else 0)

        def hexdigest(self) -> str:
            return ""

    monkeypatch.setattr(model.blake3, "blake3", type("Made", (), {"AUTO": 0, "__new__": lambda *_, **__: Counting()}))
    model_digest(subject.model)
    # parameters() lists tied ones once
    assert sum(read) == sum(p.numel() * p.element_size() for p in subject.model.parameters())
    assert "lm_head.weight" in subject.model.state_dict()


def test_a_large_tensor_is_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model_digest(tiny_model())
    monkeypatch.setattr(model, "CHUNK_BYTES", 1000)
    assert model_digest(tiny_model()) == whole


def test_padding_is_no_part_of_a_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer.pad_token_id = None
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.backend_tokenizer.enable_truncation(5)
    assert tokenizer_digest(tokenizer) == before
    assert tokenizer_digest(byte_tokenizer(end=False)) != before


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
        monkeypatch.setattr(evaluating, "SCORERS", {})
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


def test_a_run_that_was_killed_goes_on(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = load_tasks("math", limit=150)
    expected = Evaluator(subject, tasks).scores()
    computed: list[int] = []

    def until_the_second(*given) -> list:
        if len(computed) == 1:
            raise KeyboardInterrupt
        return counted(*given)

    def counted(subject: Subject, items, budget) -> list:
        computed.append(len(items))
        return score_texts(subject, items, budget)

    with Cache(tmp_path) as cache:
        monkeypatch.setattr(evaluating, "SCORERS", {"bits": until_the_second})
        with pytest.raises(KeyboardInterrupt):
            Evaluator(subject, tasks, cache=cache).scores()
        monkeypatch.setattr(evaluating, "SCORERS", {"bits": counted})
        assert Evaluator(subject, tasks, cache=cache).scores().equals(expected)
    assert computed == [64, 64, 22]


def test_progress_counts_items(subject: Subject) -> None:
    seen: list[tuple[float, float, str]] = []
    tasks = load_tasks("math,gsm:1", limit=3)
    Evaluator(subject, tasks, progress=lambda *given: seen.append(given)).scores()
    assert seen == [(3, 6, "math"), (6, 6, "gsm:1")]


def test_scores_of_a_model_with_adapters_are_not_kept(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(subject.model, "peft_config", {"default": object()}, raising=False)
    with Cache(tmp_path) as cache:
        assert Evaluator(subject, [], cache=cache, notes=notes.append).cache is None
    assert notes == ["scores are not kept: the model holds adapters; merge them first"]


def test_a_model_in_training_is_not_while_it_is_scored(subject: Subject) -> None:
    tasks = load_tasks("math", limit=3)
    expected = Evaluator(subject, tasks).scores()
    for layer in subject.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    subject.model.train()
    assert Evaluator(subject, tasks).scores().equals(expected)
    assert subject.model.training
