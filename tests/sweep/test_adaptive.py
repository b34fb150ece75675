"""Adaptive evaluation, its parts: against plain formulas of NumPy, SciPy and scikit-learn, and on synthetic sweeps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern
from sklearn.metrics import f1_score, matthews_corrcoef

from mergelab.errors import MergeWarning, NonFinite, SweepError
from mergelab.evaluation.metrics import example_statistics, score
from mergelab.sweep.adaptive import prediction
from mergelab.sweep.adaptive.finalists import likely_best
from mergelab.sweep.adaptive.history import MeasuredTrial
from mergelab.sweep.adaptive.kernel import Kernel, fit_kernel
from mergelab.sweep.adaptive.policy import POLICY, Field, draw_rounds, ends_trial, round_ends
from mergelab.sweep.adaptive.prediction import Prior, Seen, condition, trials_of
from mergelab.sweep.adaptive.reporter import AdaptiveReporter
from mergelab.sweep.budget import budget_of
from mergelab.sweep.outcome import TrialOutcome
from mergelab.sweep.reporting import Pruned
from mergelab.sweep.targets import scores_for, target_of, unsupported
from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]
MEAN = TaskSpec(name="t", version=1, kind="generation", metrics=("exact_match",), primary="exact_match")


def labels(*metrics: str, count: int = 2) -> TaskSpec:
    names = tuple(f"label {number}" for number in range(count))
    return TaskSpec(
        name="t", version=1, kind="classification", labels=names, metrics=metrics, primary=metrics[0]
    )  # fmt: skip


def drawn_sweep(rng: np.random.Generator, trials: int, count: int) -> Array:
    """Draw right and wrong answers (t, n) of models that share what is hard, and have two traits."""
    hardness, loads = rng.normal(0.8, 1.2, count), rng.normal(size=(count, 2))
    traits = rng.normal(scale=0.5, size=(trials, 2))
    margins = hardness + traits @ loads.T + rng.normal(scale=0.3, size=(trials, 1))
    return (margins + 0.4 * rng.normal(size=(trials, count)) > 0).astype(float)


NOWHERE = np.empty(0)  # of a space without dimensions, no trial is nearer than others


def prior_of(whole: Array, models: Array, *partial: Seen) -> Prior:
    """Return what is known of a trial from others that are at no points."""
    seen = [*(Seen(np.arange(whole.shape[1]), scores) for scores in whole), *partial]
    return trials_of(seen, models, np.empty((len(seen), 0))).prior(NOWHERE)


def whole(number: int, scores: Array) -> MeasuredTrial:
    rows = {"exact_match": scores[:, None]}
    return MeasuredTrial(number, float(scores.mean()), np.arange(len(scores)), rows, len(scores), whole=True)


def measured(reporter: AdaptiveReporter, scores: Array) -> MeasuredTrial:
    """Measure a trial round by round, as far as its reporter lets it."""
    rounds = np.zeros(len(scores), int) if reporter.rounds is None else reporter.rounds
    seen = np.empty(0, np.int64)
    try:
        for one in np.unique(rounds):
            seen = np.sort(np.append(seen, np.flatnonzero(rounds == one)))
            reporter.report(np.flatnonzero(rounds == one), scores[rounds == one])
    except Pruned:
        rows = {"exact_match": scores[seen, None]}
        (found,) = reporter.estimates(seen, rows, np.zeros(len(scores), int)).values()
        return MeasuredTrial(0, found.value, seen, rows, len(scores), whole=False)
    return whole(0, scores)


# ------------------------------------------------------------------------------------------------------- prediction


def test_predictions_are_the_conditional_of_a_dense_gaussian() -> None:
    rng = np.random.default_rng(0)
    matrix = drawn_sweep(rng, 7, 40)
    prior = prior_of(matrix[:4], matrix[5:6], Seen(np.arange(0, 40, 3), matrix[4, ::3]))
    seen = np.sort(rng.permutation(40)[:15])
    found = condition(prior, Seen(seen, matrix[6, seen]))
    rest = np.setdiff1d(np.arange(40), seen)

    def dense(share: float) -> tuple[float, Array, Array]:
        covariance = prior.factors @ prior.factors.T + share * np.diag(prior.variance)
        own = covariance[np.ix_(seen, seen)]
        weights = np.linalg.solve(own, covariance[np.ix_(seen, rest)]).T
        mean = prior.mean[rest] + weights @ (matrix[6, seen] - prior.mean[seen])
        left = covariance[np.ix_(rest, rest)] - weights @ covariance[np.ix_(seen, rest)]
        of_share = -((np.log(share / prediction._NOISE_CENTRE) / prediction._NOISE_WIDTH) ** 2) / 2
        fit = multivariate_normal(prior.mean[seen], own).logpdf(matrix[6, seen])
        return float(fit) + of_share, mean, left

    _, mean, left = max((dense(share) for share in prediction._NOISE_SHARES), key=lambda one: one[0])
    np.testing.assert_allclose(found.scores[rest], mean, atol=1e-9)
    np.testing.assert_array_equal(found.scores[seen], matrix[6, seen])
    sums, covariance = found.sums(np.ones((40, 1)))
    assert sums[0] == pytest.approx(mean.sum() + matrix[6, seen].sum())
    assert covariance[0, 0] == pytest.approx(prediction._INFLATION * left.sum())


def test_what_was_measured_is_known() -> None:
    matrix = drawn_sweep(np.random.default_rng(1), 4, 30)
    found = condition(prior_of(matrix[:3], np.empty((0, 30))), Seen(np.arange(30), matrix[3]))
    sums, covariance = found.sums(np.ones((30, 1)))
    assert (sums[0], covariance[0, 0]) == (matrix[3].sum(), 0)


@pytest.mark.parametrize("stopping", [False, True], ids=["a fixed number", "stopped"])
def test_intervals_hold_as_often_as_they_say(stopping: bool) -> None:
    inside, errors = [], []
    for seed in range(8):
        matrix = drawn_sweep(np.random.default_rng(seed), 40, 200)
        history = [whole(number, scores) for number, scores in enumerate(matrix[:4])]
        for number, scores in enumerate(matrix[4:], 4):
            reporter = AdaptiveReporter(MEAN, "exact_match", history, (), 200, (seed, number), NOWHERE)
            if stopping:
                one = measured(reporter, scores)
                seen, rows = one.positions, one.statistics
            else:
                assert reporter.rounds is not None
                seen = np.flatnonzero(reporter.rounds <= 3)
                rows = {"exact_match": scores[seen, None]}
            (found,) = reporter.estimates(seen, rows, np.zeros(200, int)).values()
            assert found.low is not None
            assert found.high is not None
            if len(seen) < 200:
                inside.append(found.low <= scores.mean() <= found.high)
                errors.append(found.value - scores.mean())
    assert 0.93 <= np.mean(inside) <= 0.985  # ± 0.02 of 288
    assert abs(np.mean(errors)) < 0.25 * np.std(errors)


def test_predictions_from_other_models_err_less_than_the_mean_of_as_many_examples() -> None:
    own, plain = [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        matrix = drawn_sweep(rng, 20, 200)
        prior = prior_of(matrix[:8], np.empty((0, 200)))
        for scores in matrix[8:]:
            seen = rng.permutation(200)[:40]
            own.append(condition(prior, Seen(seen, scores[seen])).scores.mean() - scores.mean())
            plain.append(scores[seen].mean() - scores.mean())
    assert np.std(own) < 0.65 * np.std(plain)


def smooth_sweep(rng: np.random.Generator, trials: int, count: int) -> tuple[Array, Array]:
    """Draw points (t, 2) and answers (t, n) that change smoothly from point to point, each example's in its own way."""
    points = rng.uniform(size=(trials, 2))
    waves, loads = rng.normal(scale=2, size=(2, 8)), rng.normal(size=(8, count))
    margins = rng.normal(0.6, 1.0, count) + np.sin(points @ waves + rng.uniform(0, 6, 8)) @ loads / 2
    return points, (margins + 0.2 * rng.normal(size=(trials, count)) > 0).astype(float)


def test_a_kernel_predicts_what_a_gaussian_process_does() -> None:
    rng = np.random.default_rng(0)
    points, rows, noise, lengths = (
        rng.uniform(size=(12, 2)),
        rng.normal(size=(12, 30)),
        np.zeros(12),
        np.array([0.3, 2]),
    )
    noise[5:8] = 0.4
    kernel = Kernel(points, noise, lengths, own=0.2)

    def expected(used: Array, point: Array) -> tuple[Array, float]:
        process = GaussianProcessRegressor(0.8 * Matern(lengths, nu=2.5), alpha=0.2 + noise[used], optimizer=None)
        mean, deviation = process.fit(points[used], rows[used]).predict(point[None], return_std=True)
        return mean[0], float(np.ravel(deviation)[0]) ** 2 + 0.2

    for used, point, (weights, left) in (
        (np.arange(12), np.array([0.4, 0.6]), kernel.at(np.array([0.4, 0.6]))),
        (np.delete(np.arange(12), 6), points[6], kernel.without(6)),
    ):
        mean, variance = expected(used, point)
        np.testing.assert_allclose(weights @ rows, mean, atol=1e-9)
        assert left == pytest.approx(variance)
    white = kernel.whitened(rows)
    np.testing.assert_allclose(white.T @ white, rows.T @ np.linalg.solve(kernel.covariance, rows), atol=1e-9)


def test_a_kernel_finds_along_which_axis_merges_change() -> None:
    rng = np.random.default_rng(1)
    points = rng.uniform(size=(40, 2))
    rows = np.sin(8 * points[:, :1] + rng.uniform(0, 6, 200)) * np.sqrt(2)
    found = fit_kernel(points, np.zeros(40), rows)
    assert found.lengths[1] > 2 * found.lengths[0]
    assert fit_kernel(points, np.zeros(40), rng.normal(size=(40, 200))).own > 2 * found.own


def test_near_trials_predict_more_than_any() -> None:
    near, anywhere = [], []
    for seed in range(4):
        points, matrix = smooth_sweep(np.random.default_rng(seed), 40, 150)
        seen = [Seen(np.arange(150), scores) for scores in matrix[:15]]
        seen += [Seen(np.arange(0, 150, 4), scores[::4]) for scores in matrix[15:30]]
        for known, errors in ((points, near), (np.empty((40, 0)), anywhere)):
            trials = trials_of(seen, np.empty((0, 150)), known[:30])
            for point, scores in zip(known[30:], matrix[30:], strict=True):
                errors.append(np.mean((trials.prior(point).mean - scores) ** 2))
    assert np.mean(near) < 0.8 * np.mean(anywhere)


# ---------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews_correlation"])
def test_a_metric_of_labels_follows_from_the_right_answers_for_each_label(metric: str) -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 2, 90), rng.integers(0, 2, 90)
    spec = labels(metric)
    rows = example_statistics(spec, np.eye(2)[predicted], truth)[metric]
    other = example_statistics(spec, np.eye(2)[1 - truth], truth)[metric]  # only the truth of these counts
    target = target_of(spec, metric, other)
    expected = {
        "accuracy": (truth == predicted).mean(),
        "f1": f1_score(truth, predicted),
        "matthews_correlation": matthews_corrcoef(truth, predicted),
    }
    assert target.value(target.groups.T @ scores_for(spec, metric, rows)) == pytest.approx(expected[metric])


def test_a_split_has_its_own_metric() -> None:
    truth, predicted, members = np.arange(60) % 2, np.arange(60) % 3 % 2, np.arange(0, 60, 4)
    spec = labels("f1")
    rows = example_statistics(spec, np.eye(2)[predicted], truth)["f1"]
    target = target_of(spec, "f1", rows, members)
    found = target.value(target.groups.T @ scores_for(spec, "f1", rows))
    assert found == pytest.approx(f1_score(truth[members], predicted[members]))


def test_perplexity_follows_from_the_sum_of_nats() -> None:
    rng = np.random.default_rng(0)
    rows = np.stack([rng.gamma(9, 3, 50), rng.integers(5, 30, 50), rng.integers(3, 20, 50)], axis=1)
    spec = TaskSpec(
        name="t", version=1, kind="language_modelling", metrics=("token_perplexity",), primary="token_perplexity"
    )
    target = target_of(spec, "token_perplexity", rows)
    found = target.value(target.groups.T @ scores_for(spec, "token_perplexity", rows))
    assert found == pytest.approx(np.exp(rows[:, 0].sum() / rows[:, 1].sum()))
    assert found == pytest.approx(score(spec, rows, np.zeros(50))["token_perplexity"])


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_errors_of_sums_become_the_metrics(metric: str) -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(400) % 2
    spec = labels(metric)
    target = target_of(spec, metric, example_statistics(spec, np.eye(2)[truth], truth)[metric])
    sums, covariance = np.array([150.0, 120.0]), np.array([[40.0, 25.0], [25.0, 60.0]])
    value, error = target.with_error(sums, covariance)
    drawn = [target.value(one) for one in rng.multivariate_normal(sums, covariance, 4000)]
    assert value == pytest.approx(np.mean(drawn), abs=0.005)
    assert error == pytest.approx(np.std(drawn), rel=0.06)


@pytest.mark.parametrize(
    ("spec", "metric", "named"),
    [
        (labels("matthews_correlation", count=3), "matthews_correlation", "matthews_correlation of 3 labels"),
        (replace(MEAN, kind="regression", metrics=("pearson",), primary="pearson"), "pearson", "pearson is no"),
        (replace(MEAN, metrics=("bleu",), primary="bleu"), "bleu", "bleu is no"),
    ],
)  # fmt: skip
def test_other_metrics_of_a_corpus_are_not_estimated(spec: TaskSpec, metric: str, named: str) -> None:
    assert named in str(unsupported(spec, metric))
    assert unsupported(labels("accuracy", count=3), "accuracy") is None


# ------------------------------------------------------------------------------------------- choosing and stopping


def test_every_example_has_its_round_and_those_that_vary_come_sooner() -> None:
    variance = np.repeat([0.25, 0.01], [50, 150])
    rounds = np.stack([draw_rounds(variance, (0, number)) for number in range(200)])
    ends = round_ends(200)
    sizes = np.diff([0, *ends])
    assert all((np.bincount(one) == sizes).all() for one in rounds)
    soon = (rounds == 0).mean(axis=0)
    assert soon[:50].mean() > 3 * soon[50:].mean() > 0
    np.testing.assert_array_equal(draw_rounds(variance, (0, 7)), rounds[7])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_trial_ends_that_is_no_rival_or_is_known_well_enough(sign: float) -> None:
    values = [sign * value for value in (0.5, 0.6, 0.7, 0.8)]
    field = Field(best=sign * 0.8, values=values, step=0.004, sign=sign)
    loose, tight = 0.9 * POLICY.tolerance * field.spread, 1.1 * POLICY.tolerance * field.spread
    assert ends_trial(sign * 0.8, loose, field)
    assert not ends_trial(sign * 0.8, tight, field)
    assert ends_trial(sign * (0.8 - 4 * tight), tight, field)
    assert not ends_trial(sign * (0.8 + 4 * tight), tight, field)
    few = Field(best=sign * 0.8, values=values[:2], step=0.004, sign=sign)
    assert not ends_trial(sign * 0.8, loose, few)


def history(matrix: Array) -> list[MeasuredTrial]:
    return [whole(number, scores) for number, scores in enumerate(matrix)]


def test_a_bad_trial_ends_early_and_the_first_ones_are_whole() -> None:
    rng = np.random.default_rng(0)
    matrix = drawn_sweep(rng, 6, 200)
    known = history(matrix[: POLICY.startup])
    assert AdaptiveReporter(MEAN, "exact_match", known[:-1], (), 200, (0, 1), NOWHERE).rounds is None
    bad = measured(AdaptiveReporter(MEAN, "exact_match", known, (), 200, (0, 2), NOWHERE), np.zeros(200))
    assert not bad.whole
    assert len(bad.positions) <= 40
    assert bad.value < min(one.value for one in known)


def test_a_trial_depends_on_its_seed_its_number_and_the_trials_before_it_alone() -> None:
    matrix = drawn_sweep(np.random.default_rng(0), 6, 200)
    found = [
        measured(AdaptiveReporter(MEAN, "exact_match", history(matrix[:4]), (), 200, (seed, 5), NOWHERE), matrix[5])
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(found[0].positions, found[1].positions)
    assert found[0].value == found[1].value
    assert not np.array_equal(found[0].positions, found[2].positions)


@pytest.mark.parametrize(
    ("matrix", "named"),
    [(np.ones((2, 100)), "equal scores"), (drawn_sweep(np.random.default_rng(0), 2, POLICY.first), "too few")],
    ids=["all right", "few examples"],
)
def test_with_nothing_to_choose_by_trials_are_whole_and_that_is_said_once(matrix: Array, named: str) -> None:
    count = matrix.shape[1]
    with pytest.warns(MergeWarning, match=named):
        first = AdaptiveReporter(MEAN, "exact_match", history(matrix), (), count, (0, 2), NOWHERE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = history(np.concatenate([matrix, matrix[:1]]))
        second = AdaptiveReporter(MEAN, "exact_match", known, (), count, (0, 3), NOWHERE)
    assert (first.rounds, second.rounds) == (None, None)


def test_a_score_that_is_no_number_ends_the_trial() -> None:
    reporter = AdaptiveReporter(MEAN, "exact_match", history(np.eye(40)[:2]), (), 40, (0, 2), NOWHERE)
    with pytest.raises(NonFinite, match="1 examples have a score that is NaN"):
        reporter.report(np.arange(3), np.array([0.0, np.nan, 1.0]))


def test_the_likeliest_winners_among_the_stopped_are_finalists() -> None:
    rng = np.random.default_rng(3)
    matrix = drawn_sweep(rng, 4, 200)
    good, bad = np.ones(200), np.zeros(200)
    stopped = []
    for number, scores in ((4, bad), (5, good)):
        seen = np.sort(rng.permutation(200)[:40])
        stopped.append(
            MeasuredTrial(number, float(scores.mean()), seen, {"exact_match": scores[seen, None]}, 200, whole=False)
        )
    known: Sequence[MeasuredTrial] = [*history(matrix), *stopped]
    assert likely_best(MEAN, "exact_match", known, ()) == [5]
    assert likely_best(MEAN, "exact_match", history(matrix), ()) == []


def test_a_finalist_has_what_was_measured_before_and_after_it_was_stopped() -> None:
    scores, seen = np.arange(20) / 20, np.array([3, 4, 11, 19])
    rest = np.setdiff1d(np.arange(20), seen)
    stopped = MeasuredTrial(2, 0.1, seen, {"exact_match": scores[seen, None]}, 20, whole=False)
    found = stopped.completed(rest, {"exact_match": scores[rest, None]})
    assert found.whole
    np.testing.assert_array_equal(found.positions, np.arange(20))
    np.testing.assert_array_equal(found.statistics["exact_match"][:, 0], scores)
    assert TrialOutcome((0.5,), 20, None, 0.0, 0.0, None, before=4).measured == 16


# ----------------------------------------------------------------------------------------------------------- budget


def outcome(pruned_at: int | None, seconds: float = 1.0) -> TrialOutcome:
    return TrialOutcome((0.5,), 100, pruned_at, seconds / 2, seconds / 2, None)


def test_a_budget_of_examples_lets_no_trial_begin_that_might_exceed_it() -> None:
    budget = budget_of(350)
    assert budget.left([]) == 1
    assert budget.left([outcome(None)]) == 2
    assert budget.left([outcome(None), outcome(60)], reserved=1) == 0
    assert budget.left([outcome(None), outcome(50)], reserved=1) == 1
    assert budget_of(None).left([outcome(None)] * 9) is None
    budget.check(350)
    with pytest.raises(SweepError, match=r"sweep.budget=350: a whole trial has 351 selecting examples"):
        budget.check(351)


def test_a_budget_of_seconds_lets_no_trial_begin_after_them() -> None:
    budget = budget_of("2.5s")
    assert budget.left([outcome(None)] * 2) is None
    assert budget.left([outcome(None)] * 3) == 0
    budget.check(10**9)


@pytest.mark.parametrize("setting", ["0", "-5", "1.5", "5m", "many", "0s", ""])
def test_another_budget_is_refused(setting: str) -> None:
    with pytest.raises(SweepError, match="must be a number of examples"):
        budget_of(setting)
