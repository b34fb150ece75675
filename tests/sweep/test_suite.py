"""Trials of suites end early where their average will hardly be the best: tasks are measured in turns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

from mergelab.sweep.futility import Futility
from mergelab.sweep.metric_reporter import PARTS, MetricReporter
from mergelab.sweep.objective import objectives
from mergelab.sweep.reporting import Pruned, packed_statistics
from mergelab.sweep.study import STATISTICS
from mergelab.tasks.loading import load_task
from tests.conftest import Outcome
from tests.standins import GPT2_BASE, glue_table
from tests.sweep.test_run import trials

Array = np.ndarray[Any, Any]
TASKS = ("rte", "cola", "stsb")  # accuracy, Matthews' correlation, Pearson's
COUNTS = (80, 240, 160)


class Model:
    """A trial's statistics of every example: right answers with a probability, scores with noise."""

    def __init__(self, random: np.random.Generator, truth: list[Array], quality: float) -> None:
        self.rows = []
        for task, labels in zip(TASKS, truth, strict=True):
            if task == "stsb":
                found = labels + random.normal(size=len(labels)) * (3 - 2 * quality)
            else:
                found = np.where(random.random(len(labels)) < quality, labels, 1 - labels)
            self.rows.append(np.stack([found, labels], axis=1).astype(np.float64))
        self.order = [random.permutation(len(labels)) for labels in truth]
        self.seen = [0] * len(TASKS)

    def statistics(self, task: str) -> tuple[Array, Mapping[str, Array]]:
        at = TASKS.index(task)
        seen = np.sort(self.order[at][: self.seen[at]])
        return seen, dict.fromkeys(load_task(task).metrics, self.rows[at][seen])

    def value(self) -> float:
        from mergelab.evaluation.metrics import value_of_rows

        specs = [load_task(task) for task in TASKS]
        return float(np.mean([value_of_rows(s, s.primary, rows) for s, rows in zip(specs, self.rows, strict=True)]))


def labels_of(random: np.random.Generator) -> list[Array]:
    made = [random.integers(0, 2, count).astype(np.float64) for count in COUNTS]
    made[TASKS.index("stsb")] = random.random(COUNTS[TASKS.index("stsb")]) * 5
    return made


def run(model: Model, best: Model | None, objective: str = "average") -> int | None:
    """Measure a trial as a sweep does; return after how many examples it was stopped."""
    study = optuna.create_study(direction="maximize")
    specs = [load_task(task) for task in TASKS]
    if best is not None:
        best.seen = list(COUNTS)
        rows = {f"{task}/{name}": found for task in TASKS for name, found in best.statistics(task)[1].items()}
        attributes = {STATISTICS: packed_statistics(rows)}
        study.add_trial(optuna.trial.create_trial(value=best.value(), user_attrs=attributes))
    (wanted,) = objectives(objective, None, specs)
    tasks = list(zip(specs, COUNTS, strict=True))
    number = study.ask().number
    reporter = MetricReporter(Futility(), study, number, wanted, tasks, model.statistics)
    try:
        for share in PARTS:
            for at in range(len(TASKS)):
                until = int(COUNTS[at] * share)
                reporter.report(np.arange(until - model.seen[at]), np.zeros(until - model.seen[at]))
                model.seen[at] = until
            reporter.decide()
    except Pruned:
        estimates = reporter.estimates()
        assert {"average", "rte/accuracy", "cola/matthews_correlation", "stsb/pearson"} <= estimates.keys()
        return reporter.done
    reporter.finish()
    assert STATISTICS in study.trials[number].user_attrs
    return None


def test_better_trials_are_hardly_ever_stopped_and_worse_ones_early() -> None:
    random = np.random.default_rng(0)
    stopped: dict[bool, list[int | None]] = {True: [], False: []}
    for _ in range(40):
        truth = labels_of(random)
        best = Model(random, truth, 0.75)
        for quality in (0.55, 0.78):
            own = Model(random, truth, quality)
            stopped[own.value() > best.value()].append(run(own, best))
    assert sum(each is not None for each in stopped[True]) <= 0.15 * len(stopped[True])
    ended = [each for each in stopped[False] if each is not None]
    assert len(ended) > 0.8 * len(stopped[False])
    assert np.median(ended) < sum(COUNTS) / 3


def test_the_estimate_of_the_average_has_an_honest_interval() -> None:
    random, inside = np.random.default_rng(1), []
    for _ in range(80):
        truth = labels_of(random)
        best, own = Model(random, truth, 0.8), Model(random, truth, 0.7)
        study = optuna.create_study(direction="maximize")
        best.seen = list(COUNTS)
        rows = {f"{task}/{name}": found for task in TASKS for name, found in best.statistics(task)[1].items()}
        study.add_trial(optuna.trial.create_trial(value=best.value(), user_attrs={STATISTICS: packed_statistics(rows)}))
        specs = [load_task(task) for task in TASKS]
        (wanted,) = objectives("average", None, specs)
        reporter = MetricReporter(
            Futility(), study, study.ask().number, wanted, list(zip(specs, COUNTS, strict=True)), own.statistics
        )
        own.seen = [count // 4 for count in COUNTS]
        average = reporter.estimates()["average"]
        assert average.low is not None
        assert average.high is not None
        inside.append(average.low <= own.value() <= average.high)
    assert 0.9 <= np.mean(inside) <= 1.0


def test_one_task_of_a_suite_can_be_the_objective() -> None:
    random = np.random.default_rng(2)
    truth = labels_of(random)
    best, worse = Model(random, truth, 0.95), Model(random, truth, 0.95)
    worse.rows[TASKS.index("cola")] = Model(random, truth, 0.5).rows[TASKS.index("cola")]
    worse.rows[TASKS.index("rte")] = best.rows[TASKS.index("rte")]
    assert run(worse, best, "cola") is not None
    worse.seen = [0] * len(TASKS)
    assert run(worse, best, "rte") is None


@pytest.mark.parametrize("best", [False, True])
def test_nothing_is_stopped_without_a_rival_or_by_an_equal_one(best: bool) -> None:
    random = np.random.default_rng(3)
    model = Model(random, labels_of(random), 0.8)
    rival = Model(random, labels_of(random), 0.8)
    rival.rows = model.rows
    assert run(model, rival if best else None) is None


@pytest.mark.parametrize("kind", ["futility", "wilcoxon"])
def test_a_suites_sweep_stops_trials_and_finds_the_same_winner(
    kind: Literal["futility", "wilcoxon"],
    mergelab_command: Any,
    gpt2_checkpoints: Mapping[str, Path],
    workplace: Path,
) -> None:
    base = gpt2_checkpoints[GPT2_BASE]
    experts = ", ".join(f"{task}: {gpt2_checkpoints[f'tanganke/gpt2_{task}']}" for task in ("rte", "sst2"))
    for task in ("rte", "sst2"):
        (workplace / "data" / task).mkdir(parents=True)
        pq.write_table(glue_table(task, 300, 1), workplace / "data" / task / "validation.parquet")
    values = "method.lambda=choice(0.7,0.65,0.0,0.02,0.04,0.05)"
    outcome: Outcome = mergelab_command(
        "-m", "sweep=custom", "method=task_arithmetic", values, "sweep.sampler=grid", "sweep.study_name=s",
        "task=suite", "task.members=[rte,sst2]", "task.data_dir=data", f"models.base={base}",
        f"models.experts={{{experts}}}", "models.head=per_task", "eval.protocol=holdout", f"sweep.pruner={kind}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = trials(workplace)
    best = max(found, key=lambda trial: trial.value)
    assert best.params["method.lambda"] in (0.7, 0.65)
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("suite").experiment_id])
    stopped = [run for run in runs if run.data.tags.get("mergelab.pruned")]
    if kind == "wilcoxon":
        assert not stopped
        assert "trials are not pruned: the pruner wilcoxon takes one task, futility several" in outcome.out
        return
    assert len(stopped) >= 2
    for run_ in stopped:
        metrics = run_.data.metrics
        assert metrics["estimate/average_low"] <= metrics["estimate/average"] <= metrics["estimate/average_high"]
        assert {"estimate/rte/accuracy", "estimate/sst2/accuracy"} <= metrics.keys()
        assert "select/average" not in metrics
        assert metrics["select/examples"] < 300
        assert " of 300 examples: average " in run_.data.tags["mergelab.pruned"]


@pytest.mark.parametrize("evaluation", ["pruned", "adaptive"])
def test_tasks_of_a_few_examples_are_measured_too(
    evaluation: str, mergelab_command: Any, gpt2_checkpoints: Mapping[str, Path], workplace: Path
) -> None:
    experts = ", ".join(f"{task}: {gpt2_checkpoints[f'tanganke/gpt2_{task}']}" for task in ("rte", "sst2"))
    for task, rows in (("rte", 120), ("sst2", 6)):
        (workplace / "data" / task).mkdir(parents=True)
        pq.write_table(glue_table(task, rows, 1), workplace / "data" / task / "validation.parquet")
    outcome: Outcome = mergelab_command(
        "-m", "sweep=custom", "method=task_arithmetic", "method.lambda=choice(0.7,0.65,0.6)", "sweep.sampler=grid",
        "task=suite", "task.members=[rte,sst2]", "task.data_dir=data", f"models.base={gpt2_checkpoints[GPT2_BASE]}",
        f"models.experts={{{experts}}}", "models.head=per_task", "tracking=none", "sweep.study_name=s",
        "eval.preflight=false", f"sweep.evaluation={evaluation}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert all(trial.state.name == "COMPLETE" for trial in trials(workplace)[: 3 if evaluation == "pruned" else 2])
