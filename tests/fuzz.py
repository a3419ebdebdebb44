"""Damage every kind of file that a user can pass, run the command that reads it, and judge how it ends.

    python tests/fuzz.py                            # 15 minutes; `make fuzz`
    python tests/fuzz.py --trials 300 --seed 7      # as many as that
    python tests/fuzz.py --only recipe --at 123     # one trial again, with what it prints

A trial is a kind of file and a number, from which its damage is drawn: the same again for the same one. It goes
through the command line, in a process of its own that is forked once everything is imported. It is right when it ends
with a documented exit code, not that of an error in diffract, says why where that is not 0, shows no traceback and
no control character, and stays within bounds of time and memory.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import polars as pl
import torch
import yaml
from safetensors.torch import load_file, save_file

from checkpoints.test_gguf import as_gguf
from checkpoints.test_gguf import write as write_gguf
from diffract.__main__ import main as command_line
from tiny_language_model import write_language_model
from tiny_llama import llama_tensors, save_llama

SECONDS, MEMORY_BYTES = 20.0, 1 << 30
"""The most that one trial may take: of time, and of memory beside what is imported. The files are of a few kB."""

RIGHT = (0, 1, 2)
"""Exit codes that are documented for what a user can do wrong."""

ROOT = Path(__file__).parents[1]

SLOW_IMPORTS = (
    "diffract.analysis", "diffract.api", "diffract.cli.main", "diffract.edits", "diffract.evaluate.run",
    "diffract.inspection", "diffract.plots", "diffract.report", "diffract.search.run", "diffract.studies.runner",
    "diffract.train.loop", "diffract.train.model", "scipy.stats", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
"""Imported once, before any process is forked."""


@dataclass(frozen=True)
class Kind:
    """A kind of file, and the command that reads it.

    Attributes:
        name: What it is called.
        damaged: The file within the folder of all good files that is damaged.
        arguments: What is typed after ``diffract``, from within that folder.
    """

    name: str
    damaged: str
    arguments: str


TRAIN = {
    "model": {"config": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}},
    "tokenizer": {"train": {"vocabulary": 260}},
    "mix": {"sums": {"sources": ["texts.jsonl"]}},
    "context": 16,
    "batch_tokens": 32,
    "tokens": 64,
    "checkpoints": [32],
    "threads": 1,
}

APPLY = {
    "model": "tuned",
    "steps": [{"rewind": {"to": "base", "heads": "L0.h1"}}, {"truncate": {"base": "base", "energy": 0.9}}],
    "output": {"dtype": "float32", "shard_size": "1MB"},
}

EVAL = "--limit 2 --device cpu --tasks"

KINDS = (
    Kind("safetensors", "tuned/model.safetensors", "scan tuned"),
    Kind("safetensors, compared", "tuned/model.safetensors", "compare base tuned"),
    Kind("safetensors, inspected", "tuned/model.safetensors", "inspect tuned"),
    Kind("config.json", "tuned/config.json", "scan tuned"),
    Kind("config.json, inspected", "tuned/config.json", "inspect tuned --json"),
    Kind("index of shards", "shards/model.safetensors.index.json", "inspect shards"),
    Kind("shard", "shards/model-00002-of-00002.safetensors", "scan shards"),
    Kind("pickle in a zip", "m.pt", "scan m.pt"),
    Kind("old pickle", "old.bin", "inspect old.bin"),
    Kind("npz", "m.npz", "scan m.npz"),
    Kind("gguf", "m.gguf", "scan m.gguf"),
    Kind("adapter's config", "adapter/adapter_config.json", "scan adapter --adapter-base base"),
    Kind("adapter's weights", "adapter/adapter_model.safetensors", "compare base adapter"),
    Kind("architecture", "own.json", "scan tuned --architecture own.json"),
    Kind("recipe", "apply.yaml", "apply apply.yaml -o out --force"),
    Kind("factors of svf", "z.npz", "svf tuned --factors z.npz -o out"),
    Kind("factors of scale", "f.csv", "scale tuned --base base --factors f.csv -o out"),
    Kind(
        "heads of a run",
        "compared/heads.parquet",
        "rewind tuned --to base --fraction 0.3 --scores compared/heads.parquet -o out",
    ),
    Kind("run's manifest", "compared/manifest.json", "report compared -o page.html"),
    Kind("run's metrics", "compared/metrics.parquet", "report compared -o page.html"),
    Kind("run's spectra", "compared/spectra.parquet", "plot spectrum compared -o figure.html"),
    Kind("run's models", "compared/models.parquet", "report compared -o page.html"),
    Kind("manifest of an edit", "edited/manifest.json", "verify edited"),
    Kind("edited weights", "edited/model.safetensors", "verify edited"),
    Kind("training recipe", "train.yaml", "train train.yaml -o out --dry-run"),
    Kind("training text", "texts.jsonl", "train train.yaml -o out --dry-run"),
    Kind("packed text", "texts.jsonl.gz", f"eval language {EVAL} said=texts.jsonl.gz"),
    Kind("Parquet text", "texts.parquet", f"eval language {EVAL} said=texts.parquet"),
    Kind("training checkpoint", "trained/checkpoints", "train train.yaml -o trained"),
    Kind("training log", "trained/log.jsonl", "train train.yaml -o trained"),
    Kind("training manifest", "trained/manifest.json", "train train.yaml -o trained"),
    Kind("training state", "begun/state", "train long.yaml -o begun"),
    Kind("manifest of a begun training", "begun/manifest.json", "train long.yaml -o begun"),
    Kind("log of a begun training", "begun/log.jsonl", "train long.yaml -o begun"),
    Kind("tokenizer", "language/tokenizer.json", f"eval language {EVAL} said=texts.jsonl"),
    Kind("language model's config", "language/config.json", f"eval language {EVAL} said=texts.jsonl"),
    Kind("generation settings", "language/generation_config.json", f"eval language {EVAL} said=texts.jsonl"),
    Kind("study's recipe", "study.yaml", "study run study.yaml --data . -o studied --dry-run"),
    Kind("cache", "cache", "scan tuned"),
)


def good_files(folder: Path) -> None:
    """Write every kind of file, undamaged."""
    tensors = llama_tensors(0)
    tuned = llama_tensors(1, tensors)
    save_llama(folder / "base", tensors)
    save_llama(folder / "tuned", tuned)
    save_llama(folder / "shards", tuned)
    (folder / "shards/model.safetensors").unlink()
    places: dict[str, str] = {}
    for part in range(2):
        held = dict(list(tuned.items())[part::2])
        file = f"model-0000{part + 1}-of-00002.safetensors"
        save_file(held, folder / "shards" / file)
        places |= dict.fromkeys(held, file)
    (folder / "shards/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    torch.save(tuned, folder / "m.pt")
    torch.save(tuned, folder / "old.bin", _use_new_zipfile_serialization=False)
    np.savez(folder / "m.npz", **{name: value.float().numpy() for name, value in tuned.items()})
    plain, settings = as_gguf(folder / "tuned")
    write_gguf(folder / "m.gguf", plain, settings)
    spec = ROOT / "src/diffract/architectures/specs/llama.json"
    shutil.copy(spec, folder / "own.json")
    (folder / "apply.yaml").write_text(yaml.safe_dump(APPLY))
    (folder / "train.yaml").write_text(yaml.safe_dump(TRAIN))
    (folder / "long.yaml").write_text(yaml.safe_dump(TRAIN | {"tokens": 128, "state_every": 2}))
    shutil.copy(ROOT / "studies/tiny.yaml", folder / "study.yaml")
    records = [{"text": f"{i} and {i} are {2 * i}"} for i in range(40)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "texts.jsonl").write_text(lines)
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pl.DataFrame(records).write_parquet(folder / "texts.parquet")
    write_language_model(folder / "language")
    factors = {n: np.ones(min(v.shape), np.float32) for n, v in tuned.items() if n.endswith("q_proj.weight")}
    table = {"name": ["L0.attn.q"], "direction": [None], "factor": [0.5]}
    pl.DataFrame(table).write_csv(folder / "f.csv")
    np.savez(folder / "z.npz", **factors)  # pyright: ignore[reportArgumentType]


def good_runs(folder: Path) -> None:
    """Let commands write what is damaged of their own."""
    for arguments in (
        "scan tuned",
        "compare base tuned -o compared",
        "lora tuned --base base --rank 2 -o adapter",
        "rewind tuned --to base --heads L0.h1 -o edited",
        "train train.yaml -o trained",
    ):
        code, said, _, _ = apart(folder, partial(command, arguments))
        assert code == 0, f"{arguments} ends with {code}:\n{said}"
    code, said, _, _ = apart(folder, begun_training)
    assert code == 0, said


def begun_training() -> None:
    """Train until the state of the second step is there, and be interrupted in the third."""
    from diffract.train import train

    def stop(done: float, total: float, what: str) -> None:
        if done == 96:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        train("long.yaml", "begun", progress=stop)
    assert [path.name for path in Path("begun/state").iterdir()] == ["step000000002"]


def command(arguments: str) -> None:
    """Run the command line in this process."""
    os.environ["DIFFRACT_CACHE_DIR"] = str(Path("cache").resolve())
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.argv = ["diffract", *arguments.split()]
    command_line()


def apart(
    folder: Path,
    work: Callable[[], None],
    *,
    told_to_end: tuple[int, float] | None = None,
    most_seconds: float = SECONDS,
) -> tuple[int, str, float, int]:
    """Work in a forked process, in a folder; return exit code, what it printed, seconds, and bytes it grew by.

    A signal may be sent to it after some seconds. Everything else stays out of the process that forks: threads, such as
    those of Polars, would be missing in its children, which would wait for them for ever.
    """
    told = folder / ".told"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            file = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(file, stream)
            # Beyond the bound, so that it is seen, and far below what would end other processes of the machine.
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 6 * MEMORY_BYTES,) * 2)
            os.chdir(folder)
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    while (ended := os.wait4(child, os.WNOHANG))[0] == 0:
        if time.monotonic() - begun > most_seconds:
            os.kill(child, signal.SIGKILL)
        if told_to_end and time.monotonic() - begun >= told_to_end[1]:
            os.kill(child, told_to_end[0])
            told_to_end = None
        time.sleep(0.003)
    code = os.waitstatus_to_exitcode(ended[1])
    grown = max(0, ended[2].ru_maxrss - before) << 10
    return code, told.read_text(errors="backslashreplace"), time.monotonic() - begun, grown


def judge(code: int, said: str, seconds: float, grown: int) -> str:
    """Return what is wrong with how a trial ended, or an empty text."""
    if seconds > SECONDS:
        return f"took more than {SECONDS:.0f} s"
    if code not in RIGHT:
        return f"exit code {code}"
    if "Traceback (most recent call last)" in said:
        return "a traceback"
    if code and not said.strip():
        return f"exit code {code} without a word"
    if found := re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said):
        return f"control character {found[0]!r}"
    return f"grew by {grown >> 20} MiB" if grown > MEMORY_BYTES else ""


ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", " ", "x", "\x1b[31mred\x07", "../..", "/", "/dev/zero",
    "a" * 5000, "(a+)+$", "é\u202e\ud800", "L0.h1", "1e9",
    "*", [], [[]], {}, {"": {}}, [1, "a", None], {"a": 1}, [0] * 2000,
)  # fmt: skip
"""What is put in place of a value, or of a key."""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place within a value: what holds it, and its key or index."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def wrong_value(rng: random.Random, value: Any) -> Any:
    """Return a structure with one to three places changed."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            return rng.choice(ODD)
        holder, key = rng.choice(found)
        match rng.randrange(6):
            case 0 | 1:
                holder[key] = rng.choice(ODD)
            case 2:
                del holder[key]
            case 3 if isinstance(holder, dict):
                holder[str(rng.choice(ODD))] = holder.pop(key)
            case 4:
                other, there = rng.choice(found)
                with suppress(KeyError, IndexError):
                    holder[key] = json.loads(json.dumps(other[there]))
            case _:
                kept = holder[key]
                is_number = isinstance(kept, int | float)
                holder[key] = kept * rng.choice((-1, 0, 2, 1000, 2**40)) if is_number else [kept]
    return value


def wrong_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Return bytes with a few of them changed, cut, put in or repeated."""
    found = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        # Headers lie at the beginning and directories of archives at the end: most damage goes there.
        size = len(found)
        near = min(size, 400)
        at = rng.choice((rng.randrange(near or 1), size - rng.randrange(near or 1), rng.randrange(size or 1)))
        length = rng.choice((1, 1, 2, 4, 8, 64, 1000))
        match rng.randrange(6):
            case 0 if at < size:
                found[at] ^= 1 << rng.randrange(8)
            case 1:
                del found[at:]
            case 2:
                found[at : at + length] = rng.randbytes(length)
            case 3:
                found[at : at + 8] = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)).to_bytes(
                    8, "little"
                )
            case 4:
                found[at:at] = found[at : at + length] * rng.choice((1, 1, 100))
            case _:
                del found[at : at + length]
    return bytes(found)


def wrong_text(rng: random.Random, value: Any, write: Callable[[Any], str]) -> bytes:
    """Return a structure as text that parses but means something else, or that strains whoever parses it."""
    match rng.randrange(12):
        case 0:
            return ("[" * 100_000 + "]" * 100_000).encode()
        case 1:
            return write(value).encode("utf-16")
        case 2:
            return b"a: &a [x, x]\n" + b"".join(b"b%d: &b%d [*%s, *%s]\n" % (i, i, p, p) for i, p in
                                               enumerate([b"a", *(b"b%d" % i for i in range(40))]))  # fmt: skip
        case 3:
            return write(rng.choice(ODD)).encode(errors="surrogatepass")
        case _:
            return write(wrong_value(rng, value)).encode(errors="surrogatepass")


def wrong_members(rng: random.Random, path: Path) -> None:
    """Write an archive again with one of its members damaged, gone, twice there, or compressed."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at = rng.randrange(len(members))
    name, raw = members[at]
    members[at : at + 1] = rng.choice(
        ([(name, wrong_bytes(rng, raw))], [], [(name, raw), (name, raw[: len(raw) // 2])], [(name, raw * 3)],
         [("../" + name, raw)], [(name, bytes(200_000_000))])
    )  # fmt: skip
    with zipfile.ZipFile(path, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, raw in members:
            archive.writestr(name, raw)


def another_kind(rng: random.Random, path: Path, others: list[Path]) -> None:
    """Put in the place of a file what is none, or one of another kind."""
    path.unlink()
    match rng.randrange(7):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(path.name)
        case 3:
            path.symlink_to("/dev/zero")
        case 4:
            path.write_bytes(b"")
        case 5:
            pass
        case _:
            shutil.copyfile(rng.choice(others), path)


def damage(rng: random.Random, path: Path, others: list[Path]) -> None:  # noqa: PLR0912
    """Damage a file, half of the time so that its outermost layer can still be read."""
    if path.is_dir():
        path = rng.choice(sorted(p for p in path.rglob("*") if p.is_file()))
    if rng.random() < 0.1:
        return another_kind(rng, path, others)
    raw = path.read_bytes()
    if rng.random() < 0.35:
        path.write_bytes(wrong_bytes(rng, raw))
    elif path.suffix == ".json":
        path.write_bytes(wrong_text(rng, json.loads(raw), json.dumps))
    elif path.suffix == ".yaml":
        path.write_bytes(wrong_text(rng, yaml.safe_load(raw), yaml.safe_dump))
    elif path.suffix == ".jsonl":
        lines = raw.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = wrong_text(rng, json.loads(lines[at]), json.dumps)
        path.write_bytes(b"\n".join(lines))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(wrong_bytes(rng, gzip.decompress(raw))))
    elif path.suffix == ".safetensors":
        if rng.random() < 0.3:
            tensors = load_file(path)
            name = rng.choice(sorted(tensors))
            odd = (torch.full((3, 4), torch.nan), torch.zeros(0, 5), torch.tensor(1.0), torch.ones(2, 2, 2, 2))
            value = tensors.pop(name)
            tensors[rng.choice((name, "\x1b[2J.weight", "a" * 3000))] = rng.choice((*odd, value.double(), value * 1e38))
            save_file(tensors, path)
        else:
            size = int.from_bytes(raw[:8], "little")
            head = wrong_text(rng, json.loads(raw[8 : 8 + size]), json.dumps)
            path.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + size :])
    elif path.suffix == ".parquet":
        frame = pl.read_parquet(path)
        column = rng.choice(frame.columns)
        odd = (pl.lit(None), pl.lit("\x1b[31mx"), pl.lit(-1.0), pl.lit(float("nan")), pl.lit(2**40), pl.lit([1.0]))
        changed = (
            frame.drop(column), frame.clear(), frame.with_columns(rng.choice(odd).alias(column)),
            frame.rename({column: "other"}), pl.concat([frame, frame]), frame.sample(fraction=1, shuffle=True, seed=1),
        )  # fmt: skip
        rng.choice(changed).write_parquet(path)
    elif zipfile.is_zipfile(path):
        wrong_members(rng, path)
    else:
        path.write_bytes(wrong_bytes(rng, raw))


def trial(kind: Kind, number: int, good: Path) -> tuple[str, str]:
    """Run one trial; return what is wrong, if anything, and what was printed."""
    rng = random.Random(f"{kind.name} {number}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "all"
        shutil.copytree(good, folder)
        others = sorted(p for p in good.rglob("*") if p.is_file() and p.stat().st_size < 1 << 20)
        code, said, _, _ = apart(folder, partial(damage, rng, folder / kind.damaged, others))
        assert code == 0, f"{kind.name} --at {number} cannot be damaged:\n{said}"
        code, said, seconds, grown = apart(folder, partial(command, kind.arguments))
        return judge(code, said, seconds, grown), f"exit code {code}, {seconds:.1f} s, {grown >> 20} MiB\n{said}"


def main() -> None:
    """Run trials of all kinds in turn until the time or the number of trials is over; fail if any was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15, help="how long")
    parser.add_argument("--trials", type=int, help="most trials of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="the number of the first trial of each kind")
    parser.add_argument("--only", help="kinds whose name begins so")
    parser.add_argument("--at", type=int, help="only the trial of this number, with what it prints")
    args = parser.parse_args()
    kinds = [kind for kind in KINDS if kind.name.startswith(args.only or "")]
    for module in SLOW_IMPORTS:
        import_module(module)
    gc.freeze()
    end = time.monotonic() + 60 * args.minutes
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        good = Path(name) / "good"
        good.mkdir()
        code, said, _, _ = apart(good, partial(good_files, good))
        assert code == 0, said
        good_runs(good)
        for kind in kinds:
            tried = shutil.copytree(good, Path(name) / "tried")
            code, said, _, _ = apart(tried, partial(command, kind.arguments))
            shutil.rmtree(tried)
            assert code == 0, f"undamaged, {kind.name} ends with {code}:\n{said}"
        if args.at is not None:
            for kind in kinds:
                print(kind.name, *trial(kind, args.at, good), sep="\n")
            return
        number = args.seed
        while time.monotonic() < end and (args.trials is None or counts.total() < args.trials):
            for kind in kinds:
                problem, said = trial(kind, number, good)
                counts[kind.name] += 1
                if problem:
                    wrong.append(f"{kind.name} --at {number}: {problem}: {said.strip().splitlines()[-1][:300]!r}")
                    print(wrong[-1], flush=True)
            number += 1
    print(f"{counts.total()} trials of {len(counts)} kinds, {len(wrong)} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
