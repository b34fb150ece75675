"""Measure a ``transformers`` pipeline on a GLUE task, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mergelab.errors import DataError


def evaluate_glue_pipeline(
    pipe: Any,
    task: str,
    *,
    data_dir: Path | str | None = None,
    split: str | None = None,
    limit: int | None = None,
    labels: Sequence[str] | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Score a text-classification pipeline's model on a GLUE task.

    Args:
        pipe: a ``transformers`` text-classification pipeline; its model, tokenizer and device are used.
        task: the task's name, such as ``"rte"``.
        data_dir: a folder of Parquet files instead of the hub.
        split: one split instead of the task's own, such as ``"validation_matched"``.
        limit: examples to use.
        labels: the task's label names in the order of the model's outputs, where its ``id2label`` does not tell.
        progress: called with the fraction done.

    Returns:
        The task's metrics as fractions, such as ``{"accuracy": 0.66}``.

    Raises:
        DataError: the task, its data or the model's labels cannot be used. HubError: the hub cannot be reached.
    """
    from mergelab.evaluation.classification import encode, predict
    from mergelab.evaluation.lengths import max_input_length
    from mergelab.evaluation.metrics import check_labels, score
    from mergelab.evaluation.options import EvaluationOptions
    from mergelab.tasks.data import load_data
    from mergelab.tasks.labels import label_order
    from mergelab.tasks.loading import load_task

    if pipe.tokenizer is None:
        raise DataError(f"{task}: the pipeline has no tokenizer")
    spec = load_task(task)
    config = pipe.model.config
    model = getattr(config, "_name_or_path", "") or "the pipeline's model"
    # Labels are checked before data are fetched.
    order = label_order(spec, config.id2label, model=model, override=labels)
    data = load_data(spec, data_dir=data_dir, split=split, limit=limit)
    check_labels(spec, data.labels)
    encoded = encode(data, pipe.tokenizer, max_input_length(config, pipe.tokenizer))
    logits = predict(pipe.model, encoded, EvaluationOptions(pipe.device, progress=progress))[:, list(order)]
    return score(data.spec, logits, data.labels, parts=data.parts)
