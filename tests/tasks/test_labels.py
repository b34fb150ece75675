from __future__ import annotations

import pytest

from mergelab.errors import DataError
from mergelab.tasks.labels import label_order
from mergelab.tasks.loading import load_task


def order(task: str, *names: str, override: list[str] | None = None) -> tuple[int, ...]:
    return label_order(load_task(task), dict(enumerate(names)), model="org/model", override=override)


@pytest.mark.parametrize(
    ("task", "names", "expected"),
    [
        ("rte", ("entailment", "not_entailment"), (0, 1)),
        ("rte", ("not_entailment", "entailment"), (1, 0)),
        ("rte", ("NOT ENTAILMENT", "Entailment"), (1, 0)),
        ("rte", ("not entailment", "entailment"), (1, 0)),
        ("rte", ("Not-Entailment", "ENTAILMENT"), (1, 0)),
        ("rte", ("notEntailment", "entails"), (1, 0)),
        ("qnli", ("not_entailment", "entailment"), (1, 0)),
        ("wnli", ("entailment", "not_entailment"), (1, 0)),
        ("sst2", ("NEGATIVE", "POSITIVE"), (0, 1)),
        ("sst2", ("pos", "neg"), (1, 0)),
        ("mrpc", ("equivalent", "not_equivalent"), (1, 0)),
        ("qqp", ("duplicate", "not duplicate"), (1, 0)),
        ("cola", ("acceptable", "unacceptable"), (1, 0)),
        ("mnli", ("contradiction", "entailment", "neutral"), (1, 2, 0)),
        ("mnli", ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), (2, 1, 0)),
    ],
)
def test_a_models_names_are_found_in_any_order_case_and_spelling(
    task: str, names: tuple[str, ...], expected: tuple[int, ...]
) -> None:
    assert order(task, *names) == expected


@pytest.mark.parametrize("names", [("LABEL_0", "LABEL_1"), ("0", "1"), ("label_0", "label_1"), ("Label 0", "Label 1")])
def test_names_that_only_number_are_the_datasets_labels(names: tuple[str, ...]) -> None:
    assert order("rte", *names) == (0, 1)


def test_numbers_in_another_order_are_followed() -> None:
    assert order("mnli", "LABEL_2", "LABEL_0", "LABEL_1") == (1, 2, 0)


def test_keys_of_id2label_count_and_not_their_order() -> None:
    spec = load_task("rte")
    assert label_order(spec, {1: "entailment", 0: "not_entailment"}, model="m") == (1, 0)
    assert label_order(spec, {"1": "entailment", "0": "not_entailment"}, model="m") == (1, 0)  # type: ignore[dict-item]


def test_given_labels_win_over_the_models_own() -> None:
    assert order("rte", "entailment", "not_entailment", override=["not_entailment", "entailment"]) == (1, 0)
    assert order("mnli", "a", "b", "c", override=["neutral", "contradiction", "entailment"]) == (2, 0, 1)


@pytest.mark.parametrize("given", [["entailment"], ["entailment", "entailment"], ["entailment", "neutral"], ["0", "1"]])
def test_given_labels_must_be_the_tasks_in_some_order(given: list[str]) -> None:
    with pytest.raises(
        DataError, match=r"org/model: the given labels .* are not rte's labels \(entailment, not_entail"
    ):
        order("rte", "LABEL_0", "LABEL_1", override=given)


def test_another_number_of_labels_is_an_error_that_lists_both() -> None:
    with pytest.raises(
        DataError, match=r"org/model has 3 labels \(LABEL_0, LABEL_1, LABEL_2\).*rte's labels \(entailment"
    ):
        order("rte", "LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize(
    "names", [("yes", "no"), ("LABEL_1", "LABEL_2"), ("entailment", "Entailment"), ("entailment", "0")]
)
def test_names_that_tell_nothing_are_an_error(names: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"org/model's labels .* cannot be matched with rte's labels"):
        order("rte", *names)


def test_a_regression_takes_the_one_output() -> None:
    assert order("stsb", "LABEL_0") == (0,)
    with pytest.raises(DataError, match=r"org/model has 2 outputs .* stsb needs one"):
        order("stsb", "LABEL_0", "LABEL_1")
