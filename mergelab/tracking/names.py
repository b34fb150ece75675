"""Names of what is recorded of runs: tags, metrics, parameters, artifacts, and the runs themselves.

No other file spells them. Users' dashboards and notebooks ask for these names, and mergelab finds earlier runs by them:
a changed name loses what was recorded before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

Kind = Literal["merge", "grid", "sweep", "trial", "report", "base", "expert", "analysis", "stages", "finetuning"]

# ---------------------------------------------------------------------------------------------------- tags: every run

KIND = "mergelab.kind"
METHOD = "mergelab.method"
TASK = "mergelab.task"  # the tasks' names, joined by commas
SOURCE = "mergelab.source"  # where models and data come from: hub, local or mini
SEED = "mergelab.seed"
PROTOCOL = "mergelab.protocol"
MODELS = "mergelab.models"
NOTE = "mergelab.note"  # what was measured, and how
PRIMARY = "mergelab.primary_metric"  # the metric of this run that it is judged by, such as report/accuracy
DIRECTION = "mergelab.direction"  # whether less of it is better: "minimize", or "maximize"
RUN_FOLDER = "mergelab.run_folder"  # where the job worked
MERGE_PATH = "mergelab.merge_path"  # how the merge was computed: compiled or plain
ERROR = "error"
CHOSEN_EXPERTS = "greedy_soup.chosen"
TRIED_SOUPS = "greedy_soup.tried"
_MODEL = "model."


def model(name: str) -> str:
    """Name the tag with a model's reference and revision."""
    return f"{_MODEL}{name}"


def stage(name: str) -> str:
    """Name the tag with the run that made a stage, or where it is."""
    return f"stage.{name}"


def model_hash(name: str) -> str:
    """Name the tag with the hash of a model's weights."""
    return f"{_MODEL}{name}.sha256"


def calibration(expert: str) -> str:
    """Name the tag that says which training examples a method used for an expert."""
    return f"calibration.{expert}"


def describes_result(tag: str) -> bool:
    """Return whether runs with different values of this tag have results of different things."""
    return tag.startswith(_MODEL) or tag in (METHOD, TASK, SEED, PROTOCOL, MODELS, NOTE)


# -------------------------------------------------------------------------------- tags: grids, sweeps and baselines

SWEEP_DIR = "mergelab.sweep_dir"  # of a grid: the folder that its jobs' folders lie in
BEST_RUN_ID = "mergelab.best_run_id"
BEST_RUN_NAME = "mergelab.best_run_name"
SWEEP = "mergelab.sweep"  # of a sweep: a key that finds its run again
STUDY = "mergelab.study"
TRIAL = "mergelab.trial"
PRUNED = "mergelab.pruned"  # of a trial that was stopped early: after how many examples, and its scores on these
N_TRIALS = "mergelab.n_trials"
BEST_TRIAL = "mergelab.best_trial"
BASELINE_KEY = "mergelab.baseline_key"  # the hash of all that a baseline's scores depend on
FINETUNING_KEY = "mergelab.finetuning_key"  # of a fine-tuning: the hash of all that the expert depends on


def best_parameter(key: str) -> str:
    """Name the tag with the value that the best trial has for a config key."""
    return f"best.{key}"


# ------------------------------------------------------------------------------------------------- tags: environment

PROCESS = "mergelab.process"  # the numbers below in JSON: whether the process that opened a run still lives
HOST = "mergelab.host"
PID = "mergelab.pid"
STARTED = "mergelab.process_start"
STARTED_TICKS = "mergelab.process_start_ticks"  # since the machine's start, where the system tells
PID_NAMESPACE = "mergelab.pid_namespace"
BOOT = "mergelab.boot"  # the machine's start, which no other machine has; containers on it have the same
ALIVE = "mergelab.alive"  # when the run's process last gave a sign of life, in seconds since the epoch
# MLflow's own.
PARENT = "mlflow.parentRunId"
USER = "mlflow.user"
COMMAND = "mlflow.source.name"
COMMAND_TYPE = "mlflow.source.type"
GIT_COMMIT = "mlflow.source.git.commit"
GIT_DIRTY = "mlflow.source.git.dirty"
EXPERIMENT_KIND = "mlflow.experimentKind"
DATASET_CONTEXT = "mlflow.data.context"
DESCRIPTION = "mlflow.note.content"  # of a run, in Markdown
MODEL_VERSIONS = "mlflow.modelVersions"  # of a logged model: the versions of registered models that it is
# Of an experiment: mergelab writes to it. No others are searched.
OURS = "mergelab"
_VIEW = "mlflow.sharedViewState."


def saved_view(key: str) -> str:
    """Name the tag of an experiment with a view of its runs, which the UI opens by the ``key``."""
    return f"{_VIEW}{key}"


# ----------------------------------------------------------------------------------------------------------- metrics

REPORT_AVERAGE = "report/average"
REPORT_NORMALISED = "report/normalised_average"
SELECT_AVERAGE = "select/average"
SELECT_NORMALISED = "select/normalised_average"
SELECT_EXAMPLES = "select/examples"
MERGE_SECONDS = "time/merge_s"
EVAL_SECONDS = "time/eval_s"
TRAINING_SECONDS = "time/train_s"
BEST_EPOCH = "best_epoch"
PEAK_MB = "memory/peak_mb"


def report_metric(metric: str, task: str | None = None) -> str:
    """Name a score on the reporting examples; of several tasks with the task's name."""
    return f"report/{_below(task)}{metric}"


def select_metric(metric: str, task: str | None = None) -> str:
    """Name a score on all selecting examples; of several tasks with the task's name."""
    return f"select/{_below(task)}{metric}"


def estimate_metric(metric: str, task: str | None = None) -> str:
    """Name a trial's score on all selecting examples, estimated where it was stopped early; `low` and `high` bound it.

    Of a complete trial it is the score itself, and so are the bounds.
    """
    return f"estimate/{_below(task)}{metric}"


def _below(task: str | None) -> str:
    return "" if task is None else f"{task}/"


def low(metric: str) -> str:
    """Name the lower bound of a score's 95 % interval."""
    return f"{metric}_low"


def high(metric: str) -> str:
    """Name the upper bound of a score's 95 % interval."""
    return f"{metric}_high"


def p_value(other: str) -> str:
    """Name the p-value of the paired test against another model."""
    return f"report/p_vs_{other}"


P_VS_BEST_EXPERT = p_value("best_expert")


def coefficient(expert: str) -> str:
    """Name the mean of the coefficients that a method has learnt for an expert."""
    return f"coefficient/{expert}"


def training_metric(name: str) -> str:
    """Name a point of a fine-tuning's learning curve, on what is trained on: ``train/loss``."""
    return f"train/{name}"


def held_out_metric(name: str) -> str:
    """Name a point of a fine-tuning's learning curve, on what is held out of the training split: ``heldout/loss``."""
    return f"heldout/{name}"


def best_of_jobs(metric: str) -> str:
    """Name, in a grid's run, the best job's value of a metric.

    The run has it under the metric's own name too, where lists of runs show it. Under this one it is not taken for one
    more measurement: it is the best of several.
    """
    return f"best/{metric}"


def best_of_trials(objective: str) -> str:
    """Name, in a sweep's run, the best trial's value of an objective."""
    return f"best/select_{objective}"


def analysis_metric(quantity: str, *of: str) -> str:
    """Name a figure of an analysis: ``analysis/norm/a``, ``analysis/cosine/a/b``."""
    return "/".join(["analysis", quantity, *of])


# ---------------------------------------------------------------- parameters in addition to the resolved configuration

JOBS, OVERRIDES = "jobs", "overrides"  # of a grid
SAMPLER, PRUNER, OBJECTIVE, SPACE = "sampler", "pruner", "objective", "space"  # of a sweep
ROLE = "role"  # of a baseline

# --------------------------------------------------------------------------------------------------------- artifacts

CONFIG = "config.yaml"
TABLE = "table.csv"
COEFFICIENTS = "coefficients.json"
PREDICTIONS = "predictions"
MODEL = "model"  # the merged model's folder, also in the job's own folder
ENVIRONMENT = "environment.json"  # process, machine, versions of libraries, hash of the configuration
CONFIG_HASH = "config_hash"  # in it
PLOTS = "plots"
PLOTS_PAGE = "plots.html"  # among `PLOTS`: all of them, interactive
TRIALS = "trials.csv"
STUDY_FILE = "study.db"
SUMMARY, SUMMARY_JSON = "summary.csv", "summary.json"
ANALYSIS = "analysis"  # the folder of an analysis
ANALYSIS_PAGE, ANALYSIS_PICTURE = "analysis.html", "analysis.png"
ANALYSIS_JSON, ANALYSIS_TABLE = "analysis.json", "analysis.parquet"


def generations(task: str) -> str:
    """Name the artifact with what the models wrote for a task without metrics."""
    return f"{task}.json"


def predictions(task: str) -> str:
    """Name the file, among the artifact `PREDICTIONS`, of a task's predictions."""
    return f"{task}.parquet"


# -------------------------------------------------------------------------------------------- experiments and runs


_LONG_NAME = 60  # characters


def labelled(task: str, *, mini: bool) -> str:
    """Name a task as runs and experiments do: results of the miniature never pass for the real task's."""
    return f"mini/{task}" if mini else task


def merge_run(task: str, described: str) -> str:
    """Name the run of a merge: ``rte ties density=0.3``."""
    return f"{task} {described}"


def grid_run(varied: Mapping[str, Sequence[str]], typed: Sequence[str], tasks: str | None) -> str:
    """Name a grid's run by what it varies, with the tasks where that has to be said.

    Where the values are too many for a name, their numbers are in it: ``grid: method (5), lambda (9)``.

    Args:
        varied: the values of each key that jobs differ in.
        typed: the overrides, where they differ in nothing.
        tasks: their names.
    """
    ending = f" ({tasks})" if tasks else ""
    name = " ".join(f"{_short(key)}={','.join(values)}" for key, values in varied.items()) or " ".join(typed)
    if len(name) > _LONG_NAME and varied:
        name = ", ".join(f"{_short(key)} ({len(values)})" for key, values in varied.items())
    return f"grid: {name if len(name) <= 2 * _LONG_NAME else name[: 2 * _LONG_NAME] + '…'}{ending}"


def _short(key: str) -> str:
    return key.removeprefix("method.")


def sweep_run(task: str, method: str, sampler: str) -> str:
    """Name a sweep's run."""
    return f"sweep: {task} {method} {sampler}"


def trial_run(task: str, method: str, number: int) -> str:
    """Name a trial's run."""
    return f"{task} {method} trial {number}"


def report_run(task: str, method: str, number: int) -> str:
    """Name the run of a sweep's report, which measures the trial ``number`` on the reporting examples."""
    return f"{task} {method} report: trial {number}"


def stages_run(task: str, stages: Sequence[str]) -> str:
    """Name the run that those of a merge's stages are shown under."""
    return f"{task} stages: {', '.join(stages)}"


def analysis_run(models: str) -> str:
    """Name the run of an analysis of models."""
    return f"analysis: {models}"


def finetuning_run(task: str, base: str, expert: str) -> str:
    """Name the run of a fine-tuning: ``finetune rte seed-0 of google-bert/bert-base-uncased``."""
    return f"finetune {task} {expert} of {base}"


def baseline_run(role: str, label: str, protocol: str) -> str:
    """Name the run of a base or an expert; other protocols measure on other examples."""
    return f"{role} {label} ({protocol})"
