"""Score outputs with a task's metrics; each file here is one metric, those with an underscore share code."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.cache import cache_dir
from mergelab.errors import DataError
from mergelab.tasks.metric import LabelMetric, Metric, ScoreMetric, get_metric
from mergelab.tasks.prompting import answer

if TYPE_CHECKING:
    from mergelab.tasks.spec import TaskSpec

Array = np.ndarray[Any, Any]

# What an invalid answer counts as where answers are scores; the scale of STS-B starts at 0 (Raffel et al. 2020).
_NO_SCORE = -1.0


def score(spec: TaskSpec, outputs: Array, truth: Array, *, parts: Array | None = None) -> dict[str, float]:
    """Compute a task's metrics, as fractions where they are such.

    A classifier's metrics go through ``evaluate``. Those of texts and of likelihoods are computed from the statistics
    that their intervals need too, so that every text is looked at once.

    Args:
        spec: the task.
        outputs: a model's outputs. A classifier's (n, C) logits with one column per dataset label, in the dataset's
            order, (n, 1) for regression; generated texts (n,); for language modelling (n, 3) float64, the negative log
            likelihood in nats, the tokens and the words of each example.
        truth: (n,) true labels, or tuples of reference texts; of language modelling only the length counts.
        parts: (n,) position in ``spec.splits`` of the split that each example is from. Where the task has several
            splits, adds each metric of each: ``accuracy_matched`` next to ``accuracy``.

    Raises:
        DataError: the examples have no labels or are too few, or shapes do not fit.
    """
    check_scorable(spec, outputs, truth)
    if spec.outputs:
        predictions = predicted(spec, outputs)

        def value(name: str, members: Array | slice) -> float:
            check_count(spec, name, len(truth[members]))
            return _compute(name, predictions[members], truth[members])

    else:
        rows = example_statistics(spec, outputs, truth)

        def value(name: str, members: Array | slice) -> float:
            return value_of_rows(spec, name, rows[name][members])

    names = spec.metrics if spec.outputs else tuple(rows)
    values = {name: value(name, slice(None)) for name in names}
    for suffix, members in part_members(spec, parts):
        values |= {f"{name}_{suffix}": value(name, members) for name in names}
    return values


def example_statistics(spec: TaskSpec, outputs: Array, truth: Array) -> dict[str, Array]:
    """Return what each metric of a task needs of each example.

    Returns:
        (n, k) float64 by metric; `value_of_rows` computes the metric of any choice of the rows. Of lm-eval's metrics
        those that have any of the documents.

    Raises:
        DataError: the numbers of examples differ, an example has no reference, or no document has the primary metric.
    """
    if spec.kind != "generation":
        predictions = predicted(spec, outputs) if spec.outputs else outputs
        found = {name: get_metric(name).statistics(predictions, truth) for name in spec.metrics}
        return _with_documents(spec, found) if spec.kind == "lm_eval" else found
    words = spec.verbalizer or spec.labels or ()
    answers = tuple(answer(spec.answer, text, words) for text in outputs.tolist())
    references = tuple(truth.tolist())
    if len(answers) != len(references):
        raise DataError(f"{spec.name}: {len(answers)} predictions do not fit {len(references)} examples' references")
    if missing := [i for i, texts in enumerate(references) if not texts]:
        raise DataError(f"{spec.name}: {len(missing)} examples have no reference (the first is number {missing[0]})")
    return {name: _text_statistics(get_metric(name), answers, references, words) for name in spec.metrics}


def _with_documents(spec: TaskSpec, found: dict[str, Array]) -> dict[str, Array]:
    found = {name: rows for name, rows in found.items() if (rows[:, 0] >= 0).any()}
    if spec.primary not in found:
        raise DataError(f"{spec.name}: none of the documents has {spec.primary}; measure more (task.limit)")
    return found


def value_of_rows(spec: TaskSpec, name: str, rows: Array) -> float:
    """Compute the metric ``name`` of the examples with these ``rows`` (n, k) of `example_statistics`.

    Raises:
        DataError: there are too few rows.
    """
    check_count(spec, name, len(rows))
    return get_metric(name).from_statistics(rows)


# Every text is looked at once for the score, its interval and its comparisons with other models.
@functools.lru_cache(maxsize=64)
def _text_statistics(
    metric: Metric, answers: tuple[str, ...], references: tuple[tuple[str, ...], ...], words: tuple[str, ...]
) -> Array:
    """Compute a metric's statistics of answers found in generated texts; labels and scores among them are numbers."""
    if isinstance(metric, LabelMetric):
        position = {word: index for index, word in enumerate(words)}
        if unknown := [texts[0] for texts in references if texts[0] not in position]:
            raise DataError(f"{metric.name}: the reference {unknown[0]!r} is none of the labels' words {list(words)}")
        return metric.statistics(
            [position.get(said, -1) for said in answers], [position[texts[0]] for texts in references]
        )
    if isinstance(metric, ScoreMetric):
        return metric.statistics(
            [float(said or _NO_SCORE) for said in answers], [float(texts[0]) for texts in references]
        )
    return metric.statistics(answers, references)


def predicted(spec: TaskSpec, logits: Array) -> Array:
    """Return a classifier's predictions from ``logits`` (n, C): class indices (n,) int64, or scores (n,) float64."""
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
    each = {"generation": (), "lm_eval": (), "language_modelling": (3,)}.get(spec.kind, (spec.outputs,))
    if outputs.shape != (len(truth), *each):
        what = f"{len(truth)} examples" + "".join(f" × {count}" for count in each)
        raise DataError(f"{spec.name}: outputs of shape {outputs.shape} do not fit {what}")
    check_labels(spec, truth)
    for name in spec.metrics:
        check_count(spec, name, len(truth))


def check_count(spec: TaskSpec, name: str, count: int) -> None:
    """Check that ``count`` examples are enough for the metric ``name``.

    Raises:
        DataError: they are not.
    """
    if count < (least := get_metric(name).min_examples):
        raise DataError(f"{spec.name}: {count} examples are too few to score; {name} needs {least}")


def check_labels(spec: TaskSpec, truth: Array) -> None:
    """Check that the labels or references are known.

    Raises:
        DataError: they are hidden, as in GLUE's test splits.
    """
    if spec.kind in ("language_modelling", "lm_eval"):
        return
    if spec.kind == "generation":
        hidden = truth.dtype != object
    else:
        hidden = bool((np.isnan(truth) if spec.is_regression else truth < 0).any())
    if hidden:
        raise DataError(f"{spec.name}: the labels of this split are hidden; it can be predicted, but not scored here")


def _compute(name: str, predictions: Array, references: Array) -> float:
    found = _module(name).compute(predictions=predictions, references=references)
    return float(found[get_metric(name).name])


@functools.cache
def _module(name: str) -> Any:
    """Make the ``evaluate`` module of a metric; ``import evaluate`` takes seconds."""
    from mergelab.evaluation.evaluate_module import EvaluateModule

    # In memory: the default writes every prediction to a locked file in the user's home.
    return EvaluateModule(get_metric(name), keep_in_memory=True, cache_dir=str(cache_dir() / "metrics"))
