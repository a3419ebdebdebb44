"""Which files beside the weights belong to a model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffract.checkpoints import open_checkpoint

BELONG = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "spiece.model", "preprocessor_config.json", "processor_config.json"),
    *("modeling_mine.py", "configuration_mine.py", "tokenization_mine.py", "LICENSE", "LICENSE.txt", "NOTICE"),
]
STRANGE = [
    *("README.md", "training_args.bin", "optimizer.pt", "trainer_state.json", "manifest.json", "recipe.yaml"),
    *("events.out.tfevents.1", "model.safetensors.index.json", "pytorch_model.bin", ".gitattributes", "setup.py"),
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    for name in (*BELONG, *STRANGE):
        (tmp_path / name).write_text(f'{{"name": "{name}"}}')
    (tmp_path / "tokenizer_files").mkdir()
    return tmp_path


@pytest.mark.parametrize("reference", [".", "model.safetensors"])
def test_what_belongs_to_a_model(reference: str, model: Path) -> None:
    with open_checkpoint(model / reference) as checkpoint:
        assert sorted(checkpoint.companions) == sorted(BELONG)
        for name, read in checkpoint.companions.items():
            assert read() == (model / name).read_bytes()


def test_they_are_read_when_asked_for(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        (model / "merges.txt").write_text("later")
        assert checkpoint.companions["merges.txt"]() == b"later"


def test_what_is_in_memory_has_none() -> None:
    assert open_checkpoint({"a": torch.ones(2, 2)}).companions == {}
