"""The command of a row composes the configuration that its run has recorded."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from mergelab.config import CONF_DIR
from mergelab.experiment.plan import plan_experiment
from mergelab.report.commands import nested, spelled
from mergelab.tracking.values import flatten
from tests.conftest import Outcome
from tests.report.conftest import Store, plan_of, right_on


def commands(outcome: Outcome) -> list[str]:
    assert outcome.code == 0, outcome.err
    return [row["command"] for row in csv.DictReader(io.StringIO(outcome.out)) if row["command"]]


def composed(command: str) -> Any:
    program, flag, package, *overrides = shlex.split(command)
    assert (program, flag, package) == ("python", "-m", "mergelab")
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return plan_experiment(compose("config", overrides=overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=ties", "task=rte", "method.density=0.3", "method.lambda=0.8"),
        ("method=ties", "task=rte", "method.weights=[1.0,2,0.5,1,1]", "seed=7"),
        (
            "method=ties",
            "task=rte",
            "models.experts={a:org/a,b:org/b}",
            "method.density={a:0.1,b:0.2}",
            "task.limit=50",
        ),
        ("method=task_arithmetic", "task=mrpc", "models.head=expert:a", "models.experts={a:org/a,b:org/b}"),
        ("method=slerp", "task=rte", "models.experts=[org/a@v1.0,./my/b]", "models.base=null"),
        ("method=soup", "task=rte", "models.experts={a:{reference:org/a,weight:2.0},b:org/b}"),
        ("method=soup", "task=rte", "models.experts={a:'/data/my models/it\\'s, [a]',b:'x y'}"),
        ("method=ties", "task=suite", "models=gpt2_glue", "models.head=per_task", "task.members=[rte,cola]"),
        ("method=ties", "task=rte", "models=bert_base_mrpc", "eval.protocol=holdout", "eval.dtype=bfloat16"),
        ("experiment=bert_rte",),
    ],
    ids=["numbers", "list", "by expert", "mapping", "no base", "weights", "quotes", "suite", "models", "recipe"],
)
def test_the_command_of_a_row_composes_what_was_recorded(
    store: Store, report: Callable[..., Outcome], overrides: tuple[str, ...]
) -> None:
    store.run("merge", *overrides, correct=right_on(150))
    (command,) = commands(report("rte" if "task=rte" in overrides else "--format=csv", "--format=csv"))
    wanted, found = dict(plan_of(*overrides).resolved), dict(composed(command).resolved)
    models = {key: plan.config.models for key, plan in (("wanted", plan_of(*overrides)), ("found", composed(command)))}
    for key in ("method", "task", "eval", "save", "seed", "device", "source", "evaluate"):
        assert found[key] == wanted[key], key
    given, other = models["wanted"].model_dump(), models["found"].model_dump()
    assert {**given, "name": ""} == {**other, "name": ""}


def test_a_miniatures_command_asks_for_the_miniature(store: Store, report: Callable[..., Outcome]) -> None:
    store.run("merge", "method=ties", "task=rte", correct=right_on(150), source="mini")
    assert commands(report("--format=csv")) == [
        "python -m mergelab method=ties task=rte models=bert_base_rte source=mini"
    ]


def test_a_baseline_has_no_command(store: Store, report: Callable[..., Outcome]) -> None:
    store.baseline("expert", "a", right_on(170))
    assert commands(report("rte", "--format=csv")) == []


def test_parameters_that_were_cut_make_no_configuration() -> None:
    params = flatten({"method": {"name": "ties"}, "models": {"passthrough": ["layer" * 2000]}})
    assert nested(params) == {}
    assert nested({"method.name": "ties", "method.weights.0": "1.0", "method.weights.1": "2"}) == {
        "method": {"name": "ties", "weights": [1.0, 2]}
    }


def test_the_page_can_copy_each_command(compared: Store, report: Callable[..., Outcome]) -> None:
    from tests.report.test_page import page

    (best, *_) = commands(report("rte", "--format=csv"))
    assert best == "python -m mergelab method=ties task=rte models=bert_base_rte method.density=0.3"
    assert best in {a.get("data-copy") for tag, a in page().elements if tag == "button"}
    assert best in page().text
    assert Path("report/report.html").exists()


@pytest.mark.parametrize(
    "value", ["a b", "it's", "a\\", "\\'", "${x}", "null", "1e5", "true", "a,b", "", "{a}", "é", "a'\\"]
)
def test_text_is_spelled_so_that_hydra_reads_that_text(value: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    read = OverridesParser.create().parse_override(f"key={spelled(value)}").value()
    assert OmegaConf.create({"key": str(read)}).key == value
