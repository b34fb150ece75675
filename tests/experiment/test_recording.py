"""Every kind of run is recorded alike: what it is compared by, what it used, and the numbers of one list."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

from mergelab.evaluation.results import ModelResult
from mergelab.evaluation.scoring import Score, TaskResult
from mergelab.experiment import logged
from mergelab.experiment.logged import Measured
from mergelab.experiment.recording import config_hash, reported_score
from mergelab.tracking import names
from tests.conftest import Outcome
from tests.standins import GPT2_BASE, glue_table

pytestmark = pytest.mark.slow

Command = Callable[..., Outcome]
COMPARED = {names.TASK, names.SOURCE, names.SEED, names.PROTOCOL, names.MODELS, names.NOTE, names.PRIMARY,
            names.DIRECTION, names.DESCRIPTION, "mlflow.user"}  # fmt: skip


def recorded(folder: Path, experiment: str = "rte") -> dict[str, list[Any]]:
    """The runs of a store by their kind, oldest first."""
    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    found: dict[str, list[Any]] = {}
    for run in client.search_runs([client.get_experiment_by_name(experiment).experiment_id], order_by=["start_time"]):
        found.setdefault(run.data.tags[names.KIND], []).append(run)
    return found


def artifacts(folder: Path, run: Any) -> set[str]:
    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    return {file.path for file in client.list_artifacts(run.info.run_id)}


def environment(folder: Path, run: Any) -> dict[str, Any]:
    """What a run's artifact says of where it was made."""
    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    found: dict[str, Any] = json.loads(Path(client.download_artifacts(run.info.run_id, names.ENVIRONMENT)).read_text())
    return found


def ok(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


def test_runs_of_every_kind_say_alike_what_they_are_compared_by(
    mergelab_command: Command, arguments: list[str], workplace: Path
) -> None:
    ok(mergelab_command("-m", *arguments, "method=task_arithmetic", "method.lambda=0.3,0.5", "eval.protocol=holdout"))
    ok(mergelab_command("-m", "sweep=task_arithmetic", *arguments, "sweep.n_trials=2", "sweep.pruner=none"))
    runs = recorded(workplace)
    assert {kind: len(found) for kind, found in runs.items()} == {
        "grid": 1, "merge": 2, "sweep": 1, "trial": 2, "report": 1, "base": 1, "expert": 3,
    }  # fmt: skip
    for kind, found in runs.items():
        for run in found:
            tags = run.data.tags
            assert set(tags) >= COMPARED, kind
            about = environment(workplace, run)
            assert about["versions"]["torch"].startswith("2."), kind
            assert (names.CONFIG_HASH in about) == (kind != "grid")  # jobs with different settings share no hash
            assert run.inputs.dataset_inputs, kind  # parents have those of their jobs
            assert (tags[names.TASK], tags[names.SEED], tags[names.PROTOCOL]) == ("rte", "0", "holdout")
            assert tags.get(names.METHOD) == (None if kind in ("base", "expert") else "task_arithmetic")
            assert tags[names.DIRECTION] == "maximize"
            assert tags[names.PRIMARY] in run.data.metrics, kind
            assert kind == "grid" or names.CONFIG in artifacts(workplace, run), kind
    (merge, _), (trial, _), (report,) = runs["merge"], runs["trial"], runs["report"]
    models = {tag: value for tag, value in merge.data.tags.items() if tag.startswith("model.")}
    assert {"model.base", "model.base.sha256"} < set(models)
    assert len(models) == 8
    for run in (*runs["grid"], *runs["sweep"], *runs["trial"], report):
        assert {tag: value for tag, value in run.data.tags.items() if tag.startswith("model.")} == models
    for expert in runs["expert"]:
        assert {tag: models[tag] for tag in expert.data.tags if tag.startswith("model.")}
        assert len([tag for tag in expert.data.tags if tag.startswith("model.")]) == 2
    data = [run.inputs.dataset_inputs[0].dataset.digest for run in (merge, trial, report, *runs["expert"])]
    assert len(set(data)) == 1
    assert trial.data.tags[names.PRIMARY] == "select/accuracy"
    assert report.data.tags[names.PRIMARY] == "report/accuracy"
    # The first trial is the grid's first job: the same point, the same configuration but for the sweep's own keys.
    assert trial.data.metrics["select/accuracy"] == merge.data.metrics["select/accuracy"]
    hashes = [environment(workplace, run)[names.CONFIG_HASH] for run in (trial, merge)]
    assert hashes[0] == hashes[1]
    # Parents show what their winner reports.
    ((grid,), (sweep,)) = runs["grid"], runs["sweep"]
    best = max(runs["merge"], key=lambda run: run.data.metrics["report/accuracy"])
    for parent, winner in ((grid, best), (sweep, report)):
        for metric in (names.report_metric("accuracy"), names.low("report/accuracy"), names.high("report/accuracy")):
            assert parent.data.metrics[metric] == winner.data.metrics[metric]
    commands = {run.info.run_id: run.data.tags[names.DESCRIPTION] for run in (merge, trial, report, grid, sweep)}
    assert "python -m mergelab -m " in commands[grid.info.run_id]
    assert "python -m mergelab -m sweep=task_arithmetic" in commands[sweep.info.run_id]
    assert "select" in commands[report.info.run_id]  # the table
    assert all(run.info.run_name.endswith(" (holdout)") for run in (*runs["base"], *runs["expert"]))


def size(measured: Measured) -> dict[str, float]:
    """A number of the result: the tasks that it is of."""
    return {"number/tasks": len(measured.result.results)}


def norm(measured: Measured) -> dict[str, float]:
    """A number of the weights: the norm of the task vector, where there are merged weights in memory."""
    base, found = measured.session.opened.aligned.base, 0.0
    for tensors in list(measured.backbones.values())[:1]:
        for name in measured.session.opened.aligned.names:
            found += float((tensors[name] - base.get(name)).square().sum())
    return {"norm/task_vector": found**0.5} if measured.backbones else {}


def test_a_function_in_the_list_logs_its_number_with_every_run(
    mergelab_command: Command, arguments: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logged, "LOGGED", (*logged.LOGGED, size, norm))
    ok(mergelab_command(*arguments, "method=task_arithmetic", "method.lambda=0.3", "eval.protocol=holdout"))
    ok(mergelab_command(*arguments, "method=task_arithmetic", "method.lambda=0.3", "evaluate=false", "output=merged"))
    ok(mergelab_command("-m", "sweep=task_arithmetic", *arguments, "sweep.n_trials=2", "sweep.pruner=none"))
    runs = recorded(workplace)
    for kind, found in runs.items():
        for run in found:
            assert "number/tasks" in run.data.metrics, kind
            assert names.PEAK_MB in run.data.metrics or kind in ("base", "expert"), kind
    evaluated, written = runs["merge"]
    assert written.data.metrics["number/tasks"] == 0
    assert set(written.data.metrics) == {"number/tasks", names.MERGE_SECONDS, names.PEAK_MB}
    first, second = runs["trial"]
    assert first.data.metrics["norm/task_vector"] == pytest.approx(evaluated.data.metrics["norm/task_vector"], rel=1e-6)
    assert first.data.metrics["norm/task_vector"] != pytest.approx(second.data.metrics["norm/task_vector"], rel=1e-3)
    (report,), (sweep,) = runs["report"], runs["sweep"]
    assert report.data.metrics["norm/task_vector"] == sweep.data.metrics["norm/task_vector"]
    models = json.loads(next(workplace.glob("outputs/sweeps/*/*/result.json")).read_text())["models"]
    assert [("norm/task_vector" in model["logged"], "number/tasks" in model["logged"]) for model in models] == [
        *[(False, True)] * 4, *[(True, True)] * 3,
    ]  # fmt: skip


def test_a_trial_of_a_suite_is_judged_by_the_sweeps_objective_and_has_the_average_too(
    mergelab_command: Command, gpt2_checkpoints: Mapping[str, Path], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGELAB_CACHE", str(workplace / "cache"))
    experts = ", ".join(f"{task}: {gpt2_checkpoints[f'tanganke/gpt2_{task}']}" for task in ("rte", "sst2"))
    for task in ("rte", "sst2"):
        (workplace / "data" / task).mkdir(parents=True)
        pq.write_table(glue_table(task, 80, 1), workplace / "data" / task / "validation.parquet")
    suite = ["task=suite", "task.members=[rte,sst2]", "task.data_dir=data", "models.head=per_task",
             f"models.base={gpt2_checkpoints[GPT2_BASE]}", f"models.experts={{{experts}}}"]  # fmt: skip
    whole = ("sweep.n_trials=2", "sweep.objective=sst2", "sweep.pruner=none")
    ok(mergelab_command("-m", "sweep=task_arithmetic", *suite, *whole))
    runs = recorded(workplace, "suite")
    for trial in runs["trial"]:
        metrics = trial.data.metrics
        assert trial.data.tags[names.PRIMARY] == "select/sst2/accuracy"
        mean = (metrics["select/rte/accuracy"] + metrics["select/sst2/accuracy"]) / 2
        assert metrics["select/average"] == pytest.approx(mean)
        assert metrics["select/rte/accuracy"] != metrics["select/sst2/accuracy"]
    (sweep,), (report,) = runs["sweep"], runs["report"]
    for run in (sweep, report):
        assert run.data.tags[names.PRIMARY] == "report/average"
        assert run.data.metrics["select/average"] == pytest.approx(
            (run.data.metrics["select/rte/accuracy"] + run.data.metrics["select/sst2/accuracy"]) / 2
        )


def result(task: str, *report: str, less: tuple[str, ...] = ()) -> TaskResult:
    return TaskResult(task, "".join(report[:1]), {}, {name: Score(0.5, 0.4, 0.6) for name in report}, 0, 10, less)


@pytest.mark.parametrize(
    ("results", "average", "expected"),
    [
        ([result("rte", "accuracy")], None, ("report/accuracy", "maximize")),
        ([result("text", "perplexity", less=("perplexity",))], None, ("report/perplexity", "minimize")),
        # Beside a task without metrics the score has its task's name, as it is logged.
        ([result("rte", "accuracy"), result("prompts")], None, ("report/rte/accuracy", "maximize")),
        ([result("rte", "accuracy"), result("sst2", "accuracy")], 0.5, ("report/average", "maximize")),
        (
            [result("rte", "accuracy"), result("text", "perplexity", less=("perplexity",))],
            None,
            ("report/normalised_average", "maximize"),
        ),
    ],
)
def test_a_run_is_judged_by_a_score_that_is_logged(
    results: list[TaskResult], average: float | None, expected: tuple[str, str]
) -> None:
    session: Any = None
    model = ModelResult("m", "merged", {one.task: one for one in results}, average=average, normalised=0.9)
    found = reported_score(model)
    assert (found[names.PRIMARY], found[names.DIRECTION]) == expected
    if len(model.scored) == 1:
        model = ModelResult("m", "merged", model.results)
    assert found[names.PRIMARY] in logged.with_logged(Measured(model, session)).logged


def test_a_model_without_scores_is_not_judged() -> None:
    assert reported_score(ModelResult("m", "merged", {"prompts": result("prompts")})) == {}


def test_where_a_run_is_recorded_does_not_change_its_hash() -> None:
    config = {"method": {"name": "ties", "density": 0.2}, "seed": 0}
    assert config_hash(config) == config_hash({**config, "tracking": {"uri": "x"}, "output": "folder"})
    assert config_hash(config) != config_hash({**config, "seed": 1})
