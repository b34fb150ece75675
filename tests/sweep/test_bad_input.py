"""What is wrong about a sweep is one line, exit code 2, and found before there is a study or a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest
from omegaconf import OmegaConf

from mergelab.config import CONF_DIR
from mergelab.sweep.storage import open_storage
from tests.cli.test_bad_input import assert_one_line
from tests.conftest import Outcome

if TYPE_CHECKING:
    from mergelab.sweep.plan import Sweep

Command = Callable[..., Outcome]

CASES: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("sweep=custom",), ("the search space is empty", "interval(0.1,1.5)", "sweep=ties")),
    (("sweep=tie",), ("sweep=tie", "'ties'")),
    (("sweep=median",), ("sweep=median: median has no parameter to search", "-m method=median,ties")),
    (("sweep=soup",), ("sweep=soup: soup has no parameter with a range", "'method.normalize=choice(true,false)'")),
    (("sweep=greedy_soup",), ("sweep=greedy_soup: greedy_soup chooses by the selecting examples itself",)),
    (("sweep=ties", "method.densty=interval(0.1,0.9)"), ("method.densty", "'density'")),
    (("sweep=ties", "method.density=interval(0.1,1.5)"), ("method.density=1.5", "at most 1")),
    (("sweep=ties", "method.density=interval(0,0.5)"), ("method.density=0", "greater than 0")),
    (("sweep=ties", "method.reduce=choice(mean,summ)"), ("method.reduce='summ'", "'sum'")),
    (("sweep=ties", "method.density=interval(0.9,0.1)"), ("method.density=interval(0.9,0.1)", "less than")),
    (("sweep=ties", "method.density=interval(a,b)"), ("method.density",)),
    (
        ("sweep=ties", "sweep.sampler=grid"),
        ("sweep.sampler=grid", "method.lambda is an interval", "range(0.2,2,"),
    ),
    (("sweep=ties", "sweep.sampler=tpa"), ("sweep.sampler=tpa", "'tpe'")),
    (("sweep=ties", "sweep.sampler={name:tpe,startup:3}"), ("sweep.sampler=tpe", "startup")),
    (("sweep=ties", "sweep.pruner=futile"), ("sweep.pruner=futile", "'futility'")),
    (("sweep=ties", "sweep.pruner={name:wilcoxon,p:0.1}"), ("sweep.pruner=wilcoxon", "'p'")),
    (("sweep=ties", "sweep.evaluation=adaptiv"), ("sweep.evaluation='adaptiv'", "'adaptive'")),
    (("sweep=ties", "sweep.evaluation=adaptive", "sweep.pruner=median"), ("sweep.pruner=median", "remove one")),
    (("sweep=ties", "sweep.budget=5m"), ("sweep.budget=5m", "600s")),
    (("sweep=ties", "sweep.n_trial=3"), ("sweep.n_trial", "'sweep.n_trials'")),
    (("sweep=ties", "hydra.sweeper.n_trial=3"), ("hydra.sweeper.n_trial",)),
    (("sweep=ties", "sweep.n_trials=0"), ("sweep.n_trials=0", "1")),
    (("sweep=ties", "sweep.n_trials=many"), ("sweep.n_trials='many'", "whole number")),
    (("sweep=ties", "sweep.max_failure_rate=2"), ("sweep.max_failure_rate=2", "at most 1")),
    (("sweep=ties", "sweep.objective=f1"), ("sweep.objective=f1", "rte does not report 'f1'", "accuracy")),
    (("sweep=ties", "sweep.direction=minimize"), ("sweep.direction", "accuracy", "maximize")),
    (("sweep=ties", "sweep.direction=up"), ("sweep.direction='up'", "'maximize'")),
    (("sweep=ties", "sweep.enqueue=[{method.lamda:1.0}]"), ("sweep.enqueue", "method.lamda is not swept")),
    (("sweep=ties", "eval.protocol=full"), ("eval.protocol=full", "eval.protocol=holdout")),
    (("sweep=ties", "evaluate=false", "output=merged"), ("evaluate=false", "a sweep selects by scores")),
    (("sweep=ties", "models.base=null"), ("ties", "base")),
    (("sweep=custom", "method=greedy_soup", "seed=0,1"), ("method=greedy_soup", "cannot be swept")),
    (("sweep=ties", "sweep.storage=sqlite:////proc/no/studies.db"), ("sweep.storage=sqlite:////proc/no/studies.db",)),
    (("sweep=ties", "sweep.storage=postgresql+psycopg://me:secret@127.0.0.1:9/x"), ("sweep.storage=", "***")),
]


def planned(folder: Path, *told: str) -> Sweep:
    """Plan the sweep of a command line."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from mergelab.sweep.plan import plan_sweep

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        plain = [override for override in told if "choice(" not in override]
        config = compose("config", plain, return_hydra_config=True)
        config.hydra.runtime.cwd = str(folder)
        node: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=True)
        return plan_sweep(node, config, GlobalHydra.instance().config_loader(), told)


@pytest.mark.parametrize(("arguments", "named"), CASES, ids=[" ".join(arguments) for arguments, _ in CASES])
def test_a_wrong_sweep_is_one_line_and_leaves_nothing(
    mergelab_command: Command, workplace: Path, arguments: tuple[str, ...], named: tuple[str, ...]
) -> None:
    outcome = mergelab_command("-m", *arguments, "source=mini")
    assert_one_line(outcome, *named)
    assert "secret" not in outcome.err
    assert outcome.out == ""
    assert not list(workplace.rglob("*.db")), "a study or a run was begun"
    assert not list(workplace.rglob("*.safetensors"))


def test_a_sweep_without_the_flag_is_told_so(mergelab_command: Command, workplace: Path) -> None:
    outcome = mergelab_command("sweep=ties", "source=mini")
    assert_one_line(outcome, "sweep=ties", "is started with -m", "python -m mergelab -m sweep=ties")
    assert not list(workplace.rglob("*.db"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["method.lambda=interval(0.1,0.5)"], ("search space of method.lambda", "interval(0.1,0.5)")),
        (["method.lambda=choice(0.1,0.5)"], ("search space of method.lambda", "choice(0.1,0.5)")),
        (["models.experts=[x/a,x/b]"], ("models.experts",)),
        (["sweep.objective=[accuracy,f1]"], ("another direction: maximize, not maximize,maximize",)),
        (["sweep.objective=f1"], ("another objective: accuracy, not f1",)),
        (["models.head=base"], ("another models.head: average, not base",)),
        (
            ["sweep.evaluation=pruned"],
            ("another sweep.evaluation: adaptive, not pruned; sweep.evaluation=adaptive",),
        ),
        (["task.limit=50"], ("another task.limit: null, not 50",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_study_of_something_else_is_refused_with_what_differs_and_a_new_name(
    mergelab_command: Command, workplace: Path, changed: list[str], named: tuple[str, ...]
) -> None:
    from mergelab.sweep.plan import definition
    from mergelab.sweep.study import SweepStudy

    own = ["task.metrics=[accuracy,f1]", "task.primary=accuracy", "sweep.study_name=mine", "source=mini"]
    sweep = planned(workplace, "sweep=task_arithmetic", *own)
    SweepStudy(sweep.url, sweep.name, sweep.space, sweep.settings, ["maximize"], definition(sweep))
    before = sorted(path.name for path in workplace.rglob("*"))
    outcome = mergelab_command("-m", "sweep=task_arithmetic", *own, *changed)
    assert_one_line(outcome, "sweep.study_name=mine: the study exists with another", "sweep.study_name=mine-2", *named)
    assert sorted(path.name for path in workplace.rglob("*")) == before
    open_storage.cache_clear()
    assert not optuna.load_study(storage=f"sqlite:///{workplace}/outputs/sweeps.db", study_name="mine").trials


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF_DIR / "sweep").glob("[a-z]*.yaml")))
def test_every_ready_sweep_composes_and_starts_from_points_of_its_space(workplace: Path, name: str) -> None:
    own = {
        "custom": ["method=median", "seed=choice(0,1)"],
        "slerp": ["~models.experts", "+models.experts={a: x/a, b: x/b}"],
    }
    sweep = planned(workplace, f"sweep={name}", "source=mini", *own.get(name, []))
    given = sweep.config.sweep.enqueue
    assert len(sweep.settings.enqueue or []) == len(given)
    assert all(sweep.space.check_point(point) is None for point in sweep.settings.enqueue or [])
    assert sweep.plan.config.eval.protocol == "holdout"
    assert name == "custom" or given


def test_the_commands_of_the_guide_to_adaptive_sweeps_are_possible(workplace: Path) -> None:
    page = (CONF_DIR.parent / "docs" / "guides" / "adaptive-sweeps.md").read_text()
    commands = [block.partition("```")[0].split() for block in page.split("```bash\n")[1:]]
    assert len(commands) == 2
    for command in commands:
        assert command[:4] == ["python", "-m", "mergelab", "-m"]
        assert planned(workplace, *command[4:]).settings.evaluation == "adaptive"
