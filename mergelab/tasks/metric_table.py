"""Which metrics there are, and what kind of task each is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mergelab.tasks.prompting import AnswerKind

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class MetricEntry:
    """Where a metric's class is, and what kind of task it is for."""

    kind: Literal["classification", "regression"]
    module: str
    cls: str


METRICS: dict[str, MetricEntry] = {
    "accuracy": MetricEntry("classification", "mergelab.evaluation.metrics.classification", "Accuracy"),
    "f1": MetricEntry("classification", "mergelab.evaluation.metrics.classification", "F1"),
    "matthews_correlation": MetricEntry(
        "classification", "mergelab.evaluation.metrics.classification", "MatthewsCorrelation"
    ),
    "pearson": MetricEntry("regression", "mergelab.evaluation.metrics.regression", "Pearson"),
    "spearmanr": MetricEntry("regression", "mergelab.evaluation.metrics.regression", "Spearmanr"),
}


def metric_directions(kind: str) -> dict[str, Direction]:
    """Name the metrics that a kind of task can have, and say whether greater or less is better."""

    if kind == "generation":
        return {name: entry.direction for name, entry in TEXT_METRICS.items()}
    if kind == "language_modelling":
        return dict.fromkeys(LIKELIHOOD, "minimize")
    return {name: "maximize" for name, entry in METRICS.items() if entry.kind == kind}


@dataclass(frozen=True)
class TextMetricEntry:
    """Where a metric's class is, what kinds of answers it is of, which direction is better, and its least examples."""

    module: str
    cls: str
    of: tuple[AnswerKind, ...]
    direction: Literal["maximize", "minimize"] = "maximize"
    at_least: int = 1

    @property
    def needs_labels(self) -> bool:
        """Whether it is of labels, and so needs the words that stand for them."""
        return self.of == ("label",)


_HERE = "mergelab.evaluation.metrics"


TEXT_METRICS: dict[str, TextMetricEntry] = {
    "rouge1": TextMetricEntry(f"{_HERE}.rouge", "Rouge1", ("text",)),
    "rouge2": TextMetricEntry(f"{_HERE}.rouge", "Rouge2", ("text",)),
    "rougeL": TextMetricEntry(f"{_HERE}.rouge", "RougeL", ("text",)),
    "rougeLsum": TextMetricEntry(f"{_HERE}.rouge", "RougeLsum", ("text",)),
    "bleu": TextMetricEntry(f"{_HERE}.ngrams", "Bleu", ("text",)),
    "chrf": TextMetricEntry(f"{_HERE}.ngrams", "Chrf", ("text",)),
    "exact_match": TextMetricEntry(f"{_HERE}.answers", "ExactMatch", ("text", "number", "label", "score")),
    "accuracy": TextMetricEntry(f"{_HERE}.answers", "Accuracy", ("label",)),
    "f1": TextMetricEntry(f"{_HERE}.answers", "F1", ("label",)),
    "matthews_correlation": TextMetricEntry(f"{_HERE}.answers", "MatthewsCorrelation", ("label",)),
    "pearson": TextMetricEntry(f"{_HERE}.answers", "Pearson", ("score",), at_least=2),
    "spearmanr": TextMetricEntry(f"{_HERE}.answers", "Spearmanr", ("score",), at_least=2),
    "invalid_rate": TextMetricEntry(f"{_HERE}.answers", "InvalidRate", ("number", "label", "score"), "minimize"),
}


# What the negative log likelihood is divided by before it is exponentiated: a column of an example's statistics, which
# are (negative log likelihood in nats, tokens, words).
LIKELIHOOD = {"token_perplexity": 1, "word_perplexity": 2}
