"""One head's rewind costs what that head is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf

from diffract.edits import LiveModel, Rewind

SAMPLES = Path(__file__).parents[2] / "samples" / "tiny-olmo2"
BASE, MATH = str(SAMPLES / "base"), str(SAMPLES / "math")


def test_only_what_a_head_consists_of_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a head: no more entries are copied than the head has."""
    model, base = (tf.AutoModelForCausalLM.from_pretrained(m) for m in (MATH, BASE))
    copied = []
    plain = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *a: (copied.append(self.numel()), plain(self, *a))[1])
    with LiveModel(model).edited(Rewind(to=base, heads="L2.h3")):
        assert sum(copied) == 2 * 16 * 128 + 16  # q and o, and the head's part of the queries' norm
