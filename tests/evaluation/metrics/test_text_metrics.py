from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import sacrebleu
from rouge_score import rouge_scorer
from scipy import stats
from sklearn import metrics

from mergelab.errors import DataError
from mergelab.evaluation.metrics import example_statistics, score
from mergelab.tasks.metric import get_metric
from tests.tasks.writers import generation_task

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


def value(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    return get_metric(name).score(predictions, references)


def answered(names: Sequence[str], predictions: Sequence[str], true: Sequence[str], **task: Any) -> dict[str, float]:
    """Score generated texts against one true answer each; with ``labels`` the answers are these."""
    references = {"references": []} if "labels" in task else {}
    spec = generation_task(metrics=list(names), primary=names[0], **references, **task)
    truth = np.empty(len(true), dtype=object)
    truth[:] = [(text,) for text in true]
    return score(spec, np.array(predictions, dtype=object), truth)


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
    rows = get_metric(name).statistics(PREDICTIONS, REFERENCES)
    expected = expected_rouge(PREDICTIONS, REFERENCES)[name]
    assert rows[:, 0].tolist() == expected
    assert get_metric(name).from_statistics(rows) == pytest.approx(np.mean(expected))


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


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_a_metric_of_a_corpus_is_no_mean_of_its_sentences_scores(name: str) -> None:
    metric = get_metric(name)
    rows = metric.statistics(PREDICTIONS, REFERENCES)
    assert abs(np.mean([metric.from_statistics(row[None]) for row in rows]) - metric.from_statistics(rows)) > 0.01


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
    assert get_metric("exact_match").statistics(said, true).tolist() == [[1], [0], [1], [0]]
    assert value("exact_match", said, true) == 0.5
    assert value("invalid_rate", said, true) == 0.25
    assert value("invalid_rate", ["a", "b"], [["a"], ["a"]]) == 0.0


def test_class_metrics_are_scikit_learns_with_invalid_answers_as_a_class_of_their_own() -> None:
    draw = np.random.default_rng(0)
    labels, true, said = ["no", "yes"], draw.integers(2, size=200), draw.integers(-1, 2, size=200)
    said = np.where(draw.random(200) < 0.5, true, said)
    assert (said == -1).any()
    answers = ["perhaps" if i < 0 else labels[i] for i in said]
    references = [labels[i] for i in true]
    names = ["accuracy", "f1", "matthews_correlation"]
    found = answered(names, answers, references, labels=labels)
    expected = {
        "accuracy": metrics.accuracy_score(true, said),
        "f1": metrics.f1_score(true == 1, said == 1),
        "matthews_correlation": metrics.matthews_corrcoef(true, said),
    }
    assert found == pytest.approx(expected)
    # An invalid answer is not the same as "no".
    as_no = answered(names, [said.replace("perhaps", "no") for said in answers], references, labels=labels)
    assert abs(as_no["matthews_correlation"] - expected["matthews_correlation"]) > 0.001


def test_f1_is_of_the_second_label() -> None:
    labels, true = ["no", "yes"], ["no", "no", "yes"]
    assert answered(["f1"], ["no", "no", "no"], true, labels=labels) == {"f1": 0.0}
    assert answered(["f1"], ["yes", "no", "yes"], true, labels=labels) == {"f1": pytest.approx(2 / 3)}
    assert answered(["f1"], ["no", "no"], true[:2], labels=labels) == {"f1": 0.0}


@pytest.mark.filterwarnings("error")
def test_scores_are_correlated_and_an_invalid_one_is_minus_one() -> None:
    said, true = ["3.2", "none", "4", "0.0", "-2"], ["3.0", "2.0", "4.4", "0.2", "1.0"]
    numbers = [3.2, -1.0, 4.0, 0.0, -2.0], [3.0, 2.0, 4.4, 0.2, 1.0]
    names = ["pearson", "spearmanr"]
    assert answered(names, said, true, answer="score") == pytest.approx(
        {"pearson": stats.pearsonr(*numbers)[0], "spearmanr": stats.spearmanr(*numbers)[0]}
    )
    for constant in ("1.0", "none"):
        assert answered(names, [constant] * 5, true, answer="score") == dict.fromkeys(names, 0.0)


def test_a_missing_or_unknown_reference_is_named() -> None:
    spec = generation_task(metrics=["rouge1"], primary="rouge1")
    said, true = np.array(["a", "b"], dtype=object), np.empty(2, dtype=object)
    true[:] = [("a",), ()]
    with pytest.raises(DataError, match=r"sums: 1 examples have no reference \(the first is number 1\)"):
        example_statistics(spec, said, true)
    with pytest.raises(DataError, match="sums: 2 predictions do not fit 1 examples' references"):
        example_statistics(spec, said, true[:1])
    with pytest.raises(
        DataError, match=r"accuracy: the reference 'maybe' is none of the labels' words \['no', 'yes'\]"
    ):
        answered(["accuracy"], ["no"], ["maybe"], labels=["no", "yes"])


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
