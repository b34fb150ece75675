"""Tasks and examples for every metric: a metric that is added gets them for the kinds and answers that it declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergelab.tasks.loading import task_from_config
from mergelab.tasks.metric import LabelMetric, LikelihoodMetric, ScoreMetric, get_metric, metric_names
from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]
WORDS = [
    "a",
    "cat",
    "and",
    "the",
    "dog",
    "sat",
    "on",
    "mat",
    "mats",
    "jumped",
    "jumps",
    "running",
    "foxes",
    "purring",
    "was",
    "is",
]


@dataclass(frozen=True)
class Case:
    """A metric on a kind of task, with a kind of answers where texts are generated, and a number of labels."""

    name: str
    kind: str
    answer: str | None = None
    labels: int = 0

    def __str__(self) -> str:
        return "-".join(str(part) for part in (self.name, self.kind, self.answer, self.labels) if part)

    @property
    def spec(self) -> TaskSpec:
        """The task, as a configuration says it."""
        node: dict[str, Any] = {
            "name": "case", "version": 1, "kind": self.kind, "dataset": {"path": "none"}, "metrics": [self.name],
            "primary": self.name,
        }  # fmt: skip
        names = [f"l{i}" for i in range(self.labels)] or None
        if self.kind == "generation":
            node |= {"prompt": "{question}", "answer": self.answer, "references": [] if names else ["answer"]}
            node |= {"labels": names} if names else {}
        else:
            node |= {"columns": ["text"]} | ({} if self.kind == "language_modelling" else {"labels": names})
        return task_from_config(node)


def cases(names: Sequence[str] = ()) -> list[Case]:
    """Make the cases of the metrics named, by default of all that there are."""
    found = []
    for name in names or metric_names():
        metric = get_metric(name)
        counts = [metric.num_labels] if metric.num_labels else [2, 4]
        for kind in metric.kinds:
            for answer in metric.answers if kind == "generation" else (None,):
                labelled = kind == "classification" or answer == "label"
                found += [Case(name, kind, answer, count) for count in (counts if labelled else [0])]
    return found


@dataclass(frozen=True)
class Examples:
    """Predictions and references as a metric takes them, and the outputs and truths of a model that gave them."""

    predictions: Any
    references: Any
    outputs: Array
    truth: Array

    def drawn(self, rows: Array) -> tuple[Any, Any]:
        """Return the predictions and references of a choice of examples."""
        if isinstance(self.predictions, np.ndarray):
            return self.predictions[rows], self.references[rows]
        return [self.predictions[i] for i in rows], [self.references[i] for i in rows]


def examples(case: Case, predictions: Any, references: Any) -> Examples:
    """Encode predictions and references as a model's outputs and a task's truth."""
    metric, size = get_metric(case.name), len(references)
    if case.kind == "classification":
        return Examples(predictions, references, np.eye(case.labels)[predictions], references)
    if case.kind == "regression":
        return Examples(predictions, references, predictions[:, None], references)
    if isinstance(metric, LikelihoodMetric):
        return Examples(predictions, references, predictions, references)
    said, true = predictions, references
    if isinstance(metric, LabelMetric):
        said, true = [f"L{i}." if i >= 0 else "?" for i in predictions], [(f"l{i}",) for i in references]
    elif isinstance(metric, ScoreMetric):
        said, true = [f"{x:.1f}" if x >= 0 else "?" for x in predictions], [(f"{x:.1f}",) for x in references]
    elif case.answer != "text":
        said = [text or "?" for text in predictions]
    truth = np.empty(size, dtype=object)
    truth[:] = [tuple(texts) for texts in true]
    return Examples(predictions, references, np.array(said, dtype=object), truth)


def drawn_examples(case: Case, size: int, errors: float = 0.4, seed: int = 0) -> Examples:
    """Draw examples of which about the share ``errors`` is predicted wrong."""
    draw = np.random.default_rng([size, seed])
    wrong = draw.random(size) < errors
    metric = get_metric(case.name)
    if isinstance(metric, LikelihoodMetric):
        tokens = draw.integers(2, 40, size=size).astype(np.float64)
        nats = tokens * draw.uniform(2.0, 3.0, size=size) * (1 + wrong)
        return examples(case, np.column_stack([nats, tokens, np.ceil(tokens / 1.3)]), np.zeros(size, dtype=np.int64))
    if isinstance(metric, LabelMetric):
        true = draw.integers(case.labels, size=size)
        lowest = -1 if case.kind == "generation" else 0
        return examples(case, np.where(wrong, draw.integers(lowest, case.labels, size=size), true), true)
    if isinstance(metric, ScoreMetric):
        true = np.round(draw.uniform(0, 5, size=size), 1)
        said = np.round(np.where(wrong, draw.uniform(0, 5, size=size), true), 1)
        if case.kind == "generation":
            said[wrong & (draw.random(size) < 0.3)] = -1.0
        return examples(case, said, true)
    true = [_answers(case, draw) for _ in range(size)]
    said = [("" if draw.random() < 0.5 else _answers(case, draw)[0]) if bad else texts[-1]
            for bad, texts in zip(wrong, true, strict=True)]  # fmt: skip
    return examples(case, said, true)


def _answers(case: Case, draw: np.random.Generator) -> list[str]:
    """Draw one reference or more."""
    if case.answer == "label":
        return [f"l{draw.integers(case.labels)}"]
    if case.answer == "number":
        return [str(draw.integers(20))]
    if case.answer == "score":
        return [f"{draw.uniform(0, 5):.1f}"]
    lines = [[" ".join(draw.choice(WORDS, size=draw.integers(5, 12))) for _ in range(2)] for _ in range(3)]
    return ["\n".join(line) for line in lines[: draw.integers(1, 4)]]


def edge_examples(case: Case) -> Mapping[str, Examples]:
    """Make the examples on which formulas tend to break."""
    some = drawn_examples(case, 30)
    metric, least = get_metric(case.name), get_metric(case.name).min_examples
    found = {"as few as there may be": drawn_examples(case, least), "perfect": drawn_examples(case, 30, errors=0.0)}
    if isinstance(metric, LabelMetric):
        true, last = some.references, case.labels - 1
        made = {
            "inverse": ((true + 1) % case.labels, true),
            "constant": (np.zeros_like(true), true),
            "constantly the last": (np.full_like(true, last), true),
            "one class only": (some.predictions, np.zeros_like(true)),
            "the last class only": (some.predictions, np.full_like(true, last)),
            "one class, all right": (np.full_like(true, last), np.full_like(true, last)),
            "one class, all wrong": (np.full_like(true, last), np.zeros_like(true)),
            "a class never predicted": (np.minimum(some.predictions, last - 1), true),
            "a class never true": (some.predictions, np.minimum(true, last - 1)),
        }
        if case.kind == "generation":
            made["no answer at all"] = (np.full_like(true, -1), true)
    elif isinstance(metric, ScoreMetric):
        true, fixed = some.references, np.full_like(some.references, 2.3)
        made = {
            "inverse": (5.0 - true, true),
            "constant": (fixed, true),
            "constant references": (some.predictions, fixed),
            "both constant": (fixed, fixed),
            "ties": (np.round(np.abs(some.predictions)), np.round(true)),
            "two values": ((true > 2.5).astype(np.float64), true),
        }
    elif isinstance(metric, LikelihoodMetric):
        made = {
            "impossible": (some.predictions * [1e4, 1, 1], some.references),
            "certain": (some.predictions * [0, 1, 1], some.references),
            "no units": (some.predictions * [1, 0, 0], some.references),
        }
    else:
        empty = [""] * len(some.references)
        made = {
            "no answer at all": (empty, some.references),
            "shifted": ([texts[0] for texts in some.references[1:] + some.references[:1]], some.references),
        }
        if case.answer == "text":
            made["without words"] = (["..."] * len(empty), some.references)
    return found | {name: examples(case, *pair) for name, pair in made.items()}
