from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from mergelab.errors import DataError
from mergelab.evaluation.metrics import score
from mergelab.evaluation.metrics.spearmanr import mean_ranks
from mergelab.tasks.loading import load_task
from mergelab.tasks.metric import get_metric
from mergelab.tasks.spec import TaskSpec


def one_hot(predictions: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[predictions]


def binary() -> TaskSpec:
    return replace(load_task("mrpc"), metrics=("accuracy", "f1", "matthews_correlation"))


def test_class_metrics_are_what_is_computed_by_hand() -> None:
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    predictions = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    labels = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    found = score(binary(), one_hot(predictions, 2), labels)
    assert found["accuracy"] == pytest.approx(7 / 10)
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert found["matthews_correlation"] == pytest.approx((3 * 4 - 1 * 2) / np.sqrt(4 * 5 * 5 * 6))


def test_class_metrics_are_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    labels, logits = draw.integers(2, size=400), draw.normal(size=(400, 2)).astype(np.float32)
    said = logits.argmax(axis=1)
    assert score(binary(), logits, labels) == pytest.approx(
        {
            "accuracy": metrics.accuracy_score(labels, said),
            "f1": metrics.f1_score(labels, said),
            "matthews_correlation": metrics.matthews_corrcoef(labels, said),
        }
    )


def test_f1_is_of_the_second_label() -> None:
    found = score(load_task("qqp"), one_hot([1, 1, 0], 2), np.array([1, 1, 1]))
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1))
    assert score(load_task("qqp"), one_hot([0, 0], 2), np.array([0, 0]))["f1"] == 0.0


def test_a_constant_answer_has_no_matthews_correlation() -> None:
    assert score(load_task("cola"), one_hot([1, 1, 1], 2), np.array([0, 1, 1])) == {"matthews_correlation": 0.0}


def test_matthews_correlation_is_defined_for_three_classes() -> None:
    draw = np.random.default_rng(1)
    labels, logits = draw.integers(3, size=300), draw.normal(size=(300, 3)).astype(np.float32)
    found = score(load_task("ax"), logits, labels)
    assert found["matthews_correlation"] == pytest.approx(metrics.matthews_corrcoef(labels, logits.argmax(axis=1)))


def test_correlations_are_what_is_computed_by_hand_and_scipys(stsb: TaskSpec) -> None:
    logits, labels = np.array([[1.0], [2.0], [3.0], [10.0]]), np.array([1.0, 3.0, 2.0, 4.0], dtype=np.float32)
    found = score(stsb, logits, labels)
    # deviations of x: -3 -2 -1 6 (squares 50), of y: -1.5 .5 -.5 1.5 (squares 5), products 4.5 - 1 + .5 + 9 = 13
    assert found["pearson"] == pytest.approx(13 / np.sqrt(50 * 5))
    # ranks differ by 0 1 1 0
    assert found["spearmanr"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(200, 1)), np.round(draw.uniform(0, 5, size=200), 1)
    expected = {"pearson": stats.pearsonr(x[:, 0], y)[0], "spearmanr": stats.spearmanr(x[:, 0], y)[0]}
    assert score(stsb, x, y) == pytest.approx(expected)


@pytest.mark.filterwarnings("error")
def test_a_constant_answer_has_no_correlation(stsb: TaskSpec) -> None:
    assert score(stsb, np.full((5, 1), 2.3), np.arange(5.0)) == {"pearson": 0.0, "spearmanr": 0.0}


def test_several_splits_are_scored_together_and_each_on_its_own() -> None:
    labels, parts = np.array([0, 1, 2, 0, 1]), np.array([0, 0, 1, 1, 1])
    found = score(load_task("mnli"), one_hot([0, 2, 2, 0, 0], 3), labels, parts=parts)
    assert found == pytest.approx({"accuracy": 3 / 5, "accuracy_matched": 1 / 2, "accuracy_mismatched": 2 / 3})


def test_one_split_is_scored_under_the_plain_name() -> None:
    spec = replace(load_task("mnli"), splits=("validation_matched",))
    found = score(spec, one_hot([0, 1], 3), np.array([0, 2]), parts=np.zeros(2, dtype=int))
    assert found == {"accuracy": 0.5}


@pytest.mark.parametrize("task", ["ax", "stsb"])
def test_hidden_labels_cannot_be_scored(task: str) -> None:
    spec = load_task(task)
    labels = np.full(3, -1) if spec.labels else np.full(3, np.nan, dtype=np.float32)
    with pytest.raises(DataError, match=f"{task}: the labels of this split are hidden"):
        score(spec, np.zeros((3, spec.outputs)), labels)


@pytest.mark.parametrize("shape", [(3, 2), (4, 3), (4,)])
def test_outputs_that_do_not_fit_the_task_are_an_error(rte: TaskSpec, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="do not fit 4 examples × 2"):
        score(rte, np.zeros(shape), np.zeros(4, dtype=int))


def test_too_few_examples_are_an_error(rte: TaskSpec, stsb: TaskSpec) -> None:
    with pytest.raises(DataError, match="1 examples are too few"):
        score(stsb, np.zeros((1, 1)), np.zeros(1))
    with pytest.raises(DataError, match="0 examples are too few"):
        score(rte, np.zeros((0, 2)), np.zeros(0, dtype=int))


def test_too_few_examples_of_one_split_are_an_error(stsb: TaskSpec) -> None:
    spec = replace(stsb, splits=("one", "two"))
    with pytest.raises(DataError, match="stsb: 1 examples are too few to score; pearson needs 2"):
        score(spec, np.arange(4.0)[:, None], np.arange(4.0), parts=np.array([0, 0, 0, 1]))


def test_ties_and_repeats_share_their_mean_rank() -> None:
    values, rows = np.array([3.0, 1.0, 3.0, 2.0]), [0, 0, 2, 3, 3, 1]
    ranks = mean_ranks(values, np.bincount(rows, minlength=4)[None].astype(float))[0]
    np.testing.assert_allclose(ranks[rows], stats.rankdata(values[rows]))


def test_a_metric_of_classes_takes_a_class_that_no_reference_has() -> None:
    said, true = np.array([-1, 0, 1, 1, -1]), np.array([0, 0, 1, 0, 1])
    found = {name: get_metric(name).score(said, true) for name in ("accuracy", "f1", "matthews_correlation")}
    assert found == pytest.approx({"accuracy": 2 / 5, "f1": 2 / 4, "matthews_correlation": 3 / np.sqrt(16 * 12)})
