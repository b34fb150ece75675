"""``models.experts.NAME=null``: who is there is left out, who is not is named beside those who are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Outcome

Command = Callable[..., Outcome]
SAID = (
    "error: models.experts.howy=null: no expert 'howy'; did you mean 'howey'? "
    "(there are textattack, yoshitomo-matsubara, Ruizhou, howey, anirudh21)\n"
)


def experts(mergelab_command: Command, *arguments: str) -> dict[str, Any]:
    outcome = mergelab_command(*arguments, "--cfg", "job")
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = yaml.safe_load(outcome.out)["models"]["experts"]
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    "arguments",
    [
        ("models.experts.howy=null",),
        ("++models.experts.howy=null",),
        ("models.experts.howy=null", "--cfg", "job"),
        ("-m", "method=ties,soup", "models.experts.howy=null"),
        ("-m", "task=rte,rte", "models.experts.howy=null", "tracking=none"),
        ("-m", "sweep=ties", "models.experts.howy=null"),
    ],
)
def test_an_expert_that_is_not_there_cannot_be_left_out(
    mergelab_command: Command, workplace: Path, arguments: tuple[str, ...]
) -> None:
    outcome = mergelab_command("source=mini", *arguments)
    assert (outcome.code, outcome.err, outcome.out) == (2, SAID, "")
    assert not list(workplace.rglob("mlflow.db"))


def test_those_that_a_ready_set_leaves_out_itself_are_not_among_those_there_are(mergelab_command: Command) -> None:
    outcome = mergelab_command("task=suite", "models.experts.nobody=null")
    assert outcome.code == 2
    assert outcome.err == ("error: models.experts.nobody=null: no expert 'nobody' (there are cola, mrpc, rte, sst2)\n")
    assert list(experts(mergelab_command, "task=suite", "models.experts.mnli=null")) == ["cola", "mrpc", "rte", "sst2"]
    assert list(experts(mergelab_command, "task=suite", "models.experts.rte=null")) == ["cola", "mrpc", "sst2"]


def test_experts_in_a_list_have_no_names_to_be_left_out_by(mergelab_command: Command) -> None:
    for setting in ("models.experts.a=null", "models.experts.a.weight=2", "~models.experts.a"):
        outcome = mergelab_command("models.experts=[./a,./b]", setting)
        assert outcome.code == 2
        assert outcome.err.startswith("error: models.experts.a: models.experts is a list here, whose entries cannot be")
        assert len(outcome.err.splitlines()) == 1
    named = ("models.experts=[./a]", "models.experts={a: ./a, b: ./b}", "models.experts.a=null")
    assert experts(mergelab_command, *named) == {"b": "./b"}


def test_hydras_own_ways_to_add_and_remove_an_expert_are_as_they_were(mergelab_command: Command) -> None:
    two = "models.experts={a: ./a, b: ./b}"
    assert experts(mergelab_command, two, "models.experts.b=null") == {"a": "./a"}
    assert experts(mergelab_command, two, "~models.experts.b") == {"a": "./a"}
    assert list(experts(mergelab_command, two, "+models.experts.c=./c")) == ["a", "b", "c"]
    assert list(experts(mergelab_command, two, "models.experts.c=./c", "models.experts.b=null")) == ["a", "c"]
    assert experts(mergelab_command, two, "models.experts.a.labels=null")["a"] == {"labels": None}
    outcome = mergelab_command(two, "~models.experts.c")
    assert (outcome.code, outcome.err) == (
        2,
        "error: Could not delete from config. 'models.experts.c' does not exist.\n",
    )


def labels(folder: Path) -> list[list[str]]:
    """Which experts the jobs of a grid merged: the names in their results."""
    files = sorted(folder.glob("outputs/grids/*/*/*/result.json"), key=lambda file: int(file.parent.name))
    models = [json.loads(file.read_text())["models"] for file in files]
    return [[model["label"] for model in each if model["role"] == "expert"] for each in models]


MEASURED = ("task.limit=8", "eval.preflight=false", "tracking=none", "method=soup", "eval.bootstrap=10")


def test_a_grid_can_be_with_and_without_an_expert(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    named = [arguments[0], "models.experts={a: ./a, b: ./b}", arguments[2], *MEASURED]
    outcome = mergelab_command("-m", *named, "models.experts.c=null,./c", "models.experts.b=null")
    assert outcome.code == 0, outcome.err
    assert labels(workplace) == [["./a"], ["./a", "./c"]]


def test_in_a_grid_over_sets_of_experts_each_job_must_have_the_one_that_is_left_out(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    (workplace / "conf" / "models").mkdir(parents=True)
    for name, members in {"two": "ab", "three": "abc"}.items():
        found = {"name": name, "base": "./base", "experts": {each: f"./{each}" for each in members}}
        (workplace / "conf" / "models" / f"{name}.yaml").write_text(yaml.safe_dump({**found, "passthrough": []}))
    grid = ["--config-dir=conf", "-m", "models=two,three", arguments[2], *MEASURED]
    outcome = mergelab_command(*grid, "models.experts.c=null")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "error: models.experts.c=null: no expert 'c' (there are a, b)\n"
    assert labels(workplace) == []
    outcome = mergelab_command(*grid, "models.experts.a=null")
    assert outcome.code == 0, outcome.err
    assert labels(workplace) == [["./b"], ["./b", "./c"]]
