"""Show that a change of the code changes no output: the same commands in two trees, and all they write compared.

    python benchmarks/same.py COMMIT                                  # the working tree against a commit, some minutes
    python benchmarks/same.py COMMIT --only scan,merge                # some parts; --list names them
    python benchmarks/same.py COMMIT --only study --data DATA         # the study of studies/tiny.yaml, over an hour
    python benchmarks/same.py COMMIT --moved 'metrics.left_*' --manifests

Every command is ``python -m diffract ...`` in a process of its own, forked from one that has imported torch and the
like but nothing of diffract; those of the two trees run side by side, with one thread, a cache and a folder for each
tree, on copies of the sample models. Tables are compared bit by bit, with dtypes and order; weights byte by
byte; JSON, YAML, pages, standard output, errors and exit codes as text without times, versions and folders. Names for
``--moved``, ``--gone`` and ``--new`` are patterns: ``table`` (or a path), ``table.column`` (of JSON ``file.key.key``).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLES = ("base", "math", "code", "natural", "instructions")
TASK = "math=word-problems:1"
MODEL = "model_type: olmo2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4"
STEPS = "[rewind: {to: base, order: reference, reference: natural, fraction: 0.1}, "
STEPS += "truncate: {base: base, drop: 0.5, select: mlp}, interpolate: {with: base, at: 0.1}]"
INPUTS = {
    "texts.jsonl": "".join(f'{{"text": "{n} and {n * n % 97} are {n + n * n % 97}."}}\n' for n in range(900)),
    "new.yaml": f"{{model: {{config: {{{MODEL}, num_key_value_heads: 2}}}}, tokenizer: {{train: {{vocabulary: 300}}}}, "
    "mix: {even: {sources: [texts.jsonl], share: 0.8}, odd: {sources: [texts.jsonl], share: 0.2}}, context: 64, "
    "batch_tokens: 256, tokens: 4096, checkpoints: [0, 2048], threads: 1}",
    "further.yaml": "{model: {init: base}, mix: {texts: {sources: [texts.jsonl], share: 1}}, context: 64, "
    "batch_tokens: 256, micro_batch: 1, tokens: 1024, schedule: {kind: cosine}, threads: 1}",
    "edit.yaml": f"{{model: math, steps: {STEPS}, output: {{dtype: float32, shard_size: 1MB}}}}",
    "export.yaml": "{model: math, steps: [merge: {base: base, called: math, models: {code: code}, method: ties}], "
    "export: {lora: {base: base, rank: 4}}}",
    "wrong.yaml": "{model: math, steps: [truncate: {base: base, dorp: 0.5}]}",
    "scores.csv": "layer,head,effect\n"
    + "".join(f"{layer},{head},{(layer * 5 + head * 3) % 7}\n" for layer in range(4) for head in range(8)),
}
TRUNCATIONS = (
    "--drop 0.5", "--rank 16 --side tail", "--energy 0.9 --per head --select attn", "--energy 0.9 --side random",
    "--above 0.3", "--rule donoho-gavish", "--rule mp-edge", "--band 0.1,0.5 --output-dtype float32",
)  # fmt: skip
REWINDS = (
    "--fraction 0.25", "--order reference --reference natural --fraction 0.3 --kv majority",
    "--order random --seed 3 --fraction 0.5 --kv never", "--order greedy --scores scores.csv --fraction 0.4 --reverse",
    "--heads L3.h5,L0.h0 --amount 0.5", "--unit matrix --fraction 0.3", "--unit tensor --fraction 0.5 --select mlp",
)  # fmt: skip
MERGES = (
    "linear --weights math=2", "slerp", "task-arithmetic --scale 0.7", "dare", "ties --density 0.3",
    "dare-ties --seed 2", "tsv", "iso-c",
)  # fmt: skip
FIGURES = (
    "density scan/all", "ks compare/all", "spectrum compare/default", "agreement compare/default", "heads heads/two",
    "lorenz heads/two", "scores heads/two", "evolution trajectory/steps", "ridge trajectory/steps",
    "violins compare/default", "head_heatmap scan/default", "rewind search-rewind/run", "effects search-rewind/run",
    "truncation search-truncate/run", "paths connect/run", "connectivity connect/run", "simplex connect/run",
)  # fmt: skip
PARTS: dict[str, Sequence[str]] = {
    "look": ("inspect base", "inspect math --json --select 'layers 1-2, attn'", "metrics", "metrics --facts --json"),
    "scan": (
        "scan base -o scan/default", "scan math --metrics all -o scan/all", "scan code --circuits -o scan/circuits",
        "scan math --select 'layers 0-1, mlp' --vectors -o scan/vectors",
        "scan base --method exact --no-heads --select 'layers 2' --json -o scan/exact",
    ),
    "compare": (
        "compare base math=math code=code natural=natural -o compare/default",
        "compare base instructions --metrics all -o compare/all",
        "compare base math --circuits --vectors --select 'layers 1-2' -o compare/circuits",
    ),
    "heads": ("heads base math=math natural=natural code=code -o heads/two", "report heads/two",
              "heads base math --projections q,k --json -o heads/one"),
    "trajectory": ("trajectory step1=base step2=math step4=code -o trajectory/steps",
                   "trajectory base natural math --by given --against first --metrics all -o trajectory/given"),
    "eval": (f"eval math --tasks {TASK},gsm:1 --limit 6 --shots 1 --against base -o eval/run",),
    "search-rewind": (f"search rewind base math --reference natural --eval {TASK} --limit 6 --fractions 0,0.25,0.5,1 "
                      "--seeds 1 -o search-rewind/run --write search-rewind/out --choose-by without-loss",),
    "search-truncate": (f"search truncate base math --eval {TASK} --limit 6 --fractions 0,0.5,0.9,1 --seeds 1 "
                        "-o search-truncate/run --write search-truncate/out",),
    "connect": (f"connect base math=math code=code natural=natural --eval {TASK} --limit 6 --steps 3 --grid 2 "
                "-o connect/run",),
    "train": ("train new.yaml --dry-run", "train new.yaml -o train/new", "train further.yaml -o train/further"),
    "rewind": [f"rewind math --to base {how} -o rewind/{n}" for n, how in enumerate(REWINDS)],
    "truncate": [f"truncate math --base base {how} -o truncate/{n}" for n, how in enumerate(TRUNCATIONS)],
    "interpolate": ("interpolate base math --at 0:1:0.25 -o interpolate/row",
                    "interpolate base math --at 0.5 --groups mlp=0.8 --groups 'layers 0-1=0.2' -o interpolate/groups",
                    "interpolate base math --at 0.3 --method slerp --json -o interpolate/slerp"),
    "merge": [f"merge base math=math code=code --method {how} -o merge/{n}" for n, how in enumerate(MERGES)],
    "adapters": ("lora math --base base -o adapters/auto", "lora math --base base --rank full -o adapters/full",
                 "lora math --base base --energy 0.8 --dtype bfloat16 -o adapters/energy",
                 "pissa base --rank 8 -o adapters/pissa", "scan adapters/auto -o adapters/scan",
                 "heads base math=adapters/auto -o adapters/heads"),
    "values": ("laser math --select 'layers 3, mlp.up' --keep 0.5 -o values/laser",
               "svf math --z 0.9 --select mlp -o values/svf", "svf math --factors factors.npz -o values/factors"),
    "apply": ("apply edit.yaml --dry-run", "apply edit.yaml -o apply/edited", "verify apply/edited --replay",
              "apply export.yaml -o apply/adapter", "verify apply/adapter --json"),
    "errors": (
        "interpolate base math --at 0.5 -o errors/edited", "cp math/model.safetensors errors/edited",
        "verify errors/edited", "verify base", "scan nothing -o errors/x", "scan base --metrics effective_rnk",
        "compare base", "trajectory base math", "truncate math --base base --drop 1.5 -o errors/x",
        "merge base math=math --method tie -o errors/x", "apply wrong.yaml -o errors/x", "rewind math --to base",
        "plot densty errors -o errors/x.html", "eval base --tasks nothing", "nonsense",
    ),
    "plot": [f"plot {how} -o plot/{n}.html" for n, how in enumerate(FIGURES)],
    "study": ("study run study.yaml --data DATA -o study/run",),
}  # fmt: skip
SERVER = """
import atexit, gc, json, os, runpy, sys, traceback
import numpy, plotly.graph_objects, polars, torch, transformers.models.olmo2.modeling_olmo2

gc.freeze()
for line in sys.stdin:
    words, out, err, cache = json.loads(line)
    child = os.fork()
    if not child:
        for number, name in enumerate((os.devnull, out, err)):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        os.environ["DIFFRACT_CACHE_DIR"] = cache
        sys.argv = ["diffract", *words]
        code = 0
        try:
            runpy.run_module("diffract", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # taking torch apart would take longer than most commands
    _, status, used = os.wait4(child, 0)
    print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, flush=True)
"""
NEEDS = {"plot": ("scan", "compare", "heads", "trajectory", "search-rewind", "search-truncate", "connect")}
VOLATILE = {"created", "seconds", "machine", "diffract"}
NOISE = (
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[-+:.\dZ]*", "TIME"),
    (r'"(created|seconds|diffract)": [^,}\n]+', "VOLATILE"),
    (r"\b\d[\d.,]{0,9}(e[-+]\d+)? (s|ms|min|h)\b", "DURATION"),
    (r"\b\d[\d.,]{0,9} +[kMG]? *tokens/s", "RATE"),
    (r"\bdiffract \d+\.\d+\.\w+", "diffract VERSION"),
)
PROGRESS = re.compile(r"[\w ,]+: \d+%, .*")
SHOWN = 6


@dataclass(frozen=True)
class Column:
    """One thing that is compared: a column of a table, a tensor, a value of a JSON file, a line of a text."""

    kind: str
    values: pl.Series

    def same(self, other: Column) -> bool:
        """Whether both have the same type, nulls and bits."""
        a, b = self.values, other.values
        if self.kind != other.kind or len(a) != len(b) or a.dtype != b.dtype:
            return False
        if a.dtype.is_float() and a.is_null().equals(b.is_null()):
            return a.fill_null(0).to_numpy().tobytes() == b.fill_null(0).to_numpy().tobytes()
        return a.equals(b, null_equal=True)

    def against(self, other: Column) -> str:
        """Say how this, the commit's, and another differ."""
        a, b = self.values, other.values
        if self.kind != other.kind or len(a) != len(b) or a.dtype != b.dtype:
            return f"{self.kind} of {len(a)}, now {other.kind} of {len(b)}"
        unlike = ~a.eq_missing(b)
        if a.dtype.is_float():
            unlike |= pl.Series(a.fill_null(0).to_numpy().view("V8") != b.fill_null(0).to_numpy().view("V8"))
        first = unlike.arg_true()[0]
        was, now = str(a[first]), str(b[first])
        alike = next((at for at, (x, y) in enumerate(zip(was, now, strict=False)) if x != y), 0)
        begin = max(0, alike - 30)
        shown = f"{was[begin : begin + 90]}, now {now[begin : begin + 90]}"
        text = shown if len(a) == 1 else f"{unlike.sum()} of {len(a)} values, [{first}] {shown}"
        # Where one of both is null throughout there is no distance.
        if not a.dtype.is_numeric() or not (a.is_not_null() & b.is_not_null()).any():
            return text
        gap, size = (a - b).abs(), pl.select(pl.max_horizontal(a.abs(), b.abs())).to_series()
        return f"{text}; at most {gap.max():.3g}, relative {(gap / size).fill_nan(0).max():.3g}"


def columns(path: Path, clean: Callable[[str], str]) -> dict[str, Column]:
    """Return what a file holds, piece by piece."""
    if path.suffix == ".parquet":
        return {series.name: _flat(series) for series in pl.read_parquet(path)}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return {
            name: Column(f"{t.dtype} {list(t.shape)}", pl.Series(t.double().flatten().numpy()))
            for name, t in load_file(path).items()
        }
    if path.suffix not in {".json", ".jsonl", ".yaml"}:
        return {
            f"line {n}": Column("text", pl.Series([line]))
            for n, line in enumerate(clean(path.read_text(errors="replace")).splitlines(), start=1)
        }
    text = path.read_text()
    if path.suffix == ".jsonl":
        text = f"[{','.join(text.splitlines())}]"
    content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    return {
        ".".join(keys): Column(type(value).__name__, pl.Series([clean(value) if isinstance(value, str) else value]))
        for keys, value in _leaves(content)
    }


def _flat(series: pl.Series) -> Column:
    kind = str(series.dtype)
    while isinstance(series.dtype, pl.List):
        kind += f" {zlib.crc32(series.list.len().fill_null(1 << 31).to_numpy().tobytes()):x}"
        series = series.explode()
    return Column(kind, series)


def _leaves(value: object, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    if not isinstance(value, dict | list) or not value:
        yield keys, str(value) if isinstance(value, dict | list) else value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if key not in VOLATILE:
            yield from _leaves(inner, (*keys, str(key)))


@dataclass
class Comparison:
    """What differs between the files of two folders."""

    old: Path
    new: Path
    allowed: Mapping[str, Sequence[str]]
    clean: Callable[[str], str]
    found: dict[str, list[str]] = field(default_factory=lambda: {"differs": [], "manifest": [], "moved": []})

    def _named(self, what: str, file: str, column: str | None = None) -> bool:
        stem = Path(file).stem
        names = (f"{stem}.{column}", f"{file}.{column}", file) if column else (stem, Path(file).name, file)
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.allowed[what])

    def _one_sided(self, old: Sequence[str], new: Sequence[str], file: str | None = None) -> Iterator[str]:
        """Say which files, or columns of a file, only one side has."""
        for what, names, other in (("gone", old, set(new)), ("new", new, set(old))):
            for name in (name for name in names if name not in other):
                if not (self._named(what, file, name) if file else self._named(what, name)):
                    yield f"{file + ': ' if file else ''}{name}: {what}"

    def files(self, old: Sequence[str], new: Sequence[str]) -> None:
        """Compare files, given by their paths within the folders."""
        self.found["differs"] += self._one_sided(old, new)
        for file in (file for file in old if file in set(new)):
            here = "manifest" if Path(file).name == "manifest.json" else "differs"
            if (self.old / file).read_bytes() == (self.new / file).read_bytes():
                continue
            a, b = columns(self.old / file, self.clean), columns(self.new / file, self.clean)
            before = sum(map(len, self.found.values()))
            self.found[here] += self._one_sided(list(a), list(b), file)
            unordered = "vectors" in Path(file).parts  # worker threads write singular vectors as they are done
            if not unordered and [name for name in a if name in b] != [name for name in b if name in a]:
                self.found[here].append(f"{file}: order")
            for name in (name for name in a if name in b):
                if not a[name].same(b[name]):
                    there = "moved" if self._named("moved", file, name) else here
                    self.found[there].append(f"{file}: {name}: {a[name].against(b[name])}")
            if file.endswith(".safetensors") and not unordered and sum(map(len, self.found.values())) == before:
                self.found[here].append(f"{file}: bytes, though the tensors are the same")


def prepare(tree: Path, work: Path) -> None:
    """Lay out what the commands read, and make sure that they run the code of this tree."""
    for name in SAMPLES:
        shutil.copytree(tree / "samples/tiny-olmo2" / name, work / name)
    shutil.copy(tree / "studies/tiny.yaml", work / "study.yaml")
    for name, text in INPUTS.items():
        (work / name).write_text(text)
    np.savez(work / "factors.npz", **{"L3.mlp.up": np.linspace(1.1, 0.9, 128), "L0.attn.k": np.linspace(1, 0.5, 32)})
    asked = [sys.executable, "-c", "import diffract; print(diffract.__file__)"]
    where = subprocess.run(asked, env=environment(tree, work), capture_output=True, text=True, check=True).stdout
    if not Path(where.strip()).is_relative_to(tree):
        raise SystemExit(f"{tree}: Python takes diffract from {where.strip()}")


def environment(tree: Path, cache: Path) -> dict[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "NO_COLOR": "1", "COLUMNS": "120"}
    return os.environ | threads | offline | {"PYTHONPATH": str(tree / "src"), "DIFFRACT_CACHE_DIR": str(cache)}


class Server:
    """Runs the commands of a tree, one after another."""

    def __init__(self, tree: Path, work: Path) -> None:
        self.seconds = 0.0  # of the processor
        asked, env, pipe = [sys.executable, "-c", SERVER], environment(tree, work), subprocess.PIPE
        self._process = subprocess.Popen(asked, cwd=work, env=env, stdin=pipe, stdout=pipe, text=True)

    def run(self, words: Sequence[str], *places: Path) -> int:
        """Run a command, with files for its output and errors and a folder for its cache; return its exit code."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the process has no pipes")
        print(json.dumps([words, *map(str, places)]), file=stdin, flush=True)
        code, seconds = stdout.readline().split()
        self.seconds += float(seconds)
        return int(code)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def run_part(part: str, data: Path | None, server: Server, work: Path) -> list[str]:
    """Run the commands of a part; return those that failed."""
    (work / part).mkdir()
    failed = []
    for number, command in enumerate(PARTS[part]):
        words = [str(data) if word == "DATA" else word for word in shlex.split(command)]
        if words[0] == "cp":
            shutil.copy(work / words[1], work / words[2])
            continue
        log, out, err = (work / part / f"{number:02d}{ending}" for ending in (".txt", ".out", ".err"))
        code = server.run(words, out, err, work / "cache" / part)
        errors = "\n".join(line for line in err.read_text().splitlines() if not PROGRESS.fullmatch(line))
        log.write_text(f"diffract {command}\nexit code {code}\n{out.read_text()}\n{errors}\n")
        out.unlink(), err.unlink()
        if code and part != "errors":
            failed.append(f"{part}/{log.name}: exit code {code}: {command}")
    return failed


def written(part: str, work: Path) -> list[str]:
    """Return the files of a part that are compared; of a study its numbers alone."""
    files = [
        path
        for path in sorted((work / part).rglob("*"))
        if path.is_file() and "cache" not in path.relative_to(work).parts
    ]
    return [str(path.relative_to(work)) for path in files if part != "study" or path.name == "numbers.json"]


def compare_trees(trees: tuple[Path, Path], folder: Path, parts: Sequence[str], asked: argparse.Namespace) -> bool:
    """Run the parts in both trees, print a line for each, and return whether all is the same."""
    works = (folder / "old", folder / "new")
    for tree, work in zip(trees, works, strict=True):
        work.mkdir(parents=True)
        prepare(tree, work)

    def clean(text: str) -> str:
        for path in (*works, *trees):
            text = text.replace(str(path), "FOLDER")
        for pattern, word in NOISE:
            text = re.sub(pattern, word, text)
        return text

    allowed = {what: [name for name in getattr(asked, what).split(",") if name] for what in ("moved", "gone", "new")}
    faults, servers = 0, [Server(tree, work) for tree, work in zip(trees, works, strict=True)]
    for part in parts:
        begun, used = time.monotonic(), sum(server.seconds for server in servers)
        with ThreadPoolExecutor(2) as pool:
            failed = list(pool.map(partial(run_part, part, asked.data), servers, works))
        comparison = Comparison(*works, allowed, clean)
        comparison.found["differs"] += [f"{line} (in both)" for line in failed[0] if line in failed[1]]
        names = [written(part, work) for work in works]
        comparison.files(*names)
        lists = comparison.found
        verdict = ", ".join(f"{what} ({len(lines)})" for what, lines in lists.items() if lines) or "same"
        used, took = sum(server.seconds for server in servers) - used, time.monotonic() - begun
        print(f"{part:16s}{took:4.0f} s ({used:4.0f} s CPU) {len(names[0]):4d} files   {verdict}", flush=True)
        for what, lines in lists.items():
            for line in sorted(lines)[: None if what == "moved" else SHOWN]:
                print(f"    {what}: {line}", flush=True)
        faults += len(lists["differs"]) + (0 if asked.manifests else len(lists["manifest"]))
    for server in servers:
        server.close()
    return not faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="what the tree is compared with")
    parser.add_argument("--tree", type=Path, default=REPOSITORY, help="the tree; by default the one this file is in")
    parser.add_argument("--only", default="", metavar="NAME,...", help="these parts, and what they need")
    parser.add_argument("--list", action="store_true", help="show the parts and their commands")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder for the outputs, which stay")
    parser.add_argument("--data", type=Path, help="texts for the study")
    parser.add_argument("--moved", default="", metavar="NAME,...", help="what may differ: how far is said")
    parser.add_argument("--gone", default="", metavar="NAME,...", help="what only the commit has")
    parser.add_argument("--new", default="", metavar="NAME,...", help="what only the tree has")
    parser.add_argument("--manifests", action="store_true", help="manifest.json may differ")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(f"{part}\n" + "\n".join(f"    {line}" for line in lines) for part, lines in PARTS.items()))
        return
    wanted = asked.only.split(",") if asked.only else [part for part in PARTS if part != "study"]
    if not asked.commit or not PARTS.keys() >= set(wanted) or ("study" in wanted and not asked.data):
        parser.error(f"give a COMMIT, for study --data too, and of the parts {', '.join(PARTS)}")
    wanted += [part for name in wanted for part in NEEDS.get(name, ())]
    asked.data = asked.data and asked.data.resolve()
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    with tempfile.TemporaryDirectory(prefix="same-") as temporary:
        started = Path(temporary).resolve() / "tree"
        subprocess.run([*git, "add", "--quiet", "--detach", str(started), asked.commit], check=True)
        try:
            trees = (started, asked.tree.resolve())
            folder = (asked.keep or Path(temporary) / "outputs").resolve()
            same = compare_trees(trees, folder, [part for part in PARTS if part in wanted], asked)
        finally:
            subprocess.run([*git, "remove", "--force", str(started)], check=True)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
