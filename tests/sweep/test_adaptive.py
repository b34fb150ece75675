"""Adaptive evaluation, its parts: against plain formulas of NumPy, SciPy and scikit-learn, and on synthetic sweeps."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from scipy.stats import multivariate_normal
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern
from sklearn.metrics import f1_score, matthews_corrcoef

from mergelab.errors import MergeWarning, NonFinite, SweepError
from mergelab.evaluation.metrics import example_statistics, score, value_of_rows
from mergelab.sweep.adaptive import prediction
from mergelab.sweep.adaptive.estimator import Goal
from mergelab.sweep.adaptive.finalists import likely_best
from mergelab.sweep.adaptive.goals import goals_of, not_estimated
from mergelab.sweep.adaptive.history import MeasuredTask, MeasuredTrial, read_models, write_models
from mergelab.sweep.adaptive.kernel import Kernel, fit_kernel
from mergelab.sweep.adaptive.policy import POLICY, Field, draw_rounds, ends_trial, round_ends
from mergelab.sweep.adaptive.prediction import Prior, Seen, condition, trials_of
from mergelab.sweep.adaptive.reporter import AdaptiveReporter
from mergelab.sweep.budget import budget_of
from mergelab.sweep.config import SweepConfig
from mergelab.sweep.objective import Objective
from mergelab.sweep.outcome import TrialOutcome
from mergelab.sweep.plan import fitted, not_adaptive, not_pruned
from mergelab.sweep.reporting import Pruned
from mergelab.sweep.study import MODELS
from mergelab.sweep.targets import is_linearised, linear_scores, scores_for, target_of, unsupported
from mergelab.tasks.loading import load_task
from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]
MEAN = TaskSpec(name="t", version=1, kind="generation", metrics=("exact_match",), primary="exact_match")
GOAL = Goal("exact_match", ((MEAN, "exact_match"),))


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


def known(scores: Array, positions: Array | None = None) -> dict[str, MeasuredTask]:
    """Return what was measured of the one task: all examples, or those at some positions."""
    seen = np.arange(len(scores)) if positions is None else positions
    return {"t": MeasuredTask(seen, {"exact_match": scores[seen, None]}, len(scores))}


def whole(number: int, scores: Array) -> MeasuredTrial:
    return MeasuredTrial(number, (float(scores.mean()),), known(scores), whole=True)


def reporter_of(
    history: Sequence[MeasuredTrial], count: int, seed: Sequence[int], again: MeasuredTrial | None = None
) -> AdaptiveReporter:
    return AdaptiveReporter([GOAL], history, {}, {"t": count}, seed, NOWHERE, again)


def measured(reporter: AdaptiveReporter, scores: Array, number: int = 0) -> MeasuredTrial:
    """Measure a trial round by round, as far as its reporter lets it."""
    try:
        for one in np.unique(reporter.rounds[reporter.rounds >= 0]):
            members = np.flatnonzero(reporter.rounds == one)
            reporter.report(members, {"exact_match": scores[members, None]})
    except Pruned:
        (found,) = reporter.estimates({"t": np.zeros(len(scores), int)}).values()
        return MeasuredTrial(number, (found.value,), reporter.measured(), whole=False)
    return whole(number, scores)


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
    for seed in range(16):
        matrix = drawn_sweep(np.random.default_rng(seed), 40, 200)
        history = [whole(number, scores) for number, scores in enumerate(matrix[:4])]
        for number, scores in enumerate(matrix[4:], 4):
            reporter = reporter_of(history, 200, (seed, number))
            if stopping:
                measured(reporter, scores)
            else:
                with contextlib.suppress(Pruned):
                    seen = np.flatnonzero(reporter.rounds <= 3)
                    reporter.report(seen, {"exact_match": scores[seen, None]})
            (found,) = reporter.estimates({"t": np.zeros(200, int)}).values()
            assert found.low is not None
            assert found.high is not None
            if reporter.done < 200:
                inside.append(found.low <= scores.mean() <= found.high)
                errors.append(found.value - scores.mean())
    assert 0.93 <= np.mean(inside) <= 0.985  # ± 0.02 of 576
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


PEARSON = TaskSpec(name="t", version=1, kind="regression", metrics=("pearson",), primary="pearson")
BLEU = replace(MEAN, metrics=("bleu",), primary="bleu")
WORDS = ("a", "cat", "sat", "on", "the", "mat", "dog")


def outputs_of(spec: TaskSpec, truth: Array, share: float, rng: np.random.Generator) -> Array:
    """Draw outputs of a model that is wrong, or off, in about a share of the examples."""
    wrong = rng.uniform(size=len(truth)) < share
    if spec.kind == "regression":
        return (truth + share * rng.normal(size=len(truth)))[:, None]
    if spec.kind == "classification":
        return np.eye(3)[np.where(wrong, rng.integers(0, 3, len(truth)), truth)]
    texts = [texts[0] if right else texts[0].rpartition(" ")[0] for texts, right in zip(truth, ~wrong, strict=True)]
    return np.array(texts, object)


def truth_of(spec: TaskSpec, count: int, rng: np.random.Generator) -> Array:
    if spec.kind == "regression":
        return rng.uniform(0, 5, count)
    if spec.kind == "classification":
        return rng.integers(0, 3, count)
    found = np.empty(count, object)
    found[:] = [(" ".join(rng.choice(WORDS, 9)),) for _ in range(count)]
    return found


LINEARISED = [PEARSON, BLEU, labels("matthews_correlation", count=3)]


@pytest.mark.parametrize("spec", LINEARISED, ids=lambda spec: spec.primary)
def test_the_scores_of_a_metric_of_several_sums_add_up_to_it(spec: TaskSpec) -> None:
    rng = np.random.default_rng(0)
    truth, everything = truth_of(spec, 400, rng), np.arange(400)
    best, other = (
        example_statistics(spec, outputs_of(spec, truth, share, rng), truth)[spec.primary] for share in (0.3, 0.4)
    )
    whole = linear_scores(spec, spec.primary, other, everything, best)
    assert whole.sum() == pytest.approx(value_of_rows(spec, spec.primary, other), abs=1e-6)
    # Of a part they add up to what that part tells of the whole.
    seen = np.sort(rng.permutation(400)[:200])
    part = linear_scores(spec, spec.primary, other[seen], seen, best)
    assert part.mean() * 400 == pytest.approx(value_of_rows(spec, spec.primary, other[seen]), abs=0.02)
    assert np.corrcoef(part, whole[seen])[0, 1] > 0.95
    assert is_linearised(spec, spec.primary)


@pytest.mark.parametrize("spec", LINEARISED, ids=lambda spec: spec.primary)
def test_metrics_of_several_sums_are_estimated_with_intervals_that_hold(spec: TaskSpec) -> None:
    rng = np.random.default_rng(1)
    truth, name = truth_of(spec, 200, rng), spec.primary
    shares = rng.uniform(0.2, 0.6, 24)
    rows = [example_statistics(spec, outputs_of(spec, truth, share, rng), truth)[name] for share in shares]
    exact = [value_of_rows(spec, name, one) for one in rows]
    everything = np.arange(200)
    known = [
        MeasuredTrial(number, (exact[number],), {"t": MeasuredTask(everything, {name: rows[number]}, 200)}, whole=True)
        for number in range(6)
    ]
    inside, stopped = 0, 0
    for number in range(6, 24):
        reporter = AdaptiveReporter([Goal(name, ((spec, name),))], known, {}, {"t": 200}, (0, number), NOWHERE)
        with contextlib.suppress(Pruned):
            for one in np.unique(reporter.rounds):
                members = np.flatnonzero(reporter.rounds == one)
                reporter.report(members, {name: rows[number][members]})
        if reporter.done < 200:
            (found,) = reporter.estimates({"t": np.zeros(200, int)}).values()
            assert found.low is not None
            assert found.high is not None
            stopped += 1
            inside += found.low <= exact[number] <= found.high
    assert stopped >= 12
    assert inside >= 0.9 * stopped - 1


def test_a_correlation_is_estimated_of_predictions_on_another_scale() -> None:
    """λ shrinks predictions; a correlation does not see it, and neither may its estimate."""
    rng = np.random.default_rng(2)
    truth = truth_of(PEARSON, 300, rng)
    rows = [
        example_statistics(PEARSON, outputs_of(PEARSON, truth, 1.0, rng) * scale, truth)["pearson"]
        for scale in (1.0, 1.0, 1.0, 0.3)
    ]
    goal = Goal("pearson", ((PEARSON, "pearson"),))
    values = [value_of_rows(PEARSON, "pearson", one) for one in rows]
    everything, seen = np.arange(300), np.sort(rng.permutation(300)[:60])
    known = [
        MeasuredTrial(number, (values[number],), {"t": MeasuredTask(everything, {"pearson": rows[number]}, 300)}, True)
        for number in range(3)
    ]
    reporter = AdaptiveReporter([goal], known, {}, {"t": 300}, (0, 3), NOWHERE)
    with contextlib.suppress(Pruned):
        reporter.report(seen, {"pearson": rows[3][seen]})
    (found,) = reporter.estimates({"t": np.zeros(300, int)}).values()
    assert found.value == pytest.approx(values[3], abs=0.03)


def suite_of(rng: np.random.Generator, trials: int) -> tuple[list[TaskSpec], dict[str, list[Array]]]:
    """Draw the statistics of models on two tasks: right answers on 60 examples, and ROUGE of 100."""
    right, means = labels("accuracy", "f1"), replace(MEAN, name="u")
    right = replace(right, name="r")
    answers, scores = drawn_sweep(rng, trials, 60), drawn_sweep(rng, trials, 100) * rng.uniform(0.5, 1, (trials, 100))
    truth = np.arange(60) % 2
    pairs = [np.stack([np.where(row > 0, truth, 1 - truth), truth], axis=1).astype(float) for row in answers]
    return [right, means], {"r": pairs, "u": [row[:, None] for row in scores]}


def test_a_suite_is_estimated_from_examples_of_all_its_tasks() -> None:
    tasks, rows = suite_of(np.random.default_rng(0), 30)
    goal = Goal("average", ((tasks[0], "f1"), (tasks[1], "exact_match")))
    counts = {"r": 60, "u": 100}

    def statistics(number: int, name: str, members: Array) -> dict[str, Array]:
        own = rows[name][number][members]
        return {"accuracy": own, "f1": own} if name == "r" else {"exact_match": own}

    def exact(number: int) -> float:
        scores = [value_of_rows(spec, metric, rows[spec.name][number]) for spec, metric in goal.parts]
        return float(np.mean(scores))

    known = []
    for number in range(6):
        of = {name: MeasuredTask(np.arange(n), statistics(number, name, np.arange(n)), n) for name, n in counts.items()}
        known.append(MeasuredTrial(number, (exact(number),), of, whole=True))
    errors, inside, shares = [], [], []
    for number in range(6, 30):
        reporter = AdaptiveReporter([goal], known, {}, counts, (0, number), NOWHERE)
        with contextlib.suppress(Pruned):
            for one in np.unique(reporter.rounds):
                for name, first in (("r", 0), ("u", 60)):
                    members = np.flatnonzero(reporter.rounds[first : first + counts[name]] == one)
                    if len(members):
                        reporter.report(first + members, statistics(number, name, members))
        shares.append(reporter.done / 160)
        if reporter.done < 160:
            found = reporter.estimates({name: np.zeros(n, int) for name, n in counts.items()})
            assert set(found) == {"r/accuracy", "r/f1", "u/exact_match", "average"}
            one = found["average"]
            mean = (found["r/f1"].value + found["u/exact_match"].value) / 2
            assert one.value == pytest.approx(mean)
            assert one.low is not None
            assert one.high is not None
            errors.append(one.value - exact(number))
            inside.append(one.low <= exact(number) <= one.high)
    assert np.mean(shares) < 0.6
    assert np.mean(inside) > 0.85
    assert np.std(errors) < 0.06


def test_an_objective_of_one_task_leaves_the_others_for_last() -> None:
    tasks, rows = suite_of(np.random.default_rng(0), 3)
    counts, objective = {"r": 60, "u": 100}, Objective("u", "u", "exact_match", "maximize")
    goals = goals_of([objective], tasks)
    assert goals[0].name == "u/exact_match"
    known = [
        MeasuredTrial(number, (rows["u"][number].mean(),), {
            "r": MeasuredTask(np.arange(60), {"accuracy": rows["r"][number], "f1": rows["r"][number]}, 60),
            "u": MeasuredTask(np.arange(100), {"exact_match": rows["u"][number]}, 100)}, whole=True)
        for number in range(2)
    ]  # fmt: skip
    rounds = AdaptiveReporter(goals, known, {}, counts, (0, 2), NOWHERE).rounds
    assert rounds[:60].min() > rounds[60:].max()


@pytest.mark.parametrize(
    ("spec", "metric", "named"),
    [
        (replace(MEAN, kind="regression", metrics=("spearmanr",), primary="spearmanr"), "spearmanr", "spearmanr is no"),
        (replace(MEAN, metrics=("f1",), primary="f1", labels=("a", "b")), "f1", "f1 of written labels"),
    ],
)  # fmt: skip
def test_other_metrics_are_not_estimated(spec: TaskSpec, metric: str, named: str) -> None:
    assert named in str(unsupported(spec, metric))
    assert named in str(not_estimated([Goal("", ((MEAN, "exact_match"), (spec, metric)))]))
    assert unsupported(labels("accuracy", count=3), "accuracy") is None


@pytest.mark.parametrize(
    ("task", "objective", "reason"),
    [
        ("stsb", None, None),
        ("stsb", "spearmanr", "spearmanr is no function of sums over its examples"),
        ("stsb", ["pearson", "spearmanr"], "spearmanr is no function of sums over its examples"),
        ("e2e_nlg", "bleu", None),
        ("gsm8k", None, None),
        ("wikitext", None, None),
        ("lm_eval", None, "lm-eval measures all examples at once"),
    ],
)
def test_where_it_is_not_possible_trials_are_pruned(task: str, objective: Any, reason: str | None) -> None:
    spec = TaskSpec(name="x", version=1, kind="lm_eval") if task == "lm_eval" else load_task(task)
    settings = SweepConfig(params={}, objective=objective, evaluation="adaptive")
    plan: Any = SimpleNamespace(tasks=(spec,))
    assert not_adaptive(settings, plan) == reason
    assert fitted(settings, plan).evaluation == ("adaptive" if reason is None else "pruned")


@pytest.mark.parametrize(
    ("task", "objective", "pruner", "reason"),
    [
        ("stsb", None, "futility", None),
        ("stsb", None, "wilcoxon", "compares single examples, which do not add up to pearson"),
        ("mrpc", "accuracy", "wilcoxon", None),
        ("mrpc", "f1", "wilcoxon", "which do not add up to f1"),
        ("mrpc", "f1", "median", None),
        ("mrpc", ["accuracy", "f1"], "futility", "that takes one objective"),
        ("dialogsum", "rougeL", "wilcoxon", None),
        ("dialogsum", "rouge1", "wilcoxon", "which do not add up to rouge1"),
    ],
)
def test_examples_are_compared_only_where_the_objective_is_their_mean(
    task: str, objective: Any, pruner: str, reason: str | None
) -> None:
    settings = SweepConfig(params={}, objective=objective, evaluation="pruned", pruner=pruner)
    plan: Any = SimpleNamespace(tasks=(load_task(task),))
    found = not_pruned(settings, plan)
    assert (found is None) if reason is None else (reason in str(found))


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


def field_of_values(best: float, values: Sequence[float], sign: float) -> Field:
    return Field(np.array([[best]]), np.array(values)[:, None], np.array([0.004]), np.array([sign]))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_trial_ends_that_is_no_rival_or_is_known_well_enough(sign: float) -> None:
    values = [sign * value for value in (0.5, 0.6, 0.7, 0.8)]
    field = field_of_values(sign * 0.8, values, sign)
    loose, tight = 0.9 * POLICY.tolerance * field.spread, 1.1 * POLICY.tolerance * field.spread

    def ends(value: Any, error: Array, field: Field = field) -> bool:
        return ends_trial(np.array([float(sign * np.ravel(value)[0])]), error, field)

    assert ends(0.8, loose)
    assert not ends(0.8, tight)
    assert ends(0.8 - 4 * tight, tight)
    assert not ends(0.8 + 4 * tight, tight)
    assert not ends(0.8, loose, field_of_values(sign * 0.8, values[:2], sign))


def test_of_several_objectives_one_that_is_the_best_in_any_of_them_goes_on() -> None:
    rivals = np.array([[0.8, 0.2], [0.5, 0.7]])
    values = np.concatenate([rivals, [[0.4, 0.1], [0.6, 0.3]]])
    field = Field(rivals, values, np.zeros(2), np.ones(2))
    errors = np.full(2, 0.01)
    assert field.chance(np.array([0.4, 0.1]), errors) < 1e-6  # both are better
    assert field.chance(np.array([0.6, 0.3]), errors) > 0.999  # better than each in one of them
    assert field.gain(np.array([0.6, 0.3]), errors) == pytest.approx(0.1 / values.std(axis=0)[1], rel=0.01)
    assert field.gain(np.array([0.4, 0.1]), errors) < 1e-6


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_expected_gain_is_that_of_many_draws(sign: float) -> None:
    rng = np.random.default_rng(0)
    field = field_of_values(sign * 0.8, [sign * 0.6, sign * 0.8], sign)
    drawn = 0.78 + 0.05 * rng.normal(size=200_000)
    expected = np.maximum(drawn - 0.8, 0).mean() / 0.1
    assert field.gain(np.array([sign * 0.78]), np.array([0.05])) == pytest.approx(expected, rel=0.02)
    assert field.gain(np.array([sign * 0.78]), np.zeros(1)) == pytest.approx(0.0, abs=1e-9)


def history(matrix: Array) -> list[MeasuredTrial]:
    return [whole(number, scores) for number, scores in enumerate(matrix)]


def test_a_bad_trial_ends_early_and_the_first_ones_are_whole() -> None:
    rng = np.random.default_rng(0)
    matrix = drawn_sweep(rng, 6, 200)
    first = history(matrix[: POLICY.startup])
    assert set(reporter_of(first[:-1], 200, (0, 1)).rounds) == {0}
    bad = measured(reporter_of(first, 200, (0, 2)), np.zeros(200))
    assert not bad.whole
    assert len(bad.tasks["t"].positions) <= 40
    assert bad.values < min(one.values for one in first)


def test_a_trial_depends_on_its_seed_its_number_and_the_trials_before_it_alone() -> None:
    matrix = drawn_sweep(np.random.default_rng(0), 6, 200)
    found = [measured(reporter_of(history(matrix[:4]), 200, (seed, 5)), matrix[5]) for seed in (0, 0, 1)]
    positions = [one.tasks["t"].positions for one in found]
    np.testing.assert_array_equal(positions[0], positions[1])
    assert found[0].values == found[1].values
    assert not np.array_equal(positions[0], positions[2])


@pytest.mark.parametrize(
    ("matrix", "named"),
    [(np.ones((2, 100)), "equal scores"), (drawn_sweep(np.random.default_rng(0), 2, POLICY.first), "too few")],
    ids=["all right", "few examples"],
)
def test_with_nothing_to_choose_by_trials_are_whole_and_that_is_said_once(matrix: Array, named: str) -> None:
    count = matrix.shape[1]
    with pytest.warns(MergeWarning, match=named):
        first = reporter_of(history(matrix), count, (0, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = reporter_of(history(np.concatenate([matrix, matrix[:1]])), count, (0, 3))
    assert set(first.rounds) == set(second.rounds) == {0}


def test_a_score_that_is_no_number_ends_the_trial() -> None:
    reporter = reporter_of(history(np.eye(40)[:2]), 40, (0, 2))
    with pytest.raises(NonFinite, match="1 examples have a score that is NaN"):
        reporter.report(np.arange(3), {"exact_match": np.array([[0.0], [np.nan], [1.0]])})


def stopped(number: int, scores: Array, positions: Array) -> MeasuredTrial:
    return MeasuredTrial(number, (float(scores[positions].mean()),), known(scores, positions), whole=False)


def test_the_likeliest_winners_among_the_stopped_are_finalists() -> None:
    rng = np.random.default_rng(3)
    matrix = drawn_sweep(rng, 4, 200)
    partly = [
        stopped(number, scores, np.sort(rng.permutation(200)[:40]))
        for number, scores in ((4, np.zeros(200)), (5, np.ones(200)))
    ]
    assert likely_best([GOAL], [*history(matrix), *partly], {}) == [5]
    assert likely_best([GOAL], history(matrix), {}) == []


def test_a_finalist_is_measured_on_the_rest_as_long_as_it_may_be_the_best() -> None:
    rng = np.random.default_rng(3)
    matrix = drawn_sweep(rng, 6, 200)
    positions = np.sort(rng.permutation(200)[:20])
    good, bad = np.ones(200), np.zeros(200)
    bad[positions] = 1.0  # what was seen of it was all right
    for scores in (good, bad):
        partly = stopped(6, scores, positions)
        reporter = reporter_of([*history(matrix), partly], 200, (0, 6, 1), partly)
        assert reporter.done == 20
        assert (reporter.rounds[positions] == -1).all()
        found = measured(reporter, scores)
        assert found.whole == (scores is good)
        np.testing.assert_array_equal(np.intersect1d(found.tasks["t"].positions, positions), positions)
    assert TrialOutcome((0.5,), 20, None, 0.0, 0.0, None, before=4).measured == 16
    assert TrialOutcome((0.5,), 20, 9, 0.0, 0.0, None, before=4).measured == 5


def test_what_a_trial_has_measured_is_read_as_it_was_written_and_as_older_studies_wrote_it() -> None:
    scores, seen = np.arange(20) / 20, np.array([3, 4, 11, 19])
    one = stopped(2, scores, seen)
    newer = one.written()
    for stored in (newer, {**newer["tasks"]["t"], "whole": False}):
        found = MeasuredTrial.read(2, one.values, json.loads(json.dumps(stored)), "t")
        assert (found.whole, found.values, set(found.tasks)) == (False, one.values, {"t"})
        np.testing.assert_array_equal(found.tasks["t"].positions, seen)
        np.testing.assert_allclose(found.tasks["t"].statistics["exact_match"][:, 0], scores[seen], rtol=1e-6)
    study = optuna.create_study()
    write_models(study, {"t": [one.tasks["t"].statistics]})
    new = read_models(study, "t")
    study.set_user_attr(MODELS, study.user_attrs[MODELS]["t"])
    old = read_models(study, "t")
    np.testing.assert_array_equal(old["t"][0]["exact_match"], new["t"][0]["exact_match"])


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
