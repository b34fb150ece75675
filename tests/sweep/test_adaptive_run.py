"""Whole sweeps that measure their trials adaptively: what is measured, what wins, and how a sweep goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

from mergelab.sweep.adaptive.policy import POLICY
from mergelab.sweep.outcome import TrialOutcome
from mergelab.sweep.storage import open_storage
from mergelab.sweep.study import KNOWN, LATER, MEASURED, OUTCOME
from tests.conftest import Outcome
from tests.standins import GPT2_BASE, glue_table

Command = Callable[..., Outcome]
pytestmark = pytest.mark.slow


@pytest.fixture
def sweep(mergelab_command: Command, arguments: list[str]) -> Callable[..., Outcome]:
    """``python -m mergelab -m sweep=ties sweep.evaluation=adaptive ...`` on three tiny experts and 60 examples."""

    def run(*more: str, code: int = 0) -> Outcome:
        own = ["sweep.evaluation=adaptive", "sweep.study_name=s", "tracking=none", "sweep.sampler=random"]
        kept = [one for one in own if not any(other.startswith(one.partition("=")[0]) for other in more)]
        outcome = mergelab_command("-m", "sweep=ties", *arguments, *kept, *more)
        assert outcome.code == code, outcome
        return outcome

    return run


def study(folder: Path, name: str = "s", file: str = "outputs/sweeps.db") -> optuna.Study:
    open_storage.cache_clear()
    return optuna.load_study(storage=f"sqlite:///{folder}/{file}", study_name=name)


def outcomes(found: optuna.Study) -> list[TrialOutcome]:
    return [TrialOutcome.read(trial.user_attrs[OUTCOME]) for trial in found.trials]


def later(found: optuna.Study) -> dict[int, TrialOutcome]:
    known = {key.removeprefix(LATER): value for key, value in found.user_attrs.items() if key.startswith(LATER)}
    return {int(number): TrialOutcome.read(value[OUTCOME]) for number, value in known.items()}


def test_trials_are_measured_in_part_and_the_winner_is_a_whole_one(
    sweep: Callable[..., Outcome], workplace: Path
) -> None:
    outcome = sweep("sweep.n_trials=8", "tracking=mlflow")
    assert "sampler random, adaptive evaluation" in outcome.out
    found = study(workplace)
    first, again = outcomes(found), later(found)
    assert all(one.pruned_at is None for one in first[: POLICY.startup])
    stopped = [number for number, one in enumerate(first) if one.pruned_at is not None]
    assert stopped
    assert set(again) <= set(stopped)
    assert len(again) <= POLICY.finalists
    assert all(one.before == first[number].pruned_at for number, one in again.items())
    values = {number: one.values[0] for number, one in enumerate(first) if one.pruned_at is None}
    values |= {number: one.values[0] for number, one in again.items() if one.pruned_at is None}
    best = max(values, key=lambda number: (values[number], -number))
    assert f"best: trial {best}," in outcome.out
    assert f"8 trials: {len(values)} complete" in outcome.out

    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("rte").experiment_id
    runs = client.search_runs([experiment], "tags.`mergelab.kind` = 'trial'")
    assert len(runs) == 8
    for run in runs:
        number, metrics = int(run.data.tags["mergelab.trial"]), run.data.metrics
        assert metrics["estimate/accuracy_low"] <= metrics["estimate/accuracy"] <= metrics["estimate/accuracy_high"]
        if number in values:
            assert metrics["select/accuracy"] == metrics["estimate/accuracy"] == pytest.approx(values[number])
            assert not run.data.tags.get("mergelab.pruned")
        else:
            last = again.get(number, first[number])
            assert run.data.tags["mergelab.pruned"].startswith(f"after {last.pruned_at} of 60 examples")
            assert metrics["estimate/accuracy"] == pytest.approx(last.values[0])

    # Finalists have what a trial has that is measured whole at once.
    sweep("sweep.n_trials=8", "sweep.evaluation=full", "sweep.study_name=full")
    full = study(workplace, "full").trials
    assert {number: full[number].value for number in values} == values
    assert [trial.state.name for trial in full] == ["COMPLETE"] * 8


def test_a_sweep_that_ended_early_measures_what_it_would_have(sweep: Callable[..., Outcome], workplace: Path) -> None:
    own = ["sweep.n_trials=6", "sweep.sampler=tpe"]
    sweep(*own)
    expected = study(workplace)
    apart = f"sweep.storage=sqlite:///{workplace}/part.db"
    assert "after 2 of 6" in sweep(*own, apart, "sweep.budget=200").out
    sweep(*own, apart)
    found = study(workplace, file="part.db")
    for ours, theirs in zip(found.trials, expected.trials, strict=True):
        assert (ours.params, ours.state, ours.value) == (theirs.params, theirs.state, theirs.value)
        assert ours.user_attrs[MEASURED] == theirs.user_attrs[MEASURED]
    again, wanted = ({number: (one.values, one.pruned_at) for number, one in later(each).items()}
                     for each in (found, expected))  # fmt: skip
    assert again == wanted


def test_trials_started_together_learn_from_those_that_had_ended(
    sweep: Callable[..., Outcome], workplace: Path
) -> None:
    sweep("sweep.n_trials=6", "sweep.n_jobs=2")
    trials = study(workplace).trials
    assert [trial.user_attrs[KNOWN] for trial in trials] == [0, 0, 2, 2, 4, 4]
    parts = [outcome.pruned_at is not None for outcome in outcomes(study(workplace))]
    assert parts[:2] == [False, False]
    assert any(parts)


def test_a_budget_is_not_exceeded_and_must_do_for_a_trial(sweep: Callable[..., Outcome], workplace: Path) -> None:
    outcome = sweep("sweep.budget=59", code=2)
    assert "sweep.budget=59: a whole trial has 60 selecting examples" in outcome.err
    outcome = sweep("sweep.budget=300", "sweep.n_trials=40")
    assert "sweep.budget=300: no more trials begin, after " in outcome.out
    found = study(workplace)
    first, again = outcomes(found), later(found)
    measured = [one.measured for one in (*first, *again.values())]
    assert 180 < sum(measured) <= 300
    for number, one in again.items():
        assert one.before == first[number].pruned_at
        assert one.measured == (one.pruned_at or 60) - one.before


def test_of_several_objectives_the_front_is_of_whole_trials(sweep: Callable[..., Outcome], workplace: Path) -> None:
    own = ["sweep.n_trials=10", "sweep.objective=[accuracy,f1]", "task.metrics=[accuracy,f1]", "sweep.sampler=nsga2"]
    outcome = sweep(*own)
    assert not outcome.err
    found = study(workplace)
    first, again = outcomes(found), later(found)
    assert [len(one.values) for one in first] == [2] * 10
    stopped = {number for number, one in enumerate(first) if one.pruned_at is not None}
    assert stopped
    whole = {number: one.values for number, one in enumerate(first) if one.pruned_at is None}
    whole |= {number: one.values for number, one in again.items() if one.pruned_at is None}
    front = {
        number
        for number, values in whole.items()
        if not any(all(np.greater_equal(other, values)) and other != values for other in whole.values())
    }
    said = {int(line.split()[3].rstrip(",")) for line in outcome.out.splitlines() if line.startswith("Pareto front")}
    assert said == front


def test_a_suite_is_measured_in_part_and_the_winner_is_a_whole_trial(
    mergelab_command: Any, gpt2_checkpoints: Mapping[str, Path], workplace: Path
) -> None:
    experts = ", ".join(f"{task}: {gpt2_checkpoints[f'tanganke/gpt2_{task}']}" for task in ("rte", "sst2"))
    for task in ("rte", "sst2"):
        (workplace / "data" / task).mkdir(parents=True)
        pq.write_table(glue_table(task, 120, 1), workplace / "data" / task / "validation.parquet")
    own = (
        "-m", "sweep=custom", "method=task_arithmetic", "method.lambda=interval(0,1)", "sweep.sampler=random",
        "sweep.n_trials=10", "task=suite", "task.members=[rte,sst2]", "task.data_dir=data",
        f"models.base={gpt2_checkpoints[GPT2_BASE]}", f"models.experts={{{experts}}}", "models.head=per_task",
    )  # fmt: skip
    outcome: Outcome = mergelab_command(*own, "sweep.study_name=s", "sweep.evaluation=adaptive")
    assert outcome.code == 0, outcome.err
    found = study(workplace)
    first, again = outcomes(found), later(found)
    whole = {number: one.values[0] for number, one in enumerate(first) if one.pruned_at is None}
    whole |= {number: one.values[0] for number, one in again.items() if one.pruned_at is None}
    assert len(whole) < 10
    best = max(whole, key=lambda number: (whole[number], -number))
    assert f"best: trial {best}," in outcome.out
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("suite").experiment_id], "tags.`mergelab.kind` = 'trial'")
    for run in runs:
        number, metrics = int(run.data.tags["mergelab.trial"]), run.data.metrics
        assert metrics["estimate/average_low"] <= metrics["estimate/average"] <= metrics["estimate/average_high"]
        if number in whole:
            assert metrics["select/average"] == pytest.approx(whole[number])
            assert metrics["estimate/rte/accuracy"] == metrics["select/rte/accuracy"]
        else:
            assert "select/average" not in metrics
            parts = [metrics[f"estimate/{task}/accuracy"] for task in ("rte", "sst2")]
            assert metrics["estimate/average"] == pytest.approx(np.mean(parts))
    full: Outcome = mergelab_command(*own, "sweep.study_name=full", "sweep.evaluation=full", "tracking=none")
    assert full.code == 0, full.err
    every = study(workplace, "full").trials
    assert {number: every[number].value for number in whole} == pytest.approx(whole)
