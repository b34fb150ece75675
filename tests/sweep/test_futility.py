"""Trials without hope are pruned for futility: on what evidence, and how often wrongly."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest

from mergelab.sweep.futility import Futility

Array = np.ndarray[Any, Any]


def is_futile(pruner: Futility, scores: Array, best: Array) -> bool:
    """Ask about a trial's scores (n,), NaN where not known yet, and the best trial's (n,)."""
    known = ~np.isnan(scores)
    return pruner.is_futile(scores[known] - best[known], int((~known).sum()))


def pruned_at(pruner: Futility, scores: Array, best: Array, order: Array, every: int = 10) -> int | None:
    """Show examples in ``order``, ``every`` at a time, and return after how many the trial is pruned."""
    seen = np.full(len(scores), np.nan)
    for end in range(every, len(scores), every):
        seen[order[:end]] = scores[order[:end]]
        if is_futile(pruner, seen, best):
            return end
    return None


def models(rng: Any, difference: int, discordant: int, count: int = 250) -> tuple[Array, Array]:
    """Draw two models' right answers (n,): they differ on ``discordant`` examples, the sums by ``difference``."""
    best = (rng.random(count) < 0.85).astype(float)
    wins, losses = (discordant + difference) // 2, (discordant - difference) // 2
    places = rng.permutation(count)
    scores = best.copy()
    scores[places[:wins]], best[places[:wins]] = 1.0, 0.0
    scores[places[wins : wins + losses]], best[places[wins : wins + losses]] = 0.0, 1.0
    return scores, best


def test_a_trial_that_would_have_won_is_seldom_pruned_and_a_bad_one_soon() -> None:
    rng, pruner = np.random.default_rng(0), Futility()
    ahead, level, spent = [], [], []
    for _ in range(200):
        ahead.append(pruned_at(pruner, *models(rng, difference=8, discordant=20), rng.permutation(250)))
        level.append(pruned_at(pruner, *models(rng, difference=2, discordant=20), rng.permutation(250)))
        spent.append(pruned_at(pruner, *models(rng, difference=-20, discordant=40), rng.permutation(250)) or 250)
    assert np.mean([end is not None for end in ahead]) < 0.12
    assert np.mean([end is not None for end in level]) < 0.3
    assert np.mean(spent) < 0.3 * 250


def test_nearly_at_the_end_a_trial_that_is_behind_is_pruned() -> None:
    best, scores = np.ones(100), np.ones(100)
    best[:2], scores[2:5] = 0.0, 0.0  # two that only the trial has right, three that only the other one has
    scores[99:] = np.nan
    assert is_futile(Futility(), scores, best)
    scores[55:] = np.nan
    assert not is_futile(Futility(), scores, best)


def test_nothing_is_pruned_on_little_evidence_or_without_a_difference() -> None:
    scores, best = np.full(100, np.nan), np.ones(100)
    scores[:31] = 0.0
    assert not is_futile(Futility(), scores, best)
    scores[:32] = 0.0
    assert is_futile(Futility(), scores, best)
    scores[:99] = 1.0
    assert not is_futile(Futility(), scores, best)


def test_the_probability_is_that_of_the_rest_of_the_examples() -> None:
    rng = np.random.default_rng(1)
    scores, best = np.full(400, np.nan), np.zeros(400)
    drawn = rng.normal(0, 0.4, 200)
    found = scores[:200] = drawn - drawn.mean() - 0.015
    mean, deviation = found.mean(), found.std(ddof=1)
    # The mean is only known from the sample, and the rest varies about it as the sample does.
    centres = rng.normal(mean, deviation / np.sqrt(200), 40_000)
    ends = found.sum() + 200 * centres + rng.normal(0, deviation * np.sqrt(200), 40_000)
    share = float((ends > 0).mean())
    assert 0.05 < share < 0.45
    assert is_futile(Futility(probability=share + 0.02), scores, best)
    assert not is_futile(Futility(probability=share - 0.02), scores, best)


def loop(study: optuna.Study, scores: Array, order: Array) -> str:
    """Optuna's own loop over one trial's examples, each reported under its number."""
    trial = study.ask()
    for example in order.tolist():
        trial.report(float(scores[example]), example)
        if trial.should_prune():
            return study.tell(trial, state=optuna.trial.TrialState.PRUNED).state.name
    return study.tell(trial, float(scores.mean())).state.name


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_it_prunes_in_any_study_of_optunas(direction: str) -> None:
    study = optuna.create_study(direction=direction, pruner=Futility())
    rng, sign = np.random.default_rng(0), 1 if direction == "maximize" else -1
    good, bad = (sign * (rng.random(200) < share).astype(float) for share in (0.95, 0.4))
    found = [loop(study, scores, rng.permutation(200)) for scores in (good, bad, good, bad)]
    assert found == ["COMPLETE", "PRUNED", "COMPLETE", "PRUNED"]


def test_examples_that_the_best_trial_does_not_have_are_not_counted() -> None:
    pruner, best = Futility(), optuna.create_study(direction="maximize")
    best.add_trial(optuna.trial.create_trial(value=1.0, intermediate_values=dict.fromkeys(range(100), 1.0)))

    def running(examples: Any) -> optuna.trial.FrozenTrial:
        values = dict.fromkeys(examples, 0.0)
        return optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, intermediate_values=values)

    assert pruner.prune(best, running(range(40)))
    assert not pruner.prune(best, running(range(80, 120)))  # twenty examples in common are too few
    assert not pruner.prune(optuna.create_study(), running(range(40)))
