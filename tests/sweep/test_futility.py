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


def shifted(rng: Any, shift: float) -> tuple[Array, Array]:
    """Draw two models' scores (n,) of any size, which differ by ``shift`` on average."""
    best = rng.normal(0, 1, 250)
    return best + rng.normal(shift, 0.5, 250), best


def test_trials_are_pruned_at_the_examples_at_which_they_always_were() -> None:
    rng = np.random.default_rng(5)
    drawn = [(models(rng, by, discordant=20), rng.permutation(250)) for by in (4, 2, 0, -2, -4, -8) for _ in range(3)]
    assert [pruned_at(Futility(), *pair, order) for pair, order in drawn] == [
        None, None, None, None, 150, None, None, None, None, 180, 40, 220, 140, 70, 160, 90, 80, 80,
    ]  # fmt: skip
    rng = np.random.default_rng(6)
    drawn = [(models(rng, by, discordant=30), rng.permutation(250)) for by in (8, 4, 0, -4) for _ in range(3)]
    eager = Futility(probability=0.3, n_startup_steps=8)
    assert [pruned_at(eager, *pair, order) for pair, order in drawn] == [
        10, None, 10, None, None, None, 20, 80, 20, 130, 30, 30,
    ]  # fmt: skip
    rng = np.random.default_rng(7)
    shifts = (0.05, 0.02, 0, -0.02, -0.05, -0.1)
    drawn = [(shifted(rng, by), rng.permutation(250)) for by in shifts for _ in range(3)]
    assert [pruned_at(Futility(), *pair, order) for pair, order in drawn] == [
        110, None, None, None, None, None, 150, 90, None, 40, 40, 40, 100, 60, 220, 80, 40, 40,
    ]  # fmt: skip


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


def of(examples: Any, scores: Any, value: float | None = None) -> optuna.trial.FrozenTrial:
    """A trial with these scores: running, or complete where it has a value."""
    state = optuna.trial.TrialState.RUNNING if value is None else optuna.trial.TrialState.COMPLETE
    values = dict(zip(examples, scores, strict=True))
    return optuna.trial.create_trial(state=state, value=value, intermediate_values=values)


def best_of(count: int) -> optuna.Study:
    study = optuna.create_study(direction="maximize")
    study.add_trial(of(range(count), np.ones(count), 1.0))
    return study


def test_only_examples_that_both_trials_have_count_and_only_those_of_the_best_are_still_to_come() -> None:
    pruner = Futility()
    assert pruner.prune(best_of(100), of(range(40), np.zeros(40)))
    assert not pruner.prune(best_of(100), of(range(80, 120), np.zeros(40)))  # twenty in common are too few
    assert not pruner.prune(optuna.create_study(), of(range(40), np.zeros(40)))
    behind = np.where(np.arange(60) % 2 == 0, 1.5, 0.5)
    behind[:8:2] = 1.0
    assert pruner.prune(best_of(70), of(range(60), behind))
    assert not pruner.prune(best_of(100), of(range(60), behind))
    assert not pruner.prune(best_of(100), of([*range(60), *range(100, 130)], [*behind, *np.zeros(30)]))
