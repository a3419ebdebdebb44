"""Every text model type of transformers: the heads that are cut are those that the live attention is given.

The verdicts are written to docs/families.md.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from every_type import Verdict, build, judge, text_types

DOCS = Path(__file__).parents[2] / "docs" / "families.md"
MEANINGS = {
    "right": "every attention module is cut, and each part was found in the live model",
    "in part": "what is cut is right; the rest stays whole",
    "cut, not judged": "some of what is cut could not be observed",
    "generic": "nothing is cut into heads",
    "not built": "no tiny model could be made",
    "wrong": "what is cut is not what the live attention is given",
}
HEAD = f"""# Families

How diffract reads every type that transformers {transformers.__version__} has for causal, masked and
sequence-to-sequence language models. `pytest -m slow
tests/architectures/test_every_type.py` writes this page: it builds each type tiny, gives
it one token, and compares. A head's queries and keys must be among the operands of the
products that the live model makes, and a change of a value head's rows must reach those
columns of the output projection that are called its own, and no others. Towers for images
and sound are called alone. `structure` is read by names and shapes without a file of its
own.
"""


def verdict(config_class: type, model_class: type) -> Verdict:
    try:
        model = build(config_class, model_class)
    except Exception as error:  # whatever a type raises that cannot be built tiny is the answer
        return Verdict("not built", f"{type(error).__name__}: {error}")
    inputs: dict = {"input_ids": torch.tensor([[7]])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[5]])
    if "use_cache" in model_class.forward.__code__.co_varnames:
        inputs["use_cache"] = False
    return judge(model, inputs)


def page(verdicts: dict[str, Verdict]) -> str:
    counts = Counter(v.word for v in verdicts.values())
    summary = [f"| {word} | {counts[word]} | {meaning} |" for word, meaning in MEANINGS.items()]
    rows = [
        f"| `{name}` | {v.word} | {f'`{v.family}`' if v.family else ''} | {_short(v.why)} |"
        for name, v in verdicts.items()
    ]
    lines = ["| verdict | types | meaning |", "|---|---|---|", *summary, ""]
    return "\n".join([HEAD, *lines, "| type | verdict | read as | why |", "|---|---|---|---|", *rows, ""])


def _short(text: str) -> str:
    """Put a reason in one line, without marks of tables and without advice."""
    first = " ".join(text.split()).split(" Pass --architecture")[0].replace("|", "/").replace("`", "'")
    first = first.removesuffix(".") if len(first) < 200 else first[:197] + "..."
    return first.replace("<", "&lt;")


ONE_TOKEN = {"input_ids": torch.tensor([[7]]), "use_cache": False}


def test_a_plain_model_is_right() -> None:
    assert judge(build(*text_types()["llama"]), ONE_TOKEN).word == "right"


def test_twice_as_many_heads_are_not_right() -> None:
    """Sizes fit, so that nothing but the live model can tell."""
    model = build(*text_types()["llama"])
    for key, value in {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6}.items():
        setattr(model.config, key, value)
    assert judge(model, ONE_TOKEN).word != "right"


def test_outputs_of_other_heads_are_wrong() -> None:
    model = build(*text_types()["llama"])
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0].roll(12, -1),))
    assert judge(model, ONE_TOKEN).word == "wrong"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_type() -> None:
    transformers.logging.set_verbosity_error()
    verdicts = {name: verdict(*classes) for name, classes in text_types().items()}
    DOCS.write_text(page(verdicts), encoding="utf-8")
    wrong = {name: v.why for name, v in verdicts.items() if v.word == "wrong"}
    assert not wrong
    assert sum(v.word == "right" for v in verdicts.values()) >= 200
