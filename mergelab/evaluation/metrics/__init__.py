"""Score predictions with a task's official metrics.

The metrics are ``evaluate`` modules of this package, loaded at first use: ``import evaluate`` takes seconds.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.config import cache_dir
from mergelab.errors import DataError
from mergelab.tasks.metric_table import METRICS
from mergelab.tasks.prompting import answer

if TYPE_CHECKING:
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]


def score(spec: TaskSpec, outputs: Array, truth: Array, *, parts: Array | None = None) -> dict[str, float]:
    """Compute a task's metrics, as fractions where they are such.

    Args:
        spec: the task.
        outputs: what a model made of the examples. A classifier's (n, C) logits with one column per dataset label, in
            the dataset's order, (n, 1) for regression; generated texts (n,); for language modelling (n, 3) float64, the
            negative log likelihood in nats, the tokens and the words of each example.
        truth: (n,) true labels, or tuples of reference texts; of language modelling only the length counts.
        parts: (n,) position in ``spec.splits`` of the split that each example is from. Where the task has several
            splits, adds each metric of each: ``accuracy_matched`` beside ``accuracy``.

    Raises:
        DataError: the examples have no labels, or shapes do not fit.
    """
    check_scorable(spec, outputs, truth)
    if spec.outputs:
        predictions = predicted(spec, outputs)

        def value(name: str, members: Array | slice) -> float:
            return _compute(name, predictions[members], truth[members])

    else:
        rows = example_statistics(spec, outputs, truth)

        def value(name: str, members: Array | slice) -> float:
            return value_of_rows(spec, name, rows[name][members])

    values = {name: value(name, slice(None)) for name in spec.metrics}
    for suffix, members in part_members(spec, parts):
        values |= {f"{name}_{suffix}": value(name, members) for name in spec.metrics}
    return values


def example_statistics(spec: TaskSpec, outputs: Array, truth: Array) -> dict[str, Array]:
    """Return, for each metric of a generation or language modelling task, what it needs to know of each example.

    Returns:
        (n, k) float64 by metric; `value_of_rows` computes the metric of any choice of the rows.

    Raises:
        DataError: the numbers of examples differ, or an example has no reference.
    """
    if spec.kind == "language_modelling":
        return dict.fromkeys(spec.metrics, outputs)
    words = spec.verbalizer or spec.labels or ()
    answers = tuple(answer(spec.answer, text, words) for text in outputs.tolist())
    return {name: _text_statistics(name, answers, tuple(truth.tolist()), words) for name in spec.metrics}


def value_of_rows(spec: TaskSpec, name: str, rows: Array) -> float:
    """Compute the metric ``name`` of the examples with these ``rows`` (n, k) of `example_statistics`."""
    from mergelab.evaluation.metrics import likelihood, text

    if spec.kind == "language_modelling":
        return likelihood.from_statistics(name, rows)
    return text.from_statistics(name, rows)


@functools.lru_cache(maxsize=64)
def _text_statistics(
    name: str, answers: tuple[str, ...], references: tuple[tuple[str, ...], ...], words: tuple[str, ...]
) -> Array:
    """Look at every text; what was found is kept, for the score's interval and its comparison with other models."""
    from mergelab.evaluation.metrics import text

    return text.statistics(name, answers, references, labels=words)


def predicted(spec: TaskSpec, logits: Array) -> Array:
    """Return the predictions that ``logits`` (n, C) say: class indices (n,) int64, or scores (n,) float64."""
    return logits[:, 0].astype(np.float64) if spec.is_regression else logits.argmax(axis=1)


def part_members(spec: TaskSpec, parts: Array | None) -> list[tuple[str, Array]]:
    """Name the parts of a task with several splits (``matched``) and say which examples (positions) are in each."""
    if parts is None or len(spec.splits) < 2:
        return []
    found = [
        (split.removeprefix("validation_"), np.flatnonzero(parts == index)) for index, split in enumerate(spec.splits)
    ]
    return [(name, members) for name, members in found if len(members)]


def check_scorable(spec: TaskSpec, outputs: Array, truth: Array) -> None:
    """Check that predictions fit the task and that there are labels or references to score them against.

    Raises:
        DataError: they do not, or there are none.
    """
    each = {"generation": (), "language_modelling": (3,)}.get(spec.kind, (spec.outputs,))
    if outputs.shape != (len(truth), *each):
        what = f"{len(truth)} examples" + "".join(f" × {count}" for count in each)
        raise DataError(f"{spec.name}: outputs of shape {outputs.shape} do not fit {what}")
    check_labels(spec, truth)
    if len(truth) < (2 if spec.is_regression else 1):
        raise DataError(f"{spec.name}: {len(truth)} examples are too few to score")


def check_labels(spec: TaskSpec, truth: Array) -> None:
    """Check that the labels or references are known.

    Raises:
        DataError: they are hidden, as in GLUE's test splits.
    """
    if spec.kind == "language_modelling":
        return
    if spec.kind == "generation":
        hidden = truth.dtype != object
    else:
        hidden = bool((np.isnan(truth) if spec.is_regression else truth < 0).any())
    if hidden:
        raise DataError(f"{spec.name}: the labels of this split are hidden; it can be predicted, but not scored here")


def _compute(name: str, predictions: Array, references: Array) -> float:
    found = _metric(name).compute(predictions=predictions, references=references)
    return float(found[name])


@functools.cache
def _metric(name: str) -> Any:
    entry = METRICS[name]
    # In memory: the default writes every prediction to a locked file in the user's home.
    return getattr(import_module(entry.module), entry.cls)(keep_in_memory=True, cache_dir=str(cache_dir() / "metrics"))
