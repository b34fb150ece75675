"""A trial's scores reach its pruner in the form it takes, and end the trial where it says so."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import optuna
import pytest

from mergelab.sweep.pruners import make_pruner
from mergelab.sweep.reporting import (
    Pruned,
    ScoreReporter,
    packed,
    packed_statistics,
    unpacked,
    unpacked_statistics,
)
from mergelab.sweep.study import SCORES, STATISTICS

Array = np.ndarray[Any, Any]


class Recorder(optuna.pruners.BasePruner):
    """Notes what it is shown, and never prunes."""

    def __init__(self) -> None:
        self.seen: list[tuple[optuna.Study, dict[int, float]]] = []

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        self.seen.append((study, dict(trial.intermediate_values)))
        return False


class ExampleRecorder(Recorder):
    by_example = True
    checks = None


def reporter(study: optuna.Study, count: int, pruner: Any = "futility") -> ScoreReporter:
    made = make_pruner(pruner) if isinstance(pruner, str) else pruner
    return ScoreReporter(made, study, study.ask().number, np.full(count, np.nan), lambda: 0.25)


def statistics(scores: Array) -> dict[str, Array]:
    """Rows of two metrics: the same for both, and what nobody reads here."""
    return {"accuracy": scores[:, None], "f1": scores[:, None], "other": np.stack([scores, scores + 1], axis=1)}


def report_all(one: ScoreReporter, scores: Array, every: int) -> None:
    for start in range(0, len(scores), every):
        one.report(np.arange(start, min(start + every, len(scores))), scores[start : start + every])
    one.finish(partial(statistics, scores))


@pytest.mark.parametrize("pruner", ["futility", "wilcoxon"])
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_trials_are_compared_with_the_best_example_by_example(direction: str, pruner: str) -> None:
    study = optuna.create_study(direction=direction)
    rng = np.random.default_rng(0)
    good, bad = ((rng.random(200) < share).astype(float) for share in (0.95, 0.4))
    for scores in (good, bad, bad):
        one = reporter(study, 200, pruner)
        try:
            report_all(one, scores, 20)
        except Pruned:
            study.tell(one.number, state=optuna.trial.TrialState.PRUNED)
            assert one.done < 200
        else:
            study.tell(one.number, float(scores.mean()) * (1 if direction == "maximize" else -1))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert [trial.intermediate_values for trial in study.trials] == [{}] * 3  # no example is a row of the storage


def test_a_trial_is_not_pruned_when_all_its_examples_are_measured() -> None:
    study = optuna.create_study(direction="maximize")
    for scores in (np.ones(200), np.zeros(200)):
        one = reporter(study, 200)
        report_all(one, scores, 200)
        study.tell(one.number, float(scores.mean()))


def test_of_equally_good_trials_the_earliest_is_compared_with() -> None:
    study = optuna.create_study(direction="maximize")
    halves = np.repeat([1.0, 0.0], 100)
    for scores in (halves, halves[::-1]):
        one = reporter(study, 200)
        one.scores[:] = scores
        one.finish(partial(statistics, scores))
        study.tell(one.number, 0.5)
    with pytest.raises(Pruned):
        reporter(study, 200).report(np.arange(100), np.zeros(100))  # the first has these right, the other one the rest


def test_a_trial_on_other_examples_is_no_rival() -> None:
    study = optuna.create_study(direction="maximize")
    one = reporter(study, 100)
    report_all(one, np.ones(100), 50)
    study.tell(one.number, 1.0)
    reporter(study, 200).report(np.arange(100), np.zeros(100))


def test_a_pruner_gets_the_objective_so_far_at_every_sixteenth_in_the_sweeps_own_study() -> None:
    study, pruner = optuna.create_study(direction="maximize"), Recorder()
    report_all(reporter(study, 160, pruner), np.ones(160), 4)
    assert [study_ for study_, _ in pruner.seen] == [study] * 15
    assert [max(values) for _, values in pruner.seen] == list(range(1, 16))
    assert study.trials[0].intermediate_values == dict.fromkeys(range(1, 16), 0.25)
    assert SCORES not in study.trials[0].user_attrs
    assert STATISTICS in study.trials[0].user_attrs  # later trials' estimates need them, whatever the pruner


def test_a_class_may_ask_for_examples_and_to_be_asked_after_every_batch() -> None:
    study, pruner = optuna.create_study(direction="minimize"), ExampleRecorder()
    for scores in (np.arange(160.0), np.zeros(160)):
        one = reporter(study, 160, pruner)
        report_all(one, scores, 4)
        study.tell(one.number, -float(scores.mean()))
    assert len(pruner.seen) == 2 * 39
    pair, values = pruner.seen[-1]
    assert values == dict.fromkeys(range(156), 0.0)
    assert pair.best_trial.intermediate_values == {example: float(example) for example in range(160)}
    assert pruner.seen[0][0].trials == []


def test_scores_are_stored_as_they_are() -> None:
    scores = np.array([0.0, 1.0, -2.5, 1e-3])
    np.testing.assert_allclose(unpacked(packed(scores)), scores, rtol=1e-7)


def test_statistics_are_stored_as_they_are_and_equal_ones_once() -> None:
    rows = statistics(np.array([0.0, 1.0, 2.5]))
    stored = packed_statistics(rows)
    assert set(stored) == {"accuracy,f1", "other"}
    found = unpacked_statistics(json.loads(json.dumps(stored)))
    assert {metric: each.tolist() for metric, each in found.items()} == {m: each.tolist() for m, each in rows.items()}


@pytest.mark.parametrize("pruner", ["futility", "median"])
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_rival_is_the_best_complete_trial_when_a_trial_begins(direction: str, pruner: str) -> None:
    study = optuna.create_study(direction=direction)
    assert reporter(study, 4, pruner).rival is None
    for value in (0.5, 0.75, 0.75, 0.25):
        one = reporter(study, 4, pruner)
        report_all(one, np.full(4, value), 4)
        study.tell(one.number, value)
    numbers = {trial.number: trial.value for trial in study.trials if trial.value is not None}
    rival = reporter(study, 4, pruner).rival
    assert rival is not None
    best = (max if direction == "maximize" else min)(numbers.values())
    assert rival.number == min(number for number, value in numbers.items() if value == best)
    assert rival.statistics["other"].tolist() == [[best, best + 1]] * 4
    assert (rival.scores is None) == (pruner == "median")
    assert reporter(study, 5, pruner).rival is None  # it was measured on other examples
