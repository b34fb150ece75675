"""Paired tests of merged models against their best expert and against their soup, corrected for their number (Holm)."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergelab.errors import MergelabError, listed
from mergelab.evaluation.bootstrap import paired_test
from mergelab.report.selection import artifact
from mergelab.tasks.loading import tasks_from_config
from mergelab.tracking import names

if TYPE_CHECKING:
    from mergelab.console.progress import Progress
    from mergelab.report.comparison import Group, Row
    from mergelab.report.selection import LoggedRun
    from mergelab.tasks.spec import TaskSpec
    from mergelab.tracking import Tracker

Array = np.ndarray[Any, Any]

EXPERT, SOUP = "best expert", "soup"
_P_VS_SOUP = names.p_value("soup")
_LEAST_SAMPLES = 1000  # as in an experiment's own test
# Resamples for each test of a family. The least p-value of a test is 1 / (1 + resamples): times the number of tests it
# must be below any level of interest, or no difference however large could be told from noise.
_SAMPLES_PER_TEST = 40


@dataclass(frozen=True)
class PairedTest:
    """A two-sided paired bootstrap test of a merged model against another one, on the same examples.

    Attributes:
        row: the merged model.
        other: what it is tested against: `EXPERT` or `SOUP`.
        label: the other model's.
        task: the task, whose primary metric is compared.
        difference: of the scores, merged minus other.
        p_value: None where the predictions of one of them are missing.
        adjusted: the p-value after Holm's correction for all tests of its family.
        family: how many tests these are.
    """

    row: Row
    other: str
    label: str
    task: str
    difference: float
    p_value: float | None
    adjusted: float | None = None
    family: int = 1


@dataclass(frozen=True)
class _Pair:
    """Two models to be tested on a task; ``logged`` is the p-value that the run has of it."""

    row: Row
    other: str
    rival: Row
    task: str
    metric: str
    logged: float | None

    @property
    def family(self) -> tuple[str, frozenset[str]]:
        """What a test is corrected with: the tests against one kind of model, of merges of the same models."""
        return self.other, self.row.models

    def tested(self, predictions: _Predictions, family: int) -> PairedTest:
        """Test them, as one of ``family`` tests."""
        difference = self.row.scores[self.metric].value - self.rival.scores[self.metric].value
        p_value, least = self.logged, max(_LEAST_SAMPLES, _SAMPLES_PER_TEST * family)
        if p_value is None or least > predictions.samples(self.row):
            computed = predictions.p_value(self.row, self.rival, self.task, least)
            p_value = p_value if computed is None else computed
        return PairedTest(self.row, self.other, self.rival.label, self.task, difference, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number, in the same order: Holm's step-down procedure.

    With p_(1) ≤ … ≤ p_(m) the adjusted value of the k-th is max over j ≤ k of min(1, (m − j + 1) · p_(j)); it holds the
    family-wise error whatever the tests' dependence (Holm 1979, Scand. J. Statistics 6).
    """
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, np.float64)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps)) if len(p_values) else steps
    return [float(value) for value in adjusted]


def paired_tests(
    group: Group, tracker: Tracker, configuration: Callable[[LoggedRun], Mapping[str, Any]], progress: Progress
) -> list[PairedTest]:
    """Test every merged model of a group on each of its tasks, and correct the p-values of each family.

    A test that the run has logged itself is taken from there, if it has resamples enough for its family; others are
    computed from logged predictions. A family is all tests against one kind of model from the same inputs.

    Args:
        group: the models.
        tracker: has their predictions.
        configuration: returns a run's composed configuration.
        progress: shows how far this is.
    """
    merged = group.merged
    found: list[PairedTest] = []
    with tempfile.TemporaryDirectory() as folder:
        predictions = _Predictions(tracker, Path(folder), _specs(group, configuration))
        pairs = [
            pair
            for row in merged
            for pair in (*_against_experts(group, row, predictions), *_against_soup(group, row, predictions))
        ]
        families = Counter(pair.family for pair in pairs)
        for index, pair in enumerate(pairs):
            progress("paired tests", index / len(pairs))
            found.append(pair.tested(predictions, families[pair.family]))
    return _corrected(found)


def untested(tests: Sequence[PairedTest]) -> str:
    """Say which merged models could not be tested; empty where all were."""
    labels = dict.fromkeys(test.row.label for test in tests if test.p_value is None)
    why = "predictions of one side are missing, or are of other examples"
    return f"not tested, since {why}: {listed(labels, 3)}" if labels else ""


def _against_experts(group: Group, row: Row, predictions: _Predictions) -> list[_Pair]:
    experts = group.experts_of(row)
    found = []
    for task in group.tasks:
        metric = predictions.metric(task)
        if metric is None or metric not in row.scores:
            continue
        able = [expert for expert in experts if metric in expert.scores]
        if not able:
            continue
        sign = -1 if predictions.less(task) else 1
        best = max(able, key=lambda expert: sign * expert.scores[metric].value)
        # A run has logged the test against the best of all its experts, of which one may have no run here.
        whole = len(group.tasks) == 1 and not group.missing_experts(row)
        logged = row.logged.get(names.P_VS_BEST_EXPERT) if whole else None
        found.append(_Pair(row, EXPERT, best, task, metric, logged))
    return found


def _against_soup(group: Group, row: Row, predictions: _Predictions) -> list[_Pair]:
    if row.is_soup or not row.own_run:
        return []
    soups = [other for other in group.merged if other.is_soup and other.models == row.models]
    # What a sweep measured beside its winner is what the winner was tested against; it has no predictions of its own.
    beside = _P_VS_SOUP in row.logged
    soups.sort(key=lambda other: (other.own_run == beside, other.run is not row.run))
    soup = next(iter(soups), None)
    if soup is None:
        return []
    found = []
    for task in group.tasks:
        metric = predictions.metric(task)
        if metric is None or metric not in row.scores or metric not in soup.scores:
            continue
        logged = row.logged.get(_P_VS_SOUP) if len(group.tasks) == 1 else None
        found.append(_Pair(row, SOUP, soup, task, metric, logged))
    return found


def _corrected(tests: Sequence[PairedTest]) -> list[PairedTest]:
    """Adjust the p-values of each family: the tests against one kind of model, of merges of the same models."""
    families: dict[tuple[str, frozenset[str]], list[int]] = {}
    for index, test in enumerate(tests):
        if test.p_value is not None:
            families.setdefault((test.other, test.row.models), []).append(index)
    found = list(tests)
    for members in families.values():
        adjusted = holm([tests[index].p_value or 0.0 for index in members])
        for index, value in zip(members, adjusted, strict=True):
            found[index] = replace(tests[index], adjusted=value, family=len(members))
    return found


# --------------------------------------------------------------------------------------------------------- predictions


def _specs(group: Group, configuration: Callable[[LoggedRun], Mapping[str, Any]]) -> dict[str, TaskSpec]:
    """Return the group's tasks as the first run that has a usable configuration was measured on."""
    for row in group.merged:
        config = configuration(row.run)
        if isinstance(config.get("task"), Mapping):
            try:
                return {spec.name: spec for spec in tasks_from_config(config["task"]).tasks}
            except MergelabError:
                continue
    return {}


class _Predictions:
    """Reads each model's predictions once, when they are asked for."""

    def __init__(self, tracker: Tracker, folder: Path, specs: Mapping[str, TaskSpec]) -> None:
        self.tracker, self.folder, self.specs = tracker, folder, specs
        self._read: dict[tuple[str, str], tuple[Array, Array, Array] | None] = {}

    def metric(self, task: str) -> str | None:
        """Name the score of a task's primary metric; None where the task is not known or has none."""
        spec = self.specs.get(task)
        if spec is None or not spec.primary:
            return None
        return spec.primary if len(self.specs) == 1 else f"{task}/{spec.primary}"

    def less(self, task: str) -> bool:
        """Return whether less of the task's primary metric is better."""
        return self.specs[task].direction == "minimize"

    def samples(self, row: Row) -> int:
        """Return the resamples of a run's own tests."""
        return max(int(row.run.record.params.get("eval.bootstrap", _LEAST_SAMPLES)), _LEAST_SAMPLES)

    def p_value(self, row: Row, other: Row, task: str, least: int) -> float | None:
        """Test two models on the reporting examples, with at least so many resamples.

        Returns:
            None where predictions are missing, or are of other examples.
        """
        own, rival = self._of(row, task), self._of(other, task)
        if own is None or rival is None or own[0].tolist() != rival[0].tolist():
            return None
        samples = max(self.samples(row), least)
        seed = int(row.run.record.tags.get(names.SEED, 0))
        return paired_test(self.specs[task], own[1], rival[1], own[2], samples=samples, seed=seed)

    def _of(self, row: Row, task: str) -> tuple[Array, Array, Array] | None:
        if not row.own_run:
            return None
        key = (row.run.record.id, task)
        if key not in self._read:
            path = f"{names.PREDICTIONS}/{names.predictions(task)}"
            file = artifact(self.tracker, row.run, path, self.folder)
            self._read[key] = None if file is None else read_predictions(file, self.specs[task])
        return self._read[key]


def read_predictions(file: Path, spec: TaskSpec) -> tuple[Array, Array, Array] | None:
    """Read the reporting examples of the predictions that a run has logged.

    Returns:
        Their numbers (n,), a model's outputs and the truth as `mergelab.evaluation.metrics.score` takes them; None
        where the file is damaged, has other columns than the task's kind needs, or no labels.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_table(file).to_pydict()
    except (pa.ArrowException, OSError):  # cut off, or no Parquet
        return None
    needed = {
        "generation": ("prediction", "references"),
        "language_modelling": ("negative_log_likelihood", "tokens", "words"),
        "lm_eval": ("values", "task"),
    }.get(spec.kind, ("label", *(f"output_{index}" for index in range(spec.outputs))))
    if not {"idx", "reports", *needed} <= columns.keys() or spec.kind == "prompts":
        return None
    reports = np.asarray(columns["reports"], bool)
    numbers = np.asarray(columns["idx"])[reports]
    if spec.kind == "generation":
        return numbers, _objects(columns["prediction"])[reports], _objects(map(tuple, columns["references"]))[reports]
    if spec.kind == "lm_eval":
        return numbers, _objects(columns["values"])[reports], np.asarray(columns["task"])[reports]
    if spec.kind == "language_modelling":
        outputs = np.stack([np.asarray(columns[name], np.float64) for name in needed], axis=1)[reports]
        return numbers, outputs, np.zeros(len(outputs), np.int64)
    outputs = np.stack([np.asarray(columns[name]) for name in needed[1:]], axis=1)[reports]
    truth = np.asarray(columns["label"])[reports]
    hidden = bool((np.isnan(truth) if spec.is_regression else truth < 0).any())
    return None if hidden else (numbers, outputs, truth)


def _objects(values: Any) -> Array:
    values = list(values)
    found = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):  # at once NumPy would make tuples of one length a second axis
        found[place] = value
    return found
