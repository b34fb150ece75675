"""What the ``evaluate`` modules of text metrics share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np

Array = np.ndarray[Any, Any]
Texts = Sequence[str]


class TextMetric(evaluate.Metric):  # type: ignore[misc]
    """A metric of texts against one reference or more each, computed in two steps."""

    metric: ClassVar[str]
    """Its name, under which ``compute`` answers."""
    citation: ClassVar[str]

    def _info(self) -> Any:
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
        )
        inputs = "predictions: n texts; references: for each a list of texts; labels: the words that stand for labels"
        return evaluate.MetricInfo(type(self).__doc__ or "", self.citation, features, inputs_description=inputs)

    def statistics(self, predictions: Texts, references: Sequence[Texts], labels: Texts = ()) -> Array:
        """Return one row of numbers per example: (n, k) float64."""
        return self._rows(predictions, references, labels)

    def value(self, rows: Array) -> float:
        """Compute the metric, as a fraction, of the examples with these ``rows`` (n, k)."""
        return self._value(rows)

    def _rows(self, predictions: Texts, references: Sequence[Texts], labels: Texts) -> Array:
        raise NotImplementedError

    def _value(self, rows: Array) -> float:
        return float(rows.mean())

    def _compute(self, predictions: Any, references: Any, labels: Texts = ()) -> dict[str, float]:
        return {self.metric: self.value(self.statistics(predictions, references, labels))}
