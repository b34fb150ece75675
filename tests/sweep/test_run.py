"""Whole sweeps on the basic launcher: what is tried, selected, reported and recorded, and how a sweep goes on."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

from mergelab.engine import warm_session
from mergelab.sweep.attempts import BEGUN, DEATHS, attempting
from mergelab.sweep.config import SweepConfig
from mergelab.sweep.reporting import unpacked
from mergelab.sweep.space import space_from
from mergelab.sweep.storage import open_storage
from mergelab.sweep.study import ERROR, OUTCOME, SCORES, SweepStudy
from mergelab.tracking import interrupts
from mergelab.tracking.processes import process_tags
from tests.conftest import Outcome
from tests.standins import GPT2_BASE, glue_table

pytestmark = pytest.mark.slow

Command = Callable[..., Outcome]
PULL = """
import os, signal
def pull(base, experts, *, strength: float = 1.0):
    if strength == 0.25:
        raise ValueError("a quarter is too much")
    if strength == 0.75 and not os.path.exists("interrupted"):
        open("interrupted", "w").close()
        os.kill(os.getpid(), signal.SIGINT)
    return base + strength * (sum(experts) / len(experts) - base)
"""


@pytest.fixture
def sweep(mergelab_command: Command, arguments: list[str]) -> Callable[..., Outcome]:
    """``python -m mergelab -m sweep=NAME ...`` on three tiny experts, untracked unless the caller says otherwise."""

    def run(name: str, *more: str, code: int = 0) -> Outcome:
        tracked = () if any(argument.startswith("tracking") for argument in more) else ("tracking=none",)
        known = () if any(argument.startswith("sweep.study_name") for argument in more) else ("sweep.study_name=s",)
        outcome = mergelab_command("-m", f"sweep={name}", *arguments, *tracked, *known, *more)
        assert outcome.code == code, outcome
        return outcome

    return run


@pytest.fixture
def pulled(workplace: Path) -> list[str]:
    """A method whose strength 1 is the soup, 0.25 an error, and 0.75 presses Ctrl-C the first time."""
    (workplace / "mine.py").write_text(PULL)
    sys.modules.pop("mine", None)
    return ["method=custom", "method.function=mine.pull", "sweep.sampler=grid", "sweep.pruner=none"]


def trials(folder: Path, name: str = "s") -> list[optuna.trial.FrozenTrial]:
    open_storage.cache_clear()
    return optuna.load_study(storage=f"sqlite:///{folder}/outputs/sweeps.db", study_name=name).trials


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(max(folder.glob("outputs/sweeps/*/*/result.json")).read_text())
    return found


def single(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(max(folder.glob("outputs/runs/*/*/result.json")).read_text())
    return found


def runs(folder: Path, kind: str) -> list[Any]:
    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("rte").experiment_id
    return list(client.search_runs([experiment], f"tags.`mergelab.kind` = '{kind}'", order_by=["start_time ASC"]))


def states(folder: Path) -> list[str]:
    return [trial.state.name for trial in trials(folder)]


# ------------------------------------------------------------------------------------------------- what is tried


def test_known_good_points_come_first_and_n_trials_is_the_total(sweep: Callable[..., Outcome], workplace: Path) -> None:
    outcome = sweep("task_arithmetic", "sweep.n_trials=3")
    assert "3 trials: 3 complete" in outcome.out
    assert [trial.params["method.lambda"] for trial in trials(workplace)][:2] == [0.3, pytest.approx(1 / 3)]
    before = [(trial.params, trial.values) for trial in trials(workplace)]
    outcome = sweep("task_arithmetic", "sweep.n_trials=5")
    assert "trials    5 in all, 3 of them there already" in outcome.out
    said = [line for line in outcome.out.splitlines() if line.startswith("trial ") and " as a finalist" not in line]
    assert [line.partition(":")[0] for line in said] == ["trial 3", "trial 4"]
    assert [(trial.params, trial.values) for trial in trials(workplace)][:3] == before
    outcome = sweep("task_arithmetic", "sweep.n_trials=5")
    assert "trial 5" not in outcome.out
    assert len(trials(workplace)) == 5
    assert "best: trial" in outcome.out


def test_a_users_own_space_is_swept_and_a_grid_ends_with_its_points(
    sweep: Callable[..., Outcome], workplace: Path, pulled: list[str]
) -> None:
    sweep("custom", *pulled, "method.strength=choice(0.0,0.5,1.0)", "sweep.n_trials=20")
    assert sorted(trial.params["method.strength"] for trial in trials(workplace)) == [0.0, 0.5, 1.0]


def test_a_space_that_the_user_narrows_or_fixes_keeps_what_is_left_of_the_first_points(
    sweep: Callable[..., Outcome], workplace: Path
) -> None:
    sweep("ties", "method.density=0.3", "sweep.n_trials=2")
    assert [list(trial.params) for trial in trials(workplace)] == [["method.lambda"]] * 2
    assert trials(workplace)[0].params["method.lambda"] == 1.0
    sweep("ties", "method.lambda=interval(0.2,0.9)", "sweep.n_trials=1", "sweep.study_name=narrow")
    assert trials(workplace, "narrow")[0].params["method.lambda"] <= 0.9


def test_lambda_is_swept_along_a_curve_over_depth(
    sweep: Callable[..., Outcome], mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    sweep("layerwise", "sweep.n_trials=3")
    best = max(trials(workplace), key=lambda trial: (trial.value or 0.0, -trial.number))
    assert set(best.params) == {f"sweep.curve.{place}" for place in ("first", "middle", "last")}
    curve = ",".join(str(value) for value in best.params.values())
    plain = [*arguments, "method=task_arithmetic", f"method.lambda=[{curve}]", "eval.protocol=holdout"]
    assert mergelab_command(*plain, "tracking=none").code == 0
    assert report(workplace)["models"][-1]["results"] == single(workplace)["models"][-1]["results"]


# ---------------------------------------------------------------------------------------- selection and report


def test_trials_select_and_the_winners_report_are_those_of_single_runs(
    sweep: Callable[..., Outcome], mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    outcome = sweep("ties", "sweep.n_trials=4", "sweep.pruner=none")
    found = {}
    for trial in trials(workplace):
        values = [f"{key}={value}" for key, value in trial.params.items()]
        plain = [*arguments, "method=ties", *values, "eval.protocol=holdout", "tracking=none"]
        assert mergelab_command(*plain).code == 0
        found[trial.number] = single(workplace)["models"]
        assert trial.value == found[trial.number][-1]["results"]["rte"]["select"]["accuracy"]
    best = max(trials(workplace), key=lambda trial: (trial.value or 0.0, -trial.number))
    assert f"best: trial {best.number}" in outcome.out
    reported = report(workplace)["models"]
    assert [model["results"] for model in reported[:4]] == [model["results"] for model in found[0][:4]]
    assert reported[-1]["results"] == found[best.number][-1]["results"]
    assert reported[-1]["p_value"] == found[best.number][-1]["p_value"]
    assert reported[-2]["results"] == found[0][-1]["results"]  # the paper's defaults were the first point
    assert mergelab_command(*arguments, "method=soup", "eval.protocol=holdout", "tracking=none").code == 0
    assert reported[-3]["results"] == single(workplace)["models"][-1]["results"]
    assert "paired test of the winner on the reporting examples: p" in outcome.out


def test_models_that_memory_has_no_room_for_are_read_again_in_every_trial(
    sweep: Callable[..., Outcome],
    mergelab_command: Command,
    arguments: list[str],
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        warm_session, "check_memory", lambda models, memory=None, ask=warm_session.check_memory: ask(models, 0)
    )
    outcome = sweep("ties", "sweep.n_trials=2", "sweep.pruner=none")
    assert outcome.code == 0, outcome.err
    assert "not even one of them fits" in outcome.err
    for trial in trials(workplace):
        values = [f"{key}={value}" for key, value in trial.params.items()]
        plain = [*arguments, "method=ties", *values, "eval.protocol=holdout", "tracking=none"]
        assert mergelab_command(*plain).code == 0
        assert trial.value == single(workplace)["models"][-1]["results"]["rte"]["select"]["accuracy"]


def test_no_trial_is_measured_on_an_example_that_reports(
    sweep: Callable[..., Outcome], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergelab.experiment.session import Session

    asked: list[tuple[str, Any]] = []
    original = Session.predict

    def predict(self: Session, data: Any, backbone: Any, head: Any, model: str, **options: Any) -> Any:
        asked.append((model, options.get("members")))
        return original(self, data, backbone, head, model, **options)

    monkeypatch.setattr(Session, "predict", predict)
    sweep("task_arithmetic", "sweep.n_trials=3", "sweep.pruner=none", "tracking=mlflow", "eval.holdout_fraction=0.25")
    measured = [members for model, members in asked if "(trial" in model]
    (winner,) = runs(workplace, "report")
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    table = pq.read_table(client.download_artifacts(winner.info.run_id, "predictions/rte.parquet"))
    selects, reports = table["selects"].to_numpy(), table["reports"].to_numpy()
    assert len(measured) == 3
    for members in measured:
        assert sorted(members) == list(np.flatnonzero(selects))
        assert not reports[members].any()
    right = table["prediction"].to_numpy() == table["label"].to_numpy()
    assert winner.data.metrics["report/accuracy"] == pytest.approx(right[reports].mean())
    assert [trial.user_attrs[OUTCOME]["examples"] for trial in trials(workplace)] == [30] * 3


def test_several_objectives_give_a_pareto_front(sweep: Callable[..., Outcome], workplace: Path) -> None:
    both = ["task.metrics=[accuracy,f1]", "sweep.objective=[accuracy,f1]", "sweep.sampler=nsga2"]
    outcome = sweep("task_arithmetic", *both, "sweep.n_trials=4", "tracking=mlflow", "sweep.evaluation=pruned")
    assert "trials are not pruned: that takes one objective" in outcome.out
    found = trials(workplace)
    assert all(len(trial.values) == 2 for trial in found)
    front = {
        trial.number
        for trial in found
        if not any(np.all(np.greater_equal(o.values, trial.values)) and o.values != trial.values for o in found)
    }
    told = {int(line.split()[3][:-1]) for line in outcome.out.splitlines() if line.startswith("Pareto front: trial")}
    assert told == front
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    (parent,) = runs(workplace, "sweep")
    plots = [file.path for file in client.list_artifacts(parent.info.run_id, "plots")]
    assert "plots/pareto_front.png" in plots


def test_a_suite_is_swept_with_the_head_of_each_tasks_expert(
    mergelab_command: Command, gpt2_checkpoints: Mapping[str, Path], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGELAB_CACHE", str(workplace / "cache"))
    base = gpt2_checkpoints[GPT2_BASE]
    experts = ", ".join(f"{task}: {gpt2_checkpoints[f'tanganke/gpt2_{task}']}" for task in ("rte", "sst2"))
    for task in ("rte", "sst2"):
        (workplace / "data" / task).mkdir(parents=True)
        pq.write_table(glue_table(task, 80, 1), workplace / "data" / task / "validation.parquet")
    suite = ["task=suite", "task.members=[rte,sst2]", "task.data_dir=data", f"models.base={base}", "tracking=none",
             f"models.experts={{{experts}}}", "models.head=per_task"]  # fmt: skip
    outcome = mergelab_command("-m", "sweep=task_arithmetic", *suite, "sweep.n_trials=2", "sweep.study_name=s")
    assert outcome.code == 0, outcome.err
    assert "select average" in outcome.out
    values = [trial.value for trial in trials(workplace)]
    for trial in trials(workplace):
        plain = [*suite, "method=task_arithmetic", f"method.lambda={trial.params['method.lambda']}"]
        assert mergelab_command(*plain, "eval.protocol=holdout").code == 0
        results = single(workplace)["models"][-1]["results"]
        assert trial.value == pytest.approx(np.mean([found["select"]["accuracy"] for found in results.values()]))
    assert max(v for v in values if v is not None) > 0.5


def test_statistics_of_training_examples_are_computed_once(
    sweep: Callable[..., Outcome], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergelab.experiment.calibration import TrainingExamples

    pq.write_table(glue_table("rte", 60, 2), workplace / "data" / "train.parquet")
    asked: list[str] = []
    original = TrainingExamples.module

    def module(examples: TrainingExamples) -> Any:
        asked.append(examples.session.located.experts[examples.index].name)
        return original(examples)

    monkeypatch.setattr(TrainingExamples, "module", module)
    outcome = sweep("regmean", "sweep.n_trials=3")
    assert sorted(asked) == ["a", "b", "c"]
    assert len({trial.params["method.alpha"] for trial in trials(workplace)}) == 3
    assert "best regmean" in outcome.out


# ---------------------------------------------------------------------------------------------------- endings


def test_a_failed_trial_is_recorded_and_the_sweep_goes_on(
    sweep: Callable[..., Outcome], workplace: Path, pulled: list[str]
) -> None:
    space = "method.strength=choice(0.0,0.25,0.5,1.0)"
    outcome = sweep("custom", *pulled, space, "tracking=mlflow")
    assert "failed: " in outcome.out
    assert "4 trials: 3 complete, 1 failed" in outcome.out
    (failed,) = (trial for trial in trials(workplace) if trial.state.name == "FAIL")
    assert failed.params == {"method.strength": 0.25}
    assert "a quarter is too much" in failed.user_attrs[ERROR]
    (child,) = (run for run in runs(workplace, "trial") if run.info.status == "FAILED")
    assert "a quarter is too much" in child.data.tags["error"]
    (parent,) = runs(workplace, "sweep")
    assert parent.info.status == "FINISHED"


def test_a_sweep_of_failures_stops(sweep: Callable[..., Outcome], workplace: Path, pulled: list[str]) -> None:
    (workplace / "mine.py").write_text("def pull(models, *, strength: float):\n    raise ValueError('never')\n")
    space = "method.strength=range(0.0,1.0,0.1)"
    outcome = sweep("custom", *pulled, space, "tracking=mlflow", code=2)
    assert states(workplace) == ["FAIL"] * 3
    (line,) = outcome.err.strip().splitlines()
    assert "3 of 3 trials failed, more than sweep.max_failure_rate=0.2 allows; the last:" in line
    assert "never" in line
    (parent,) = runs(workplace, "sweep")
    assert parent.info.status == "FAILED"


def test_ctrl_c_ends_after_the_trial_and_the_same_command_goes_on(
    sweep: Callable[..., Outcome], workplace: Path, pulled: list[str]
) -> None:
    space, handler = "method.strength=choice(0.0,0.5,0.75,1.0)", signal.getsignal(signal.SIGINT)
    outcome = sweep("custom", *pulled, space, "tracking=mlflow", code=130)
    assert "the same command goes on" in outcome.out
    before = trials(workplace)
    assert before[-1].params == {"method.strength": 0.75}
    assert {trial.state.name for trial in before} == {"COMPLETE"}
    (parent,) = runs(workplace, "sweep")
    assert parent.info.status == "KILLED"
    assert signal.getsignal(signal.SIGINT) is handler
    sweep("custom", *pulled, space, "tracking=mlflow")
    assert states(workplace) == ["COMPLETE"] * 4
    (again,) = runs(workplace, "sweep")
    assert (again.info.run_id, again.info.status) == (parent.info.run_id, "FINISHED")
    assert {run.info.status for run in runs(workplace, "trial")} == {"FINISHED"}


def test_a_sweep_that_is_asked_to_end_while_a_library_swallows_it_fails_no_trial(
    sweep: Callable[..., Outcome], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "_terminated", False)
    (workplace / "swallowing.py").write_text(
        "import os, signal\n\ndef between(tensors, share: float):\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except BaseException:\n        raise ImportError('half imported') from None\n"
    )
    monkeypatch.syspath_prepend(str(workplace))
    swallowing = ["method=custom", "method.function=swallowing.between", "method.share=interval(0,1)"]
    sweep("custom", *swallowing, "sweep.n_trials=2", "tracking=mlflow", code=143)
    assert states(workplace) == ["RUNNING"]
    assert {run.info.status for kind in ("sweep", "trial") for run in runs(workplace, kind)} == {"KILLED"}


def test_a_trial_is_not_to_blame_when_the_whole_sweep_is_killed_unless_it_always_is(
    sweep: Callable[..., Outcome], workplace: Path
) -> None:
    sweep("task_arithmetic", "sweep.n_trials=2")
    url = f"sqlite:///{workplace}/outputs/sweeps.db"
    space = space_from({"method.lambda": "interval(0.05,1.0)"}, [])
    # How often the sweep was killed before and while the trial was measured.
    for loading, deaths in ((3, 0), (0, 1), (1, 5), (0, 10)):
        number = len(trials(workplace))
        study = optuna.load_study(storage=url, study_name="s")
        left = SweepStudy(url, "s", space, SweepConfig(), ["maximize"], study.user_attrs["mergelab:definition"])
        asked = left.ask()
        trial_id = left.trials[asked.number]._trial_id
        for _ in range(loading):
            left.new_attempt(asked.number)
        if deaths:
            with attempting(left.storage, trial_id, left.new_attempt(asked.number)) as attempt:
                pass
            dead = process_tags() | {"mergelab.pid": "999999999"}
            left.set_attribute(asked.number, BEGUN, {**attempt.mark, "count": deaths, "by": dead})
            left.set_attribute(asked.number, DEATHS, deaths - 1)
        outcome = sweep("task_arithmetic", f"sweep.n_trials={number + 2}")
        found = trials(workplace)
        assert len(found) == number + 2
        assert found[asked.number].params == asked.params
        assert (found[asked.number].state.name == "FAIL") == (deaths == 10)
        said = f"trial {asked.number}: lambda={asked.params['method.lambda']:.4g}: the sweep died {deaths} times"
        assert (said in outcome.err) == (deaths > 1)
    assert found[asked.number].user_attrs[ERROR] == "the sweep died 10 times while it was merged or measured"


# ---------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize(
    "pruner",
    ["futility", "wilcoxon", "{name:median,n_startup_trials:1}", "halving"],
    ids=["futility", "wilcoxon", "median", "halving"],
)
def test_a_hopeless_trial_is_pruned_and_never_the_first(
    sweep: Callable[..., Outcome], workplace: Path, pulled: list[str], pruner: str
) -> None:
    pq.write_table(glue_table("rte", 400, 1), workplace / "data" / "validation.parquet")
    first = "sweep.enqueue=[{method.strength: -8.0}, {method.strength: 1.0}, {method.strength: -9.0}]"
    space = "method.strength=interval(-9,1)"
    custom = [*pulled[:2], "eval.batch_tokens=256", "sweep.sampler=random", "tracking=mlflow"]
    outcome = sweep("custom", *custom, space, first, "sweep.n_trials=3", f"sweep.pruner={pruner}")
    bad, good, hopeless = trials(workplace)
    assert [bad.state.name, good.state.name, hopeless.state.name] == ["COMPLETE", "COMPLETE", "PRUNED"]
    seen = hopeless.user_attrs[OUTCOME]["pruned_at"]
    assert 0 < seen < 200
    known = hopeless.user_attrs[OUTCOME]["estimate"]
    assert hopeless.intermediate_values[200] == pytest.approx(known["value"])
    same = (
        f"accuracy {known['seen']:.4f} against {known['best_seen']:.4f} of the best on the same {seen} of 200 examples"
    )
    assert f"{same}; stopped, estimate {known['value']:.4f} [" in outcome.out
    run = next(run for run in runs(workplace, "trial") if run.data.tags["mergelab.trial"] == "2")
    assert run.data.tags["mergelab.pruned"].startswith(f"after {seen} of 200 examples: accuracy {known['seen']:.4f} ")
    assert run.data.metrics["select/examples"] == seen
    assert {name for name in run.data.metrics if name.startswith("select/")} == {"select/examples"}
    bounds = [run.data.metrics[f"estimate/accuracy{each}"] for each in ("_low", "", "_high")]
    assert bounds == [known["low"], known["value"], known["high"]]
    assert known["value"] == pytest.approx(good.value + known["seen"] - known["best_seen"])
    complete = next(run for run in runs(workplace, "trial") if run.data.tags["mergelab.trial"] == "1")
    assert {complete.data.metrics[f"estimate/accuracy{each}"] for each in ("_low", "", "_high")} == {good.value}
    assert complete.data.metrics["select/accuracy"] == good.value
    if pruner in ("futility", "wilcoxon"):
        assert unpacked(good.user_attrs[SCORES]).mean() == pytest.approx(good.value)


MINE = """
import optuna
class Draw(optuna.samplers.RandomSampler):
    pass
class Stop(optuna.pruners.BasePruner):
    def __init__(self, after):
        self.after = after
    def prune(self, study, trial):
        return trial.number > 0 and trial.last_step >= self.after
"""


def test_a_users_own_sampler_and_pruner_are_named_by_the_dotted_paths_of_their_classes(
    sweep: Callable[..., Outcome], workplace: Path
) -> None:
    pq.write_table(glue_table("rte", 400, 1), workplace / "data" / "validation.parquet")
    (workplace / "my_classes.py").write_text(MINE)
    sys.modules.pop("my_classes", None)
    own = ["sweep.sampler=my_classes.Draw", "sweep.pruner={name: my_classes.Stop, after: 4}", "eval.batch_tokens=256"]
    outcome = sweep("task_arithmetic", *own, "sweep.n_trials=4")
    assert "sampler my_classes.Draw, pruner my_classes.Stop" in outcome.out
    assert states(workplace) == ["COMPLETE"] + ["PRUNED"] * 3
    assert all(50 <= trial.user_attrs[OUTCOME]["pruned_at"] < 80 for trial in trials(workplace)[1:])
    sweep("task_arithmetic", "sweep.sampler=random", "sweep.n_trials=4", "sweep.study_name=plain")
    drawn, expected = ([trial.params for trial in trials(workplace, name)] for name in ("s", "plain"))
    assert drawn == expected


# ---------------------------------------------------------------------------------------------------- recorded


def test_a_sweep_is_one_parent_run_with_a_child_for_every_trial(sweep: Callable[..., Outcome], workplace: Path) -> None:
    sweep("ties", "sweep.n_trials=2", "tracking=mlflow")
    sweep("ties", "sweep.n_trials=5", "tracking=mlflow")
    (parent,) = runs(workplace, "sweep")
    children = runs(workplace, "trial")
    assert [child.data.tags["mergelab.trial"] for child in children] == list("01234")
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    found = trials(workplace)
    for child, trial in zip(children, found, strict=True):
        assert {key: float(child.data.params[key]) for key in trial.params} == pytest.approx(trial.params)
        if trial.state.name == "COMPLETE":
            assert child.data.metrics["select/accuracy"] == trial.value
        assert "report/accuracy" not in child.data.metrics
    best = max((t for t in found if t.state.name == "COMPLETE"), key=lambda t: (t.value or 0.0, -t.number))
    assert parent.data.tags["mergelab.best_trial"] == str(best.number)
    assert float(parent.data.tags["best.method.lambda"]) == best.params["method.lambda"]
    assert parent.data.metrics["best/select_accuracy"] == best.value
    assert parent.data.params["sampler"] == "tpe"
    assert parent.data.params["space.method.density"] == "interval(0.05,0.95)"
    winner = report(workplace)["models"][-1]["results"]["rte"]["report"]["accuracy"]["value"]
    assert parent.data.metrics["report/accuracy"] == winner
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    table = Path(client.download_artifacts(parent.info.run_id, "trials.csv")).read_text().splitlines()
    assert len(table) == 6
    estimated = "estimate accuracy,estimate accuracy low,estimate accuracy high"
    assert table[0].startswith(f"trial,state,method.lambda,method.density,select accuracy,{estimated},examples")
    plots = {Path(file.path).name for file in client.list_artifacts(parent.info.run_id, "plots")}
    assert {"history.png", "slices.png"} <= plots
    copy = client.download_artifacts(parent.info.run_id, "study.db")
    study = optuna.load_study(storage=f"sqlite:///{copy}", study_name="s")
    assert [(trial.params, trial.state) for trial in study.trials] == [(trial.params, trial.state) for trial in found]
    assert study.best_trial.number == best.number
