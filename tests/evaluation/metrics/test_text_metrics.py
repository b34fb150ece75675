from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import sacrebleu
from rouge_score import rouge_scorer
from scipy import stats
from sklearn import metrics

from mergelab.errors import DataError
from mergelab.evaluation.metrics.text import from_statistics, statistics, text_metric
from mergelab.tasks.metric_table import TEXT_METRICS

ROUGE = ["rouge1", "rouge2", "rougeL", "rougeLsum"]

PREDICTIONS = [
    "The quick brown foxes were jumping over a lazy dog.",
    "A cat sat on the mat.\nIt purred.",
    "",
    "...",
    "On the mat, a cat was sitting and it was purring .",
    "Olivia bought five bagels",
    "naïve café",
]
REFERENCES = [
    ["The quick brown fox jumped over the lazy dog."],
    ["The cat sat on the mat.\nIt was purring.", "There is a cat, sitting on a mat."],
    ["An empty prediction must not be an error."],
    ["Nor one without a word.", "Never."],
    ["A cat sat on the mat, purring.", "The cat purrs.", "A purring cat sat there on its mat."],
    ["Olivia bought five bagels for three dollars each and has eight left"],
    ["A naïve café owner"],
]


def value(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], **more: Sequence[str]) -> float:
    return from_statistics(name, statistics(name, predictions, references, **more))


def streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References as sacrebleu takes them: the first of each example, the second of each, ..."""
    most = max(map(len, references))
    return [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]


def expected_rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    scorer = rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)
    scores = [scorer.score_multi(texts, said) for said, texts in zip(predictions, references, strict=True)]
    return {name: [score[name].fmeasure for score in scores] for name in ROUGE}


@pytest.mark.parametrize("name", ROUGE)
def test_a_rouge_row_is_the_examples_f1_against_its_best_reference(name: str) -> None:
    rows = statistics(name, PREDICTIONS, REFERENCES)
    expected = expected_rouge(PREDICTIONS, REFERENCES)[name]
    assert rows[:, 0].tolist() == expected
    assert from_statistics(name, rows) == pytest.approx(np.mean(expected))


def test_rouge_is_what_is_computed_by_hand() -> None:
    # "cats" and "cat" have one stem. Words: 2 of 3 said, 2 of 4 true; pairs: none of 2 and 3.
    found = {name: value(name, ["cats the mat"], [["the cat sat there"]]) for name in ("rouge1", "rouge2", "rougeL")}
    assert found == pytest.approx({"rouge1": 2 * 2 / (3 + 4), "rouge2": 0.0, "rougeL": 2 * 1 / (3 + 4)})


def test_rouge_lsum_takes_lines_for_sentences() -> None:
    said, true = "b b b\na a a", "a a a\nb b b"
    assert value("rougeL", [said], [[true]]) == pytest.approx(0.5)
    assert value("rougeLsum", [said], [[true]]) == pytest.approx(1.0)
    assert value("rougeLsum", [said.replace("\n", " ")], [[true.replace("\n", " ")]]) == pytest.approx(0.5)


def test_bleu_and_chrf_are_sacrebleus_for_the_corpus_with_any_number_of_references() -> None:
    said, true = PREDICTIONS, streams(REFERENCES)
    assert value("bleu", said, REFERENCES) == pytest.approx(sacrebleu.corpus_bleu(said, true).score / 100, abs=1e-12)
    assert value("chrf", said, REFERENCES) == pytest.approx(sacrebleu.corpus_chrf(said, true).score / 100, abs=1e-12)
    assert value("bleu", said, REFERENCES) > 0.1


def test_texts_that_are_too_short_for_bleu_score_as_sacrebleu_says() -> None:
    said, true = ["a cat", "a dog"], [["a cat"], ["a dog"]]
    assert value("bleu", said, true) == sacrebleu.corpus_bleu(said, streams(true)).score / 100 == 0.0
    assert value("chrf", said, true) == pytest.approx(1.0)


def test_bleu_is_what_is_computed_by_hand() -> None:
    found = value("bleu", ["the cat sat on mats"], [["the cat slept and sat on"]])
    # Matched: the, cat, sat, on; "the cat", "sat on"; no longer ones, taken for a half and a quarter of a match.
    precisions = [4 / 5, 2 / 4, 1 / (2 * 3), 1 / (4 * 2)]
    assert found == pytest.approx(np.exp(1 - 6 / 5) * np.prod(precisions) ** 0.25)


@pytest.mark.parametrize("name", ["bleu", "chrf", *ROUGE])
def test_a_resamples_metric_is_that_of_its_texts(name: str) -> None:
    rows = statistics(name, PREDICTIONS, REFERENCES)
    drawn = np.random.default_rng(0).integers(len(PREDICTIONS), size=20)
    texts, references = [PREDICTIONS[i] for i in drawn], [REFERENCES[i] for i in drawn]
    assert from_statistics(name, rows[drawn]) == pytest.approx(value(name, texts, references), abs=1e-12)
    # No mean of sentences' scores would be that.
    if name in ("bleu", "chrf"):
        means = np.mean([from_statistics(name, row[None]) for row in rows[drawn]])
        assert abs(means - from_statistics(name, rows[drawn])) > 0.01


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf"])
@pytest.mark.parametrize("said", ["", " \n", "...", "\x00", "🙂"])
def test_a_prediction_without_words_scores_zero(name: str, said: str) -> None:
    assert value(name, [said, said], [["Some words here"], ["And some there", "Or elsewhere"]]) == 0.0


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf"])
def test_a_reference_itself_scores_one(name: str) -> None:
    chosen = [texts for texts in REFERENCES if len(texts[-1].split()) > 3]
    assert value(name, [texts[-1] for texts in chosen], chosen) == pytest.approx(1.0)


# -------------------------------------------------------------------------------------------------------------- answers


def test_an_answer_must_be_one_of_its_references() -> None:
    said, true = ["18", "", "3", "4"], [["18"], [""], ["5", "3"], ["4.5"]]
    assert statistics("exact_match", said, true).tolist() == [[1], [0], [1], [0]]
    assert value("exact_match", said, true) == 0.5
    assert value("invalid_rate", said, true) == 0.25
    assert value("invalid_rate", ["a", "b"], [["a"], ["a"]]) == 0.0


def test_class_metrics_are_scikit_learns_with_invalid_answers_as_a_class_of_their_own() -> None:
    draw = np.random.default_rng(0)
    labels, true, said = ["no", "yes"], draw.integers(2, size=200), draw.integers(-1, 2, size=200)
    said = np.where(draw.random(200) < 0.5, true, said)
    assert (said == -1).any()
    answers = ["" if i < 0 else labels[i] for i in said]
    references = [[labels[i]] for i in true]
    found = {
        name: value(name, answers, references, labels=labels) for name in ("accuracy", "f1", "matthews_correlation")
    }
    expected = {
        "accuracy": metrics.accuracy_score(true, said),
        "f1": metrics.f1_score(true == 1, said == 1),
        "matthews_correlation": metrics.matthews_corrcoef(true, said),
    }
    assert found == pytest.approx(expected)
    # An invalid answer is never better than a wrong one is for accuracy, and not the same as "no" for Matthews.
    as_no = value("matthews_correlation", [said or "no" for said in answers], references, labels=labels)
    assert abs(as_no - expected["matthews_correlation"]) > 0.001


def test_f1_is_of_the_second_label() -> None:
    true = [["no"], ["no"], ["yes"]]
    assert value("f1", ["no", "no", "no"], true, labels=["no", "yes"]) == 0.0
    assert value("f1", ["yes", "no", "yes"], true, labels=["no", "yes"]) == pytest.approx(2 / 3)
    assert value("f1", ["no", "no"], true[:2], labels=["no", "yes"]) == 0.0


@pytest.mark.filterwarnings("error")
def test_scores_are_correlated_and_an_invalid_one_is_minus_one() -> None:
    said, true = ["3.2", "", "4", "0.0", "-2"], [["3.0"], ["2.0"], ["4.4"], ["0.2"], ["1.0"]]
    numbers = [3.2, -1.0, 4.0, 0.0, -2.0], [3.0, 2.0, 4.4, 0.2, 1.0]
    assert value("pearson", said, true) == pytest.approx(stats.pearsonr(*numbers)[0])
    assert value("spearmanr", said, true) == pytest.approx(stats.spearmanr(*numbers)[0])
    assert value("pearson", ["1.0"] * 5, true) == value("spearmanr", [""] * 5, true) == 0.0


# ---------------------------------------------------------------------------------------------------- what all have


ANSWERS = ["1.0", "2.5", "0.0"]
TEXTS = ["a cat sat on a mat", "and a dog sat there too", "but no mouse sat anywhere"]
SCORED = {name: TEXTS if name in (*ROUGE, "bleu", "chrf") else ANSWERS for name in TEXT_METRICS}


@pytest.mark.parametrize("name", sorted(TEXT_METRICS))
def test_every_text_metric_is_an_evaluate_module_that_computes_what_its_statistics_say(name: str) -> None:
    import evaluate

    entry = TEXT_METRICS[name]
    cls = getattr(importlib.import_module(entry.module), entry.cls)
    assert issubclass(cls, evaluate.Metric)
    assert cls.__module__.startswith("mergelab.")
    more = {"labels": ANSWERS} if entry.needs_labels else {}
    said, true = SCORED[name], [[text] for text in SCORED[name]]
    found = text_metric(name).compute(predictions=said, references=true, **more)
    assert found == {name: value(name, said, true, **more)}
    assert found[name] == pytest.approx({"maximize": 1.0, "minimize": 0.0}[entry.direction])
    assert text_metric(name).description
    assert text_metric(name).citation


@pytest.mark.parametrize("name", sorted(TEXT_METRICS))
def test_rows_are_as_wide_for_one_example_as_for_many(name: str) -> None:
    said, true = SCORED[name], [[text] for text in SCORED[name]]
    more = {"labels": ANSWERS} if TEXT_METRICS[name].needs_labels else {}
    many, one = statistics(name, said, true, **more), statistics(name, said[:1], true[:1], **more)
    assert many.dtype == np.float64
    assert (len(many), one.shape) == (3, (1, many.shape[1]))
    np.testing.assert_array_equal(many[:1], one)


def test_a_missing_reference_is_named() -> None:
    with pytest.raises(DataError, match=r"rouge1: 1 examples have no reference \(the first is number 1\)"):
        statistics("rouge1", ["a", "b"], [["a"], []])
    with pytest.raises(DataError, match="bleu: 2 predictions do not fit 1 examples' references"):
        statistics("bleu", ["a", "b"], [["a"]])
    for name in ("accuracy", "f1", "matthews_correlation"):
        with pytest.raises(DataError, match=f"{name}: needs the words that stand for the labels"):
            statistics(name, ["a"], [["a"]])


@pytest.mark.parametrize("name", sorted(TEXT_METRICS))
def test_too_few_examples_cannot_be_scored(name: str) -> None:
    said, labels = (["1.0"], ["1.0"]) if name in ("pearson", "spearmanr") else ([], ["1.0"])
    with pytest.raises(DataError, match=f"{name}: {len(said)} examples are too few to score"):
        value(name, said, [[text] for text in said], labels=labels)


# ------------------------------------------------------------------------------------------------------------ real rows


@pytest.mark.real_data
def test_summaries_of_dialogsum_score_as_rouge_score_says(generation_data: Path) -> None:
    rows = pq.read_table(generation_data / "dialogsum" / "test.parquet").slice(0, 120).to_pylist()
    references = [[rows[i + j]["summary"] for j in (1, 2)] for i in range(0, 120, 3)]
    predictions = [rows[i]["summary"] for i in range(0, 120, 3)]
    expected = expected_rouge(predictions, references)
    for name in ROUGE:
        assert value(name, predictions, references) == pytest.approx(np.mean(expected[name]))
    assert 0.3 < value("rouge1", predictions, references) < 0.8


@pytest.mark.real_data
def test_sentences_of_e2e_score_as_sacrebleu_says(generation_data: Path) -> None:
    rows = pq.read_table(generation_data / "e2e_nlg" / "validation.parquet").slice(0, 600).to_pylist()
    grouped: dict[str, list[str]] = {}
    for row in rows:
        grouped.setdefault(row["meaning_representation"], []).append(row["human_reference"])
    texts = [group for group in grouped.values() if len(group) > 1]
    predictions, references = [group[0] for group in texts], [group[1:] for group in texts]
    assert len({len(group) for group in references}) > 1, "examples must have different numbers of references"
    true = streams(references)
    assert value("bleu", predictions, references) == sacrebleu.corpus_bleu(predictions, true).score / 100
    assert value("chrf", predictions, references) == sacrebleu.corpus_chrf(predictions, true).score / 100
    assert value("bleu", predictions, references) > 0.2
