"""Output that cannot be written, closed streams and Ctrl-C at any moment: one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

COMMAND = f"{sys.executable} -m mergelab"


def shell(line: str, folder: Path) -> tuple[int, str]:
    """Run a line of shell; return its exit code and what is on standard error."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", ["--help", "--version", "method=soup --cfg job"])
def test_a_full_output_is_one_line(arguments: str, tmp_path: Path) -> None:
    code, said = shell(f"{COMMAND} {arguments} >/dev/full", tmp_path)
    assert (code, said) == (2, "error: standard output cannot be written to (No space left on device)\n")


@pytest.mark.parametrize("arguments", ["--help", "method=soup source=mini tracking=none"])
def test_a_closed_output_is_one_line_before_any_work(arguments: str, tmp_path: Path) -> None:
    code, said = shell(f"{COMMAND} {arguments} >&-", tmp_path)
    assert (code, said) == (2, "error: standard output is closed; >/dev/null discards what is shown\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("errors", ["2>&-", "2>/dev/full"])
def test_the_code_tells_where_the_line_cannot_be_written(errors: str, tmp_path: Path) -> None:
    assert shell(f"{COMMAND} sede=1 {errors}", tmp_path) == (2, "")


def test_a_closed_error_output_takes_no_file(tmp_path: Path) -> None:
    assert shell(f"{COMMAND} --version 2>&- <&- | grep -c mergelab", tmp_path)[0] == 0


def test_a_reader_that_ends_is_no_error(tmp_path: Path) -> None:
    assert shell(f"set -o pipefail; {COMMAND} --help | true", tmp_path) == (0, "")


@pytest.mark.parametrize("module", ["mergelab methods", "mergelab.methods"])
def test_a_reader_that_ends_early_is_no_error(module: str, tmp_path: Path) -> None:
    listing = COMMAND.replace("-m mergelab", f"-m {module}") + " --format=markdown"
    assert shell(f"set -o pipefail; {listing} | true", tmp_path) == (0, "")


# An import that lasts, as from a slow disk.
SLOW = """
import builtins, sys, time
load = builtins.__import__
def slow(name, *rest, **more):
    if name == MODULE:
        print("ready", flush=True)
        time.sleep(60)
    return load(name, *rest, **more)
builtins.__import__ = slow
from mergelab.__main__ import main
sys.argv = ["mergelab", "method=soup", "source=mini"]
main()
"""


@pytest.mark.parametrize("module", ["mergelab.cli.help", "hydra", "mergelab.experiment.plan"])
def test_ctrl_c_while_modules_are_imported_is_one_line(module: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SLOW.replace("MODULE", repr(module))]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said.decode()) == (130, "error: interrupted\n")
