from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mergelab.errors import DataError
from mergelab.evaluation.bootstrap import bootstrap_interval, chance_level, paired_test
from mergelab.evaluation.metrics import predicted, score
from mergelab.tasks.loading import load_task
from mergelab.tasks.metric import get_metric
from mergelab.tasks.spec import TaskSpec
from tests.tasks.writers import generation_task, language_task

Array = np.ndarray[Any, Any]
BINARY = replace(load_task("mrpc"), metrics=("accuracy", "f1", "matthews_correlation"))
STSB = load_task("stsb")


def outputs(spec: TaskSpec, labels: Array, quality: float, seed: int) -> Array:
    """Draw outputs that tell the label as well as ``quality`` says."""
    noise = np.random.default_rng(seed).normal(size=(len(labels), spec.outputs)).astype(np.float32)
    signal = labels[:, None] if spec.is_regression else np.eye(spec.outputs)[labels]
    return noise + quality * signal


def drawn_labels(spec: TaskSpec, count: int, seed: int = 0) -> Array:
    draw = np.random.default_rng(seed)
    return (
        np.round(draw.uniform(0, 5, size=count), 1) if spec.is_regression else draw.integers(spec.outputs, size=count)
    )


PLAIN: dict[str, tuple[TaskSpec, Callable[[Array, Array], float]]] = {
    "accuracy": (BINARY, lambda truth, said: float((truth == said).mean())),
    "f1": (BINARY, lambda truth, said: float(2 * (truth & said).sum() / (truth.sum() + said.sum()))),
    "matthews_correlation": (BINARY, lambda truth, said: float(np.corrcoef(truth, said)[0, 1])),
    "pearson": (STSB, lambda truth, said: float(np.corrcoef(truth, said)[0, 1])),
    "spearmanr": (
        STSB,
        lambda truth, said: float(np.corrcoef(stats.rankdata(truth), stats.rankdata(said))[0, 1]),
    ),
}


@pytest.mark.parametrize("metric", PLAIN)
def test_intervals_agree_with_scipys_bootstrap(metric: str) -> None:
    spec, plain = PLAIN[metric]
    labels = drawn_labels(spec, 150)
    logits = outputs(spec, labels, 1.0, 1)
    said = predicted(spec, logits)
    expected = stats.bootstrap(
        (labels, said), plain, method="percentile", n_resamples=4000, vectorized=False, paired=True, rng=0
    ).confidence_interval
    low, high = bootstrap_interval(spec, logits, labels, samples=20_000, seed=0)[metric]
    # What 4000 resamples leave of uncertainty in a quantile, and the steps of 1/150 that an accuracy has.
    assert expected.low == pytest.approx(low, abs=0.05 * (high - low))
    assert expected.high == pytest.approx(high, abs=0.05 * (high - low))


@pytest.mark.parametrize("spec", [BINARY, STSB])
def test_an_interval_holds_the_score_narrows_with_examples_and_repeats_with_its_seed(spec: TaskSpec) -> None:
    widths = []
    for count in (100, 1600):
        labels = drawn_labels(spec, count)
        logits = outputs(spec, labels, 1.0, 1)
        bounds = bootstrap_interval(spec, logits, labels, seed=5)
        assert bounds == bootstrap_interval(spec, logits, labels, seed=5)
        assert bounds != bootstrap_interval(spec, logits, labels, seed=6)
        value = score(spec, logits, labels)[spec.primary]
        low, high = bounds[spec.primary]
        assert low < value < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.3)


def test_a_lower_level_gives_a_narrower_interval() -> None:
    labels = drawn_labels(BINARY, 200)
    logits = outputs(BINARY, labels, 1.0, 1)
    wide, narrow = (bootstrap_interval(BINARY, logits, labels, level=level)["f1"] for level in (0.95, 0.5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    truth, covered = 0.7, 0
    draw = np.random.default_rng(0)
    spec = load_task("rte")
    for trial in range(300):
        right = draw.random(200) < truth
        low, high = bootstrap_interval(spec, np.eye(2)[right.astype(int)], np.ones(200, dtype=int), seed=trial)[
            "accuracy"
        ]
        covered += low <= truth <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_every_split_of_a_task_has_its_own_interval() -> None:
    spec = load_task("mnli")
    labels, parts = drawn_labels(spec, 300), np.repeat([0, 1], [100, 200])
    logits = np.concatenate([outputs(spec, labels[:100], 5.0, 0), outputs(spec, labels[100:], 0.5, 1)])
    bounds = bootstrap_interval(spec, logits, labels, parts=parts)
    assert list(bounds) == ["accuracy", "accuracy_matched", "accuracy_mismatched"]
    assert list(bounds) == list(score(spec, logits, labels, parts=parts))
    scores = score(spec, logits, labels, parts=parts)
    for name, (low, high) in bounds.items():
        assert [low <= value <= high for value in scores.values()] == [other == name for other in scores]


def test_perfect_and_constant_answers_have_intervals_without_width() -> None:
    labels = np.array([0, 1] * 20)
    assert bootstrap_interval(BINARY, np.eye(2)[labels], labels)["accuracy"] == (1.0, 1.0)
    constant = bootstrap_interval(STSB, np.full((40, 1), 1.7), drawn_labels(STSB, 40))
    assert constant == {"pearson": (0.0, 0.0), "spearmanr": (0.0, 0.0)}


@pytest.mark.parametrize("spec", [BINARY, load_task("cola"), load_task("mnli"), STSB])
def test_a_model_does_not_differ_from_itself(spec: TaskSpec) -> None:
    labels = drawn_labels(spec, 120)
    logits = outputs(spec, labels, 1.0, 0)
    assert paired_test(spec, logits, logits.copy(), labels) == 1.0


@pytest.mark.parametrize("spec", [BINARY, load_task("cola"), load_task("mnli"), STSB])
def test_a_strong_difference_is_found_in_both_directions(spec: TaskSpec) -> None:
    labels = drawn_labels(spec, 400)
    good, bad = outputs(spec, labels, 3.0, 0), outputs(spec, labels, 0.2, 1)
    p = paired_test(spec, good, bad, labels, samples=2000)
    assert p == pytest.approx(1 / 2001)
    assert paired_test(spec, bad, good, labels, samples=2000) == p


def test_the_test_is_paired() -> None:
    """Five answers mended of 400 differ clearly, though both models' intervals overlap almost wholly."""
    labels = drawn_labels(BINARY, 400)
    said = labels.copy()
    said[:120] = 1 - said[:120]
    better = said.copy()
    better[:10] = labels[:10]
    assert paired_test(BINARY, np.eye(2)[said], np.eye(2)[better], labels) < 0.01


def test_an_accuracy_difference_agrees_with_the_normal_approximation() -> None:
    draw = np.random.default_rng(0)
    a, b = (draw.random(1000) < share for share in (0.74, 0.71))
    labels = np.ones(1000, dtype=int)
    difference = a.astype(float) - b
    z = difference.mean() / (difference.std() / np.sqrt(1000))
    expected = 2 * stats.norm.sf(abs(z))
    p = paired_test(load_task("rte"), np.eye(2)[a.astype(int)], np.eye(2)[b.astype(int)], labels, samples=20_000)
    assert p == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("spec", "trials"), [(load_task("rte"), 300), (STSB, 150)])
def test_p_values_are_about_uniform_where_models_do_not_differ(spec: TaskSpec, trials: int) -> None:
    found = []
    for trial in range(trials):
        labels = drawn_labels(spec, 200, seed=trial)
        a, b = (outputs(spec, labels, 1.0, seed=1000 + 2 * trial + model) for model in (0, 1))
        found.append(paired_test(spec, a, b, labels, samples=500, seed=trial))
    # Ties make an accuracy's p-values somewhat conservative; what matters is that few are small.
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=0.04)
    assert np.mean(np.array(found) < 0.5) == pytest.approx(0.5, abs=0.12)


def test_chance_is_the_best_constant_answer() -> None:
    labels = np.array([0] * 3 + [1] * 7)
    assert chance_level(load_task("rte"), labels) == pytest.approx(0.7)
    assert chance_level(replace(BINARY, primary="f1"), labels) == pytest.approx(2 * 7 / (2 * 7 + 3))
    assert chance_level(load_task("cola"), labels) == 0.0
    assert chance_level(STSB, np.arange(5.0)) == 0.0
    assert chance_level(load_task("mnli"), np.array([0, 1, 2, 2])) == pytest.approx(0.5)


def test_chance_is_the_least_of_constants_where_less_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_metric("accuracy")), "direction", "minimize")
    assert chance_level(load_task("rte"), np.array([0] * 3 + [1] * 7)) == pytest.approx(0.3)


def test_hidden_labels_have_no_statistics() -> None:
    hidden, logits = np.full(3, -1), np.zeros((3, 2))
    with pytest.raises(DataError, match="hidden"):
        bootstrap_interval(load_task("rte"), logits, hidden)
    with pytest.raises(DataError, match="hidden"):
        paired_test(load_task("rte"), logits, logits, hidden)


LANGUAGE = language_task()


def likelihoods(count: int, seed: int, mean: float = 3.0) -> Array:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(5, 40, size=count).astype(np.float64)
    return np.column_stack([draw.normal(mean, 0.4, size=count) * tokens, tokens, np.ceil(tokens / 1.3)])


def test_perplexity_has_an_interval_that_agrees_with_scipys_bootstrap() -> None:
    rows, truth = likelihoods(120, 0), np.zeros(120, dtype=np.int64)
    found = bootstrap_interval(LANGUAGE, rows, truth, samples=4000, seed=1)
    for column, name in ((1, "token_perplexity"), (2, "word_perplexity")):
        expected = stats.bootstrap(
            (rows[:, 0], rows[:, column]), lambda nll, units: np.exp(nll.sum() / units.sum()), method="percentile",
            n_resamples=4000, vectorized=False, paired=True, rng=0,
        ).confidence_interval  # fmt: skip
        low, high = found[name]
        assert expected.low == pytest.approx(low, abs=0.05 * (high - low))
        assert expected.high == pytest.approx(high, abs=0.05 * (high - low))
        assert low < score(LANGUAGE, rows, truth)[name] < high


def test_likelihoods_of_two_models_are_compared_in_pairs() -> None:
    rows, truth = likelihoods(80, 0), np.zeros(80, dtype=np.int64)
    better = rows - np.outer(0.1 * rows[:, 1], [1, 0, 0])  # on every example a little
    assert paired_test(LANGUAGE, rows, better, truth, samples=1000) == pytest.approx(1 / 1001)
    assert paired_test(LANGUAGE, rows, likelihoods(80, 5), truth, samples=1000) > 0.05
    assert paired_test(LANGUAGE, rows, rows.copy(), truth, samples=1000) == 1.0
    assert chance_level(LANGUAGE, truth) is None


def test_generated_texts_have_intervals_and_tests_like_any_other_answers() -> None:
    spec = generation_task(metrics=["exact_match", "rouge1"], primary="rouge1")
    truth = np.empty(60, dtype=object)
    truth[:] = [(f"the judge calls nurse {i}", "kings") for i in range(60)]
    good, bad = truth.copy(), truth.copy()
    good[:] = [texts[0] if i % 3 else "farmers" for i, texts in enumerate(truth)]
    bad[:] = ["the farmers follow"] * 60
    values, bounds = score(spec, good, truth), bootstrap_interval(spec, good, truth, samples=300)
    assert values["exact_match"] == pytest.approx(40 / 60)
    for name, (low, high) in bounds.items():
        assert low < values[name] < high
    assert paired_test(spec, good, bad, truth, samples=300) == pytest.approx(1 / 301)
    assert chance_level(spec, truth) == 0.0


def test_answered_labels_are_at_chance_where_one_word_would_do() -> None:
    words = {"references": [], "labels": ["a", "b"], "verbalizer": ["yes", "no"]}
    spec = generation_task(**words, metrics=["accuracy", "invalid_rate"], primary="accuracy")
    truth = np.empty(10, dtype=object)
    truth[:] = [("yes",)] * 7 + [("no",)] * 3
    assert chance_level(spec, truth) == pytest.approx(0.7)
    said = np.array(["Yes."] * 5 + ["maybe"] * 3 + ["no"] * 2, dtype=object)
    assert score(spec, said, truth) == pytest.approx({"accuracy": 0.7, "invalid_rate": 0.3})


def test_intervals_do_not_depend_on_how_many_resamples_are_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergelab.evaluation import bootstrap

    truth = drawn_labels(BINARY, 60)
    first, second = outputs(BINARY, truth, 1.0, 1), outputs(BINARY, truth, 0.5, 2)
    whole = (
        bootstrap_interval(BINARY, first, truth, samples=500),
        paired_test(BINARY, first, second, truth, samples=500),
    )
    monkeypatch.setattr(bootstrap, "_CHUNK", 100)
    parts = (
        bootstrap_interval(BINARY, first, truth, samples=500),
        paired_test(BINARY, first, second, truth, samples=500),
    )
    assert whole == parts
