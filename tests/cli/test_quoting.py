"""Paths of any name in overrides: accepted as they are, or refused with a quoted form that works in a shell."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from tests.conftest import Outcome
from tests.standins import BERT_BASE, BERT_RTE_EXPERTS, glue_table

Command = Callable[..., Outcome]

ACCEPTED = [
    "a=b",
    "lr=1e-5 step=10",
    "ü",
    "größe/à",
    "日本",
    "a#b",
    "a%20b",
    "a$b",
    "a!b&c;d",
    "x@y",
    "a~b",
    "??",
    "50%",
    "a?",
]
REFUSED = ["a,b", "a[1]", "[a]", "{a}", "{a: b}", "it's", 'say "hi"', "a'b\"c", "a(b)", "2024", "1e3", "true"]
REFUSED += ["a${x}", "${x}", "a\\,b", "choice(a,b)", "'a'", "[1]", "a{b},c=[d]"]
READ_AS = {"a\\,b": "a,b", "'a'": "a"}  # Hydra's own ways to write a text; such a folder is seen where it exists
UNNOTICED = list(READ_AS)
TO_DISK = ("method=soup", "evaluate=false", "tracking=none", "source=hub")


EXPERTS = "models.experts=[{0}/a,{0}/b]"


@pytest.fixture
def named(bert_checkpoints: Mapping[str, Path], workplace: Path) -> Callable[[str], None]:
    """Make a folder of any name with a base, two experts and RTE-shaped data in it."""

    def make(name: str) -> None:
        for folder, repository in zip(("base", "a", "b"), (BERT_BASE, *BERT_RTE_EXPERTS[1:3]), strict=True):
            shutil.copytree(bert_checkpoints[repository], workplace / name / folder)
        pq.write_table(glue_table("rte", 60, 1), workplace / name / "validation.parquet")

    return make


def shown(outcome: Outcome) -> str:
    """The override that an error shows, as a shell reads it."""
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert outcome.err.count("\n") == 1, outcome
    quoted = outcome.err.rstrip("\n").partition("for that text write ")[2]
    printed = subprocess.run(["/bin/sh", "-c", f"printf '%s\\0' {quoted}"], capture_output=True, check=True, text=True)
    (word,) = printed.stdout.split("\0")[:-1]
    return word


def run(command: Command, overrides: list[str], *more: str) -> int:
    """Run with ``overrides``, each refused one as its error shows it; return how many were refused."""
    for refused in range(len(overrides) + 1):
        outcome = command(*more, *overrides)
        if outcome.code == 0:
            return refused
        meant = shown(outcome)
        (at,) = (at for at, each in enumerate(overrides) if outcome.err.startswith(f"error: {each}: "))
        assert meant != overrides[at]
        overrides[at] = meant
    raise AssertionError(outcome)


def same(first: Path, second: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    return one.keys() == other.keys() and all(bool((one[name] == other[name]).all()) for name in one)


@pytest.mark.parametrize("name", [*ACCEPTED, *REFUSED])
def test_a_folder_of_any_name_can_be_a_base_an_expert_and_the_output(
    mergelab_command: Command, named: Callable[[str], None], workplace: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    named("plain")
    base, experts = "models.base=../plain/base", "models.experts={a: ../plain/a, b: ../plain/b}"
    bases, ones, outputs = workplace / "bases", workplace / "experts", workplace / "outputs"
    shutil.copytree(workplace / "plain" / "base", bases / name)
    shutil.copytree(workplace / "plain" / "a", ones / name)
    outputs.mkdir()

    monkeypatch.chdir(outputs)
    assert run(mergelab_command, [f"output={name}"], base, experts, *TO_DISK) == (name in {*REFUSED} - {*UNNOTICED})
    written = outputs / READ_AS.get(name, name)
    monkeypatch.chdir(bases)
    assert run(mergelab_command, [f"models.base={name}"], experts, "output=../1", *TO_DISK) == (name in REFUSED)
    monkeypatch.chdir(ones)
    more = (base, "models.experts={b: ../plain/b}")
    assert run(mergelab_command, [f"models.experts.a={name}"], *more, "output=../2", *TO_DISK) == (name in REFUSED)
    assert same(written, workplace / "1")
    assert same(written, workplace / "2")


@pytest.mark.parametrize("name", ["größe=1", "a, b", "c[1]", "x{y}"])
def test_pieces_of_lists_and_mappings_are_quoted_one_by_one(
    mergelab_command: Command, named: Callable[[str], None], workplace: Path, name: str
) -> None:
    named(name)
    named("plain")
    for number, experts in enumerate(
        ("[plain/a,{}/b]", "{{one: plain/a, two: {}/b}}", "[plain/a,{{reference: {}/b}}]")
    ):
        outcome = mergelab_command(
            *TO_DISK, "models.base=plain/base", f"models.experts={experts.format(name)}", f"output=m{number}"
        )
        if outcome.code != 0 and "," not in name:
            outcome = mergelab_command(*TO_DISK, "models.base=plain/base", shown(outcome), f"output=m{number}")
        assert outcome.code == (2 if "," in name else 0), outcome
        if outcome.code:
            assert outcome.err.count("\n") == 1


@pytest.mark.slow
def test_quoted_paths_work_in_grids_and_sweeps(
    mergelab_command: Command, named: Callable[[str], None], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "à [b]={c},d'e\"f%20#?"
    named(name)
    named("plain")
    monkeypatch.setenv("MERGELAB_CACHE", str(workplace / name / "cache"))
    overrides = [f"task.data_dir={name}", f"models.base={name}/base", f"models.experts.a={name}/a"]
    more = ("models.experts={b: plain/b}", "tracking=none", "source=hub")
    assert run(mergelab_command, list(overrides), "method=soup", *more) == 3
    for kind in (["-m", "method=soup,median"], ["-m", "sweep=task_arithmetic", "sweep.n_trials=2"]):
        quoted = list(overrides)
        assert run(mergelab_command, quoted, *kind, *more) == 3
    written = [f"output={name}-${{method.name}}-${{x}}"]
    assert run(mergelab_command, written, *TO_DISK, "models.base=plain/base", EXPERTS.format("plain")) == 1
    assert (workplace / f"{name}-${{method.name}}-${{x}}" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["à [b]={c},d'e\"f%20#?", "50%25 x=1?y=2"])
def test_a_project_may_lie_in_a_folder_of_any_name(
    named: Callable[[str], None], arguments: list[str], mergelab_command: Command, workplace: Path,
    monkeypatch: pytest.MonkeyPatch, folder: str,
) -> None:  # fmt: skip
    there = workplace / folder
    there.mkdir()
    for part in ("base", "a", "b", "c", "data"):
        (workplace / part).rename(there / part)
    monkeypatch.chdir(there)
    monkeypatch.setenv("MERGELAB_CACHE", str(there / "cache"))
    sweep = ["-m", "sweep=task_arithmetic", "sweep.n_trials=2"]
    for command in (["method=soup", "output=merged"], ["-m", "method=soup,median"], sweep):
        outcome = mergelab_command(*command, *arguments)
        assert outcome.code == 0, outcome
    assert [path.name for path in workplace.iterdir()] == [folder]
    assert {path.name for path in (there / "outputs").iterdir() if not path.name.startswith(".")} == {
        "mlflow.db", "mlartifacts", "sweeps.db", "runs", "grids", "sweeps",
    }  # fmt: skip


def test_a_working_folder_whose_name_is_a_reference_is_one_line(mergelab_command: Command, workplace: Path) -> None:
    (workplace / "${x}").mkdir()
    os.chdir(workplace / "${x}")
    outcome = mergelab_command("method=soup", "source=mini")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "reads ${ in the working folder's name as a reference" in outcome.err
    assert not list(Path.cwd().iterdir())


def test_a_reference_to_no_key_is_one_line_before_anything_is_made(mergelab_command: Command, workplace: Path) -> None:
    outcome = mergelab_command("output=a${x}", *TO_DISK[:3], "source=mini")
    assert shown(outcome) == r'output="a\${x}"'
    assert not list(workplace.iterdir())
