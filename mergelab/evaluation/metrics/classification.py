"""Metrics of class predictions, as ``evaluate`` modules built on scikit-learn."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

_CITATION = "Pedregosa et al. 2011, Scikit-learn: Machine Learning in Python, JMLR 12"
_INPUTS = "predictions and references: class indices, n of each"


def _info(description: str) -> Any:
    features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
    return evaluate.MetricInfo(description, _CITATION, features, inputs_description=_INPUTS)


class Accuracy(evaluate.Metric):  # type: ignore[misc]
    """The fraction of predictions that are right."""

    def _info(self) -> Any:
        return _info("The fraction of predictions that are right.")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(evaluate.Metric):  # type: ignore[misc]
    """The harmonic mean of precision and recall on class 1; 0 where class 1 is neither predicted nor true."""

    def _info(self) -> Any:
        return _info("The harmonic mean of precision and recall on class 1.")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, pos_label=1, average="binary", zero_division=0))}


class MatthewsCorrelation(evaluate.Metric):  # type: ignore[misc]
    """Matthews' correlation (beyond two classes, Gorodkin's R_K); 0 where predictions or labels are constant."""

    def _info(self) -> Any:
        return _info("The correlation of predicted and true classes.")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
