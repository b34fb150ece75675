"""Load tasks: from their configuration, or by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergelab.config import CONF_DIR, check
from mergelab.errors import ConfigError, DataError, did_you_mean, listed
from mergelab.tasks.lm_eval import with_metrics
from mergelab.tasks.metric import get_metric
from mergelab.tasks.prompting import AnswerKind, fewshot_examples, plain_word, template_columns
from mergelab.tasks.schema import (
    SCHEMAS,
    GenerationTask,
    LabelledTask,
    LanguageModellingTask,
    LmEvalTask,
    PromptsTask,
    SuiteSchema,
)
from mergelab.tasks.spec import Decoding, Kind, Suite, TaskSpec


def task_from_config(node: Mapping[str, Any]) -> TaskSpec:
    """Check one task's configuration.

    Raises:
        ConfigError: a key is unknown or missing, or a value is not usable.
    """
    kind = node.get("kind") or "classification"
    if kind not in SCHEMAS:
        raise ConfigError(f"task.kind={kind!r}: must be one of {listed(SCHEMAS)}{did_you_mean(str(kind), SCHEMAS)}")
    task = check(SCHEMAS[kind], node, "task")
    return _FROM[type(task)](task)


def _labelled(task: Any) -> TaskSpec:
    kind: Kind = "regression" if task.labels is None else "classification"
    if task.kind not in (None, kind):
        raise ConfigError(f"task.kind={task.kind}: task.labels {'is null' if task.labels is None else 'names classes'}")
    return _scored(
        task, kind=kind, columns=tuple(task.columns), label_column=task.label_column, labels=_tuple(task.labels)
    )


def _generation(task: Any) -> TaskSpec:
    if bool(task.references) == bool(task.labels):
        raise ConfigError("task.references: name the columns of references, or task.labels, and not both")
    answer: AnswerKind = task.answer or ("label" if task.labels else "text")
    if bool(task.labels) != (answer == "label"):
        raise ConfigError(f"task.answer={answer}: must be label where there are task.labels, and only there")
    if task.group_by is not None and task.labels:
        raise ConfigError(f"task.group_by={task.group_by}: examples are grouped by their references, not by labels")
    if task.verbalizer is not None and len(task.verbalizer) != len(task.labels or ()):
        raise ConfigError(f"task.verbalizer={task.verbalizer}: must be as many as task.labels, one for each")
    words = list(map(plain_word, task.verbalizer or task.labels or ()))
    if len(set(words)) < len(words) or not all(words):
        raise ConfigError(f"task.verbalizer={task.verbalizer}: must differ in more than case and punctuation")
    if task.num_fewshot is not None and task.fewshot_examples is None:
        raise ConfigError(f"task.num_fewshot={task.num_fewshot}: task.fewshot_examples names no worked examples")
    return _scored(
        task,
        kind="generation",
        columns=template_columns(task.prompt),
        label_column=task.label_column,
        labels=_tuple(task.labels),
        prompt=task.prompt,
        fewshot_examples=()
        if task.fewshot_examples is None
        else fewshot_examples(task.fewshot_examples, task.num_fewshot),
        references=tuple(task.references),
        answer=answer,
        group_by=task.group_by,
        verbalizer=_tuple(task.verbalizer),
        max_prompt_tokens=task.max_prompt_tokens,
        decoding=_decoding(task.decoding),
    )


def _language_modelling(task: Any) -> TaskSpec:
    if task.window is not None and task.stride is not None and task.stride > task.window:
        raise ConfigError(f"task.stride={task.stride}: must be at most task.window={task.window}")
    columns = tuple(task.columns)
    return _scored(
        task, kind="language_modelling", columns=columns, join=task.join, window=task.window, stride=task.stride
    )


def _prompts(task: Any) -> TaskSpec:
    if task.file is None and not any(text.strip() for text in task.prompts):
        raise ConfigError(f"task.prompts={task.prompts}: needs at least one prompt, or a file of them as task.file")
    return TaskSpec(
        task.name,
        task.version,
        "prompts",
        prompts=tuple(task.prompts),
        file=task.file,
        max_prompt_tokens=task.max_prompt_tokens,
        decoding=_decoding(task.decoding),
    )


def _lm_eval(task: Any) -> TaskSpec:
    return TaskSpec(
        task.name,
        task.version,
        "lm_eval",
        primary=task.primary or "",
        lm_eval_tasks=tuple(task.tasks),
        lm_eval_num_fewshot=task.num_fewshot,
        lm_eval_limit=task.limit,
        include_path=task.include_path,
    )


_FROM = {
    LabelledTask: _labelled,
    GenerationTask: _generation,
    LanguageModellingTask: _language_modelling,
    PromptsTask: _prompts,
    LmEvalTask: _lm_eval,
}


def _scored(task: Any, **own: Any) -> TaskSpec:
    """Make the specification of a task on a dataset, and check what such tasks have in common."""
    spec = TaskSpec(
        name=task.name,
        version=task.version,
        path=task.dataset.path,
        config=task.dataset.name,
        revision=task.dataset.revision,
        slices=task.dataset.slices,
        splits=tuple(task.splits),
        metrics=tuple(task.metrics),
        primary=task.primary,
        **own,
    )
    for metric in spec.metrics:
        _check_metric(spec, metric)
    if spec.primary not in spec.metrics:
        raise ConfigError(f"task.primary={spec.primary!r}: must be one of task.metrics: {listed(spec.metrics)}")
    for key in ("splits", "columns", "labels", "verbalizer", "references", "metrics"):
        values = getattr(spec, key) or ()
        if len(set(values)) < len(values):
            raise ConfigError(f"task.{key}={list(values)}: must not repeat a name")
    return spec


def _check_metric(spec: TaskSpec, name: str) -> None:
    """Check that there is such a metric, and that it is for such a task."""
    metric = get_metric(name)
    if spec.kind not in metric.kinds:
        raise ConfigError(f"task.metrics: {name} is not for {spec.kind}, but for {listed(metric.kinds)}")
    if spec.kind == "generation" and spec.answer not in metric.answers:
        raise ConfigError(
            f"task.metrics: {name} is of answers of the kind {listed(metric.answers)}, not of {spec.answer}"
        )
    count = len(spec.labels or ())
    if metric.num_labels not in (None, count):
        raise ConfigError(f"task.metrics: {name} is for {metric.num_labels} labels, {spec.name} has {count}")


def _decoding(config: Any) -> Decoding:
    if config.do_sample and config.num_beams > 1:
        raise ConfigError(f"task.decoding.num_beams={config.num_beams}: beams are searched, not sampled (do_sample)")
    if config.min_new_tokens > config.max_new_tokens:
        raise ConfigError(
            f"task.decoding.min_new_tokens={config.min_new_tokens}: must be at most max_new_tokens="
            f"{config.max_new_tokens}"
        )
    return Decoding(**{**config.model_dump(), "stop": tuple(config.stop)})


def _tuple(values: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)


def tasks_from_config(node: Mapping[str, Any], *, measured: bool = True) -> Suite:
    """Check the configuration of a task or of a suite (which has ``members``), and load a suite's tasks.

    What lm-eval's tasks are is loaded where they are ``measured``.

    Raises:
        ConfigError: a key is unknown or missing, or a value is not usable.
        DataError: a suite names a task that does not exist.
    """
    complete = with_metrics if measured else _as_it_is
    if "members" not in node:
        task = complete(task_from_config(node))
        return Suite(task.name, (task,), node.get("data_dir"), node.get("limit"))
    suite = check(SuiteSchema, node, "task")
    if len(set(suite.members)) < len(suite.members):
        raise ConfigError(f"task.members={suite.members}: must not repeat a task")
    for name in suite.splits:
        if name not in suite.members:
            raise ConfigError(f"task.splits.{name}: not among task.members{did_you_mean(name, suite.members)}")
    tasks = [complete(load_task(name)) for name in suite.members]
    chosen = [replace(task, splits=tuple(suite.splits.get(task.name, task.splits))) for task in tasks]
    return Suite(suite.name, tuple(chosen), suite.data_dir, suite.limit)


def _as_it_is(spec: TaskSpec) -> TaskSpec:
    return spec


def task_names() -> list[str]:
    """List the ready tasks, suites aside."""
    return sorted(path.stem for path in (CONF_DIR / "task").glob("*.yaml") if "members" not in _read(path.stem))


def load_task(name: str) -> TaskSpec:
    """Load a ready task by its name.

    Raises:
        DataError: there is no such task.
    """
    if not (CONF_DIR / "task" / f"{name}.yaml").is_file() or "members" in (node := _read(name)):
        names = task_names()
        raise DataError(f"no task {name!r}{did_you_mean(name, names)} (there are {listed(names, 20)})")
    return task_from_config(node)


def task_of_expert(name: str, tasks: Sequence[TaskSpec]) -> TaskSpec | None:
    """Find the task that an expert was made for, where ``tasks`` are measured; None where that is not known.

    Args:
        name: what the expert's configuration calls its task; the expert's own name where it does not say.
        tasks: at least one.
    """
    for task in tasks:
        if task.name == name:
            return task
    if (CONF_DIR / "task" / f"{name}.yaml").is_file() and "members" not in (node := _read(name)):
        return task_from_config(node)
    return tasks[0] if len(tasks) == 1 else None


def _read(name: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    node: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "task" / f"{name}.yaml"))
    return {key: value for key, value in node.items() if key != "defaults"}
