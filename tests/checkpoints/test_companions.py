"""Which files beside the weights belong to a model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffract.checkpoints import open_checkpoint
from diffract.errors import CheckpointError

KNOWN = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "spiece.model", "preprocessor_config.json", "processor_config.json", "tekken.json"),
    *("modeling_mine.py", "configuration_mine.py", "tokenization_mine.py", "helper.py", "LICENSE", "NOTICE"),
]
MORE = ["params.json", "notes.md", "sentence_bert_config.json", "1_Pooling/config.json", "code/deep/layers.py"]
STRANGE = [
    *("README.md", "training_args.bin", "optimizer.pt", "trainer_state.json", "manifest.json", "recipe.yaml"),
    *("events.out.tfevents.1", "model.safetensors.index.json", "pytorch_model.bin", ".gitattributes", "state.pkl"),
    *("checkpoint-500/config.json", "onnx/model.onnx", "onnx/config.json", ".cache/token", "__pycache__/a.pyc"),
    *("adapter_config.json", "original/params.json", "original/consolidated.00.pth", "a/b/c/d/too_deep.json"),
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2, 2)}, folder / "model.safetensors")
    for name in (*KNOWN, *MORE, *STRANGE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"name": "{name}"}}')
    return folder


@pytest.mark.parametrize(("reference", "belong"), [(".", [*KNOWN, *MORE]), ("model.safetensors", KNOWN)])
def test_what_belongs_to_a_model(reference: str, belong: list[str], model: Path) -> None:
    with open_checkpoint(model / reference) as checkpoint:
        assert sorted(checkpoint.companions) == sorted(belong)
        for name, read in checkpoint.companions.items():
            assert read() == (model / name).read_bytes()


def test_weights_of_a_listed_module_come_along(model: Path) -> None:
    """A dense layer of sentence-transformers lies in a folder of its own; others with weights are other models."""
    (model / "modules.json").write_text('[{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}]')
    for folder in ("2_Dense", "3_Dense"):
        (model / folder).mkdir()
        (model / folder / "config.json").write_text("{}")
        save_file({"w": torch.ones(1)}, model / folder / "model.safetensors")
    (model / "2_Dense" / "pytorch_model.bin").write_bytes(b"pickle")
    with open_checkpoint(model) as checkpoint:
        dense = {name for name in checkpoint.companions if "_Dense" in name}
    assert dense == {"2_Dense/config.json", "2_Dense/model.safetensors"}


@pytest.mark.parametrize("text", ["no json", "{}", "[1, {}]", "[" * 100_000])
def test_modules_that_are_no_list_of_modules(text: str, model: Path) -> None:
    (model / "modules.json").write_text(text)
    with open_checkpoint(model) as checkpoint:
        assert "modules.json" in checkpoint.companions


def test_what_a_link_brings_in_from_elsewhere_is_no_part_of_a_model(model: Path) -> None:
    secret = model.parent / "token"
    secret.write_text("hf_secret")
    (model / "LICENSE").unlink()
    (model / "LICENSE").symlink_to(secret)
    (model / "extra").symlink_to(model.parent, target_is_directory=True)
    (model / "inside.txt").symlink_to("merges.txt")
    with open_checkpoint(model) as checkpoint:
        assert "LICENSE" not in checkpoint.companions
        assert not any(name.startswith("extra") for name in checkpoint.companions)
        assert checkpoint.companions["inside.txt"]() == (model / "merges.txt").read_bytes()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused_where_it_counts(name: str, model: Path) -> None:
    (model / name).rename(model.parent / name)
    (model / name).symlink_to(model.parent / name)
    with pytest.raises(CheckpointError, match=f"{name}' is a link that leads out of its folder"):
        open_checkpoint(model)


def test_a_version_in_the_cache_of_the_hub_is_links_to_what_versions_share(model: Path) -> None:
    version = model.parent / "models--o--m" / "snapshots" / "0a1b"
    version.mkdir(parents=True)
    (blobs := version.parents[1] / "blobs").mkdir()
    for number, name in enumerate(("model.safetensors", "config.json", "tokenizer.json")):
        (model / name).rename(blobs / str(number))
        (version / name).symlink_to(f"../../blobs/{number}")
    with open_checkpoint(version) as checkpoint:
        assert sorted(checkpoint.companions) == ["config.json", "tokenizer.json"]
        assert checkpoint.read("a").sum() == 4


def test_they_are_read_when_asked_for(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        (model / "merges.txt").write_text("later")
        assert checkpoint.companions["merges.txt"]() == b"later"


def test_what_is_in_memory_has_none() -> None:
    assert open_checkpoint({"a": torch.ones(2, 2)}).companions == {}
