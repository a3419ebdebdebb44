"""Measure a search over truncations with decompositions kept, and with each step making its own.

    python benchmarks/search.py --width 1024 --layers 2

A model of two layers with the sample family's tokenizer, random weights, and a tuned one with 3% of noise. Both ways
run in turn in one process, and must find the same tables to the last bit. Evaluations are of a few word problems, so
that what is measured is the edits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import torch
from polars.testing import assert_frame_equal
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from diffract.edits.directions import Decompositions
from diffract.run import Run
from diffract.search import search_truncate

SAMPLE = Path(__file__).parents[1] / "samples/tiny-olmo2/base"


def models(width: int, layers: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a base and a tuned model."""
    config = AutoConfig.from_pretrained(SAMPLE)
    config.update({"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers})
    config.update({"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64})
    torch.manual_seed(0)
    base, tuned = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for weight in tuned.parameters():
            if weight.ndim > 1:
                weight.add_(torch.randn_like(weight) * weight.std(), alpha=0.03)
    return base, tuned


def search(base: torch.nn.Module, tuned: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[Run, float]:
    """Return what a search finds, and its seconds."""
    begun = time.perf_counter()
    found = search_truncate(base, tuned, eval="math=word-problems:1", limit=2, seeds=1, tokenizer=tokenizer)
    assert isinstance(found, Run)
    return found, time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    asked = parser.parse_args()
    tokenizer, pair = AutoTokenizer.from_pretrained(SAMPLE), models(asked.width, asked.layers)
    seconds: dict[str, list[float]] = {"kept": [], "each step its own": []}
    for _ in range(asked.repeats):
        kept, took = search(*pair, tokenizer)
        seconds["kept"].append(took)
        with patch.object(Decompositions, "of", lambda self, way, matrices, make: make()):
            anew, took = search(*pair, tokenizer)
        seconds["each step its own"].append(took)
        for name in kept.tables.frames:
            assert_frame_equal(kept.tables.frames[name], anew.tables.frames[name], check_exact=True)
    print(f"width {asked.width}, {asked.layers} layers, {torch.get_num_threads()} threads, the same tables bit for bit")
    print("\n| decompositions | seconds |\n|---|---|")
    for name, took in seconds.items():
        print(f"| {name} | {statistics.median(took):.1f} |")


if __name__ == "__main__":
    main()
