"""What goes to which stream, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import diffract
from diffract.cli.main import app

ROOT = Path(__file__).parents[2]
run = CliRunner()


@pytest.mark.parametrize("command", ["scan", "inspect"])
def test_quiet_prints_nothing(family: tuple[Path, Path], command: str) -> None:
    done = run.invoke(app, [command, str(family[0]), "--quiet"])
    assert (done.exit_code, done.output) == (0, "")


def test_quiet_report_prints_nothing(family: tuple[Path, Path], tmp_path: Path) -> None:
    folder = diffract.scan(family[0]).save(tmp_path / "run")
    done = run.invoke(app, ["report", str(folder), "-o", str(tmp_path / "x.html"), "-q"])
    assert (done.exit_code, done.output) == (0, "")
    assert (tmp_path / "x.html").read_text() == (folder / "report.html").read_text()


ENDED = """
import os, sys, time
from diffract.cli import main as cli
from diffract.store import whole_folder
def app():
    with whole_folder(sys.argv[1]):
        os.kill(os.getpid(), int(sys.argv[2]))
        time.sleep(20)
cli.app = app
try:
    cli.main()
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_being_asked_to_end_leaves_no_draft(tmp_path: Path, number: int) -> None:
    done = subprocess.run([sys.executable, "-c", ENDED, tmp_path / "out", str(int(number))], check=False, timeout=60)
    assert done.returncode == 130
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
import sys
class Interrupts:
    def find_spec(self, name, *rest):
        if name == sys.argv[1]:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
from diffract.__main__ import main
main()
"""


@pytest.mark.parametrize("name", ["typer", "diffract.cli.commands", "diffract.cli.main"])
def test_an_interruption_while_the_command_is_imported_shows_no_traceback(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_quiet_still_tells_errors() -> None:
    done = run.invoke(app, ["scan", "/nowhere/at-all", "--quiet"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")


def test_compare_json_equals_the_api(family: tuple[Path, Path]) -> None:
    base, tuned = map(str, family)
    done = run.invoke(app, ["compare", base, f"math={tuned}", "--json", "--no-heads"])
    assert (done.exit_code, done.stderr) == (0, "")
    expected = diffract.compare(base, f"math={tuned}", heads=False).models.to_dicts()
    assert json.loads(done.stdout)["models"] == expected


def test_a_reader_who_has_seen_enough_is_no_fault() -> None:
    command = [sys.executable, "-m", "diffract", "metrics"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_debug_shows_where(family: tuple[Path, Path]) -> None:
    done = run.invoke(app, ["scan", str(family[0]), "--select", "attn.z", "--debug"])
    assert isinstance(done.exception, diffract.SelectionError)


def test_a_fault_of_ours_is_told_apart(family: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("\x1b[31mred")

    monkeypatch.setattr("diffract.inspection.inspect", broken)
    done = run.invoke(app, ["inspect", str(family[0])])
    assert done.exit_code == 3
    assert "ZeroDivisionError" in done.stderr
    assert "\x1b" not in done.stderr
    assert "Traceback" not in done.output


def test_an_interruption_has_its_own_code(family: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffract.api.scan", interrupted)
    done = run.invoke(app, ["scan", str(family[0])])
    assert done.exit_code == 130
    assert "run the same command again" in done.stderr


def test_an_error_on_the_way_of_an_interruption_is_no_fault_of_ours(
    family: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RecursionError("of a library that is half imported")

    monkeypatch.setattr("diffract.api.scan", interrupted)
    done = run.invoke(app, ["scan", str(family[0])])
    assert done.exit_code == 130
    assert done.stderr == "interrupted; run the same command again to continue\n"


def test_version_and_missing_arguments() -> None:
    assert run.invoke(app, ["--version"]).stdout == f"diffract {diffract.__version__}\n"
    assert run.invoke(app, ["compare", "only-a-base"]).exit_code == 2


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "content", [json.dumps({"family": "x"}).encode("utf-16"), DEEP.encode()], ids=["utf-16", "deep"]
)
def test_an_architecture_file_that_cannot_be_read_is_the_inputs_fault(
    family: tuple[Path, Path], tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    done = run.invoke(app, ["inspect", str(family[0]), "--architecture", str(tmp_path / "a.json")])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "is no JSON in UTF-8" in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: " + "[" * 1000 + "]" * 1000, "within each other"),
        ("a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(20)), "aliases"),
        ("", "expected a mapping|expected"),
        ("x" * 10_000_001, "10 MB"),
    ],
    ids=["deep", "aliases", "empty", "large"],
)
def test_a_recipe_that_cannot_be_read_is_the_inputs_fault(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    done = run.invoke(app, ["apply", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert re.search(said, done.stderr)


def test_a_pipe_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.yaml")
    done = run.invoke(app, ["apply", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "is no file" in done.stderr


@pytest.mark.parametrize(
    "change", [None, {"models": [{"model": "m"}]}, {"metrics": {"stable_rank": "x"}}, {"metrics": []}, {"models": {}}]
)
def test_a_damaged_run_folder_is_the_inputs_fault(
    family: tuple[Path, Path], tmp_path: Path, change: dict[str, object] | None
) -> None:
    folder = diffract.scan(family[0], metrics="norms").save(tmp_path / "run")
    manifest = folder / "manifest.json"
    manifest.write_text(DEEP if change is None else json.dumps(json.loads(manifest.read_text()) | change))
    done = run.invoke(app, ["report", str(folder), "-o", str(tmp_path / "x.html")])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "is damaged" in done.stderr
    assert not (tmp_path / "x.html").exists()


def test_a_full_disk_at_a_table_is_the_inputs_fault(family: tuple[Path, Path], tmp_path: Path) -> None:
    code = """
import resource, signal, sys
import diffract
from diffract.errors import RunError
found = diffract.scan(sys.argv[1], metrics="norms", cache=False)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    found.save(sys.argv[2])
except RunError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(family[0]), str(tmp_path / "run")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
    assert "File too large" in done.stdout
    assert list(tmp_path.glob("run*")) == []


def test_names_from_files_steer_no_terminal(family: tuple[Path, Path], tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    spec = ROOT / "src" / "diffract" / "architectures" / "specs" / "llama.json"
    own.write_text(json.dumps(json.loads(spec.read_text()) | {"family": "x\x1b[2Jy"}))
    done = run.invoke(app, ["inspect", str(family[0]), "--architecture", str(own)])
    assert done.exit_code == 0, done.output
    assert "\\x1b[2J" in done.stdout
    assert "\x1b" not in done.output
    assert run.invoke(app, ["scan", str(family[0]), "-o", str(tmp_path / "run")]).exit_code == 0
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"kind": "x\x1b[2Jy"}))
    done = run.invoke(app, ["report", str(tmp_path / "run"), "-o", str(tmp_path / "page.html")])
    assert done.exit_code == 1
    assert "\x1b" not in done.output


@pytest.mark.parametrize("command", ["apply {} -o out", "train {} -o out", "inspect {base} --architecture {}"])
def test_a_pipe_is_not_waited_for(command: str, family: tuple[Path, Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = run.invoke(app, command.format(tmp_path / "pipe", base=family[0]).split())
    assert done.exit_code == 1, done.output
    assert "it is no file" in done.stderr


def test_deep_recipes_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text("[" * 100_000 + "]" * 100_000)
    done = run.invoke(app, ["apply", str(path), "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "100 values within each other" in done.stderr
