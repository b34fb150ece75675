"""A metric as a module of ``evaluate``."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from mergelab.tasks.metric import LabelMetric, Metric, ScoreMetric


class EvaluateModule(evaluate.Metric):  # type: ignore[misc]
    """An ``evaluate`` module whose ``compute`` returns ``{metric.name: metric.score(predictions, references)}``."""

    def __init__(self, metric: Metric, **settings: Any) -> None:
        self.metric = metric  # evaluate's constructor calls `_info`
        super().__init__(**settings)

    def _info(self) -> Any:
        prediction, reference, inputs = _inputs(self.metric)
        features = datasets.Features({"predictions": prediction, "references": reference})
        return evaluate.MetricInfo(
            type(self.metric).__doc__ or "", self.metric.citation, features, inputs_description=inputs
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {self.metric.name: self.metric.score(predictions, references)}


def _inputs(metric: Metric) -> tuple[Any, Any, str]:
    """Return the types of a prediction and of a reference, and say what they are."""
    if isinstance(metric, LabelMetric):
        return datasets.Value("int64"), datasets.Value("int64"), "predictions and references: class indices, n of each"
    if isinstance(metric, ScoreMetric):
        return datasets.Value("float64"), datasets.Value("float64"), "predictions and references: scores, n of each"
    texts = datasets.Sequence(datasets.Value("string"))
    return datasets.Value("string"), texts, "predictions: n texts; references: for each a list of texts"
