"""Record runs in the tracking store: how one begins, what it used, what it found; for every kind of run alike."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mergelab.evaluation.results import ExperimentResult, common_direction
from mergelab.experiment import compared, described
from mergelab.tracking import experiment_name, names, views

if TYPE_CHECKING:
    from mergelab.evaluation.results import ModelResult
    from mergelab.experiment.calibration import Calibration
    from mergelab.experiment.evaluator import Evaluator
    from mergelab.experiment.locate import LocatedModel
    from mergelab.experiment.plan import Plan
    from mergelab.experiment.session import Session
    from mergelab.tasks.data import TaskData
    from mergelab.tracking import Run, Tracker

# ------------------------------------------------------------------------------------------------------- how it begins


def open_run(
    tracker: Tracker,
    kind: names.Kind,
    plan: Plan,
    source: str,
    name: str,
    *,
    experiment: str | None = None,
    parent: str | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    resumed: Mapping[str, str] | None = None,
) -> Run:
    """Open a run with the tags and parameters that runs of every kind have.

    Args:
        tracker: the store.
        kind: what the run is of.
        plan: the experiment; a sweep's is that of one point of its space.
        source: where models and data come from.
        name: the run's.
        experiment: the MLflow experiment; None: that of the plan's task.
        parent: id of the run that it is shown under.
        params: what is hashed, and recorded as parameters as far as people compare it (see
            `mergelab.experiment.compared`); None: the whole resolved configuration.
        tags: those of this kind of run alone; None as a value leaves a tag out.
        resumed: tags of an earlier run of the same thing: if there is such a run, it is opened again.
    """
    params = plan.resolved if params is None else params
    shown = compared.compared(_named(params, plan), source, compared.typed_keys())
    if source == "mini" and tags and names.MODELS in tags:
        shown |= _models(shown, tags)
    experiment = experiment or experiment_name(plan.tracking, plan.task_name, mini=source == "mini")
    if resumed is not None and (known := tracker.runs(resumed, experiment=experiment)):
        run = tracker.resume_run(known[0].id)
        if not known[0].params:  # its process died between creating the run and recording them
            run.log_params(shown)
        return run
    common = {
        names.KIND: kind,
        names.METHOD: plan.method.name,
        names.TASK: ",".join(task.name for task in plan.tasks),
        names.SOURCE: source,
        names.SEED: plan.config.seed,
        names.PROTOCOL: plan.config.eval.protocol,
    }
    about = {names.CONFIG_HASH: config_hash(params)}
    tags = common | dict(tags or {})
    return tracker.start_run(name, experiment=experiment, tags=tags, params=shown, parent=parent, about=about)


def _named(params: Mapping[str, Any], plan: Plan) -> Mapping[str, Any]:
    """Give the models the name of those that are used, where it is not."""
    models = params.get("models")
    if not isinstance(models, Mapping) or "experts" not in models:
        return params
    return {**params, "models": {**models, "name": plan.config.models.name}}


def _models(shown: Mapping[str, Any], tags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of models with the names that the tags have."""
    return {"models": {**shown.get("models", {}), **compared.models_used(tags)["models"]}}


def config_hash(resolved: Mapping[str, Any]) -> str:
    """Hash what determines a run's result: the resolved configuration except where it is recorded and saved."""
    hashed = {key: value for key, value in resolved.items() if key not in ("tracking", "output")}
    if isinstance(save := hashed.get("save"), Mapping):
        hashed["save"] = {key: value for key, value in save.items() if key not in ("push_to_hub", "private", "stages")}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True, default=str).encode()).hexdigest()[:16]


def save_views(tracker: Tracker, experiment: str, result: ExperimentResult, settings: Sequence[str] = ()) -> str | None:
    """Give an experiment its views of merges and baselines, and return the key of the first; None without scores.

    Args:
        tracker: the store.
        experiment: its name.
        result: says by which metric its runs are judged.
        settings: parameters to show besides the common ones.
    """
    judged = reported_score(result.merged)
    if not (tracker.enabled and judged):
        return None
    metric, less = judged[names.PRIMARY], judged[names.DIRECTION] == "minimize"
    wanted = [views.merges(metric, minimized=less, settings=settings), views.baselines(metric, minimized=less)]
    tracker.save_views(experiment, wanted)
    return views.MERGES


# -------------------------------------------------------------------------------------------------------- what it used


def record_inputs(run: Run, config: Mapping[str, Any], data: Iterable[TaskData]) -> None:
    """Record a run's configuration as a file, and its data."""
    run.log_dict(dict(config), names.CONFIG)
    for one in data:
        log_dataset(run, one)


def record_models(run: Run, session: Session) -> dict[str, str]:
    """Record the base and the experts, and return the tags that name them; none where nothing is recorded."""
    if run.id is None:  # hashing the weights takes as long as reading them
        return {}
    tags = model_tags(session)
    tag_models(run, tags, session.located.source)
    return tags


def tag_models(run: Run, tags: Mapping[str, str], source: str) -> None:
    """Record the tags that name models; with the miniature also as parameters, which others were asked for."""
    run.set_tags(tags)
    if source == "mini" and tags:
        run.log_params(compared.models_used(tags))


def model_tags(session: Session, models: Sequence[LocatedModel] | None = None) -> dict[str, str]:
    """Name models with their revisions and the hashes of their weights."""
    located = session.located
    tags = {names.MODELS: located.name if models is None else ",".join(model.label for model in models)}
    for model in [*([located.base] if located.base else []), *located.experts] if models is None else models:
        revision = f"@{model.revision}" if model.revision and "@" not in model.label else ""
        tags[names.model(model.name)] = f"{model.label}{revision}"
        tags[names.model_hash(model.name)] = session.opened.content(model.name)
    return tags


def calibration_tags(examples: Calibration | None) -> dict[str, str]:
    """Say which training examples the method learnt from, for each expert: how many, which, and if labelled."""
    drawn = {} if examples is None else examples.drawn
    return {
        names.calibration(name): f"{one.count} of {one.data.spec.name}/{one.data.split}, sha256 {one.digest[:16]}, "
        f"{'with' if one.labelled else 'without'} labels"
        for name, one in drawn.items()
    }


def log_coefficients(run: Run, examples: Calibration | None) -> None:
    """Record the coefficients that the method has learnt: all of them in a file, each expert's mean as a metric."""
    learnt = {} if examples is None else {name: dict(values) for name, values in examples.learnt.items()}
    if learnt:
        run.log_dict(learnt, names.COEFFICIENTS)
        run.log_metrics({names.coefficient(name): fmean(values.values()) for name, values in learnt.items()})


def log_dataset(run: Run, data: TaskData) -> None:
    """Record which examples of which dataset were used, where that is known."""
    spec = data.spec
    if not len(data):
        return
    run.log_dataset(
        names.labelled(spec.name, mini=data.origin == "mini"),
        origin=data.origin,
        location=data.location,
        fingerprint=data.fingerprint,
        rows=len(data),
        split=data.split,
        config=spec.name,
    )


# ------------------------------------------------------------------------------------------------------- what it found


def record_result(
    run: Run,
    result: ExperimentResult,
    evaluator: Evaluator | None = None,
    *,
    tags: Mapping[str, Any] | None = None,
    recorded: Collection[str] = (),
    command: str | None = None,
) -> None:
    """Record what was found of the last model of ``result``, and the table of all of them.

    Args:
        run: the run.
        result: the model, after those that it is compared with, if any.
        evaluator: has the examples of the predictions, which are recorded too; None: they are not.
        tags: those of this kind of run alone, or in place of the common ones.
        recorded: metrics that the run has already, and keeps: MLflow would keep both values.
        command: what was typed, or does the same.
    """
    if run.id is None:
        return
    model = result.models[-1]
    run.log_metrics({name: value for name, value in model.logged.items() if name not in recorded})
    said = described.description(described.summary_of(result), described.result_text(result), command=command)
    text = {names.DESCRIPTION: said or None}
    run.set_tags({**reported_score(model), names.NOTE: result.note or None, **text, **(tags or {})})
    if len(result.models) > 1:
        run.log_table([_row(one) for one in result.models], names.TABLE)
    for task, rows in generations(result).items():
        run.log_table(rows, names.generations(task))
    if evaluator is not None:
        _log_predictions(run, model, evaluator)


def reported_score(model: ModelResult) -> dict[str, str]:
    """Return the tags that say which metric a run is judged by and in which direction; none without a score."""
    if not model.scored:
        return {}
    if len(model.scored) > 1:
        primary = names.REPORT_AVERAGE if model.average is not None else names.REPORT_NORMALISED
    else:
        (task, result), *_ = model.scored.items()
        primary = names.report_metric(result.primary, task if len(model.results) > 1 else None)
    return {names.PRIMARY: primary, names.DIRECTION: common_direction(model.results.values()) or "maximize"}


def record_baseline(
    tracker: Tracker, experiment: str, plan: Plan, source: str, model: ModelResult, evaluator: Evaluator
) -> None:
    """Record the base or an expert in its own run, once for the same weights, data and protocol."""
    if not (tracker.enabled and model.scored):
        return
    key = _baseline_key(model, evaluator)
    with tracker.exclusively():  # parallel jobs would all find that it is not there
        if tracker.find_run({names.BASELINE_KEY: key}, experiment=experiment) is None:
            _record_baseline(tracker, experiment, plan, source, model, evaluator, key)


def _record_baseline(
    tracker: Tracker, experiment: str, plan: Plan, source: str, model: ModelResult, evaluator: Evaluator, key: str
) -> None:
    task, located = ",".join(model.results), _located(model, evaluator.session)
    params = {
        "models": {"name": model.label},
        names.ROLE: model.role,
        "task": {"name": task},
        "eval": plan.config.eval.model_dump(),
        "seed": plan.config.seed,
    }
    tags = {names.BASELINE_KEY: key, names.METHOD: None, names.TASK: task, **model_tags(evaluator.session, [located])}
    kind: names.Kind = "base" if model.role == "base" else "expert"
    name = names.baseline_run(model.role, model.label, plan.config.eval.protocol)
    with open_run(tracker, kind, plan, source, name, experiment=experiment, params=params, tags=tags) as run:
        record_inputs(run, params, [evaluator.data[one] for one in model.results])
        record_result(run, ExperimentResult(model.label, evaluator.note, tuple(model.results), (model,)), evaluator)


def _located(model: ModelResult, session: Session) -> LocatedModel:
    if model.role == "base":
        assert session.located.base is not None
        return session.located.base
    return next(expert for expert in session.located.experts if expert.label == model.label)


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
        parts["vocab"] = [vocabulary.policy.source, vocabulary.digest]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _row(model: ModelResult) -> dict[str, Any]:
    return {"model": model.label, names.ROLE: model.role, **model.logged, "cached": model.cached}


def generations(result: ExperimentResult) -> dict[str, list[dict[str, str]]]:
    """Return, for each task without metrics, rows of a prompt and what every model wrote for it."""
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
            file = Path(folder) / names.predictions(name)
            pq.write_table(pa.table(columns), file)
            run.log_artifact(file, names.PREDICTIONS)


def _prediction_columns(data: TaskData, outputs: Any) -> dict[str, Any]:
    """Return the columns of a task's predictions: inputs or labels, references, outputs; of lm-eval its values."""
    if data.spec.kind == "language_modelling":
        nll, tokens, words = outputs.T
        texts = [text for _, text in data.texts]
        return {"text": texts, "negative_log_likelihood": nll, "tokens": tokens, "words": words}
    if data.spec.kind == "lm_eval":
        documents = [document for (document,) in data.texts]
        return {"task": data.labels, "document": documents, "values": outputs.tolist()}
    if not data.spec.outputs:
        right = {} if data.references is None else {"references": [list(texts) for texts in data.references]}
        return {"prompt": [prompt for (prompt,) in data.texts], **right, "prediction": outputs.tolist()}
    columns: dict[str, Any] = {"label": data.labels}
    for output in range(outputs.shape[1]):
        columns[f"output_{output}"] = outputs[:, output]
    if outputs.shape[1] > 1:
        columns["prediction"] = outputs.argmax(axis=1)
    return columns
