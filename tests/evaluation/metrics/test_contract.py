"""What holds for every metric; a metric is tested here from when its file exists."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer
from scipy import stats
from sklearn import metrics as sklearn_metrics

from mergelab.errors import DataError
from mergelab.evaluation.bootstrap import bootstrap_interval, chance_level, paired_test
from mergelab.evaluation.metrics import example_statistics, score, value_of_rows
from mergelab.sweep.objective import objectives
from mergelab.tasks.metric import BEST_CONSTANT, PairMetric, ScoreMetric, TextMetric, get_metric, metric_names
from tests.evaluation.metrics.cases import Array, Case, Examples, cases, drawn_examples, edge_examples, examples

CASES = cases()
every_case = pytest.mark.parametrize("case", CASES, ids=str)


# ------------------------------------------------------------------------------------------------ one number throughout


@every_case
def test_the_score_is_the_same_from_examples_from_statistics_and_from_counts(case: Case) -> None:
    metric, spec = get_metric(case.name), case.spec
    for tag, given in {**edge_examples(case), "drawn": drawn_examples(case, 200)}.items():
        plain = metric.score(given.predictions, given.references)
        rows = example_statistics(spec, given.outputs, given.truth)[case.name]
        found = {
            "score": score(spec, given.outputs, given.truth)[case.name],
            "statistics": value_of_rows(spec, case.name, rows),
        }
        if isinstance(metric, PairMetric):
            found["counts"] = float(metric.from_counts(rows, np.ones((1, len(rows))))[0])
            distinct, counts = np.unique(rows, axis=0, return_counts=True)
            found["distinct"] = float(metric.from_counts(distinct, counts[None].astype(np.float64))[0])
        assert found == pytest.approx(dict.fromkeys(found, plain), abs=1e-12), tag


@every_case
def test_an_example_has_a_row_that_does_not_depend_on_the_others(case: Case) -> None:
    given = drawn_examples(case, 12)
    whole = example_statistics(case.spec, given.outputs, given.truth)[case.name]
    assert (whole.shape[0], whole.dtype) == (12, np.float64)
    for i in range(12):
        row = example_statistics(case.spec, given.outputs[i : i + 1], given.truth[i : i + 1])[case.name]
        np.testing.assert_array_equal(row, whole[i : i + 1])


# ----------------------------------------------------------------------------------------- equal to other people's code


def _defined(value: float) -> float:
    return 0.0 if math.isnan(value) else float(value)


def _rouge(variant: str) -> Callable[[Any, Any], float]:
    scorer = rouge_scorer.RougeScorer([variant], use_stemmer=True)
    return lambda said, true: float(
        np.mean([scorer.score_multi(texts, text)[variant].fmeasure for text, texts in zip(said, true, strict=True)])
    )


def _streams(true: Any) -> list[list[str | None]]:
    return [[texts[i] if i < len(texts) else None for texts in true] for i in range(max(map(len, true)))]


def _perplexity(column: int) -> Callable[[Any, Any], float]:
    def value(said: Any, _: Any) -> float:
        units = math.fsum(said[:, column])
        return math.exp(min(math.fsum(said[:, 0]) / units, 700)) if units else math.inf

    return value


OTHERS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": lambda said, true: sklearn_metrics.accuracy_score(true, said),
    "f1": lambda said, true: sklearn_metrics.f1_score(true, said, labels=[1], average="macro", zero_division=0),
    "matthews_correlation": lambda said, true: sklearn_metrics.matthews_corrcoef(true, said),
    "pearson": lambda said, true: _defined(stats.pearsonr(said, true).statistic),
    "spearmanr": lambda said, true: _defined(stats.spearmanr(said, true).statistic),
    "exact_match": lambda said, true: float(np.mean([s != "" and s in t for s, t in zip(said, true, strict=True)])),
    "invalid_rate": lambda said, true: said.count("") / len(said),
    "bleu": lambda said, true: sacrebleu.corpus_bleu(said, _streams(true), force=True).score / 100,
    "chrf": lambda said, true: sacrebleu.corpus_chrf(said, _streams(true)).score / 100,
    "token_perplexity": _perplexity(1),
    "word_perplexity": _perplexity(2),
    **{variant: _rouge(variant) for variant in ("rouge1", "rouge2", "rougeL", "rougeLsum")},
}


@pytest.mark.filterwarnings("ignore:An input array is constant")
@every_case
def test_the_score_is_that_of_an_independent_implementation(case: Case) -> None:
    if case.name not in OTHERS:
        pytest.skip(f"no independent implementation of {case.name} is named here yet")
    random = {f"drawn {seed}": drawn_examples(case, 150, seed=seed) for seed in range(3)}
    for tag, given in {**edge_examples(case), **random}.items():
        expected = OTHERS[case.name](given.predictions, given.references)
        found = score(case.spec, given.outputs, given.truth)[case.name]
        assert found == pytest.approx(expected, abs=1e-12), tag


# ----------------------------------------------------------------------------------------------------------- resampling


def resamples(case: Case, given: Examples, samples: int, seed: int) -> Iterator[tuple[Any, Any]]:
    """Yield the predictions and references of the resamples that `bootstrap_interval` draws, example by example."""
    random, size = np.random.default_rng([seed, 0]), len(given.truth)
    if case.kind != "classification":
        for _ in range(samples):
            yield given.drawn(random.integers(size, size=size))
        return
    cells = given.predictions * case.labels + given.references
    frequency = np.bincount(cells, minlength=case.labels**2) / size
    for counts in random.multinomial(size, frequency, size=samples):
        drawn = np.repeat(np.arange(case.labels**2), counts)
        yield drawn // case.labels, drawn % case.labels


@every_case
def test_the_bootstrap_is_that_of_plain_scores_of_resampled_examples(case: Case) -> None:
    metric, samples = get_metric(case.name), 40
    # Of few examples, some resamples have one class, one score or one text only.
    for size in (max(3, metric.min_examples), 60):
        given = drawn_examples(case, size, seed=1)
        plain = [metric.score(*drawn) for drawn in resamples(case, given, samples, seed=7)]
        for level in (0.95, 0.5):
            tail = (1 - level) / 2
            found = bootstrap_interval(
                case.spec, given.outputs, given.truth, samples=samples, seed=7, level=level
            )[case.name]  # fmt: skip
            assert found == pytest.approx(tuple(np.quantile(plain, [tail, 1 - tail])), abs=1e-12)


@every_case
def test_the_value_lies_in_its_own_interval(case: Case) -> None:
    perfect = drawn_examples(case, 40, errors=0.0)
    for given in (drawn_examples(case, 80), drawn_examples(case, 80, errors=0.8), perfect):
        value = score(case.spec, given.outputs, given.truth)[case.name]
        low, high = bootstrap_interval(case.spec, given.outputs, given.truth, samples=200)[case.name]
        assert low - 1e-12 <= value <= high + 1e-12
        if given is not perfect:
            assert low < high


@every_case
def test_the_paired_test_tells_models_apart_by_this_metric(case: Case) -> None:
    good, bad = drawn_examples(case, 150, errors=0.05), drawn_examples(case, 150, errors=0.9)
    np.testing.assert_array_equal(good.truth, bad.truth)
    for first, second, p in ((good, bad, 1 / 101), (bad, good, 1 / 101), (good, good, 1.0)):
        assert paired_test(case.spec, first.outputs, second.outputs, good.truth, samples=100) == pytest.approx(p)


# ------------------------------------------------------------------------------------------ direction, chance, examples


@every_case
def test_a_better_model_moves_it_in_its_direction(case: Case) -> None:
    values = [
        score(case.spec, given.outputs, given.truth)[case.name]
        for given in (drawn_examples(case, 400, errors=share) for share in (0.9, 0.6, 0.3, 0.0))
    ]
    direction = get_metric(case.name).direction
    assert values == sorted(values, reverse=direction == "minimize")
    assert len(set(values)) == 4
    assert case.spec.direction == direction
    (objective,) = objectives(None, None, [case.spec])
    assert (objective.metric, objective.direction) == (case.name, direction)


@every_case
def test_the_chance_level_is_what_a_constant_answer_gets(case: Case) -> None:
    metric, given = get_metric(case.name), drawn_examples(case, 50)
    found = chance_level(case.spec, given.truth)
    if metric.chance is None:
        assert found is None
        return
    answers = constant_answers(case, given.references)
    values = [score(case.spec, same.outputs, same.truth)[case.name] for same in answers]
    if metric.chance == BEST_CONSTANT:
        assert found == pytest.approx((max if metric.direction == "maximize" else min)(values), abs=1e-12)
    else:
        assert values == pytest.approx([metric.chance] * len(values), abs=1e-12)
        assert found == metric.chance


def constant_answers(case: Case, references: Any) -> list[Examples]:
    """Make the examples of models that always answer the same."""
    metric, size = get_metric(case.name), len(references)
    if isinstance(metric, ScoreMetric):
        return [examples(case, np.full(size, value), references) for value in (0.0, 2.3, 5.0)]
    if isinstance(metric, TextMetric):
        texts = [f"l{i}" for i in range(case.labels)] or [""]
        return [examples(case, [text] * size, references) for text in texts]
    return [examples(case, np.full(size, label), references) for label in range(case.labels)]


@every_case
def test_it_has_a_score_from_its_least_number_of_examples_on(case: Case) -> None:
    least = get_metric(case.name).min_examples
    given = drawn_examples(case, least)
    assert not math.isnan(score(case.spec, given.outputs, given.truth)[case.name])
    outputs, truth = given.outputs[: least - 1], given.truth[: least - 1]
    for compute in (score, bootstrap_interval):
        with pytest.raises(DataError, match=rf"{least - 1} examples are too few to score; {case.name} needs {least}"):
            compute(case.spec, outputs, truth)
    with pytest.raises(DataError, match="too few"):
        value_of_rows(case.spec, case.name, example_statistics(case.spec, outputs, truth)[case.name])


# --------------------------------------------------------------------------------------------------------- declarations


def test_every_kind_of_task_and_answer_has_metrics() -> None:
    assert {(case.kind, case.answer) for case in CASES} == {
        ("classification", None), ("regression", None), ("language_modelling", None), ("generation", "text"),
        ("generation", "number"), ("generation", "label"), ("generation", "score"),
    }  # fmt: skip
    assert {case.name for case in CASES} == set(metric_names())


@pytest.mark.parametrize("case", [case for case in CASES if case.kind != "language_modelling"], ids=str)
def test_it_is_a_module_of_evaluate(case: Case) -> None:
    import evaluate

    from mergelab.evaluation.evaluate_module import EvaluateModule

    metric, given = get_metric(case.name), drawn_examples(case, 20)
    module = EvaluateModule(metric, keep_in_memory=True)
    assert isinstance(module, evaluate.Metric)
    assert (module.description, module.citation) == (type(metric).__doc__, metric.citation)
    found = module.compute(predictions=given.predictions, references=given.references)
    assert found == {case.name: pytest.approx(metric.score(given.predictions, given.references), abs=1e-12)}


def test_statistics_of_texts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == "rougeL")
    given, looked = drawn_examples(case, 9, seed=99), []
    metric = get_metric("rougeL")
    plain = type(metric).statistics

    def statistics(self: Any, predictions: Any, references: Any) -> Array:
        looked.append(len(predictions))
        return plain(self, predictions, references)

    monkeypatch.setattr(type(metric), "statistics", statistics)
    score(case.spec, given.outputs, given.truth)
    bootstrap_interval(case.spec, given.outputs, given.truth, samples=10)
    assert looked == [9]
