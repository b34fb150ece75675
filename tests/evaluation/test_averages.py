from __future__ import annotations

import pytest

from mergelab.errors import DataError
from mergelab.evaluation.averages import average, normalised, normalised_average

MERGED = {"rte": 0.6, "cola": 0.3}
EXPERTS = {"rte": 0.8, "cola": 0.6, "sst2": 0.9}


def test_the_average_counts_every_task_once() -> None:
    assert average(MERGED) == pytest.approx(0.45)


def test_the_normalised_average_divides_each_task_by_its_own_expert() -> None:
    assert normalised(MERGED, EXPERTS) == pytest.approx({"rte": 0.75, "cola": 0.5})
    assert normalised_average(MERGED, EXPERTS) == pytest.approx(0.625)


def test_a_task_whose_expert_is_not_known_cannot_be_normalised() -> None:
    with pytest.raises(DataError, match="no expert was measured on cola"):
        normalised(MERGED, {"rte": 0.8})


@pytest.mark.parametrize("score", [0.0, -0.1, float("nan")])
def test_an_expert_without_a_positive_score_is_no_measure(score: float) -> None:
    with pytest.raises(DataError, match="not positive: cola"):
        normalised(MERGED, {"rte": 0.8, "cola": score})


def test_nothing_cannot_be_averaged() -> None:
    with pytest.raises(DataError, match="nothing to average"):
        average({})


def test_where_less_is_better_the_experts_score_is_divided() -> None:
    scores, experts = {"samsum": 0.3, "wikitext": 40.0}, {"samsum": 0.4, "wikitext": 30.0}
    assert normalised(scores, experts, minimized=["wikitext"]) == pytest.approx({"samsum": 0.75, "wikitext": 0.75})
    assert normalised_average(scores, experts, ["wikitext"]) == pytest.approx(0.75)
