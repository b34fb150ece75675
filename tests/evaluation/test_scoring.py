"""Scores of a model under a protocol, with the direction of each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mergelab.config import EvalConfig
from mergelab.evaluation.scoring import measure, split_examples
from mergelab.tasks.data import TaskData
from mergelab.tasks.metric import MeanTextMetric, get_metric
from tests.tasks.writers import generation_task


def measured(spec_changes: dict[str, Any], parts: list[int]) -> tuple[str, ...]:
    """Measure texts of numbers, and return the scores that are better when they are less."""
    spec = replace(generation_task(answer="number"), **spec_changes)
    count = len(parts)
    truth = np.empty(count, dtype=object)
    truth[:] = [(str(number),) for number in range(count)]
    outputs = np.array([str(number) if number % 3 else "?" for number in range(count)], dtype=object)
    data = TaskData(
        spec, (("",),) * count, np.zeros(count, dtype=np.int64), np.arange(count), np.array(parts), "test", "folder",
        "", "", truth,
    )  # fmt: skip
    config = EvalConfig(protocol="full", bootstrap=20)
    return measure(data, outputs, split_examples(data, config, 0), config, 0).minimized


def test_a_score_of_every_split_has_the_direction_of_its_metric() -> None:
    changes = {"metrics": ("exact_match", "invalid_rate"), "splits": ("validation_easy", "validation_hard")}
    assert measured(changes, [0, 0, 0, 1, 1, 1]) == ("invalid_rate", "invalid_rate_easy", "invalid_rate_hard")
    # Where all reporting examples are from one split, the others have no scores.
    assert measured(changes, [1] * 6) == ("invalid_rate", "invalid_rate_hard")
    assert measured({"metrics": ("exact_match",)}, [0] * 6) == ()


def test_a_metric_whose_name_begins_as_anothers_has_its_own_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = get_metric

    class Longer(MeanTextMetric):
        name, citation, answers = "invalid_rate_inverse", "None", ("number",)
        direction, chance, min_examples = "maximize", None, 1

        def statistics(self, predictions: Any, references: Any) -> Any:
            return np.ones((len(predictions), 1))

    def lookup(name: str) -> Any:
        return Longer() if name == Longer.name else plain(name)

    monkeypatch.setattr("mergelab.evaluation.scoring.get_metric", lookup)
    monkeypatch.setattr("mergelab.evaluation.metrics.get_metric", lookup)
    assert measured({"metrics": ("invalid_rate", Longer.name)}, [0] * 6) == ("invalid_rate",)
