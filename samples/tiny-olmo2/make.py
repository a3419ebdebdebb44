"""Train the sample family: a small OLMo-2 base and its continuations on four domains.

    python make.py --data CORPORA --out .

The domains are natural text, math, code and instructions. ``CORPORA`` holds the files named in ``FILES``; the code is
the running Python's standard library. The same seed, library versions and machine give the same weights again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sysconfig
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

FILES = {
    "books": "natural/gutenberg14.jsonl.gz",
    "gsm8k": "math/gsm8k.train.jsonl.gz",
    "tal": "math/tal_scq5k_en.train.jsonl.gz",
    "p3": "instructions/p3_subset.jsonl.gz",
    "roleplay": "instructions/gpteacher_roleplay_instruct.jsonl.gz",
}
EVALUATION_ONLY = ("gsm8k.test", "gsm8k.example", "gsm_hard", "humaneval", "user_oriented")
HELD_OUT_BOOKS = ("Jane Eyre", "Dracula", "Frankenstein")
HELD_OUT_SOURCES = ("quartz", "ropes")

DOMAINS = ("natural", "math", "code", "instructions")
BASE_MIX = {"natural": 0.85, "math": 0.05, "code": 0.05, "instructions": 0.05}
REPLAY = 0.1
"""Share of a continuation's batches that come from the base's mix."""

VOCABULARY = 1024
CONTEXT = 256
BATCH = 16
HELD_OUT_TOKENS = 50_000

Corpus = dict[str, tuple[list[str], list[str]]]


def read_lines(folder: Path, name: str) -> list[dict]:
    file = FILES[name]
    if any(part in file for part in EVALUATION_ONLY):
        raise SystemExit(f"{file} is for evaluation only and must not be trained on")
    with gzip.open(folder / file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def is_held_out(key: str) -> bool:
    """One document in twenty, by its content, so that the split does not depend on order."""
    return zlib.crc32(key.encode()) % 20 == 0


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    return [d for d in documents if not is_held_out(d)], [d for d in documents if is_held_out(d)]


def read_natural(folder: Path) -> tuple[list[str], list[str]]:
    books = read_lines(folder, "books")
    held_out = [b["text"] for b in books if any(title in b["title"] for title in HELD_OUT_BOOKS)]
    return [b["text"] for b in books if b["text"] not in held_out], held_out


def read_math(folder: Path) -> tuple[list[str], list[str]]:
    gsm = [f"Question: {r['question']}\nAnswer: {r['answer']}\n" for r in read_lines(folder, "gsm8k")]
    tal = [f"Question: {r['problem']}\nAnswer: {' '.join(r['analysis'])}\n" for r in read_lines(folder, "tal")]
    return split(gsm + tal)


def read_code() -> tuple[list[str], list[str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    return split([p.read_text(encoding="utf-8", errors="replace") for p in paths])


def read_instructions(folder: Path) -> tuple[list[str], list[str]]:
    records = read_lines(folder, "p3")
    asked = {True: [], False: []}
    for r in records:
        asked[r["source"] in HELD_OUT_SOURCES].append(as_dialogue(r["prompt"], r["completion"]))
    roleplay = [as_dialogue(f"{r['instruction']} {r['input']}", r["response"]) for r in read_lines(folder, "roleplay")]
    train, held_out = split(roleplay)
    return asked[False] + train, asked[True] + held_out


def as_dialogue(prompt: str, answer: str) -> str:
    return f"### Instruction:\n{prompt.strip()}\n### Response:\n{answer.strip()}\n"


def read_corpus(folder: Path) -> Corpus:
    return {
        "natural": read_natural(folder),
        "math": read_math(folder),
        "code": read_code(),
        "instructions": read_instructions(folder),
    }


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    sample = (text[:1_000_000] for train, _ in corpus.values() for text in "\n".join(train)[:2_000_000].split("\f"))
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """Return all documents as one stream of tokens, each ended by the end token."""
    end = tokenizer.token_to_id("<|end|>")
    return torch.tensor([i for e in tokenizer.encode_batch(documents) for i in (*e.ids, end)], dtype=torch.int32)


def spread(stream: torch.Tensor) -> torch.Tensor:
    """Return evenly spaced windows of a stream, so that every held-out document has its share."""
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    step = max(1, len(windows) * CONTEXT // HELD_OUT_TOKENS)
    return windows[::step][: HELD_OUT_TOKENS // CONTEXT].flatten()


def build_model(seed: int) -> Olmo2ForCausalLM:
    torch.manual_seed(seed)
    config = Olmo2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
    )
    return Olmo2ForCausalLM(config)


def draw_batches(
    streams: dict[str, torch.Tensor], mix: dict[str, float], steps: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield batches of windows, each row from a domain drawn with the mix's probabilities."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([mix[d] for d in DOMAINS])
    for _ in range(steps):
        rows = []
        for i in torch.multinomial(weights, BATCH, replacement=True, generator=generator).tolist():
            stream = streams[DOMAINS[i]]
            start = int(torch.randint(len(stream) - CONTEXT, (), generator=generator))
            rows.append(stream[start : start + CONTEXT])
        yield torch.stack(rows).long()


def train(
    model: Olmo2ForCausalLM,
    streams: dict[str, torch.Tensor],
    mix: dict[str, float],
    steps: int,
    rate: float,
    seed: int,
) -> float:
    """Train with AdamW, a warm-up of a twentieth and a cosine down to a tenth; return the seconds it took."""
    begun = time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, steps // 20)
    model.train()
    for step, batch in enumerate(draw_batches(streams, mix, steps, seed)):
        progress = max(0.0, (step - warm) / max(1, steps - warm))
        scale = min(1.0, (step + 1) / warm) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"  step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - begun:6.0f} s", flush=True)
    return time.monotonic() - begun


@torch.no_grad()
def evaluate(folder: Path, held_out: dict[str, torch.Tensor], token_bytes: torch.Tensor) -> dict[str, dict[str, float]]:
    """Return nats per token and bits per byte of a saved model on each domain's held-out text."""
    model = Olmo2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for domain, stream in held_out.items():
        windows = stream.view(-1, CONTEXT).long()
        nats = 0.0
        for batch in windows.split(BATCH):
            logits = model(input_ids=batch).logits[:, :-1]
            nats += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).double(), batch[:, 1:].flatten(), reduction="sum"
            ).item()
        predicted = windows[:, 1:]
        found[domain] = {
            "nats_per_token": round(nats / predicted.numel(), 4),
            "bits_per_byte": round(nats / math.log(2) / int(token_bytes[predicted].sum()), 4),
        }
    return found


def save(model: Olmo2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a rounded copy in bf16, with its tokenizer."""
    rounded = Olmo2ForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.tie_weights()
    rounded.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--out", type=Path, required=True, help="where the model folders go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=260, help="of each continuation")
    parser.add_argument("--base-rate", type=float, default=4e-3)
    parser.add_argument("--rate", type=float, default=1e-3)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    corpus = read_corpus(args.data)
    tokenizer = train_tokenizer(corpus)
    streams = {d: encode(tokenizer, corpus[d][0]) for d in DOMAINS}
    held_out = {d: spread(encode(tokenizer, corpus[d][1])) for d in DOMAINS}
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    token_bytes = torch.tensor([0 if i == 0 else len(by_id[i]) for i in range(VOCABULARY)])
    print({d: (len(streams[d]), len(held_out[d])) for d in DOMAINS}, flush=True)

    model = build_model(args.seed)
    print(f"base: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    seconds = {"base": train(model, streams, BASE_MIX, args.base_steps, args.base_rate, args.seed)}
    save(model, tokenizer, args.out / "base")
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    for i, domain in enumerate(DOMAINS, start=1):
        print(domain, flush=True)
        model.load_state_dict(trained)
        mix = {d: REPLAY * BASE_MIX[d] + (1 - REPLAY) * (d == domain) for d in DOMAINS}
        seconds[domain] = train(model, streams, mix, args.steps, args.rate, args.seed + i)
        save(model, tokenizer, args.out / domain)
    losses = {name: evaluate(args.out / name, held_out, token_bytes) for name in ("base", *DOMAINS)}
    record = {
        "seed": args.seed,
        "steps": {"base": args.base_steps, "continuation": args.steps},
        "learning_rate": {"base": args.base_rate, "continuation": args.rate},
        "tokens_per_step": BATCH * CONTEXT,
        "train_tokens": {d: len(streams[d]) for d in DOMAINS},
        "held_out_tokens": {d: len(held_out[d]) for d in DOMAINS},
        "seconds": {name: round(s) for name, s in seconds.items()},
        "python": sysconfig.get_python_version(),
        "losses": losses,
    }
    (args.out / "losses.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(losses, indent=2))


if __name__ == "__main__":
    main()
