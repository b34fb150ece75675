"""Record an experiment in the tracking store: parameters, scores, tags, data, predictions, and the baseline runs."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mergelab.evaluation.results import common_direction
from mergelab.tracking import BASELINE_KEY, DIRECTION, PRIMARY

if TYPE_CHECKING:
    from mergelab.evaluation.results import ExperimentResult, ModelResult
    from mergelab.experiment.calibration import Calibration
    from mergelab.experiment.evaluator import Evaluator
    from mergelab.experiment.locate import LocatedModels
    from mergelab.experiment.session import Session
    from mergelab.tasks.data import TaskData
    from mergelab.tracking import Run, Tracker


def config_hash(resolved: Mapping[str, Any]) -> str:
    """Hash what determines a run's result: the resolved configuration but for where it is recorded and saved."""
    kept = {key: value for key, value in resolved.items() if key not in ("tracking", "output")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def model_tags(located: LocatedModels, session: Session) -> dict[str, str]:
    """Name every model with its revision and the hash of its weights."""
    tags = {"mergelab.models": located.name}
    for model in (*([located.base] if located.base else []), *located.experts):
        revision = f"@{model.revision}" if model.revision and "@" not in model.label else ""
        tags[f"model.{model.name}"] = f"{model.label}{revision}"
        tags[f"model.{model.name}.sha256"] = session.opened.content(model.name)
    return tags


def calibration_tags(examples: Calibration | None) -> dict[str, str]:
    """Say which training examples the method learnt from, for each expert: how many, which, and if labelled."""
    drawn = {} if examples is None else examples.drawn
    return {
        f"calibration.{name}": f"{one.count} of {one.data.spec.name}/{one.data.split}, sha256 {one.digest[:16]}, "
        f"{'with' if one.labelled else 'without'} labels"
        for name, one in drawn.items()
    }


def log_coefficients(run: Run, examples: Calibration | None) -> None:
    """Record the coefficients that the method has learnt: all of them in a file, each expert's mean as a metric."""
    learnt = {} if examples is None else {name: dict(values) for name, values in examples.learnt.items()}
    if learnt:
        run.log_dict(learnt, "coefficients.json")
        run.log_metrics({f"coefficient/{name}": fmean(values.values()) for name, values in learnt.items()})


def log_dataset(run: Run, data: TaskData) -> None:
    """Record which examples of which dataset were used, where that is known."""
    spec = data.spec
    if not len(data):
        return
    run.log_dataset(
        f"mini/{spec.name}" if data.origin == "mini" else spec.name,
        origin=data.origin,
        location=data.location,
        fingerprint=data.fingerprint,
        rows=len(data),
        split=data.split,
        config=spec.name,
    )


def result_metrics(model: ModelResult) -> dict[str, float]:
    """Flatten a model's scores: ``report/accuracy`` with its bounds, ``select/accuracy``; in suites below the task."""
    metrics: dict[str, float] = {}
    for name, result in model.results.items():
        below = f"{name}/" if len(model.results) > 1 else ""
        for metric, score in result.report.items():
            metrics[f"report/{below}{metric}"] = score.value
            metrics[f"report/{below}{metric}_low"] = score.low
            metrics[f"report/{below}{metric}_high"] = score.high
        metrics |= {f"select/{below}{metric}": value for metric, value in result.select.items()}
    others = {
        "report/average": model.average,
        "report/normalised_average": model.normalised,
        "select/normalised_average": model.select_normalised,
        "report/p_vs_best_expert": model.p_value,
        "time/merge_s": model.merge_seconds,
        "time/eval_s": model.eval_seconds,
        "memory/peak_mb": model.peak_mb,
    }
    return metrics | {name: value for name, value in others.items() if value is not None}


def primary_metric(model: ModelResult) -> str:
    """Name the metric that a run is judged by."""
    if len(model.scored) > 1:
        return "report/average" if model.average is not None else "report/normalised_average"
    return f"report/{next(iter(model.scored.values())).primary}"


def _judged_by(model: ModelResult) -> dict[str, str]:
    """Say by which metric a run is judged, and which direction is better; nothing where there is no score."""
    if not model.scored:
        return {}
    direction = common_direction(model.results.values()) or "maximize"
    return {PRIMARY: primary_metric(model), DIRECTION: direction}


def record_result(run: Run, result: ExperimentResult, evaluator: Evaluator) -> None:
    """Record the merged model's scores, the table, and the predictions of every example."""
    merged = result.merged
    run.log_metrics(result_metrics(merged))
    run.set_tags({**_judged_by(merged), "mergelab.task": ",".join(result.tasks), "mergelab.note": result.note})
    run.log_table([_row(model) for model in result.models], "table.csv")
    for task, rows in generations(result).items():
        run.log_table(rows, f"{task}.json")
    _log_predictions(run, merged, evaluator)


def record_baseline(tracker: Tracker, experiment: str, model: ModelResult, evaluator: Evaluator, source: str) -> None:
    """Give the base or an expert a run of its own beside the merges, once for the same weights, data and protocol."""
    key = _baseline_key(model, evaluator)
    if not model.scored:
        return
    with tracker.exclusively():  # jobs side by side would all find that it is not there
        if tracker.find_run({BASELINE_KEY: key}, experiment=experiment) is None:
            _record_baseline(tracker, experiment, model, evaluator, source, key)


def _record_baseline(
    tracker: Tracker, experiment: str, model: ModelResult, evaluator: Evaluator, source: str, key: str
) -> None:
    name = f"{model.role} {model.label}"
    task = ",".join(model.results)
    tags = {
        BASELINE_KEY: key,
        "mergelab.kind": model.role,
        "mergelab.source": source,
        "mergelab.protocol": evaluator.settings.protocol,
        "mergelab.seed": evaluator.seed,
        "mergelab.task": task,
        **_judged_by(model),
    }
    params = {
        "models.name": model.label,
        "role": model.role,
        "task.name": task,
        "eval": evaluator.settings.model_dump(),
    }
    with tracker.start_run(name, experiment=experiment, tags=tags, params=params) as run:
        for task_name in model.results:
            log_dataset(run, evaluator.data[task_name])
        run.log_metrics(result_metrics(model))
        _log_predictions(run, model, evaluator)


def _baseline_key(model: ModelResult, evaluator: Evaluator) -> str:
    """Hash what a baseline's scores depend on: weights, tokens, examples, protocol and seed."""
    parts: dict[str, Any] = {
        "weights": model.contents,
        "role": model.role,
        "data": [data.fingerprint for data in evaluator.data.values()],
        "eval": {k: v for k, v in evaluator.settings.model_dump().items() if k not in ("cache", "preflight")},
        "seed": evaluator.seed,
    }
    if (vocabulary := evaluator.session.opened.vocabulary) is not None:
        parts["vocab"] = [vocabulary.policy, vocabulary.digest]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _row(model: ModelResult) -> dict[str, Any]:
    return {"model": model.label, "role": model.role, **result_metrics(model), "cached": model.cached}


def generations(result: ExperimentResult) -> dict[str, list[dict[str, str]]]:
    """Put side by side, for each task without metrics, what every model makes of each prompt."""
    found: dict[str, list[dict[str, str]]] = {}
    for model in result.models:
        for name, own in model.results.items():
            if own.texts:
                rows = found.setdefault(name, [{"prompt": prompt} for prompt, _ in own.texts])
                for row, (_, text) in zip(rows, own.texts, strict=True):
                    row[f"{model.role}: {model.label}"] = text
    return found


def _log_predictions(run: Run, model: ModelResult, evaluator: Evaluator) -> None:
    """Write a Parquet file per task: each example, its labels or references, outputs, whether it selects or reports."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, prediction in model.predictions.items():
        data, examples = evaluator.data[name], evaluator.examples[name]
        if not len(data):
            continue
        columns = {"idx": data.idx, **_prediction_columns(data, prediction.outputs)}
        columns["selects"] = np.isin(np.arange(len(data)), examples.select)
        columns["reports"] = np.isin(np.arange(len(data)), examples.report)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.parquet"
            pq.write_table(pa.table(columns), file)
            run.log_artifact(file, "predictions")


def _prediction_columns(data: TaskData, outputs: Any) -> dict[str, Any]:
    """Name what a model was given, what is right, and what it made of it."""
    if data.spec.kind == "language_modelling":
        nll, tokens, words = outputs.T
        texts = [text for _, text in data.texts]
        return {"text": texts, "negative_log_likelihood": nll, "tokens": tokens, "words": words}
    if not data.spec.outputs:
        right = {} if data.references is None else {"references": [list(texts) for texts in data.references]}
        return {"prompt": [prompt for (prompt,) in data.texts], **right, "prediction": outputs.tolist()}
    columns: dict[str, Any] = {"label": data.labels}
    for output in range(outputs.shape[1]):
        columns[f"output_{output}"] = outputs[:, output]
    if outputs.shape[1] > 1:
        columns["prediction"] = outputs.argmax(axis=1)
    return columns
