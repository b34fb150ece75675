"""What may be compared: runs on the same examples under the same protocol, each such group with its ranking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from mergelab.config import EvalConfig
from mergelab.console.scores import Cell
from mergelab.errors import ConfigError, TrackingError, did_you_mean, listed
from mergelab.report.trials import Trial, described, point_of, read_trials
from mergelab.tasks.metric import get_metric
from mergelab.tracking import names

if TYPE_CHECKING:
    from mergelab.evaluation.results import Role
    from mergelab.report.selection import LoggedRun, RunSelection

_REPORT = names.report_metric("")
_P = names.p_value("")
_AVERAGES = tuple(name.removeprefix(_REPORT) for name in (names.REPORT_AVERAGE, names.REPORT_NORMALISED))
# Settings that say how scores are obtained: with others they are other scores.
_SETTINGS = ("dtype", "max_length")
_BASELINES = ("base", "expert")
_COMPARED = ("merge", "trial", "report", *_BASELINES)
_OF_TRIALS = "trial:"  # how the line of a note begins that only trials have
# What tells apart runs of one name; the rest of a configuration says where and how they were run.
_TELLING = ("method.", "seed", "models.", "save.", "eval.")


@dataclass(frozen=True, eq=False)
class Row:
    """A model that was measured on the reporting examples.

    Attributes:
        run: its run; of a rival in a sweep's report, that report's.
        label: what it is called; unique in its group.
        role: base, expert or merged.
        scores: by metric, in a suite ``task/metric`` and the averages.
        logged: all its numbers, by their names in the store.
        own_run: whether the run is this model's alone, so that its predictions and settings are this model's.
    """

    run: LoggedRun
    label: str
    role: Role
    scores: Mapping[str, Cell]
    logged: Mapping[str, float]
    own_run: bool = True

    @cached_property
    def models(self) -> frozenset[str]:
        """What was merged, or is this: each model with its revision."""
        return models_of(self.run)

    @property
    def is_soup(self) -> bool:
        """Whether it is a plain average of the experts, in a run of its own or measured beside a sweep's winner."""
        if not self.own_run:
            return self.label.startswith("soup of ")
        return self.run.kind == "merge" and self.run.record.tags.get(names.METHOD) == "soup"


@dataclass(frozen=True)
class ScoreColumn:
    """A metric of a group's rows; ``less`` says that less of it is better, None that this is not known."""

    name: str
    less: bool | None

    def best(self, rows: Iterable[Row]) -> float | None:
        """Return the best value; None without one, or where the direction is not known."""
        values = [row.scores[self.name].value for row in rows if self.name in row.scores]
        return (min if self.less else max)(values) if values and self.less is not None else None


@dataclass(frozen=True)
class Group:
    """Runs that may be compared.

    Attributes:
        title: the task, as runs name it.
        note: what was measured and how, a line each.
        source: where models and data come from.
        protocol: how examples are divided.
        tasks: the tasks' names.
        primary: the metric that ranks.
        columns: the metrics, the primary one first.
        ranked: the models with that metric, the best first.
        beside: bases and experts with other metrics alone, as a suite's experts are.
        unranked: merged models that have no rank, with the reason.
        trials: by the id of their sweep.
    """

    title: str
    note: str
    source: str
    protocol: str
    tasks: tuple[str, ...]
    primary: str
    columns: tuple[ScoreColumn, ...]
    ranked: tuple[Row, ...]
    beside: tuple[Row, ...] = ()
    unranked: tuple[tuple[Row, str], ...] = ()
    trials: Mapping[str, tuple[Trial, ...]] = field(default_factory=dict)

    @property
    def less(self) -> bool:
        """Whether less of the primary metric is better."""
        return bool(self.columns[0].less)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The models that a table shows."""
        return (*self.ranked, *self.beside)

    @property
    def merged(self) -> list[Row]:
        """The merged models, the best first."""
        return [row for row in self.ranked if row.role == "merged"]

    def experts_of(self, row: Row) -> list[Row]:
        """Return the experts that ``row`` was merged from, the best first."""
        return [other for other in self.rows if other.role == "expert" and other.models <= row.models]

    def missing_experts(self, row: Row) -> int:
        """Return how many of the experts that ``row`` was merged from have no run among these."""
        return expert_count(row.run) - len({expert.models for expert in self.experts_of(row)})

    def base_of(self, row: Row) -> Row | None:
        """Return the base that ``row`` was merged with."""
        return next((other for other in self.rows if other.role == "base" and other.models <= row.models), None)


@dataclass(frozen=True)
class RunComparison:
    """All groups of a report, and the runs without any result: each with what it ended with."""

    groups: tuple[Group, ...]
    without_result: tuple[tuple[LoggedRun, str], ...]


Rivals = Callable[["LoggedRun"], Sequence[Mapping[str, str]]]


def compare_runs(selection: RunSelection, metric: str | None, rivals: Rivals) -> RunComparison:
    """Divide runs into groups that may be compared, and rank each group.

    Args:
        selection: the runs.
        metric: what ranks; None: what the runs are judged by.
        rivals: returns the rows of the table that a sweep's report has logged.

    Raises:
        TrackingError: no run has the metric, or none has any result.
    """
    baselines = {run.record.id: run for run in (*selection.baselines, *_baselines(selection.runs))}
    members: dict[tuple[object, ...], list[LoggedRun]] = {}
    without: list[tuple[LoggedRun, str]] = []
    for run in (run for run in selection.runs if run.kind in _COMPARED):
        if names.NOTE not in run.record.tags or not (run.kind == "trial" or _scores(run.record.metrics)):
            without.append((run, _ending(run)))
        elif run.kind not in _BASELINES:
            members.setdefault(_key(run), []).append(run)
    groups = [_group(runs, list(baselines.values()), selection, metric, rivals) for runs in members.values()]
    shown = {row.run.record.id for group in groups for row in group.rows}
    alone: dict[tuple[object, ...], list[LoggedRun]] = {}
    for run in _baselines(selection.runs):  # asked for, with no merge to compare them with
        if run.record.id not in shown and _scores(run.record.metrics):
            alone.setdefault(_key(run), []).append(run)
    groups += [_group(runs, [], selection, metric, rivals) for runs in alone.values()]
    found = [group for group in groups if group.rows or group.unranked or group.trials]
    if metric is not None and found and not any(group.ranked for group in found):
        known = sorted({column.name for group in found for column in group.columns})
        raise TrackingError(
            f"--metric={metric}: no run has it{did_you_mean(metric, known)} (there are {listed(known)})"
        )
    return RunComparison(tuple(found), tuple(without))


def models_of(run: LoggedRun) -> frozenset[str]:
    """Return the models that a run names: each by the hash of its weights, else by its reference and revision."""
    tags = run.record.tags
    named = {tag.removeprefix(names.model("")) for tag in tags if tag.startswith(names.model(""))}
    hashes = {names.model_hash(name) for name in named}
    found = [name for name in named if names.model(name) not in hashes]
    return frozenset(tags.get(names.model_hash(name)) or tags[names.model(name)] for name in found)


def expert_count(run: LoggedRun) -> int:
    """Return how many different experts a run names."""
    tags = run.record.tags
    base = tags.get(names.model_hash("base")) or tags.get(names.model("base"))
    return len(models_of(run) - {base})


def _baselines(runs: Iterable[LoggedRun]) -> list[LoggedRun]:
    return [run for run in runs if run.kind in _BASELINES]


# -------------------------------------------------------------------------------------------------------------- groups


def _key(run: LoggedRun) -> tuple[object, ...]:
    """Return what runs must have in common to be compared."""
    tags = run.record.tags
    split = (tags.get(names.SEED), _setting(run, "holdout_fraction"))
    protocol = tags.get(names.PROTOCOL)
    return (
        tags.get(names.SOURCE),
        protocol,
        split if protocol == "holdout" else None,
        _note(run),
        run.datasets,
        *(_setting(run, key) for key in _SETTINGS),
    )


def _setting(run: LoggedRun, key: str) -> str:
    """Return a setting of the evaluation; those that nobody changed may not be recorded."""
    default = EvalConfig.model_fields[key].default
    return run.record.params.get(f"eval.{key}", "null" if default is None else str(default))


def _note(run: LoggedRun) -> str:
    lines = run.record.tags.get(names.NOTE, "").splitlines()
    return "\n".join(line for line in lines if not line.startswith(_OF_TRIALS))


def _fits(baseline: LoggedRun, run: LoggedRun) -> bool:
    """Return whether a base or an expert was measured as ``run`` was, on its data or, in a suite, on a part of them."""
    own, other = _key(baseline), _key(run)
    same = all(left == right for at, (left, right) in enumerate(zip(own, other, strict=True)) if at != _DATASETS)
    return same and bool(baseline.datasets) and set(baseline.datasets) <= set(run.datasets)


_DATASETS = 4  # the place in a key


def _group(
    runs: Sequence[LoggedRun],
    baselines: Sequence[LoggedRun],
    selection: RunSelection,
    metric: str | None,
    rivals: Rivals,
) -> Group:
    first, models = runs[0], {models_of(run) for run in runs}
    fitting = [run for run in baselines if _fits(run, first) and any(models_of(run) <= each for each in models)]
    rows = [_row(run, selection) for run in (*fitting, *(run for run in runs if run.kind != "trial"))]
    rows += [rival for run in runs if run.kind == "report" for rival in _rivals(run, rivals)]
    rows = _told_apart(_without_repeats(rows))
    primary = metric or _most_common(row.run.record.tags.get(names.PRIMARY, "") for row in rows)
    primary = primary.removeprefix(_REPORT)
    columns = _columns(rows, primary)
    sign = 1 if columns and columns[0].less else -1
    ranked = [row for row in rows if primary in row.scores]
    ranked.sort(key=lambda row: (sign * row.scores[primary].value, row.role == "merged", row.label))
    others = [row for row in rows if primary not in row.scores]
    others.sort(key=lambda row: (row.role == "expert", row.label))
    reason = f"has no {primary}"
    tags = first.record.tags
    tasks = tuple(tags.get(names.TASK, "").split(","))
    mini = tags.get(names.SOURCE) == "mini"
    trials: dict[str, tuple[Trial, ...]] = {}
    for parent in dict.fromkeys(run.parent or "" for run in runs if run.kind == "trial"):
        below = [run for run in runs if run.kind == "trial" and (run.parent or "") == parent]
        trials[parent] = read_trials(below, selection.parents.get(parent))
    return Group(
        names.labelled(", ".join(tasks), mini=mini),
        _note(first),
        tags.get(names.SOURCE, ""),
        tags.get(names.PROTOCOL, ""),
        tasks,
        primary,
        columns,
        tuple(ranked),
        tuple(row for row in others if row.role != "merged"),
        tuple((row, reason) for row in others if row.role == "merged"),
        trials,
    )


def _ending(run: LoggedRun) -> str:
    """Say in a line why a run has no result."""
    tags, status = run.record.tags, run.record.status.lower()
    if error := tags.get(names.ERROR):
        return f"{status}: {error}"
    return "still running" if status == "running" else status if status != "finished" else "finished without scores"


# ---------------------------------------------------------------------------------------------------------------- rows


def _row(run: LoggedRun, selection: RunSelection) -> Row:
    tags, params = run.record.tags, run.record.params
    role: Role = "base" if run.kind == "base" else "expert" if run.kind == "expert" else "merged"
    name = run.record.name
    if role != "merged":
        label = params.get("models.name", name)
    elif run.kind == "report":
        found = described(point_of(run, selection.parents.get(run.parent or "")))
        label = " ".join(filter(None, [tags.get(names.METHOD), found, f"(winner: trial {tags.get(names.TRIAL, '?')})"]))
    else:
        task = names.labelled(params.get("task.name", ""), mini=tags.get(names.SOURCE) == "mini")
        label = name.removeprefix(f"{task} ")
    return Row(run, label, role, _scores(run.record.metrics), run.record.metrics)


def _rivals(run: LoggedRun, table: Rivals) -> list[Row]:
    """Return the merges that a sweep's report has measured beside the winner: the soup and the method's defaults."""
    found = []
    merged = [each for each in table(run) if each.get(names.ROLE) == "merged"]
    for cells in merged[:-1]:  # the last one is the winner
        numbers = {key: float(value) for key, value in cells.items() if _is_number(value) and "/" in key}
        found.append(Row(run, cells.get("model", "?"), "merged", _scores(numbers), numbers, own_run=False))
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _scores(metrics: Mapping[str, float]) -> dict[str, Cell]:
    found = {}
    bounds = {bound(name) for name in metrics for bound in (names.low, names.high)}
    for name, value in metrics.items():
        if name.startswith(_REPORT) and not name.startswith(_P) and name not in bounds:
            low, high = metrics.get(names.low(name)), metrics.get(names.high(name))
            found[name.removeprefix(_REPORT)] = Cell(value, low, high)
    return found


def _without_repeats(rows: Sequence[Row]) -> list[Row]:
    """Leave out a base, an expert or a rival that was measured twice with the same result."""
    kept: dict[object, Row] = {}
    for row in rows:
        same = (row.label, row.role, row.models, tuple(sorted((k, c.value) for k, c in row.scores.items())))
        kept.setdefault(row.run.record.id if row.own_run and row.role == "merged" else same, row)
    return list(kept.values())


def _told_apart(rows: Sequence[Row]) -> list[Row]:
    """Add to labels that repeat what the runs differ in, else the beginning of the run's id."""
    counts = Counter(row.label for row in rows)
    found = []
    for row in rows:
        same = [other for other in rows if other.label == row.label and other.own_run]
        if counts[row.label] > 1:
            keys = [key for key in row.run.record.params if key.startswith(_TELLING)]
            params = row.run.record.params
            telling = [key for key in keys if len({other.run.record.params.get(key) for other in same}) > 1]
            told = " ".join(f"{key.removeprefix('method.')}={params[key]}" for key in telling[:3])
            row = replace(row, label=f"{row.label} {told or f'({row.run.record.id[:8]})'}")
        found.append(row)
    again = Counter(row.label for row in found)
    return [
        replace(row, label=f"{row.label} ({row.run.record.id[:8]})") if again[row.label] > 1 else row for row in found
    ]


def _columns(rows: Sequence[Row], primary: str) -> tuple[ScoreColumn, ...]:
    """List the metrics of the rows, the primary one first, in a suite then the averages."""
    known = dict.fromkeys(name for row in rows for name in row.scores)
    order = [primary, *(name for name in _AVERAGES if name in known), *sorted(known, key=_place)]
    return tuple(ScoreColumn(name, _less(name, rows)) for name in dict.fromkeys(order) if name in known)


def _place(name: str) -> tuple[str, str]:
    task, _, metric = name.rpartition("/")
    return task, metric


def _less(name: str, rows: Sequence[Row]) -> bool | None:
    """Return whether less of a metric is better: what its runs say, else what the metric declares."""
    said = {
        row.run.record.tags.get(names.DIRECTION)
        for row in rows
        if row.run.record.tags.get(names.PRIMARY) == f"{_REPORT}{name}"
    } - {None}
    if len(said) == 1:
        return said == {"minimize"}
    if name in _AVERAGES:
        return False
    metric = name.rpartition("/")[2]
    for known in (metric, metric.rpartition("_")[0]):  # of one split: accuracy_matched
        try:
            return get_metric(known).direction == "minimize"
        except ConfigError:
            continue
    return None


def _most_common(found: Iterable[str]) -> str:
    counts = Counter(name for name in found if name.startswith(_REPORT))
    return counts.most_common(1)[0][0] if counts else ""
