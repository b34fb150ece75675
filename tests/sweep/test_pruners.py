"""Trials without hope are stopped: on what evidence, how often wrongly, and beside which other trial."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest

from mergelab.errors import SweepError
from mergelab.sweep.pruners import Futility, Pruned, Watch, make_pruner, packed, unpacked

Array = np.ndarray[Any, Any]


def stopped_at(rule: Futility, scores: Array, rival: Array, order: Array, every: int = 10) -> int | None:
    """Show examples in ``order``, ``every`` at a time, and answer after how many the rule stops the trial."""
    seen = np.full(len(scores), np.nan)
    for end in range(every, len(scores), every):
        seen[order[:end]] = scores[order[:end]]
        if rule.is_hopeless(seen, rival):
            return end
    return None


def models(rng: Any, difference: int, discordant: int, count: int = 250) -> tuple[Array, Array]:
    """Draw two models' right answers (n,): they differ on ``discordant`` examples, the sums by ``difference``."""
    rival = (rng.random(count) < 0.85).astype(float)
    wins, losses = (discordant + difference) // 2, (discordant - difference) // 2
    places = rng.permutation(count)
    scores = rival.copy()
    scores[places[:wins]], rival[places[:wins]] = 1.0, 0.0
    scores[places[wins : wins + losses]], rival[places[wins : wins + losses]] = 0.0, 1.0
    return scores, rival


def test_a_trial_that_would_have_won_is_seldom_stopped_and_a_bad_one_soon() -> None:
    rng, rule = np.random.default_rng(0), Futility()
    ahead, level, spent = [], [], []
    for _ in range(200):
        ahead.append(stopped_at(rule, *models(rng, difference=8, discordant=20), rng.permutation(250)))
        level.append(stopped_at(rule, *models(rng, difference=2, discordant=20), rng.permutation(250)))
        spent.append(stopped_at(rule, *models(rng, difference=-20, discordant=40), rng.permutation(250)) or 250)
    assert np.mean([end is not None for end in ahead]) < 0.12
    assert np.mean([end is not None for end in level]) < 0.3
    assert np.mean(spent) < 0.3 * 250


def test_nearly_at_the_end_a_trial_that_is_behind_is_stopped() -> None:
    rival, scores = np.ones(100), np.ones(100)
    rival[:2], scores[2:5] = 0.0, 0.0  # two that only the trial has right, three that only the other one has
    scores[99:] = np.nan
    assert Futility().is_hopeless(scores, rival)
    scores[55:] = np.nan
    assert not Futility().is_hopeless(scores, rival)


def test_nothing_is_stopped_on_little_evidence_or_without_a_difference() -> None:
    scores, rival = np.full(100, np.nan), np.ones(100)
    scores[:31] = 0.0
    assert not Futility().is_hopeless(scores, rival)
    scores[:32] = 0.0
    assert Futility().is_hopeless(scores, rival)
    scores[:99] = 1.0
    assert not Futility().is_hopeless(scores, rival)


def test_the_probability_is_that_of_the_rest_of_the_examples() -> None:
    rng = np.random.default_rng(1)
    scores, rival = np.full(400, np.nan), np.zeros(400)
    drawn = rng.normal(0, 0.4, 200)
    found = scores[:200] = drawn - drawn.mean() - 0.015
    mean, deviation = found.mean(), found.std(ddof=1)
    # The mean is only known from the sample, and the rest varies about it as the sample does.
    centres = rng.normal(mean, deviation / np.sqrt(200), 40_000)
    ends = found.sum() + 200 * centres + rng.normal(0, deviation * np.sqrt(200), 40_000)
    share = float((ends > 0).mean())
    assert 0.05 < share < 0.45
    assert Futility(probability=share + 0.02).is_hopeless(scores, rival)
    assert not Futility(probability=share - 0.02).is_hopeless(scores, rival)


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_trials_are_compared_with_the_best_example_by_example(direction: str) -> None:
    study = optuna.create_study(direction=direction)
    rng = np.random.default_rng(0)
    good, bad = (rng.random(200) < share for share in (0.95, 0.4))
    for scores in (good, bad, bad):
        number = study.ask().number
        watch = Watch(make_pruner("futility"), study._storage, study, number, np.full(200, np.nan), lambda: 0.0)
        try:
            for start in range(0, 200, 20):
                watch.see(np.arange(start, start + 20), scores[start : start + 20].astype(float))
            watch.keep()
        except Pruned:
            study.tell(number, state=optuna.trial.TrialState.PRUNED)
            assert watch.done < 200
        else:
            study.tell(number, float(scores.mean()) * (1 if direction == "maximize" else -1))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "PRUNED"]


def watched(study: optuna.Study, count: int) -> Watch:
    number = study.ask().number
    return Watch(make_pruner("futility"), study._storage, study, number, np.full(count, np.nan), lambda: 0.0)


def test_a_trial_is_not_stopped_when_all_its_examples_are_measured() -> None:
    study = optuna.create_study(direction="maximize")
    for scores in (np.ones(200), np.zeros(200)):
        watch = watched(study, 200)
        watch.see(np.arange(200), scores)
        watch.keep()
        study.tell(watch.number, float(scores.mean()))


def test_of_equally_good_trials_the_earliest_is_compared_with() -> None:
    study = optuna.create_study(direction="maximize")
    halves = np.repeat([1.0, 0.0], 100)
    for scores in (halves, halves[::-1]):
        watch = watched(study, 200)
        watch.scores[:] = scores
        watch.keep()
        study.tell(watch.number, 0.5)
    watch = watched(study, 200)
    with pytest.raises(Pruned):
        watch.see(np.arange(100), np.zeros(100))  # the first has these right, the other one the rest


def test_scores_are_kept_as_they_are() -> None:
    scores = np.array([0.0, 1.0, -2.5, 1e-3])
    np.testing.assert_allclose(unpacked(packed(scores)), scores, rtol=1e-7)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("wilcoxn", r"sweep\.pruner=wilcoxn: no such pruner; did you mean 'wilcoxon'\?"),
        ({"name": "futility", "probability": 0.7}, r"sweep\.pruner=futility: probability=0\.7: must be between 0 and"),
        ({"name": "futility", "p": 0.1}, r"sweep\.pruner=futility: .*'p'"),
        ({"name": "wilcoxon", "p_threshold": 2}, r"sweep\.pruner=wilcoxon: .*p_threshold"),
        ({"name": "median", "warmup": 2}, r"sweep\.pruner=median: .*warmup"),
    ],
)
def test_a_pruner_that_cannot_be_had_is_one_clear_error(setting: Any, message: str) -> None:
    with pytest.raises(SweepError, match=message):
        make_pruner(setting)


def test_without_a_pruner_nothing_is_stopped() -> None:
    assert make_pruner("none") is None
