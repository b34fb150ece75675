"""``--help``, ``--version`` and the commands beside merging: what they show, and what they need not import."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mergelab import __version__
from mergelab.cli.help import commands
from mergelab.config import CONF_DIR
from tests.conftest import ROOT, Outcome

Command = Callable[..., Outcome]
HEAVY = {"torch", "mlflow", "datasets", "transformers", "ray", "optuna", "hydra", "omegaconf"}
IMPORTED = "import sys; from mergelab.__main__ import main; main(); print(*sys.modules, file=sys.stderr)"


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("flag", ["--help", "-h", "--version"])
def test_help_and_version_import_nothing_heavy(tmp_path: Path, flag: str) -> None:
    done = python("-c", IMPORTED, flag, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not HEAVY & set(done.stderr.split())


@pytest.mark.parametrize("name", ["config", "cli", "errors", "weights"])
def test_importing_a_part_of_the_package_by_from_imports_no_other(tmp_path: Path, name: str) -> None:
    done = python("-c", f"import sys; from mergelab import {name}; print(*sys.modules)", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())


def test_version_is_mergelabs(tmp_path: Path) -> None:
    done = python("-m", "mergelab", "--version", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mergelab {__version__}\n", "")


def test_help_shows_every_group_with_a_choice_and_its_options(mergelab_command: Command) -> None:
    shown = mergelab_command("method=dare", "--help").out
    groups = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ")}
    for folder in sorted(CONF_DIR.iterdir()):
        options = [file.stem for file in folder.glob("*.yaml") if not file.stem.startswith("_")]
        if folder.name == "hydra" or len(options) < 2:
            continue
        assert folder.name in groups
        assert all(f" {option}" in shown for option in options)


def test_help_shows_keys_with_defaults_meanings_and_examples(mergelab_command: Command) -> None:
    shown = mergelab_command("--help").out
    for key in ("source=auto ", "eval.protocol=full ", "sweep.n_trials=50 ", "tracking.uri=null ", "save.dtype=null "):
        assert f"\n  {key}" in shown
    assert "'~models.experts.NAME' leaves one out" in shown
    assert "mergelab -m sweep=ties task=rte" in shown
    assert "-q, --quiet" in shown
    for internal in ("_target_", "hydra.", "callbacks", "job_logging", "defaults:", "_settings", "_schema"):
        assert internal not in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_every_documented_default_is_the_composed_one(mergelab_command: Command) -> None:
    import yaml

    shown = mergelab_command("--help").out
    composed = yaml.safe_load(mergelab_command("--cfg", "job").out)
    settings = [line.split()[0] for line in shown.split("Keys (KEY=VALUE)")[1].splitlines() if line.startswith("  ")]
    checked = 0
    for setting in settings:
        key, equals, value = setting.partition("=")
        group, _, name = key.rpartition(".")
        node = composed.get(group) if group else composed
        if equals and isinstance(node, dict) and name in node and not name.isupper() and "REFERENCE" not in value:
            assert yaml.safe_load(value) == node[name] or (node[name] is None and value == "[]"), setting
            checked += 1
    assert checked > 20


def test_a_folder_of_the_users_own_is_in_the_help(mergelab_command: Command, workplace: Path) -> None:
    (workplace / "mine" / "models").mkdir(parents=True)
    (workplace / "mine" / "models" / "pair.yaml").write_text("name: pair\n")
    for flags in (("--config-dir", "mine"), ("--config-dir=mine",), ("-cd", "mine")):
        assert ", pair" in mergelab_command(*flags, "--help").out
    assert ", pair" not in mergelab_command("--help").out


def test_a_command_of_its_own_is_the_same_by_either_name(tmp_path: Path) -> None:
    by_script = python("-m", "mergelab", "methods", "ties", folder=tmp_path)
    by_module = python("-m", "mergelab.methods", "ties", folder=tmp_path)
    assert by_script.returncode == by_module.returncode == 0, by_script.stderr
    assert "arXiv:2306.01708" in by_script.stdout
    assert by_script.stdout == by_module.stdout
    failed = python("-m", "mergelab", "methods", "tis", folder=tmp_path)
    assert (failed.returncode, failed.stderr) == (2, "error: method=tis: no such method; did you mean 'ties'?\n")


def test_every_command_is_in_the_help(mergelab_command: Command) -> None:
    assert "methods" in commands()
    assert f"mergelab COMMAND ...                           {', '.join(commands())}\n" in mergelab_command("--help").out


@pytest.mark.parametrize(
    ("word", "hint"), [("methds", "did you mean 'methods'?"), ("tis", "settings are GROUP=OPTION")]
)
def test_a_word_that_is_no_command_is_one_line(mergelab_command: Command, word: str, hint: str) -> None:
    outcome = mergelab_command(word)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {word}: no such command")
    assert hint in outcome.err
