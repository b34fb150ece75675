"""Estimates of stopped trials, against the plain formulas of NumPy and SciPy and against what would have come out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from mergelab.evaluation.metrics import example_statistics, score
from mergelab.sweep.estimate import estimate, estimate_metrics, estimates
from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]


def task(*metrics: str, outputs: int = 2, splits: tuple[str, ...] = ("validation",)) -> TaskSpec:
    labels = tuple(f"label {number}" for number in range(outputs)) if outputs > 1 else None
    return TaskSpec(
        name="t", version=1, kind="classification" if outputs > 1 else "regression", splits=splits, labels=labels,
        metrics=metrics, primary=metrics[0],
    )  # fmt: skip


def logits(predicted: Array, classes: int = 2) -> Array:
    return np.eye(classes)[predicted]


def statistics(spec: TaskSpec, predicted: Array, truth: Array) -> dict[str, Array]:
    outputs = predicted[:, None] if spec.outputs == 1 else logits(predicted, spec.outputs)
    return example_statistics(spec, outputs, truth)


@pytest.fixture
def drawn() -> tuple[Array, Array, Array]:
    """Truth and two models' predictions of 200 examples, 85 % and 75 % of them right."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 200)
    best, own = (np.where(rng.random(200) < share, truth, 1 - truth) for share in (0.85, 0.75))
    return truth, best, own


def test_of_a_mean_it_is_the_best_score_plus_the_mean_paired_difference(drawn: tuple[Array, Array, Array]) -> None:
    truth, best, own = drawn
    spec, seen = task("accuracy"), np.sort(np.random.default_rng(1).permutation(200)[:37])
    rows = statistics(spec, own[seen], truth[seen])
    (found,) = estimates(spec, seen, rows, statistics(spec, best, truth), np.zeros(200)).values()
    difference = (own[seen] == truth[seen]).astype(float) - (best[seen] == truth[seen])
    assert found.value == pytest.approx((best == truth).mean() + difference.mean())
    assert found.seen == pytest.approx((own[seen] == truth[seen]).mean())
    assert found.best_seen == pytest.approx((best[seen] == truth[seen]).mean())
    # 37 examples are fewer than the jackknife's groups: it is the usual standard error, of a finite population.
    half = stats.t.ppf(0.975, 36) * difference.std(ddof=1) / np.sqrt(37) * np.sqrt(1 - 37 / 200)
    assert found.high is not None
    assert found.low == pytest.approx(found.value - half)
    assert found.high == pytest.approx(found.value + half)


@pytest.mark.parametrize(("metric", "reference"), [("f1", f1_score), ("matthews_correlation", matthews_corrcoef)])
def test_of_a_corpus_it_is_the_best_score_plus_the_difference_on_the_same_examples(
    drawn: tuple[Array, Array, Array], metric: str, reference: Any
) -> None:
    truth, best, own = drawn
    seen = np.arange(0, 200, 2)
    spec = task(metric)
    found = estimate(
        spec, metric, statistics(spec, own[seen], truth[seen])[metric], statistics(spec, best, truth)[metric], seen, 200
    )
    assert found is not None
    expected = reference(truth, best) + reference(truth[seen], own[seen]) - reference(truth[seen], best[seen])
    assert found.value == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "pearson"])
def test_intervals_have_the_score_that_would_have_come_out_as_often_as_they_say(metric: str) -> None:
    rng, inside, count = np.random.default_rng(2), 0, 200
    spec = task(metric, outputs=1 if metric == "pearson" else 2)
    for _ in range(count):
        if metric == "pearson":
            truth = rng.normal(size=400)
            common = rng.normal(size=400)
            best, own = truth + 0.7 * common, truth + 0.9 * common + 0.4 * rng.normal(size=400)
        else:
            truth = rng.integers(0, 2, 400)
            wrong = rng.random(400)
            best = np.where(wrong < 0.9, truth, 1 - truth)
            own = np.where(wrong + 0.1 * rng.normal(size=400) < 0.85, truth, 1 - truth)
        seen = np.sort(rng.permutation(400)[:100])
        rows = statistics(spec, own[seen], truth[seen])[metric]
        found = estimate(spec, metric, rows, statistics(spec, best, truth)[metric], seen, 400)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        outputs = own[:, None] if metric == "pearson" else logits(own)
        inside += found.low <= score(spec, outputs, truth)[metric] <= found.high
    assert 0.90 <= inside / count <= 0.985


def test_all_examples_seen_leave_no_doubt(drawn: tuple[Array, Array, Array]) -> None:
    truth, best, own = drawn
    spec = task("accuracy", "f1")
    all_of_them = np.arange(200)
    found = estimates(spec, all_of_them, statistics(spec, own, truth), statistics(spec, best, truth), np.zeros(200))
    whole = score(spec, logits(own), truth)
    for metric, one in found.items():
        assert (one.low, one.value, one.high) == (pytest.approx(whole[metric]),) * 3


def test_without_a_difference_seen_the_others_may_still_differ() -> None:
    truth = np.arange(200) % 2
    spec, seen = task("accuracy"), np.arange(40)
    rows = statistics(spec, truth, truth)
    found = estimate(spec, "accuracy", rows["accuracy"][seen], rows["accuracy"], seen, 200)
    assert found is not None
    assert found.value == 1
    assert found.low == pytest.approx(1 - 3 / 40 * (1 - 40 / 200))
    assert found.high == 1  # no accuracy is greater


def test_without_a_complete_trial_it_is_the_score_so_far(drawn: tuple[Array, Array, Array]) -> None:
    truth, _, own = drawn
    spec, seen = task("accuracy"), np.arange(30)
    found = estimate(spec, "accuracy", statistics(spec, own[:30], truth[:30])["accuracy"], None, seen, 200)
    assert found is not None
    assert found.value == found.seen == pytest.approx((own[:30] == truth[:30]).mean())
    assert found.best_seen is None


def test_a_single_example_bounds_nothing_and_too_few_give_nothing(drawn: tuple[Array, Array, Array]) -> None:
    truth, best, own = drawn
    spec = task("accuracy")
    one = estimate(
        spec, "accuracy", statistics(spec, own[:1], truth[:1])["accuracy"], statistics(spec, best, truth)["accuracy"],
        np.arange(1), 200,
    )  # fmt: skip
    assert one is not None
    assert (one.low, one.high) == (None, None)
    numbers = task("pearson", outputs=1)
    few = statistics(numbers, own[:1].astype(float), truth[:1].astype(float))["pearson"]
    assert estimate(numbers, "pearson", few, None, np.arange(1), 200) is None


def test_each_split_of_a_task_is_estimated_from_its_own_examples(drawn: tuple[Array, Array, Array]) -> None:
    truth, best, own = drawn
    spec = task("accuracy", splits=("validation_matched", "validation_mismatched"))
    parts, seen = np.arange(200) % 2, np.arange(60)
    found = estimates(spec, seen, statistics(spec, own[:60], truth[:60]), statistics(spec, best, truth), parts)
    assert set(found) == {"accuracy", "accuracy_matched", "accuracy_mismatched"}
    matched = np.arange(0, 200, 2)
    right, rival = own == truth, best == truth
    expected = rival[matched].mean() + right[matched[:30]].mean() - rival[matched[:30]].mean()
    assert found["accuracy_matched"].value == pytest.approx(expected)


def test_a_complete_trials_estimates_are_its_scores() -> None:
    logged = {"select/accuracy": 0.9, "select/rte/f1": 0.8, "select/examples": 200.0, "time/merge_s": 1.0}
    assert estimate_metrics(logged, {}) == {
        "estimate/accuracy": 0.9, "estimate/accuracy_low": 0.9, "estimate/accuracy_high": 0.9,
        "estimate/rte/f1": 0.8, "estimate/rte/f1_low": 0.8, "estimate/rte/f1_high": 0.8,
    }  # fmt: skip
