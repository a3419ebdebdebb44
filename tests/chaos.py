"""End commands at random moments, run them again, and compare what is there with what an undisturbed run leaves.

    python tests/chaos.py                             # 42 kills
    python tests/chaos.py --kills 200 --seed 7        # others, more of them
    python tests/chaos.py --only search --at 123      # one again, with what it prints

A kill is a command and a number, from which its signal and its moment are drawn. It is right when the signal leaves the
output whole or not there at all, the same command then ends well, and everything is the same to the last byte, but for
times; nothing else may lie beside the output, and after a signal that asks to end not even before the second run.
"""

from __future__ import annotations

import argparse
import gc
import random
import re
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

import fuzz
from tiny_language_model import write_language_model

COMMANDS = {
    "scan": "scan tuned --metrics all --vectors -o out",
    "compare": "compare base tuned -o out",
    "trajectory": "trajectory base tuned shards --by given -o out",
    "search": "search rewind language other --eval said=texts.jsonl --limit 4 --order greedy --fractions 0,1 -o out",
    "apply": "apply apply.yaml -o out",
    "train": "train train.yaml -o out",
}
"""What is typed after ``diffract``; each writes a folder ``out``."""

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)

SECONDS = 120.0
"""No run takes nearly as long."""

TIMES = re.compile(r'"seconds":\s*[^,}\n]+|Computed in [0-9.]+ s|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d')
"""What differs between two runs, in JSON and in the pages that it stands in."""


def good_files(folder: Path) -> None:
    """Write what the commands read."""
    fuzz.good_files(folder)
    write_language_model(folder / "other")
    weights = load_file(folder / "other/model.safetensors")
    torch.manual_seed(0)
    save_file({name: w + 0.02 * torch.randn_like(w) for name, w in weights.items()}, folder / "other/model.safetensors")
    recipe = fuzz.TRAIN | {"tokens": 40 * 32, "checkpoints": [0, 7 * 32, 21 * 32], "state_every": 5}
    (folder / "train.yaml").write_text(yaml.safe_dump(recipe))


@dataclass(frozen=True)
class Whole:
    """What an undisturbed run leaves.

    Attributes:
        content: The bytes of its output.
        beside: What lies in the folder that it ran in.
        seconds: How long it took.
    """

    content: dict[str, bytes]
    beside: set[str]
    seconds: float


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a folder, without times."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        raw = path.read_bytes()
        if path.suffix in (".json", ".jsonl", ".html"):
            raw = TIMES.sub("", raw.decode()).encode()
        found[str(path.relative_to(folder))] = raw
    return found


def beside(folder: Path) -> set[str]:
    """Return what lies in a folder, but for the cache, where results that were done stay."""
    return {path.name for path in folder.iterdir()} - {"cache"}


def whole_run(name: str, good: Path, folder: Path) -> Whole:
    """Run a command to its end, twice, and return what it leaves; the second run must leave the same."""
    found = []
    for place in (folder / "once", folder / "twice"):
        shutil.copytree(good, place)
        code, said, seconds, _ = fuzz.apart(place, partial(fuzz.command, COMMANDS[name]), most_seconds=SECONDS)
        assert code == 0, f"undisturbed, {name} ends with {code}:\n{said}"
        found.append(Whole(content(place / "out"), beside(place), seconds))
    one, other = (run.content for run in found)
    odd = [path for path in one.keys() | other.keys() if one.get(path) != other.get(path)]
    assert not odd, f"undisturbed, {name} gives other bytes in {odd}"
    return found[1]


def trial(name: str, number: int, good: Path, whole: Whole) -> tuple[str, str]:
    """Kill a command once and run it again; return what is wrong, if anything, and what was printed."""
    rng = random.Random(f"{name} {number}")
    ended_by, moment = rng.choice(SIGNALS), rng.uniform(0.02, 1.02)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "all"
        shutil.copytree(good, folder)
        work = partial(fuzz.command, COMMANDS[name])
        code, said, *_ = fuzz.apart(folder, work, told_to_end=(ended_by, moment * whole.seconds), most_seconds=SECONDS)
        told = f"{ended_by.name} at {moment:.0%}: exit code {code}\n{said}"
        if code not in (0, 130, -ended_by if ended_by == signal.SIGKILL else 0):
            return f"{ended_by.name} gives exit code {code}", told
        left = beside(folder) - whole.beside
        if ended_by != signal.SIGKILL and [name for name in left if ".tmp" in name]:
            return f"{ended_by.name} leaves {sorted(left)}", told
        if not (folder / "out").exists() or name == "train":
            code, said, *_ = fuzz.apart(folder, work, most_seconds=SECONDS)
            told += f"again: exit code {code}\n{said}"
            if code:
                return f"the second run gives exit code {code}", told
        if left := beside(folder) - whole.beside:
            return f"{sorted(left)} are left", told
        found = content(folder / "out")
        other = sorted(
            path for path in found.keys() | whole.content.keys() if found.get(path) != whole.content.get(path)
        )
        return (f"other bytes in {', '.join(other)}" if other else ""), told


def main() -> None:
    """Kill all commands in turn; fail if any trial was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=42, help="how many, of all commands together")
    parser.add_argument("--seed", type=int, default=0, help="the number of the first trial of each command")
    parser.add_argument("--only", help="commands whose name begins so")
    parser.add_argument("--at", type=int, help="only the trial of this number, with what it prints")
    args = parser.parse_args()
    for module in fuzz.SLOW_IMPORTS:
        import_module(module)
    gc.freeze()
    names = [name for name in COMMANDS if name.startswith(args.only or "")]
    numbers = [args.at] if args.at is not None else range(args.seed, args.seed + args.kills)
    counts, wrong = 0, 0
    with tempfile.TemporaryDirectory() as place:
        good = Path(place) / "good"
        good.mkdir()
        code, said, *_ = fuzz.apart(good, partial(good_files, good))
        assert code == 0, said
        undisturbed = {name: whole_run(name, good, Path(place) / name) for name in names}
        for number in numbers:
            for name in names:
                if args.at is None and counts == args.kills:
                    break
                problem, said = trial(name, number, good, undisturbed[name])
                counts += 1
                if problem:
                    wrong += 1
                    print(f"{name} --at {number}: {problem}: {said.strip().splitlines()[-1][:300]!r}", flush=True)
                if args.at is not None:
                    print(said)
    print(f"{counts} kills of {len(names)} commands, {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
